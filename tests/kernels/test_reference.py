"""The definition, against numpy loops written from the paper, one head and one block at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from distr_compile.estimators import auto_grouping_block
from distr_compile.kernels.attention import reference
from distr_compile.kernels.lsh.reference import gray_position, group_columns, order_of_projected
from distr_compile.kernels.random import projections


def naive_order(rows: np.ndarray, P: np.ndarray, signed: bool) -> tuple[list[int], np.ndarray]:
    """Columns of ``rows`` (l x d) in hash order, bit by bit, the table of Gray codes in full.

    And their signs: with ``signed`` all columns are turned to a positive sum before they are hashed
    by that sum and 15 projections.
    """
    table = [position ^ (position >> 1) for position in range(2**16)]
    place = {code: position for position, code in enumerate(table)}
    sign = np.where(rows.sum(0) > 0, 1, -1) if signed else np.ones(rows.shape[1])
    keys = []
    for column in range(rows.shape[1]):
        numbers = [P[:, i] @ (sign[column] * rows[:, column]) for i in range(16)]
        if signed:
            numbers[0] = sign[column] * rows[:, column].sum()
        bits = ["1" if number > 0 else "0" for number in numbers]
        keys.append((place[int("".join(bits), 2)], column))
    return [column for _, column in sorted(keys)], sign


def naive_counts(mask: np.ndarray | None, H: int, Hk: int, N: int, M: int) -> np.ndarray:
    """Which rows (H, N) are no padding, entry by entry of the mask (H, N, M)."""
    if mask is None:
        return np.ones((H, N), bool)
    sees = mask if mask.dtype == bool else mask > -1e300
    counts = np.zeros((H, N), bool)
    for h in range(H):
        heads = [other for other in range(H) if other * Hk // H == h * Hk // H]
        for i in range(N):
            hidden = N == M and not any(sees[other, :, i].any() for other in heads)
            counts[h, i] = sees[h, i].any() and not hidden
    return counts


def naive_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    mask: np.ndarray | None,
    *,
    scale: float,
    is_causal: bool,
    causal_offset: int,
    rank: int,
    estimator: str,
    block: int,
    seed: int,
    softcap: float = 0.0,
    sinks: np.ndarray | None = None,
) -> np.ndarray:
    """Loops over batch, key heads, blocks and rows in fp64; the mask has its full shape."""
    B, H, N, d = q.shape
    Hk, M = k.shape[1:3]
    rep, G = H // Hk, d // rank
    P = projections(0, N * rep, seed=seed).double().numpy()
    out = np.zeros((B, H, N, v.shape[3]))
    for b in range(B):
        kb, vb = min(b, k.shape[0] - 1), min(b, v.shape[0] - 1)
        counts = naive_counts(None if mask is None else mask[b], H, Hk, N, M)
        real = [i for i in range(N) if counts[:, i].any()] or [0, N - 1]
        for g in range(Hk):
            for start in range(real[0], real[-1] + 1, block):
                stop = min(start + block, real[-1] + 1)
                rows = range(0 if start == real[0] else start, N if stop == real[-1] + 1 else stop)
                stacked = np.stack(
                    [
                        q[b, g * rep + h, i] * counts[g * rep + h, i]
                        for i in range(start, stop)
                        for h in range(rep)
                    ]
                )
                order, sign = naive_order(stacked, P[: len(stacked)], estimator == "lsh-signed")
                groups = [order[j * G : (j + 1) * G] for j in range(rank)]
                Khat = np.stack([(k[kb, g] * sign)[:, group].sum(1) for group in groups], 1)
                for h in range(g * rep, (g + 1) * rep):
                    for i in rows:
                        estimate = [
                            q[b, h, i, group[0]]
                            if estimator == "lsh-sample"
                            else (q[b, h, i] * sign)[group].mean()
                            for group in groups
                        ]
                        scores = scale * (Khat @ np.array(estimate))
                        if softcap:
                            scores = softcap * np.tanh(scores / softcap)
                        if mask is not None and mask.dtype == bool:
                            scores[~mask[b, h, i]] = -np.inf
                        elif mask is not None:
                            scores += mask[b, h, i]
                        if is_causal:
                            scores[np.arange(M) > i + causal_offset] = -np.inf
                        if np.isneginf(scores).all():
                            continue
                        extra = [] if sinks is None else [sinks[h]]
                        top = max([scores.max(), *extra])
                        weights = np.exp(scores - top)
                        total = weights.sum() + sum(np.exp(sink - top) for sink in extra)
                        out[b, h, i] = weights / total @ v[vb, g]
    return out


CASES = [
    # B, H, Hk, N, M, d, dv, rank, block, mask, causal offset
    (1, 2, 2, 20, 20, 32, 32, 16, 0, None, None),
    (2, 2, 1, 17, 23, 32, 8, 8, 7, "bool", None),
    (2, 4, 2, 19, 30, 40, 24, 20, 8, "float", 3),
    (1, 3, 3, 33, 12, 24, 24, 8, 16, "rows", None),
    (1, 2, 2, 25, 20, 16, 16, 4, 10, None, -4),
    (1, 1, 1, 1, 5, 32, 32, 16, 0, None, 0),
]


@pytest.mark.parametrize("estimator", ["lsh-sample", "lsh-mean", "lsh-signed"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_is_the_papers(case: tuple, estimator: str) -> None:
    B, H, Hk, N, M, d, dv, rank, block, mask_kind, offset = case
    generator = torch.Generator().manual_seed(hash(case[:9]) % 1000)
    shapes = [(B, H, N, d), (1, Hk, M, d), (B, Hk, M, dv)]
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    mask = None
    if mask_kind == "bool":
        mask = torch.rand(B, 1, N, M, generator=generator) > 0.4
    elif mask_kind == "float":
        mask = torch.randn(H, 1, M, generator=generator, dtype=torch.float64)
    elif mask_kind == "rows":
        mask = torch.zeros(N, M, dtype=torch.float64)
        mask[3] = mask[N - 1] = -torch.inf
    options = {"scale": 0.3, "is_causal": offset is not None, "causal_offset": offset or 0}
    got = reference.attention(
        q, k, v, mask, rank=rank, estimator=estimator, grouping_block=block, seed=5, **options
    )
    full = None if mask is None else mask.expand(B, H, N, M).numpy()
    wanted = naive_attention(
        q.numpy(),
        k.numpy(),
        v.numpy(),
        full,
        rank=rank,
        estimator=estimator,
        block=block or N,
        seed=5,
        **options,
    )
    np.testing.assert_allclose(got.numpy(), wanted, rtol=0, atol=1e-12)
    if mask_kind == "rows":
        assert (got[:, :, 3] == 0).all()
    if offset == -4:
        assert (got[:, :, :4] == 0).all()
        assert (got[:, :, 4:] != 0).all()


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("mask_kind", [None, "bool", "rows"])
@pytest.mark.parametrize("rank", [16, 32])
def test_softcap_and_sinks(
    softcap: float, has_sinks: bool, mask_kind: str | None, rank: int
) -> None:
    """Cap, then mask, then softmax with one more score per head that has no value."""
    B, H, Hk, N, M, d = 2, 4, 2, 21, 18, 32
    generator = torch.Generator().manual_seed(rank)
    shapes = [(B, H, N, d), (B, Hk, M, d), (B, Hk, M, 8)]
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    sinks = torch.tensor([2.5, -40.0, 0.0, 60.0], dtype=torch.float64) if has_sinks else None
    mask = None
    if mask_kind == "bool":
        mask = torch.rand(B, H, N, M, generator=generator) > 0.4
    elif mask_kind == "rows":
        mask = torch.randn(B, H, N, M, generator=generator, dtype=torch.float64)
        mask[:, :, [0, 7]] = -torch.inf
    options = {"scale": 0.7, "is_causal": True, "causal_offset": 2, "rank": rank, "seed": 3}
    got = reference.attention(
        q, k, v, mask, grouping_block=8, softcap=softcap, sinks=sinks, **options
    )
    wanted = naive_attention(
        q.numpy(),
        k.numpy(),
        v.numpy(),
        None if mask is None else mask.numpy(),
        estimator="lsh-mean",
        block=8,
        softcap=softcap,
        sinks=None if sinks is None else sinks.numpy(),
        **options,
    )
    np.testing.assert_allclose(got.numpy(), wanted, rtol=0, atol=1e-12)
    if mask_kind == "rows":
        assert (got[:, :, [0, 7]] == 0).all()
    if has_sinks:
        assert got[:, 3].abs().max() < 1e-6, "a large sink takes the whole softmax"


def test_a_sink_of_minus_infinity_is_none() -> None:
    q, k, v = (torch.randn(1, 2, 20, 32, dtype=torch.float64) for _ in range(3))
    sees = torch.rand(20, 20) > 0.5
    sees[4] = False
    none = torch.full((2,), -torch.inf, dtype=torch.float64)
    got = reference.attention(q, k, v, sees, scale=0.2, rank=16, sinks=none)
    wanted = reference.attention(q, k, v, sees, scale=0.2, rank=16)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-15)


def test_full_rank_is_exact_attention() -> None:
    q, k, v = (torch.randn(2, 3, 20, 24, dtype=torch.float64) for _ in range(3))
    got = reference.attention(q, k, v, scale=0.2, rank=24)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.2)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("estimator", ["lsh-sample", "lsh-mean", "lsh-signed"])
def test_equal_columns_lose_nothing(estimator: str) -> None:
    """Eq. 1: where the columns of a group are equal, the approximation is exact.

    They are in a group unless other columns have the same hash, which two seeds in a hundred show.
    """
    torch.manual_seed(0)
    half = torch.randn(1, 2, 50, 16, dtype=torch.float64)
    q = half.repeat_interleave(2, dim=-1)[..., torch.randperm(32)]
    k, v = (torch.randn(1, 2, 40, 32, dtype=torch.float64) for _ in range(2))
    got = reference.attention(q, k, v, scale=0.2, rank=16, estimator=estimator)
    exact = reference.attention(q, k, v, scale=0.2, rank=32)
    torch.testing.assert_close(got, exact, rtol=0, atol=1e-12)


def test_opposite_columns_lose_nothing_once_they_are_turned() -> None:
    torch.manual_seed(0)
    half = torch.randn(1, 2, 50, 16, dtype=torch.float64)
    q = torch.cat([half, -half], dim=-1)[..., torch.randperm(32)]
    k, v = (torch.randn(1, 2, 40, 32, dtype=torch.float64) for _ in range(2))
    exact = reference.attention(q, k, v, scale=0.2, rank=32)
    signed, mean = (
        reference.attention(q, k, v, scale=0.2, rank=16, estimator=estimator)
        for estimator in ("lsh-signed", "lsh-mean")
    )
    torch.testing.assert_close(signed, exact, rtol=0, atol=1e-12)
    assert (mean - exact).norm() > 0.1 * exact.norm()


def test_order_follows_the_gray_sequence() -> None:
    """Four columns with hand-made signs: codes 0, 1, 3, 2 stand in this order in the sequence."""
    signs = {0: (0, 0), 1: (0, 1), 2: (1, 0), 3: (1, 1)}
    columns = [2, 3, 0, 1, 3]
    projected = torch.full((16, 5), -1.0)
    for place, code in enumerate(columns):
        for bit, one in zip((14, 15), signs[code], strict=True):
            projected[bit, place] = 1.0 if one else -1.0
    order = order_of_projected(projected)
    assert [columns[i] for i in order] == [0, 1, 3, 3, 2]
    assert order.tolist() == [2, 3, 1, 4, 0], "ties keep the order of the columns"


def test_gray_position_inverts_the_table() -> None:
    position = torch.arange(2**16)
    assert torch.equal(gray_position(position ^ (position >> 1)), position)


def test_zero_is_not_positive() -> None:
    order = order_of_projected(torch.zeros(16, 4))
    assert order.tolist() == [0, 1, 2, 3]


def naive_projection(row: int, p: int, seed: int) -> int:
    """One entry in Python's own integers."""

    def fmix32(h: int) -> int:
        h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
        h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
        return h ^ h >> 16

    u = fmix32(((row * 16 + p) * 0x9E3779B9 + fmix32((seed + 1) % 2**32)) % 2**32)
    return sum(int(digit, 16) for digit in f"{u:08x}") - 60


