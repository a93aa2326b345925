"""The blocked implementation against the definition, and its promises on memory and strides.

The rule for every dtype: the error to the definition in fp64 is at most ``FACTOR`` times the error
of the definition evaluated in the working precision, plus the rounding of the result. For the
estimator ``projection`` twice that: the condition of the scores multiplies the rounding of sums
that are added up in another order.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distr_compile.kernels.attention import reference
from distr_compile.lowering import cpu, pieces
from distr_compile.lowering.call import call_of
from tests.kernels.cpu_kernel import require_kernel

FACTOR = 2.0

FUSED = False
"""Whether calls of this file go to the fused kernel; set by the fixture below."""


@pytest.fixture(autouse=True, params=[False, True], ids=["products", "fused"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        require_kernel()
    monkeypatch.setitem(globals(), "FUSED", request.param)


CAUSAL: dict[str, Any] = {"is_causal": True, "causal_offset": 5}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    out = q.new_full((*q.shape[:3], v.shape[3]), torch.nan)
    options.setdefault("estimator", "lsh-mean")
    options.setdefault("scale", q.shape[-1] ** -0.5)
    cpu.run(call_of(q, k, v, mask, out=out, **options), fused=FUSED and q.dtype != torch.float64)
    return out


def check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    """Compare with the definition by the rule of this file; returns the result."""
    options.setdefault("scale", q.shape[-1] ** -0.5)
    got = run(q, k, v, mask, **options)
    working = torch.float64 if q.dtype == torch.float64 else torch.float32

    def defined(dtype: torch.dtype) -> Tensor:
        bias = mask if mask is None or mask.dtype == torch.bool else mask.to(dtype)
        return reference.attention(q.to(dtype), k.to(dtype), v.to(dtype), bias, **options).double()

    exact = defined(torch.float64)
    low_precision = (defined(working) - exact).abs().max().item()
    rounding = torch.finfo(q.dtype).eps * max(exact.abs().max().item(), 1e-30)
    error = (got.double() - exact).abs().max().item()
    factor = 2 * FACTOR if options.get("estimator") == "projection" else FACTOR
    assert error <= factor * low_precision + rounding
    assert got.dtype == q.dtype
    return got


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut small inputs into many panels, tiles and key chunks."""
    monkeypatch.setattr(pieces, "CHUNK", 2048)
    monkeypatch.setattr(pieces, "PANEL_ROWS", 24)
    monkeypatch.setattr(pieces, "KEY_ROWS", 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("estimator", ["lsh-sample", "lsh-mean", "lsh-signed", "projection"])
@pytest.mark.parametrize("block", [0, 64])
def test_dtypes(dtype: torch.dtype, estimator: str, block: int) -> None:
    q, k, v = (draw(2, 3, 197, 64, seed=s, dtype=dtype) for s in range(3))
    check(q, k, v, rank=32, estimator=estimator, grouping_block=block)


@pytest.mark.parametrize("tokens", [1, 17, 197, 1000])
@pytest.mark.parametrize(
    ("width", "rank"),
    [(32, 16), (40, 20), (64, 16), (72, 36), (72, 24), (80, 16), (96, 32), (192, 96), (192, 16)],
)
def test_odd_sizes(tokens: int, width: int, rank: int) -> None:
    q, k, v = (draw(1, 2, tokens, width, seed=s) for s in range(3))
    check(q, k, v, rank=rank, grouping_block=0 if tokens < 1000 else 300)


@pytest.mark.parametrize(
    ("B", "H", "Hk", "N", "M", "d", "dv", "kb", "vb"),
    [
        (2, 4, 4, 50, 70, 32, 48, 2, 2),
        (2, 4, 2, 50, 30, 64, 32, 1, 2),
        (3, 6, 1, 33, 65, 32, 16, 3, 1),
        (1, 8, 2, 100, 100, 32, 32, 1, 1),
    ],
)
def test_shapes_that_differ(
    B: int,
    H: int,
    Hk: int,
    N: int,
    M: int,
    d: int,
    dv: int,
    kb: int,
    vb: int,
    small_chunks: None,
) -> None:
    q, k, v = draw(B, H, N, d), draw(kb, Hk, M, d, seed=1), draw(vb, Hk, M, dv, seed=2)
    for block in (0, 16, 31):
        for options in ({}, {"estimator": "projection"}):
            check(q, k, v, rank=16, grouping_block=block, **options)
            check(q, k, v, rank=16, grouping_block=block, **CAUSAL, **options)


def masks(B: int, H: int, N: int, M: int) -> Iterator[Tensor]:
    for shape in ((M,), (N, M), (1, 1, M), (B, 1, 1, M), (1, H, N, M), (B, H, 1, M), (B, H, N, 1)):
        values = draw(*shape, seed=3)
        yield values
        yield values > -0.8
        yield (values * 3).bfloat16()


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=str)
def test_masks(heads: tuple[int, int], small_chunks: None) -> None:
    H, Hk = heads
    q, k, v = draw(3, H, 40, 32), draw(3, Hk, 50, 32, seed=1), draw(3, Hk, 50, 24, seed=2)
    for mask in masks(3, H, 40, 50):
        check(q, k, v, mask, rank=16)
        check(q, k, v, mask, rank=16, estimator="projection", grouping_block=15)


