"""The walk over chunks; kernels interpreted without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from distr_compile.kernels.attention import reference, triton_fwd
from distr_compile.lowering import cuda
from distr_compile.lowering.call import Approximation, Shape, call_of
from tests.walk import by_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def qkv(
    B: int = 2, H: int = 4, Hk: int = 2, N: int = 75, M: int = 70, d: int = 32, dv: int = 24
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(N + M)
    shapes = ((B, H, N, d), (B, Hk, M, d), (B, Hk, M, dv))
    return [torch.randn(s, generator=generator).to(DEVICE) for s in shapes]


def run(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | None, **options: Any) -> Tensor:
    """The output starts as NaN, so that a row that nobody writes is seen."""
    B, H, N, _ = q.shape
    out = torch.full((B, N, H, v.shape[3]), torch.nan, dtype=q.dtype, device=DEVICE)
    out = out.transpose(1, 2)
    options = {"scale": 0.2, "rank": 16, "estimator": "lsh-mean"} | options
    return by_kernels(q, k, v, *rest, out=out, **options)


def wanted(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | None, **options: Any) -> Tensor:
    mask, sinks = (*rest, None, None)[:2]
    wide = [t.double().cpu() for t in (q, k, v)]
    defaults = {"scale": 0.2, "rank": 16, "estimator": "lsh-mean"}
    small = {
        "mask": None if mask is None else mask.cpu(),
        "sinks": None if sinks is None else sinks.cpu(),
    }
    return reference.attention(*wide, **small, **defaults | options)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "two blocks, sample": {"estimator": "lsh-sample", "grouping_block": 16, "seed": 3},
    "causal": {"is_causal": True, "grouping_block": 16},
    "causal, offset": {"is_causal": True, "causal_offset": -5, "grouping_block": 20},
    "causal, late": {"is_causal": True, "causal_offset": 9, "grouping_block": 33},
    "soft cap": {"softcap": 1.5, "grouping_block": 16},
    "projection": {"estimator": "projection", "rank": 20, "grouping_block": 33},
    "projection, two rounds": {"estimator": "projection", "rounds": 2},
    "projection, causal": {
        "estimator": "projection",
        "is_causal": True,
        "causal_offset": 13,  # the first block sees more keys than the rank
        "grouping_block": 20,
    },
    "exact": {"rank": 32},
    "exact, causal": {"rank": 32, "is_causal": True, "causal_offset": 2},
}


def masks(kind: str | None) -> Tensor | None:
    generator = torch.Generator().manual_seed(0)
    if kind == "bool per batch":
        return torch.rand(2, 1, 1, 70, generator=generator).to(DEVICE) > 0.3
    if kind == "bias per head":
        return torch.randn(4, 75, 70, generator=generator).to(DEVICE)
    return None


PARTS = [(1, "bool per batch"), (9_000, "bias per head"), (40_000, None)]
WHOLE = [(1 << 28, "bias per head"), (1 << 28, None)]


@pytest.mark.parametrize(
    ("name", "workspace", "mask_kind"),
    [
        (name, *cut)
        for i, name in enumerate(CASES)
        # Interpreted, they are slow, the solve of projection most.
        for cut in ([PARTS[i % 2]] if "projection" in name else [PARTS[i % 3], PARTS[i % 3 - 1]])
    ]
    + [(name, *cut) for name in ("plain", "exact") for cut in WHOLE],
)
def test_any_workspace_gives_the_definition(
    name: str, workspace: int, mask_kind: str | None
) -> None:
    """From one block of one head at a time (a byte) to everything at once."""
    q, k, v = qkv()
    mask = masks(mask_kind)
    got = run(q, k, v, mask, workspace=workspace, **CASES[name])
    reference_out = wanted(q, k, v, mask, **CASES[name])
    torch.testing.assert_close(got.double().cpu(), reference_out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "is_causal"),
    [("padding", True), ("per row", True), ("per head", False), ("bias", True)],
)
def test_projection_gives_the_same_bits_in_any_workspace(kind: str, is_causal: bool) -> None:
    """The mask tells which rows count also where a chunk has a part of the rows only."""
    q, k, v = qkv(H=2, Hk=1, N=70)
    keep = torch.arange(70, device=DEVICE) < torch.tensor([[40], [65]], device=DEVICE)
    mask = keep[:, None, None]
    if kind == "per row":
        mask = mask & (torch.arange(70, device=DEVICE)[:, None] % 3 > 0)
    elif kind == "per head":
        mask = mask & (torch.arange(2, device=DEVICE)[:, None, None] != 1)
    elif kind == "bias":
        mask = torch.randn(1, 1, 70, 70).to(DEVICE).masked_fill(~mask, -torch.inf)
    # What must not count is large enough to show.
    q, k = (torch.where(keep[:, None, :, None], t, 100 * t) for t in (q, k))
    options = {"estimator": "projection", "grouping_block": 30, "is_causal": is_causal}
    results = [run(q, k, v, mask, workspace=w, **options) for w in (1, 100_000, 1 << 28)]
    for result in results[1:]:
        assert torch.equal(result, results[0])
    expected = wanted(q, k, v, mask, **options)
    rows = keep[:, None, :, None].cpu().expand_as(expected)
    torch.testing.assert_close(
        results[0].double().cpu()[rows], expected[rows], rtol=1e-5, atol=1e-5
    )


def test_sinks_go_with_their_heads() -> None:
    q, k, v = qkv()
    sinks = torch.tensor([0.5, -2.0, 3.0, 10.0], device=DEVICE)
    got = run(q, k, v, None, sinks, workspace=1, grouping_block=50)
    reference_out = wanted(q, k, v, None, sinks, grouping_block=50)
    torch.testing.assert_close(got.double().cpu(), reference_out, rtol=1e-5, atol=1e-5)


def test_a_batch_of_one_is_shared() -> None:
    q, k, v = qkv()
    got = run(q, k[:1], v[:1], workspace=9_000)
    reference_out = wanted(q, k[:1], v[:1])
    torch.testing.assert_close(got.double().cpu(), reference_out, rtol=1e-5, atol=1e-5)


def test_pointers_in_the_place_of_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, with the tiles of sm_90."""
    made: list[Tensor] = []
    real = triton_fwd.descriptor
    monkeypatch.setattr(triton_fwd, "descriptor", lambda t, block: made.append(t) or real(t, block))
    monkeypatch.setattr(cuda, "architecture", lambda device: "sm_90")
    q, k, v = (t.half() for t in qkv(d=32, dv=32))
    for options in ({}, {"rank": 32}, {"estimator": "projection", "strict": True}):
        made.clear()
        got = run(q, k, v, grouping_block=50, **options)
        assert made
        made.clear()
        other = run(q, k, v, grouping_block=50, by_pointers=True, **options)
        assert not made
        torch.testing.assert_close(other, got, rtol=0, atol=0)
    fallback = cuda.IMPLEMENTATION.fallback
    assert fallback is not None
    shape = Shape.of(q, k, v, None, False)._replace(device=torch.device("cuda"))
    how = Approximation("lsh-mean", 16)
    assert fallback.refuses(shape, how) is None
    assert "descriptors" in str(fallback.refuses(shape._replace(dtype=torch.float32), how))
    assert "need a GPU" in str(fallback.refuses(shape._replace(device=torch.device("cpu")), how))
    monkeypatch.setattr(cuda, "architecture", lambda device: "sm_80")
    assert "descriptors" in str(fallback.refuses(shape, how))