@pytest.mark.parametrize("seed", [0, 1, 2**31 + 5, 2**32 - 1, -3])
def test_projections_are_the_hash_of_their_place(seed: int) -> None:
    for start, stop in ((0, 3), (1000, 1002), (2**28 - 1, 2**28 + 1), (2**31, 2**31 + 1)):
        got = projections(start, stop, seed=seed)
        wanted = [[naive_projection(i, p, seed) for p in range(16)] for i in range(start, stop)]
        assert got.dtype == torch.float32
        assert got.tolist() == wanted


def test_projections_extend_and_are_exact_in_every_dtype() -> None:
    long = projections(0, 3000, seed=1)
    assert long.shape == (3000, 16)
    for start, stop in ((0, 0), (0, 1), (0, 7), (0, 1024), (5, 1030), (2047, 3000)):
        assert torch.equal(projections(start, stop, seed=1), long[start:stop])
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(long.to(dtype).float(), long)
    assert not torch.equal(projections(0, 3000, seed=2), long)


def test_projections_are_nearly_gaussian() -> None:
    """Mean, variance and kurtosis of a sum of eight digits, over 2^20 entries of each seed.

    The bounds are five standard errors of independent entries.
    """
    for seed in (0, 1, 12345):
        P = projections(0, 2**16, seed=seed).double()
        n = P.numel()
        assert abs(P.mean()) < 5 * math.sqrt(170 / n)
        standard = P / math.sqrt(170)
        # A digit has variance 255/12 and excess kurtosis -6/5 (16^2 + 1) / (16^2 - 1).
        kurtosis = 3 - 1.2 * 257 / 255 / 8
        assert abs(standard.square().mean() - 1) < 5 * math.sqrt((kurtosis - 1) / n)
        assert abs(standard.pow(4).mean() - kurtosis) < 5 * math.sqrt(90 / n)  # E x^8 < 105
        assert abs(P.mean(0)).max() < 5 * math.sqrt(170 * 16 / n)


