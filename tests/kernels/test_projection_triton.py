"""``projection`` in Triton against the definition: in the interpreter, on a GPU if there is one.

Bases differ by signs and rounding, so what is compared is their use: the scores Qhat Khat^T.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from distr_compile.kernels import plan
from distr_compile.kernels.attention import reference
from distr_compile.kernels.blocks import Places
from distr_compile.kernels.counted import counted_rows
from distr_compile.kernels.projection import launch as projection
from distr_compile.kernels.projection.launch import projection_factors
from distr_compile.kernels.roles import Asked

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# Triton's interpreter multiplies and adds bf16 as if it were integers.
DTYPES = [torch.float16, torch.float32, *([torch.bfloat16] if ON_GPU else [])]

FACTOR = 2
"""The kernels' error to fp64 is at most this times the definition's own in their precision, ...

plus the ``ROUNDINGS`` of a product of fp32 matrices of condition 2^9 (the ridge's square root).
"""

ROUNDINGS = 2.0**-24 * 64


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def scores(Qhat: Tensor, Khat: Tensor, block: int, places: Places | None = None) -> Tensor:
    """Qhat Khat^T in fp64, ``(B, H, N, M)``."""
    rep, (B, _, N, _) = Qhat.shape[1] // Khat.shape[1], Qhat.shape
    Qhat, Khat = Qhat.double(), Khat.double().repeat_interleave(rep, 1)
    ends = [(0, N, 0, N, block)] * B if places is None else places.ends.tolist()
    S = Qhat.new_full((*Qhat.shape[:3], Khat.shape[3]), torch.nan)
    for b, (low, high, first, stop, size) in enumerate(ends):
        for i, start in enumerate(range(first, stop, size)):
            rows = slice(
                low if start == first else start, high if start + size >= stop else start + size
            )
            S[b, :, rows] = Qhat[b, :, rows] @ Khat[b, :, i].mT
    return S


def wanted(Q: Tensor, K: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    blocks = reference.estimate(Q, K, mask, estimator="projection", **options)
    wide = [replace(b, Qhat=b.Qhat.double(), Khat=b.Khat.double()) for b in blocks]
    return reference.scores(Q.double(), K.double(), wide)


def factors(
    Q: Tensor, K: Tensor, mask: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    return made(Q, K, mask, **options)[:2]


def made(
    Q: Tensor, K: Tensor, mask: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor, Places | None]:
    """Qhat, Khat, and where the mask says that the blocks lie."""
    if mask is None:
        return *projection_factors(Q, K, **options), None
    causal = {name: options[name] for name in ("is_causal", "causal_offset") if name in options}
    block = options["grouping_block"]
    asked = Asked(
        "projection", options["rank"], block, options.get("rounds", 1), options["seed"],
        options.get("causal_offset", 0) if options.get("is_causal") else None, given_block=block,
    )  # fmt: skip
    mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
    prologue = projection.prologue(Q, K, mask, asked)
    found = prologue.factors(Q, K, *prologue.counted, places=prologue.places, **causal)
    return *found, prologue.places


def check(Q: Tensor, K: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    """Compare where row and key see each other; returns the scores."""
    Qhat, Khat, places = made(Q, K, mask, **options)
    assert Qhat.dtype == Khat.dtype == Q.dtype
    got = scores(Qhat, Khat, options["grouping_block"], places)
    exact = wanted(Q.double(), K.double(), mask, **options)
    own = wanted(Q, K, mask, **options)
    assert got.shape == exact.shape
    row, key = (torch.arange(n, device=DEVICE) for n in exact.shape[2:])
    sees = torch.full_like(exact, True, dtype=torch.bool)
    if options.get("is_causal"):
        sees &= key <= row[:, None] + options.get("causal_offset", 0)
    if mask is not None:
        sees &= mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    got, exact, own = (s.where(sees, 0) for s in (got, exact, own))
    bound = FACTOR * (own - exact).abs().max() + ROUNDINGS * exact.abs().max()
    assert (got - exact).abs().max() <= bound
    return got


SHAPES = [
    # B, H, Hk, N, M, d, rank, grouping block
    (1, 2, 2, 1, 1, 32, 16, 16),
    (1, 2, 1, 17, 5, 32, 20, 16),
    (1, 2, 2, 197, 131, 24, 16, 100),
    (2, 4, 2, 197, 60, 40, 16, 100),
    (1, 1, 1, 1000, 129, 72, 24, 1000),
    (1, 3, 1, 197, 1100, 32, 16, 197),
    (1, 2, 1, 1000, 33, 96, 33, 600),
    (1, 1, 1, 100, 70, 192, 48, 100),
    (1, 1, 1, 130, 300, 128, 64, 64),
    (1, 1, 1, 60, 40, 80, 79, 60),
    (1, 1, 1, 40, 40, 256, 16, 32),
    (1, 1, 1, 50, 50, 17, 1, 32),
]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    # The large ones in one precision each.
    [
        (shape, dtype)
        for i, shape in enumerate(SHAPES)
        for j, dtype in enumerate(DTYPES)
        if shape[3] * shape[5] < 3000 or (i + j) % 2 == 0
    ],
    ids=str,
)
def test_scores_are_those_of_the_definition(shape: tuple, dtype: torch.dtype) -> None:
    B, H, Hk, N, M, d, rank, block = shape
    Q, K = draw(B, H, N, d, seed=1, dtype=dtype), draw(1, Hk, M, d, seed=2, dtype=dtype)
    check(Q, K, rank=rank, grouping_block=block, seed=2**31 + 7)


@pytest.mark.parametrize(
    ("offset", "rounds", "dtype"),
    [
        (offset, rounds, DTYPES[i % len(DTYPES)])
        for i, (offset, rounds) in enumerate(
            [(0, 1), (40, 2), (-50, 1), (-50, 2), (-2000, 1), (2000, 1), (0, 2)]
        )
    ],
)
def test_causal(offset: int, rounds: int, dtype: torch.dtype) -> None:
    Q, K = draw(1, 2, 120, 32, dtype=dtype), draw(1, 1, 140, 32, seed=1, dtype=dtype)
    options = {"rank": 16, "rounds": rounds, "grouping_block": 50, "seed": 0}
    check(Q, K, is_causal=True, causal_offset=offset, **options)


def test_causality_may_end_a_block_inside_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "CHUNK_ROWS", 48)
    Q, K = draw(1, 4, 300, 32, dtype=torch.float16), draw(1, 2, 290, 32, seed=1).half()
    options = {"rank": 16, "grouping_block": 90, "seed": 0}
    first = check(Q, K, is_causal=True, causal_offset=-11, **options)
    check(Q, K, **options)
    later = K.clone()
    later[:, :, 169:] = 1000  # the first two blocks see keys up to 168
    second = check(Q, later, is_causal=True, causal_offset=-11, **options)
    assert torch.equal(first[:, :, :180], second[:, :, :180])


def masks(name: str, B: int, H: int, N: int, M: int) -> Tensor:
    keep = draw(B, 1, 1, M, seed=7) > -0.5
    keep[-1] = False
    if name == "padding":
        return keep
    if name == "per row":
        return (draw(1, 1, N, M, seed=8) > 0) & (draw(N, 1, seed=9) > -1)
    if name == "per head":
        return (draw(1, H, 1, M, seed=8) > 0).expand(B, H, N, M)
    if name == "rows":
        return draw(N, 1, seed=9) > 0
    dtype = torch.float16 if name == "float16 bias" else torch.float32
    bias = draw(B, H, N, M, seed=8).to(dtype)
    bias[..., M // 2 :] = torch.finfo(dtype).min if "16" in name else -math.inf
    bias[:, 1, N // 3 :] = -math.inf
    return bias


# Each with as many keys as queries, or with fewer.
MASKS = ["padding", "per row", "per head", "rows", "float16 bias", "bias"]


@pytest.mark.parametrize(
    ("name", "num_keys"), [(name, 50 - 9 * (i % 2)) for i, name in enumerate((*MASKS, "rows"))]
)
def test_masks_tell_which_rows_count(name: str, num_keys: int) -> None:
    """Large numbers stand in what a mask hides, so that counting them would show."""
    mask = masks(name, 2, 4, 50, num_keys)
    counted = counted_rows(mask, 50, num_keys, 2, 2)
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    seen = seen.expand(2, 4, 50, num_keys).unflatten(1, (2, 2))
    of_keys = seen.any(-2).any(2)
    of_queries = seen.any(-1) & (of_keys[:, :, None] if num_keys == 50 else True)
    for rows, other in zip(counted, (of_queries, of_keys), strict=True):
        assert torch.equal(rows.expand_as(other), other)
    Q, K = draw(2, 4, 50, 32), draw(2, 2, num_keys, 32, seed=1)
    queries, keys = counted
    queries = queries.expand(2, 2, 2, 50).flatten(1, 2)
    Q = torch.where(queries[..., None], Q, Q * 300)
    K = torch.where(keys[..., None], K, K * 300)
    check(Q, K, mask, rank=16, grouping_block=30, seed=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hidden_rows_may_hold_anything(dtype: torch.dtype) -> None:
    mask = torch.arange(60, device=DEVICE) < 37
    Q, K = draw(1, 2, 60, 32, dtype=dtype), draw(1, 2, 60, 32, seed=1, dtype=dtype)
    options = {"rank": 16, "grouping_block": 30, "seed": 0}
    before = check(Q, K, mask, **options)
    Q[:, :, 37:], K[:, :, 40:], K[:, :, 37:40] = torch.nan, torch.inf, torch.nan
    Qhat, Khat, places = made(Q, K, mask, **options)
    after = scores(Qhat, Khat, 30, places)
    assert torch.equal(after[:, :, :37, :37], before[:, :, :37, :37])


def test_without_a_mask_numbers_that_are_not_finite_spoil_their_own_row() -> None:
    Q, K = draw(1, 1, 40, 32), draw(1, 1, 50, 32, seed=1)
    Q[0, 0, 3, 5], K[0, 0, 7, 1] = torch.nan, torch.inf
    Qhat, Khat = factors(Q, K, rank=16, grouping_block=40, seed=0)
    assert Qhat.isnan().any(-1).nonzero()[:, 2].tolist() == [3]
    zeroed = [t.nan_to_num(0, 0, 0) for t in (Q, K)]
    same = factors(*zeroed, rank=16, grouping_block=40, seed=0)
    assert torch.equal(Qhat[:, :, 4:], same[0][:, :, 4:])
    assert torch.equal(Khat[..., 8:, :], same[1][..., 8:, :])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("deficient", ["Q", "K"])
def test_exact_where_the_rank_of_the_scores_is_low(deficient: str, dtype: torch.dtype) -> None:
    Q, K = draw(1, 1, 96, 64), draw(1, 1, 130, 64, seed=1)
    low = draw(64, 20, seed=2) @ draw(20, 64, seed=3) / 20
    Q, K = (Q @ low, K) if deficient == "Q" else (Q, K @ low)
    Q, K = Q.to(dtype), K.to(dtype)
    got = check(Q, K, rank=32, grouping_block=96, seed=0)
    exact = Q.double() @ K.double().mT
    # Beyond fp32, the rounding of Qhat and Khat and that of the low rank itself.
    assert (got - exact).norm() <= (1e-4 + 4 * torch.finfo(dtype).eps) * exact.norm()


@pytest.mark.parametrize(("d", "rank"), [(48, 24), (128, 64), (128, 120)])
def test_spectra_that_fall_below_rounding(d: int, rank: int) -> None:
    """Most columns of Ck Cq X0 lie within rounding of the span of a few; also in two blocks of 64.

    What is left is rounding alone: four times the definition's, which goes by Householder.
    """
    falling = torch.logspace(0, -10, d, dtype=torch.float64)
    turned = torch.linalg.qr(draw(d, d, seed=5).double()).Q
    Q, K = (draw(1, 1, 200, d, seed=s).double() * falling @ turned for s in (1, 2))
    Q, K = Q.float(), K.float()
    options = {"rank": rank, "grouping_block": 200, "seed": 0}
    exact = Q.double() @ K.double().mT
    wrong = (scores(*factors(Q, K, **options), 200) - exact).norm()
    assert wrong <= 4 * (wanted(Q, K, **options) - exact).norm()
    assert wrong <= 1e-4 * exact.norm()


EDGES = {
    "zeros": (0.0, 0.0),
    "tiny": (1e-7, 1e-7),
    "large and tiny": (1e4, 1e-7),
    "large": (8e3, 1.0),
    "far beyond fp16": (1e30, 1e-30),
    "squares beyond fp32": (1e37, 1e-10),
    "not normal": (1e-42, 1.0),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EDGES)
def test_any_scale(name: str, dtype: torch.dtype) -> None:
    sizes = EDGES[name]
    limit = torch.finfo(dtype)
    if any(size > limit.max / 8 or 0 < size < limit.smallest_normal / 1e5 for size in sizes):
        assert dtype == torch.float16, "only fp16 is too narrow for these"
        return
    Q = (draw(1, 2, 64, 32) * sizes[0]).to(dtype)
    K = (draw(1, 2, 64, 32, seed=1) * sizes[1]).to(dtype)
    got = check(Q, K, rank=16, grouping_block=32, seed=0)
    assert got.isfinite().all()
    exact = Q.double() @ K.double().mT
    if 0 in sizes:
        assert not got.any()
    else:
        assert (got - exact).norm() < 0.6 * exact.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", ["Q", "K", "both"])
def test_constant_rows(where: str, dtype: torch.dtype) -> None:
    Q, K = draw(1, 2, 64, 32, dtype=dtype), draw(1, 2, 64, 32, seed=1, dtype=dtype)
    Q = Q[:, :, :1].expand_as(Q) if where != "K" else Q
    K = K[:, :, :1].expand_as(K) if where != "Q" else K
    got = check(Q, K, rank=16, grouping_block=40, seed=0)
    exact = Q.double() @ K.double().mT
    assert (got - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max() + 1e-4


@pytest.mark.parametrize("d", [32, 64, 128, 256])
def test_numbers_that_are_all_equal(d: int) -> None:
    """One direction has everything: nothing is divided by what rounding left of the others."""
    Q, K = torch.full((1, 1, 20, d), 3.0, device=DEVICE), torch.full((1, 1, 24, d), 0.7)
    K = K.to(DEVICE)
    Qhat, Khat = factors(Q, K, rank=d // 2, grouping_block=20, seed=0)
    torch.testing.assert_close(
        scores(Qhat, Khat, 20), Q.double() @ K.double().mT, rtol=1e-5, atol=0.0
    )


@pytest.mark.parametrize("d", [32, 128])
def test_what_overflows_the_dtype_is_saturated(d: int) -> None:
    Q, K = (torch.full((1, 1, 32, d), 65504.0, dtype=torch.float16, device=DEVICE),) * 2
    Qhat, Khat = factors(Q, K, rank=d // 2, grouping_block=32, seed=0)
    assert Qhat.isfinite().all()
    assert Khat.isfinite().all()
    assert (scores(Qhat, Khat, 32) > 1e8).all()


def views(x: Tensor) -> dict[str, Tensor]:
    """The same numbers in other places: each view stands in a buffer of NaN."""
    B, H, N, d = x.shape

    def fresh(*shape: int) -> Tensor:
        return x.new_full(shape, torch.nan)

    cases = {
        "inside": fresh(B + 1, H + 2, N + 3, d + 5)[1:, 2:, 1 : N + 1, 3 : d + 3],
        "tokens first": fresh(B, N + 3, H, d + 5)[:, 2 : N + 2, :, :d].transpose(1, 2),
        "columns apart": fresh(B, H, N, 2 * d)[..., 1::2],
        "columns first": fresh(B, H, d, N).mT,
    }
    for view in cases.values():
        view.copy_(x)
    return cases


def test_inputs_are_read_where_they_are() -> None:
    Q, K = draw(2, 2, 20, 24), draw(2, 1, 25, 24, seed=1)
    options = {"rank": 10, "grouping_block": 32, "seed": 0}
    first = factors(Q, K, **options)
    for (name, q), k in zip(views(Q).items(), views(K).values(), strict=True):
        for got, want in zip(factors(q, k, **options), first, strict=True):
            assert torch.equal(got, want), name


def test_expanded_inputs() -> None:
    Q = draw(1, 1, 33, 32).expand(2, 4, -1, -1)
    K = draw(1, 1, 20, 32, seed=1).expand(1, 2, -1, -1)
    options = {"rank": 16, "grouping_block": 32, "seed": 0}
    first = factors(Q.contiguous(), K.expand(2, -1, -1, -1).contiguous(), **options)
    for got, want in zip(factors(Q, K, **options), first, strict=True):
        assert torch.equal(got, want)


def test_rows_may_lie_far_apart() -> None:
    """Offsets beyond 2^31 elements; of the 4 GiB only the pages of the rows are touched."""
    buffer = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)
    far = buffer.as_strided((1, 1, 3, 32), (0, 0, 2**30, 1))
    near = draw(1, 1, 3, 32, dtype=torch.float16)
    far.copy_(near)
    options = {"rank": 16, "grouping_block": 2, "seed": 0}
    first = factors(near, near, **options)
    for got, want in zip(factors(far, far, **options), first, strict=True):
        assert torch.equal(got, want)


@pytest.fixture
def poisoned_memory() -> object:
    """Every fresh tensor begins as NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.usefixtures("poisoned_memory")
def test_everything_that_is_seen_is_written(is_causal: bool) -> None:
    Q, K = draw(1, 2, 400, 24, dtype=torch.float16), draw(1, 1, 500, 24, seed=1).half()
    options = {"rank": 12, "grouping_block": 150, "seed": 0}
    Qhat, Khat = factors(Q, K, is_causal=is_causal, causal_offset=5, **options)
    assert Qhat.isfinite().all()
    for i, seen in enumerate((155, 305, 405) if is_causal else (500, 500, 500)):
        assert Khat[:, :, i, :seen].isfinite().all()
        assert not Khat[:, :, i, seen + 128 :].isfinite().any(), "work nobody needs"


def test_heads_and_blocks_do_not_depend_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller may cut a call into heads and whole grouping blocks: the bits stay the same."""
    monkeypatch.setattr(projection, "CHUNK_ROWS", 48)
    Q, K = draw(2, 4, 150, 32, dtype=torch.float16), draw(2, 2, 180, 32, seed=1).half()
    options = {"rank": 16, "grouping_block": 64, "seed": 0, "is_causal": True}
    Qhat, Khat = factors(Q, K, causal_offset=7, **options)
    for b, h, first, last in ((0, 0, 0, 1), (1, 1, 1, 3), (1, 0, 1, 2)):
        rows = slice(first * 64, min(last * 64, 150))
        seen = rows.stop + 7
        part = factors(
            Q[b : b + 1, 2 * h : 2 * h + 2, rows],
            K[b : b + 1, h : h + 1, :seen],
            causal_offset=7 + rows.start,
            **options,
        )
        assert torch.equal(part[0], Qhat[b : b + 1, 2 * h : 2 * h + 2, rows])
        for i in range(last - first):
            sees = min(64 * (first + i + 1), 150) + 7
            whole = Khat[b : b + 1, h : h + 1, first + i, :sees]
            assert torch.equal(part[1][:, :, i, :sees], whole)


def test_runs_are_alike_and_seeds_are_not() -> None:
    Q, K = draw(1, 4, 300, 32, dtype=torch.float16), draw(1, 2, 40, 32, dtype=torch.float16)
    options = {"rank": 16, "grouping_block": 300}
    first = factors(Q, K, seed=0, **options)
    for got, want in zip(factors(Q, K, seed=0, **options), first, strict=True):
        assert torch.equal(got, want)
    assert not torch.equal(factors(Q, K, seed=1, **options)[1], first[1])


@pytest.mark.parametrize(("N", "M"), [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_nothing_to_do(N: int, M: int, is_causal: bool) -> None:
    Q, K = draw(1, 2, N, 32), draw(1, 2, M, 32)
    mask = torch.ones(N, M, dtype=torch.bool, device=DEVICE)
    options = {"rank": 16, "grouping_block": 16, "seed": 0, "is_causal": is_causal}
    Qhat, Khat = factors(Q, K, mask, **options)
    assert Qhat.shape == (1, 2, N, 16)
    assert Khat.shape == (1, 2, math.ceil(N / 16), M, 16)


@pytest.mark.parametrize(("d", "rank"), [(32, 33), (32, 0), (257, 16)])
def test_widths_out_of_range(d: int, rank: int) -> None:
    Q = draw(1, 1, 20, d)
    with pytest.raises(ValueError, match=f"got {rank} for head_dim {d}; must be from 1"):
        factors(Q, Q, rank=rank, grouping_block=16, seed=0)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("rows", [100, 3000])
def test_the_stated_workspace_is_enough(
    rows: int, is_causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    make = Tensor.new_empty

    def listed(self: Tensor, *size: int, **options: Any) -> Tensor:
        t = make(self, *size, **options)
        maker = sys._getframe(1)
        if maker.f_code is plan.new.__code__:
            maker = maker.f_back
        if maker.f_globals is vars(projection):  # not Triton's interpreter
            made.append(t)
        return t

    monkeypatch.setattr(Tensor, "new_empty", listed)
    Q, K = draw(1, 2, rows, 40, dtype=torch.float16), draw(1, 1, 2100, 40, dtype=torch.float16)
    options = {"rank": 20, "grouping_block": 1100, "seed": 0, "is_causal": is_causal}
    results = factors(Q, K, **options)
    own = sum(t.nbytes for t in made if all(t is not r for r in results))
    once, each = projection.workspace_bytes(min(rows, 1100), 2100, 40, 20, 2, 2)
    assert 0.5 * (once + math.ceil(rows / 1100) * each) < own
    assert own < 1.05 * (once + math.ceil(rows / 1100) * each)