@pytest.mark.parametrize("rank", [16, 32])
@pytest.mark.parametrize("sizes", [{"N": 0}, {"B": 0}, {"M": 0}, {"N": 1, "M": 1}], ids=str)
def test_empty_and_tiny(sizes: dict[str, int], rank: int) -> None:
    q, k, v = qkv(**sizes)
    got = run(q, k, v, rank=rank).double().cpu()
    if 0 in sizes.values():
        torch.testing.assert_close(got, torch.zeros(*q.shape[:3], 24, dtype=torch.float64))
    else:
        torch.testing.assert_close(got, wanted(q, k, v, rank=rank), rtol=1e-5, atol=1e-5)


# B, H, Hk, N, M, block
SIZES = [
    (1, 1, 1, 131072, 131072, 64),
    (1, 40, 8, 131072, 131072, 16384),
    (4, 32, 32, 8192, 8192, 2048),
    (7, 6, 3, 100, 1000, 33),
    (2, 4, 2, 75, 1 << 24, 75),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("own", [(0, 0), (30_000, 200_000)])
@pytest.mark.parametrize("limit", [1 << 20, cuda.WORKSPACE_MIB << 20])
def test_chunks_keep_the_bound_and_cover_everything_once(
    size: tuple[int, ...], limit: int, own: tuple[int, int]
) -> None:
    B, H, Hk, N, M, block = size
    row_bytes = 2 * 64
    rep = H // Hk
    rows_done = 0
    numbers, keys = torch.arange(H).view(1, H, 1, 1).expand(B, H, N, 1), torch.zeros(1)
    keys = keys.expand(B, Hk, M, 1)
    call = call_of(numbers, keys, keys, scale=1.0, out=numbers)  # a head's rows are its number
    for chunk in cuda._chunks(
        torch.Size((B, H, N, 128)), torch.Size((B, Hk, M, 128)), block, 128, limit, *own
    ):
        batches = range(B)[chunk.batch]
        key_heads = range(Hk)[chunk.key_heads]
        heads = call.part(key_heads=chunk.key_heads).q[0, :, 0, 0].tolist()
        rows = range(N)[chunk.rows]
        assert [h // rep for h in heads] == [h for h in key_heads for _ in range(rep)]
        assert rows.start % block == 0
        blocks = -(-len(rows) // block)
        of_head = (rep * len(rows) + blocks * M) * row_bytes + own[0] + blocks * own[1]
        taken = of_head * len(batches) * len(key_heads)
        is_least = len(batches) * len(key_heads) * blocks == 1
        assert taken <= limit or is_least
        rows_done += len(batches) * len(heads) * len(rows)
    assert rows_done == B * H * N