def test_projections_are_uncorrelated() -> None:
    """Between rows, projections and seeds; bounds of five standard errors of independent ones."""
    table = {
        seed: projections(0, 2**16, seed=seed).double() / math.sqrt(170)
        for seed in (0, 1, 2, 2**31)
    }

    def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
        return abs((a * b).mean().item()) * math.sqrt(a.numel())

    for P in table.values():
        for lag in (1, 2, 3, 8, 64, 1024):
            assert correlation(P[lag:], P[:-lag]) < 5
        for lag in range(1, 16):
            assert correlation(P[:, lag:], P[:, :-lag]) < 5
        signs = P.sign()
        assert correlation(signs[1:], signs[:-1]) < 5
        assert correlation(P[1:].square() - 1, P[:-1].square() - 1) < 5 * 2
        # All pairs of the 16 projections at once.
        across = P.T @ P / len(P) - torch.eye(16, dtype=P.dtype)
        assert across.abs().max() < 5 * math.sqrt(2 / len(P))
    seeds = list(table)
    for i, one in enumerate(seeds):
        for other in seeds[:i]:
            assert correlation(table[one], table[other]) < 5
            assert correlation(table[one][1:], table[other][:-1]) < 5


def test_projections_are_those_of_every_mode_and_leave_the_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with torch.inference_mode(), torch.device("meta"):
        here = projections(0, 2000, seed=77)
    assert torch.equal(torch.get_rng_state(), before)
    assert here.device.type == "cpu"
    assert torch.equal(here, projections(0, 2000, seed=77))


