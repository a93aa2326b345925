"""The estimator ``projection`` against NumPy in fp64, which makes S and takes its bases apart.

Bases of two implementations differ by signs, so what is compared are scores, Qhat Khat^T.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distr_compile.kernels.attention import reference
from distr_compile.kernels.counted import counted_rows
from distr_compile.kernels.random import start_columns

Array = np.ndarray[Any, np.dtype[np.float64]]


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def decaying(*shape: int, last: float = 1e-3, seed: int = 0) -> Tensor:
    """Rows whose columns, turned, shrink from 1 to ``last`` geometrically, as in trained models."""
    width = shape[-1]
    turn = torch.linalg.qr(draw(width, width, seed=seed + 7)).Q
    return (draw(*shape, seed=seed) * last ** (torch.arange(width) / width)) @ turn


def scores(Q: Tensor, K: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    """Qhat Khat^T in fp64 over all rows; the factors in the dtype of Q."""
    blocks = reference.estimate(Q, K, mask, estimator="projection", **options)
    rep = Q.shape[1] // K.shape[1]
    return torch.cat(
        [b.Qhat.double() @ b.Khat.double().repeat_interleave(rep, 1).mT for b in blocks], dim=2
    )


def relative(got: Tensor, wanted: Tensor) -> float:
    return ((got.double() - wanted).norm() / wanted.norm()).item()


def start_of(d: int, r: int, seed: int) -> Array:
    """The starting columns by Python's integers."""

    def fmix32(h: int) -> int:
        h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
        h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
        return h ^ h >> 16

    def entry(place: int) -> int:
        u = fmix32((place * 0x9E3779B9 + fmix32((seed + 1) % 2**32)) % 2**32)
        return sum(u >> shift & 15 for shift in range(0, 32, 4)) - 60

    return np.array([[entry(256 * c + j) for j in range(r)] for c in range(d)], dtype=np.float64)


def projected(Q: Array, K: Array, *, rank: int, rounds: int, seed: int = 0) -> Array:
    """S of one head and block with its columns projected onto the span that ``rounds`` rounds find.

    By S itself and an orthogonal basis of its columns, without Gram matrices or their inverses; the
    ridge is d more rows of Q.
    """
    norm = np.linalg.norm(Q.T @ Q)
    ridge = 2.0**-18 * 4.0 ** np.floor(np.log2(norm) / 2)
    longer = np.vstack([Q, np.sqrt(ridge) * np.eye(Q.shape[1])])
    S = longer @ K.T
    U, _ = np.linalg.qr(longer @ start_of(Q.shape[1], rank, seed))
    for _ in range(rounds):
        U, _ = np.linalg.qr(S @ (S.T @ U))
    return (U @ (U.T @ S))[: len(Q)]


def one_head(*, rank: int, rounds: int, N: int = 70, M: int = 90, d: int = 32) -> None:
    Q, K = decaying(1, 1, N, d), decaying(1, 1, M, d, seed=1)
    wanted = projected(Q[0, 0].numpy(), K[0, 0].numpy(), rank=rank, rounds=rounds, seed=5)
    got = scores(Q, K, rank=rank, rounds=rounds, grouping_block=N, seed=5)
    assert relative(got[0, 0], torch.from_numpy(wanted)) < 1e-9


@pytest.mark.parametrize(("d", "r", "seed"), [(32, 16, 0), (64, 17, 3), (20, 1, -1), (2, 300, 0)])
def test_start_columns(d: int, r: int, seed: int) -> None:
    got = start_columns(d, r, seed=seed)
    assert got.dtype == torch.float32
    assert (got.numpy() == start_of(d, r, seed)).all()


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("rank", [1, 7, 16, 17, 25, 31])
def test_scores_are_those_of_numpy(rank: int, rounds: int) -> None:
    one_head(rank=rank, rounds=rounds)


@pytest.mark.parametrize(("N", "M", "d"), [(5, 9, 32), (40, 10, 32), (200, 300, 72)])
def test_scores_of_other_sizes(N: int, M: int, d: int) -> None:
    one_head(rank=16, rounds=2, N=N, M=M, d=d)


