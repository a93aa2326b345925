"""The definition, against numpy loops written from the paper, one head and one block at a time."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from distr_compile.estimators import auto_grouping_block
from distr_compile.kernels import reference


def naive_order(rows: np.ndarray, P: np.ndarray) -> list[int]:
    """Columns of ``rows`` (l x d) in hash order, bit by bit, the table of Gray codes in full."""
    table = [position ^ (position >> 1) for position in range(2**16)]
    place = {code: position for position, code in enumerate(table)}
    keys = []
    for column in range(rows.shape[1]):
        bits = ["1" if P[:, i] @ rows[:, column] > 0 else "0" for i in range(16)]
        keys.append((place[int("".join(bits), 2)], column))
    return [column for _, column in sorted(keys)]


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
) -> np.ndarray:
    """Loops over batch, key heads, blocks and rows in fp64; the mask has its full shape."""
    B, H, N, d = q.shape
    Hk, M = k.shape[1:3]
    rep, G = H // Hk, d // rank
    P = reference.projections(0, N * rep, seed=seed).double().numpy()
    out = np.zeros((B, H, N, v.shape[3]))
    for b in range(B):
        kb, vb = min(b, k.shape[0] - 1), min(b, v.shape[0] - 1)
        for g in range(Hk):
            for start in range(0, N, block):
                rows = range(start, min(start + block, N))
                stacked = np.stack([q[b, g * rep + h, i] for i in rows for h in range(rep)])
                order = naive_order(stacked, P[: len(stacked)])
                groups = [order[j * G : (j + 1) * G] for j in range(rank)]
                Khat = np.stack([k[kb, g][:, group].sum(1) for group in groups], 1)
                for h in range(g * rep, (g + 1) * rep):
                    for i in rows:
                        estimate = [
                            q[b, h, i, group[0]]
                            if estimator == "lsh-sample"
                            else q[b, h, i, group].mean()
                            for group in groups
                        ]
                        scores = scale * (Khat @ np.array(estimate))
                        if mask is not None and mask.dtype == bool:
                            scores[~mask[b, h, i]] = -np.inf
                        elif mask is not None:
                            scores += mask[b, h, i]
                        if is_causal:
                            scores[np.arange(M) > i + causal_offset] = -np.inf
                        if np.isneginf(scores).all():
                            continue
                        weights = np.exp(scores - scores.max())
                        out[b, h, i] = weights / weights.sum() @ v[vb, g]
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


@pytest.mark.parametrize("estimator", ["lsh-sample", "lsh-mean"])
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


def test_full_rank_is_exact_attention() -> None:
    q, k, v = (torch.randn(2, 3, 20, 24, dtype=torch.float64) for _ in range(3))
    got = reference.attention(q, k, v, scale=0.2, rank=24)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.2)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("estimator", ["lsh-sample", "lsh-mean"])
def test_equal_columns_lose_nothing(estimator: str) -> None:
    """Eq. 1: where the columns of a group are equal, the approximation is exact."""
    half = torch.randn(1, 2, 50, 16, dtype=torch.float64)
    q = half.repeat_interleave(2, dim=-1)[..., torch.randperm(32)]
    k, v = (torch.randn(1, 2, 40, 32, dtype=torch.float64) for _ in range(2))
    got = reference.attention(q, k, v, scale=0.2, rank=16, estimator=estimator)
    exact = reference.attention(q, k, v, scale=0.2, rank=32)
    torch.testing.assert_close(got, exact, rtol=0, atol=1e-12)


def test_order_follows_the_gray_sequence() -> None:
    """Four columns with hand-made signs: codes 0, 1, 3, 2 stand in this order in the sequence."""
    signs = {0: (0, 0), 1: (0, 1), 2: (1, 0), 3: (1, 1)}
    columns = [2, 3, 0, 1, 3]
    projected = torch.full((16, 5), -1.0)
    for place, code in enumerate(columns):
        for bit, one in zip((14, 15), signs[code], strict=True):
            projected[bit, place] = 1.0 if one else -1.0
    order = reference.order_of_projected(projected)
    assert [columns[i] for i in order] == [0, 1, 3, 3, 2]
    assert order.tolist() == [2, 3, 1, 4, 0], "ties keep the order of the columns"


def test_gray_position_inverts_the_table() -> None:
    position = torch.arange(2**16)
    assert torch.equal(reference.gray_position(position ^ (position >> 1)), position)


def test_zero_is_not_positive() -> None:
    order = reference.order_of_projected(torch.zeros(16, 4))
    assert order.tolist() == [0, 1, 2, 3]


def test_projections_extend_and_are_exact_in_every_dtype() -> None:
    long = reference.projections(0, 3000, seed=1)
    assert long.shape == (3000, 16)
    for start, stop in ((0, 1), (0, 7), (0, 1024), (5, 1030), (1024, 2048), (2047, 3000)):
        assert torch.equal(reference.projections(start, stop, seed=1), long[start:stop])
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(long.to(dtype).float(), long)
    assert not torch.equal(reference.projections(0, 3000, seed=2), long)
    assert abs(long.mean().item()) < 0.02
    assert abs(long.std().item() - 1) < 0.02


def test_projections_are_those_of_every_process_and_leave_the_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with torch.inference_mode(), torch.device("meta"):
        here = reference.projections(0, 2000, seed=77)
    assert torch.equal(torch.get_rng_state(), before)
    assert here.device.type == "cpu"
    cached = reference.projections(0, 1000, seed=77)
    assert not cached.is_inference(), "a later call outside inference mode could not use it"
    code = (
        "import torch; torch.manual_seed(9); from distr_compile.kernels import reference as r; "
        "print((r.projections(0, 2000, seed=77) * 32).long().flatten()[::97].tolist())"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == str((here * 32).long().flatten()[::97].tolist())


def test_first_projections_are_committed_numbers() -> None:
    """A change of these numbers changes every result of every model: it must be meant."""
    first = (reference.projections(0, 1, seed=0) * 32).long()[0].tolist()
    assert first == [5, -43, 21, 68, -20, 5, 84, -19, -5, 26, -24, 0, 2, 36, 41, 16]


def test_low_precision_groups_the_same_columns() -> None:
    q = torch.randn(1, 2, 3, 100, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(
        reference.group_columns(q, seed=4), reference.group_columns(q.double(), seed=4)
    )


def test_estimate_cuts_rows_into_blocks() -> None:
    q, k = torch.randn(1, 2, 70, 32), torch.randn(1, 1, 9, 32)
    blocks = reference.estimate(q, k, rank=16, grouping_block=32)
    assert [(b.start, b.stop) for b in blocks] == [(0, 32), (32, 64), (64, 70)]
    assert [b.Qhat.shape for b in blocks] == [(1, 2, n, 16) for n in (32, 32, 6)]
    assert all(b.Khat.shape == (1, 1, 9, 16) for b in blocks)
    assert len(reference.estimate(q, k, rank=16)) == 1
    assert auto_grouping_block(70) == 70
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