def test_first_projections_are_committed_numbers() -> None:
    """A change of these numbers changes every result of every model: it must be meant."""
    first = projections(0, 1, seed=0).long()[0].tolist()
    assert first == [26, -3, 12, -5, -14, 32, 20, -14, 7, -2, -8, -11, -10, 2, 7, -4]


def test_low_precision_groups_the_same_columns() -> None:
    q = torch.randn(1, 2, 3, 100, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    for signed in (False, True):
        order, sign = group_columns(q, seed=4, signed=signed)
        wanted = group_columns(q.double(), seed=4, signed=signed)
        assert torch.equal(order, wanted[0])
        assert torch.equal(sign.double(), wanted[1])
        assert sign.unique().tolist() == ([-1, 1] if signed else [1])


def test_estimate_cuts_rows_into_blocks() -> None:
    q, k = torch.randn(1, 2, 70, 32), torch.randn(1, 1, 9, 32)
    blocks = reference.estimate(q, k, rank=16, grouping_block=32)
    assert [(b.start, b.stop) for b in blocks] == [(0, 32), (32, 64), (64, 70)]
    assert [b.Qhat.shape for b in blocks] == [(1, 2, n, 16) for n in (32, 32, 6)]
    assert all(b.Khat.shape == (1, 1, 9, 16) for b in blocks)
    assert len(reference.estimate(q, k, rank=16)) == 1
    assert auto_grouping_block(70, "lsh-mean") == 70
    for block in blocks:
        torch.testing.assert_close(block.Khat.sum(-1), k.sum(-1))


def test_a_block_sees_only_its_own_rows() -> None:
    q, k, v = (torch.randn(1, 2, 64, 32, dtype=torch.float64) for _ in range(3))
    options = {"scale": 0.2, "rank": 16, "grouping_block": 32}
    before = reference.attention(q, k, v, **options)
    q[:, :, 32:] = torch.randn_like(q[:, :, 32:])
    after = reference.attention(q, k, v, **options)
    assert torch.equal(before[:, :, :32], after[:, :, :32])
    assert not torch.equal(before[:, :, 32:], after[:, :, 32:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 5}, "rank: got 5 for head_dim 32; must divide head_dim"),
        ({"rank": 0}, "rank: got 0"),
        ({"rank": 16, "estimator": "svd"}, "estimator: got 'svd'; must be one of lsh-sample"),
    ],
)
def test_errors(options: dict, message: str) -> None:
    q = torch.randn(1, 1, 20, 32)
    with pytest.raises(ValueError, match=message):
        reference.attention(q, q, q, scale=1.0, **options)