@pytest.mark.parametrize("rounds", [1, 2])
def test_b_is_least_squares_given_the_span_of_a(rounds: int) -> None:
    Q, K = draw(1, 1, 100, 64), draw(1, 1, 80, 64, seed=1)
    (block,) = reference.estimate(
        Q, K, rank=24, rounds=rounds, estimator="projection", grouping_block=100
    )
    Qhat, Khat = block.Qhat[0, 0].numpy(), block.Khat[0, 0].numpy()
    S = (Q @ K.mT)[0, 0].numpy()
    best, *_ = np.linalg.lstsq(Qhat, S, rcond=None)
    assert np.linalg.norm(Khat.T - best) < 1e-4 * np.linalg.norm(best)
    # To second order in that difference the residual is the least there is.
    residual, least = np.linalg.norm(Qhat @ Khat.T - S), np.linalg.norm(Qhat @ best - S)
    assert least <= residual < least * (1 + 1e-8)


def limit(Q: Tensor, K: Tensor, rank: int) -> float:
    """The least relative error of any factors of this rank (Eckart, Young)."""
    sizes = torch.linalg.svdvals(Q @ K.mT)
    return (sizes[..., rank:].norm() / sizes.norm()).item()


@pytest.mark.parametrize(
    ("make", "factors"), [(draw, (1.3, 1.15)), (decaying, (1.25, 1.1))], ids=["random", "decaying"]
)
@pytest.mark.parametrize(("d", "rank"), [(64, 32), (64, 16), (64, 20), (128, 64)])
@pytest.mark.parametrize("seed", [0, 1])
def test_error_is_near_the_svd_limit(
    make: Any, factors: tuple[float, float], d: int, rank: int, seed: int
) -> None:
    """At most 1.3 times the limit after a round, 1.15 after two; 1.1 where the spectrum falls."""
    Q, K = make(1, 1, 256, d), make(1, 1, 300, d, seed=1)
    least = limit(Q, K, rank)
    errors = [
        relative(scores(Q, K, rank=rank, rounds=n, grouping_block=256, seed=seed), Q @ K.mT)
        for n in (1, 2)
    ]
    for error, factor in zip(errors, factors, strict=True):
        assert least <= error * (1 + 1e-12)
        assert error < factor * least
    assert errors[1] < errors[0]


LOW_RANK = {
    "K": lambda: (draw(1, 1, 96, 64), draw(1, 1, 130, 20) @ draw(20, 64, seed=1)),
    "K of rank 1": lambda: (draw(1, 1, 96, 64), draw(1, 1, 130, 1) * draw(64, seed=1)),
    "Q": lambda: (draw(1, 1, 96, 20) @ draw(20, 64, seed=1), draw(1, 1, 130, 64)),
    "constant rows": lambda: (
        draw(64).expand(1, 1, 96, 64),
        draw(64, seed=1).expand(1, 1, 130, 64),
    ),
    "few rows": lambda: (draw(1, 1, 12, 64), draw(1, 1, 130, 64)),
    "few keys": lambda: (draw(1, 1, 96, 64), draw(1, 1, 19, 64)),
    "disjoint zero columns": lambda: (
        draw(1, 1, 96, 64) * (torch.arange(64) < 40),
        draw(1, 1, 130, 64, seed=1) * (torch.arange(64) >= 25),
    ),
}


@pytest.mark.parametrize("name", LOW_RANK)
@pytest.mark.parametrize("rounds", [1, 2])
def test_exact_where_the_scores_have_the_rank(name: str, rounds: int) -> None:
    """Up to the ridge where only Q has it, and to the condition of S where fp32 has to find it."""
    Q, K = LOW_RANK[name]()
    tolerances = {
        torch.float64: 1e-12 if name.startswith(("K", "constant", "few keys")) else 1e-4,
        torch.float32: 2e-3,
        torch.float16: 2e-3,
        torch.bfloat16: 8e-3,
    }
    for dtype, tolerance in tolerances.items():
        q, k = Q.to(dtype), K.to(dtype)
        got = scores(q, k, rank=20, rounds=rounds, grouping_block=96)
        assert relative(got, q.double() @ k.double().mT) < tolerance, dtype