@pytest.mark.parametrize("offset", [-60, -7, 0, 9, 49, 80])
def test_causal_offsets(offset: int, small_chunks: None) -> None:
    q, k, v = draw(2, 4, 57, 32), draw(2, 2, 50, 32, seed=1), draw(2, 2, 50, 32, seed=2)
    got = check(q, k, v, rank=16, is_causal=True, causal_offset=offset)
    assert (got[:, :, : max(-offset, 0)] == 0).all()
    padding = torch.arange(50) < 41
    check(q, k, v, padding, rank=16, is_causal=True, causal_offset=offset)
    for mask in (None, padding):
        options: dict[str, Any] = {"estimator": "projection", "grouping_block": 23}
        check(q, k, v, mask, rank=16, is_causal=True, causal_offset=offset, **options)


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize(("width", "rank"), [(32, 17), (64, 24), (72, 50), (192, 100)])
@pytest.mark.parametrize("tokens", [1, 17, 300])
def test_projection_of_any_rank(tokens: int, width: int, rank: int, rounds: int) -> None:
    q, k, v = (draw(1, 2, tokens, width, seed=s) for s in range(3))
    check(q, k, v, rank=rank, rounds=rounds, estimator="projection", seed=4)


def hard_inputs(dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Q and K that are large, small, constant, 0, or of low rank; none overflows in SDPA."""
    small, large = (1e-7, 1e2) if dtype == torch.float16 else (1e-30, 1e15)
    q, k = draw(1, 2, 40, 32), draw(1, 2, 40, 32, seed=1)
    ones, row = torch.ones_like(q), draw(32, seed=5)
    pairs = [
        (q * small, k * small),
        (q * large, k * small),
        (q * large, k * large),
        (ones, ones),
        (ones * large, ones * large),
        (ones * 0, k),
        (q, ones * 0),
        (ones * 0, ones * 0),
        (q[..., :1] * row, k),
        (row * ones, row * ones),
        (q * (torch.arange(32) < 9), k * (torch.arange(32) >= 9)),
    ]
    yield from ((a.to(dtype), b.to(dtype)) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rounds", [1, 2])
def test_projection_is_finite_where_sdpa_is(dtype: torch.dtype, rounds: int) -> None:
    v = draw(1, 2, 40, 32, seed=2, dtype=dtype)
    sees = torch.arange(40)[None] < 31
    finite = 0
    for q, k in hard_inputs(dtype):
        for mask in (None, sees):
            exact = F.scaled_dot_product_attention(q, k, v, mask)
            options: dict[str, Any] = {"rounds": rounds, "estimator": "projection"}
            got = run(q, k, v, mask, rank=16, grouping_block=16, **options)
            assert got.isfinite().where(exact.isfinite(), True).all()
            finite += int(exact.isfinite().all())
    assert finite == 22


@pytest.mark.parametrize("garbage", [1e30, torch.inf, torch.nan])
def test_projection_does_not_look_at_what_is_hidden(garbage: float) -> None:
    """Padding of any content, in queries and keys of self-attention, moves nothing else."""
    q, k, v = (draw(2, 4, 50, 32, seed=s) for s in range(3))
    k, v = k[:, :2], v[:, :2]
    sees = (torch.arange(50) < torch.tensor([33, 50])[:, None])[:, None, None]
    options: dict[str, Any] = {"rank": 16, "estimator": "projection", "grouping_block": 20}
    wanted = check(q, k, v, sees, **options)
    hidden = ~sees[:, 0, 0, None, :, None]
    got = run(q.masked_fill(hidden, garbage), k.masked_fill(hidden, garbage), v, sees, **options)
    assert torch.equal(got[0, :, :33], wanted[0, :, :33])
    assert torch.equal(got[1], wanted[1])


@pytest.mark.parametrize("small", [False, True])
def test_rows_that_see_nothing_are_zero(small: bool, request: pytest.FixtureRequest) -> None:
    if small:
        request.getfixturevalue("small_chunks")
    q, k, v = (draw(1, 2, 40, 32, seed=s) for s in range(3))
    sees = torch.ones(40, 40, dtype=torch.bool)
    sees[[0, 13, 39]] = False
    for mask in (sees, torch.zeros(40, 40).masked_fill(~sees, -torch.inf)):
        got = check(q, k, v, mask, rank=16)
        assert (got[:, :, [0, 13, 39]] == 0).all()
        assert (got[:, :, 1:13] != 0).all()


def test_lowest_finite_mask_gives_the_mean_of_v() -> None:
    """finfo.min everywhere in a row is no mask at all to a softmax: the scores drown in it."""
    q, k, v = (draw(1, 2, 40, 32, seed=s) for s in range(3))
    mask = torch.full((40, 40), torch.finfo(torch.float32).min)
    got = run(q, k, v, mask, rank=16)
    torch.testing.assert_close(got, v.mean(2, keepdim=True).expand_as(got))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 1.5, 50.0])
def test_softcap_and_sinks(
    softcap: float,
    has_sinks: bool,
    small: bool,
    dtype: torch.dtype,
    request: pytest.FixtureRequest,
) -> None:
    if small:
        request.getfixturevalue("small_chunks")
    q = draw(3, 4, 40, 32, dtype=dtype)
    k, v = (draw(3, 2, 50, 32, seed=s, dtype=dtype) for s in (1, 2))
    sinks = torch.tensor([1.5, -30.0, 0.25, 40.0], dtype=dtype) if has_sinks else None
    options: dict[str, Any] = {"rank": 16, "softcap": softcap, "sinks": sinks}
    sees = draw(3, 1, 40, 50, seed=4) > -0.5
    sees[:, :, [2, 39]] = False
    check(q, k, v, **options)
    check(q, k, v, is_causal=True, causal_offset=-3, **options)
    check(q, k, v, draw(4, 40, 50, seed=5, dtype=dtype), is_causal=True, **options)
    got = check(q, k, v, sees, **options)
    assert (got[:, :, [2, 39]] == 0).all()


def test_sinks_have_any_dtype_and_may_be_minus_infinity() -> None:
    q, k, v = (draw(1, 4, 40, 32, seed=s, dtype=torch.float64) for s in (1, 2, 3))
    sees = draw(40, 40, seed=4) > 0
    sees[7] = False
    sinks = torch.tensor([1.5, -30.0, 0.25, 40.0])
    options: dict[str, Any] = {"scale": 0.2, "rank": 16}
    wanted = reference.attention(q, k, v, sees, sinks=sinks, **options)
    halves = [x.bfloat16() for x in (q, k, v)]  # rounded: their columns may be grouped otherwise
    wanted_half = reference.attention(*(x.double() for x in halves), sees, sinks=sinks, **options)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        got = run(q, k, v, sees, sinks=sinks.to(dtype), **options)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-13)
        half = run(*halves, sees, sinks=sinks.to(dtype), **options)
        # The fused kernel rounds Qhat, Khat and the weights to bf16, as the GPU's does.
        atol = 2**-7 if FUSED else 1e-5
        torch.testing.assert_close(half.double(), wanted_half, rtol=2**-8, atol=atol)
    none = run(q, k, v, sees, sinks=torch.full((4,), -torch.inf), **options)
    torch.testing.assert_close(none, run(q, k, v, sees, **options), rtol=0, atol=1e-15)


def test_no_keys_and_no_queries() -> None:
    q, k = draw(1, 2, 20, 32), draw(1, 2, 0, 32)
    assert (run(q, k, k, rank=16) == 0).all()
    assert run(k, q, q, rank=16).shape == (1, 2, 0, 32)


def test_strides_do_not_matter(small_chunks: None) -> None:
    q, k, v = (draw(2, 4, 50, 32, seed=s) for s in range(3))
    mask = draw(2, 4, 50, 50, seed=4)
    wanted = run(q, k, v, mask, rank=16)

    def interleaved(t: Tensor) -> Tensor:
        return torch.stack([t, t + 1], -1)[..., 0]

    def heads_last(t: Tensor) -> Tensor:
        return t.transpose(1, 2).contiguous().transpose(1, 2)

    def width_first(t: Tensor) -> Tensor:
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)

    for layout in (interleaved, heads_last, width_first):
        out = layout(torch.full_like(wanted, torch.nan))
        narrow = {"scale": 32**-0.5, "rank": 16, "estimator": "lsh-mean"}
        call = call_of(*map(layout, (q, k, v, mask)), **narrow, out=out)
        cpu.run(call, fused=FUSED)
        torch.testing.assert_close(out, wanted, rtol=0, atol=1e-6)
    one = k[:1, :1].expand(2, 4, 50, 32)
    torch.testing.assert_close(
        run(q, one, one, rank=16), run(q, one.clone(), one.clone(), rank=16), rtol=0, atol=1e-6
    )


def test_repeated_key_heads_are_grouped_head_by_head() -> None:
    """With one query head per key head, heads are independent: batching them changes nothing."""
    q, k, v = (draw(1, 6, 60, 32, seed=s) for s in range(3))
    together = run(q, k, v, rank=16)
    for h in range(6):
        alone = run(*(t[:, h : h + 1] for t in (q, k, v)), rank=16)
        torch.testing.assert_close(together[:, h : h + 1], alone, rtol=0, atol=1e-6)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that ops return, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {
            t.untyped_storage().data_ptr()
            for t in tree_leaves((args, kwargs))
            if isinstance(t, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                if storage.data_ptr() not in known and storage not in self._seen:
                    self._seen.add(storage)
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._freed, storage.nbytes())
        return result

    def _freed(self, nbytes: int) -> None:
        self.live -= nbytes


@pytest.mark.parametrize(
    ("heads", "key_heads", "tokens", "keys", "width", "options"),
    [
        (8, 8, 4096, 4096, 64, {}),
        (64, 64, 512, 512, 64, {}),
        (8, 1, 64, 40000, 256, {}),
        (4, 4, 2048, 6000, 128, {"is_causal": True, "causal_offset": 4000}),
        (2, 2, 1500, 9000, 256, {"grouping_block": 1400}),
        (4096, 4096, 16, 16, 64, {}),
    ],
)
@pytest.mark.parametrize("estimator", ["lsh-mean", "projection"])
def test_memory_is_bounded(
    heads: int,
    key_heads: int,
    tokens: int,
    keys: int,
    width: int,
    options: dict[str, Any],
    estimator: str,
) -> None:
    dtype = torch.float32 if heads == 8 else torch.bfloat16
    q = torch.zeros(1, tokens, heads, width, dtype=dtype).transpose(1, 2)
    k = torch.zeros(1, keys, key_heads, width, dtype=dtype).transpose(1, 2)
    mask = torch.zeros(1, 2, tokens, keys) if heads == 2 else None
    out = torch.empty_like(q)
    with LiveBytes() as memory:
        narrow = {"scale": 0.1, "rank": width // 2, "estimator": estimator}
        cpu.run(call_of(q, k, k, mask, out=out, **narrow, **options), fused=FUSED)
    assert memory.peak / 2**20 <= pieces.WORKSPACE_MIB
    assert memory.peak > 0


def test_the_memory_counter_counts() -> None:
    with LiveBytes() as memory:
        a = torch.ones(1 << 20)
        b = a + 1
        b.view(2, -1).mul_(2)
        del a, b
        _ = torch.ones(1 << 18)
    assert memory.peak == 8 << 20
    assert memory.live == 1 << 20