def test_full_rank_is_exact() -> None:
    Q, K = draw(1, 2, 50, 32), draw(1, 1, 40, 32, seed=1)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        got = scores(Q.to(dtype), K.to(dtype), rank=32)
        assert relative(got, Q @ K.mT) < tolerance


# --- what the bases depend on --------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [1, 2])
def test_heads_and_blocks(rounds: int) -> None:
    """Query heads of a key head are more rows of it; blocks and batch elements are apart."""
    Q, K = decaying(2, 6, 70, 32), decaying(1, 3, 50, 32, seed=1)
    options = {"rank": 12, "rounds": rounds, "seed": 2}
    got = scores(Q, K, grouping_block=30, **options)
    for b, g, start in np.ndindex(2, 3, 3):
        rows = slice(30 * start, 30 * start + 30)
        stacked = Q[b, 2 * g : 2 * g + 2, rows].flatten(0, 1)
        wanted = projected(stacked.numpy(), K[0, g].numpy(), **options)
        part = got[b, 2 * g : 2 * g + 2, rows].flatten(0, 1)
        assert relative(part, torch.from_numpy(wanted)) < 1e-9


def test_auto_block() -> None:
    Q = draw(1, 1, 300, 32)
    blocks = reference.estimate(Q, Q, rank=16, estimator="projection")
    assert [(b.start, b.stop) for b in blocks] == [(0, 128), (128, 256), (256, 300)]


def test_seed_names_the_start() -> None:
    Q, K = draw(1, 1, 128, 64), draw(1, 1, 128, 64, seed=1)
    first, again, other = (scores(Q, K, rank=16, seed=s) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert relative(first, other) > 0.01


@pytest.mark.parametrize("offset", [-200, -25, 0, 13, 500])
def test_causality_cuts_the_keys_at_the_end_of_the_block(offset: int) -> None:
    Q, K = decaying(1, 1, 100, 32), decaying(1, 1, 90, 32, seed=1)
    options: dict[str, Any] = {"rank": 16, "is_causal": True, "causal_offset": offset}
    got = scores(Q, K, grouping_block=40, **options)
    for start in (0, 40, 80):
        stop = min(start + 40, 100)
        seen = max(0, min(90, stop + offset))
        if seen:
            wanted = scores(Q[:, :, start:stop], K[:, :, :seen], rank=16, grouping_block=40)
            torch.testing.assert_close(got[:, :, start:stop, :seen], wanted)
        changed = K.clone()
        changed[:, :, seen:] = torch.nan
        moved = scores(Q, changed, grouping_block=40, **options)
        assert torch.equal(moved[:, :, start:stop, :seen], got[:, :, start:stop, :seen])
    assert got.isfinite().all()


@pytest.mark.parametrize("garbage", [0.0, 1e6, torch.inf, torch.nan])
@pytest.mark.parametrize("kind", ["bool", "-inf", "lowest", "half the lowest"])
def test_padding_has_no_say(garbage: float, kind: str) -> None:
    """Rows of padding, whatever is in them: as if the text ended there."""
    lengths, length = (61, 100, 17), 100
    Q, K = decaying(3, 4, length, 32), decaying(3, 2, length, 32, seed=1)
    sees = torch.arange(length) < torch.tensor(lengths)[:, None]
    for t in (Q, K):
        t.masked_fill_(~sees[:, None, :, None], garbage)
    lowest = torch.finfo(torch.float32).min
    value = {"bool": 0.0, "-inf": -torch.inf, "lowest": lowest, "half the lowest": lowest / 2}[kind]
    mask = sees[:, None, None]
    if kind != "bool":
        mask = torch.zeros(mask.shape).masked_fill(~mask, value)
    got = scores(Q, K, mask, rank=16, grouping_block=length)
    for b, n in enumerate(lengths):
        alone = scores(Q[b : b + 1, :, :n], K[b : b + 1, :, :n], rank=16, grouping_block=length)
        torch.testing.assert_close(got[b : b + 1, :, :n, :n], alone, rtol=1e-9, atol=1e-9)


def test_counted_rows() -> None:
    """By the definition: with every entry of the expanded mask looked at."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((5,), (7, 5), (2, 1, 1, 5), (1, 4, 7, 1), (2, 4, 7, 5), (1, 1, 1, 1), (4, 1, 5)):
        mask = torch.rand(shape, generator=generator) < 0.3
        queries, keys = counted_rows(mask, 7, 5, key_heads=2, rep=2)
        assert queries is not None
        assert keys is not None
        whole = mask.expand(2, 4, 7, 5).unflatten(1, (2, 2))
        assert torch.equal(queries.expand(2, 2, 2, 7), whole.any(-1))
        assert torch.equal(keys.expand(2, 2, 5), whole.any(-2).any(2))
        bias = torch.zeros(shape).masked_fill(~mask, -torch.inf)
        torch.testing.assert_close(counted_rows(bias, 7, 5, key_heads=2, rep=2), (queries, keys))
    assert counted_rows(None, 7, 5, key_heads=2, rep=2) == (None, None)


def test_query_i_is_left_out_with_key_i_in_self_attention() -> None:
    mask = torch.tensor([True, True, False, True])
    for num_queries, wanted in ((4, [True, True, False, True]), (3, [True] * 3)):
        queries, _ = counted_rows(mask, num_queries, 4, key_heads=1, rep=1)
        assert queries is not None
        assert queries.flatten().tolist() == wanted


# --- hard numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [
        (torch.float16, [(1e4, 1e4), (1e4, 1e-7), (1e-4, 1e-4), (1, 1)]),
        (torch.bfloat16, [(1e30, 1e-30), (1e-30, 1e30), (1e18, 1e18), (1e-38, 1), (1e30, 1e30)]),
        (torch.float32, [(1e-38, 1e30), (1e18, 1e18), (1e-42, 1), (3e37, 3e37)]),
    ],
    ids=str,
)
def test_scale_of_the_inputs_does_not_matter(
    dtype: torch.dtype, sizes: list[tuple[float, float]]
) -> None:
    """Within 1.25 times the SVD limit, and 1.5 for subnormals of fp16, which have few bits."""
    for q_size, k_size in sizes:
        Q = (draw(1, 1, 256, 64) * q_size).to(dtype)
        K = (draw(1, 1, 256, 64, seed=1) * k_size).to(dtype)
        wide = Q.double(), K.double()
        blocks = reference.estimate(Q, K, rank=32, estimator="projection", grouping_block=256)
        assert blocks[0].Qhat.dtype == blocks[0].Khat.dtype == dtype
        assert blocks[0].Qhat.isfinite().all()
        assert blocks[0].Khat.isfinite().all()
        factor = 1.5 if k_size == 1e-7 else 1.25
        got = scores(Q, K, rank=32, grouping_block=256)
        assert relative(got, wide[0] @ wide[1].mT) < factor * limit(*wide, 32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_the_factors_costs_what_rounding_the_scores_would(dtype: torch.dtype) -> None:
    """Qhat and Khat are balanced, and orthonormal columns make neither larger than S needs."""
    Q = (decaying(1, 2, 256, 64) * 300).to(dtype)
    K = (decaying(1, 2, 256, 64, seed=1) / 300).to(dtype)
    options: dict[str, Any] = {"rank": 32, "grouping_block": 256}
    wide = scores(Q.double(), K.double(), **options)
    assert relative(scores(Q, K, **options), wide) < 2 * torch.finfo(dtype).eps
    (block,) = reference.estimate(Q, K, estimator="projection", **options)
    sizes = block.Qhat.double().square().mean(), block.Khat.double().square().mean()
    assert 1 / 16 < sizes[0] / sizes[1] < 16


def constant(value: float) -> Tensor:
    return torch.full((1, 2, 96, 64), value, dtype=torch.float64)


def one_hot() -> Tensor:
    return torch.eye(64, dtype=torch.float64).repeat(2, 1)[:96].expand(1, 2, 96, 64)


def outliers(size: float) -> Tensor:
    t = draw(1, 2, 96, 64)
    t[..., 3] *= size
    return t


HARD = {
    "zero": lambda: (constant(0), constant(0)),
    "zero Q": lambda: (constant(0), draw(1, 2, 96, 64)),
    "zero K": lambda: (draw(1, 2, 96, 64), constant(0)),
    "constant": lambda: (constant(1), constant(-2)),
    "large constant": lambda: (constant(3e4), constant(1e4)),
    "tiny": lambda: (draw(1, 2, 96, 64) * 6e-8, draw(1, 2, 96, 64, seed=1) * 6e-8),
    "rank 1": lambda: (draw(1, 2, 96, 1) * draw(64), draw(1, 2, 96, 1, seed=1) * draw(64)),
    "one-hot": lambda: (one_hot(), draw(1, 2, 96, 64)),
    "outlier channel": lambda: (outliers(1e3), outliers(1e3)),
    "opposed": lambda: (decaying(1, 2, 96, 64, last=1e-10), draw(1, 2, 96, 64)),
    "one large row": lambda: (
        torch.cat([constant(1e4)[:, :, :1], draw(1, 2, 95, 64)], dim=2),
        draw(1, 2, 96, 64, seed=1),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("rounds", [1, 2])
def test_hard_inputs_stay_finite_and_no_worse_than_nothing(
    name: str, dtype: torch.dtype, rounds: int
) -> None:
    """Scores of 0 have a relative error of 1: whatever the inputs, the estimate is not worse."""
    Q, K = (t.to(dtype) for t in HARD[name]())
    for block in reference.estimate(
        Q, K, rank=32, rounds=rounds, estimator="projection", grouping_block=40
    ):
        assert block.Qhat.isfinite().all()
        assert block.Khat.isfinite().all()
    got = scores(Q, K, rank=32, rounds=rounds, grouping_block=40)
    exact = Q.double() @ K.double().mT
    assert (got - exact).norm() <= exact.norm()


def test_spoilt_rows_spoil_themselves_only() -> None:
    Q, K = draw(1, 2, 60, 32), draw(1, 2, 50, 32, seed=1)
    Q[0, 0, 7, 3], Q[0, 1, 9] = torch.inf, torch.nan
    K[0, 0, 11, 0] = torch.nan
    got = scores(Q, K, rank=16)
    whole = torch.ones_like(got, dtype=torch.bool)
    whole[0, 0, 7] = whole[0, 1, 9] = whole[0, 0, :, 11] = False
    assert got[whole].isfinite().all()
    exact = (Q @ K.mT).where(whole, 0)
    assert relative(got.where(whole, 0), exact) < 0.8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 33}, "rank: got 33 for head_dim 32; must be at most head_dim"),
        ({"rank": 0}, "rank: got 0 for head_dim 32"),
        ({"rank": 16, "rounds": 3}, "rounds: got 3; with projection must be 1 or 2"),
    ],
)
def test_errors_say_what_is_accepted(options: dict[str, int], message: str) -> None:
    Q = draw(1, 1, 20, 32)
    with pytest.raises(ValueError, match=message):
        reference.estimate(Q, Q, estimator="projection", **options)


def test_two_rounds_are_not_for_lsh() -> None:
    Q = draw(1, 1, 20, 32)
    with pytest.raises(ValueError, match="rounds: got 2; with lsh-mean must be 1"):
        reference.estimate(Q, Q, rank=16, rounds=2)


def test_attention_hands_on_mask_causality_and_rounds() -> None:
    Q, K, V = decaying(1, 2, 80, 32), decaying(1, 2, 80, 32, seed=1), draw(1, 2, 80, 24)
    sees = torch.arange(80) < 50
    bases: dict[str, Any] = {
        "rank": 16,
        "rounds": 2,
        "seed": 1,
        "grouping_block": 30,
        "is_causal": True,
        "causal_offset": -3,
    }
    S = scores(Q, K, sees, **bases) * 0.2
    hidden = ~(sees & torch.ones(80, 80, dtype=torch.bool).tril(-3))
    wanted = S.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0) @ V
    got = reference.attention(Q, K, V, sees, scale=0.2, estimator="projection", **bases)
    torch.testing.assert_close(got, wanted)
