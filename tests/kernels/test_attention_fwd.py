"""The Triton forward kernel against the formula in fp64; on a GPU where there is one.

Elsewhere the kernels run in Triton's interpreter, where tiles are kept small, so that odd sequence
lengths still make several of them.
"""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distr_compile.kernels.attention import reference
from distr_compile.kernels.attention import triton_fwd as module
from distr_compile.kernels.attention.triton_fwd import Tile, attention_fwd

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"

no_interpreter = pytest.mark.skipif(
    not ON_GPU, reason="Triton's interpreter computes bf16 on its bits, as integers"
)
DTYPES = [torch.float16, torch.float32, pytest.param(torch.bfloat16, marks=no_interpreter)]

# numpy, inside the interpreter, warns of overflows that are meant: lowest number - score = -inf.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

# The rule: the kernel's error is at most FACTOR times the error of the formula, evaluated in the
# dtype of the inputs, plus ROUNDINGS epsilons of the largest result, for results that the formula
# happens to have exact. Errors are the largest over all elements, against the formula in fp64. lse
# is fp32 whatever the inputs are, and so is the formula it is compared with. On a GPU a product of
# fp32 numbers is three of tf32 numbers, which leave out up to 2^-22 of it, four fp32 roundings.
FACTOR = {torch.float16: 1.0, torch.bfloat16: 1.0, torch.float32: 8.0 if ON_GPU else 2.0}
ROUNDINGS = 1.0

SMALL = Tile(32, 32, 4)


# --- the formula --------------------------------------------------------------------------------


def formula(
    Qhat: Tensor,
    Khat: Tensor,
    V: Tensor,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    is_causal: bool = False,
    causal_offset: int = 0,
    grouping_block: int,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in the dtype of the inputs, all scores at once, head by head."""
    B, H, N, _ = Qhat.shape
    M = V.shape[2]
    out, lse = Qhat.new_empty(B, H, N, V.shape[3]), Qhat.new_empty(B, H, N)
    for b, h in itertools.product(range(B), range(H)):
        kh = h * Khat.shape[1] // H
        K = Khat[min(b, Khat.shape[0] - 1), kh]
        rows = [Qhat[b, h, i] @ K[i // grouping_block if len(K) > 1 else 0].T for i in range(N)]
        s = torch.stack(rows) * scale
        if softcap:
            s = softcap * torch.tanh(s / softcap)
        if mask is not None:
            m = mask.expand(B, H, N, M)[b, h]
            s = torch.where(m, s, -math.inf) if m.dtype == torch.bool else s + m.to(s.dtype)
        if is_causal:
            i, j = torch.arange(N)[:, None], torch.arange(M)[None]
            s = torch.where((j <= i + causal_offset).to(s.device), s, -math.inf)
        if sinks is not None:
            s = torch.cat([s, sinks[h].to(s.dtype).expand(N, 1)], 1)
        highest = s.amax(1, keepdim=True).clamp_min(torch.finfo(s.dtype).min)
        p = torch.exp(s - highest)
        total = p.sum(1, keepdim=True)
        p = torch.where(total > 0, p / total, 0.0)
        out[b, h] = p[:, :M] @ V[min(b, V.shape[0] - 1), kh]
        lse[b, h] = torch.where(total > 0, highest + total.log(), -math.inf)[:, 0]
    return out, lse


def converted(tensors: tuple[Tensor | None, ...], dtype: torch.dtype) -> list[Tensor | None]:
    return [t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors]


def check(*tensors: Tensor | None, tile: Tile = SMALL, lse: bool = True, **options) -> Tensor:
    """Run the kernel, compare with ``formula`` by the rule above, return the output."""
    Qhat, V = tensors[0], tensors[2]
    shape = (*Qhat.shape[:3], V.shape[3])
    # Both outputs lie inside larger ones, full of NaN, that must stay so around them.
    wide = Qhat.new_full((shape[0], shape[1], shape[2] + 3, shape[3] + 5), math.nan)
    wide_lse = torch.full((*shape[:2], shape[2] + 3), math.nan, device=DEVICE)
    out, kernel_lse = wide[:, :, 2:-1, : shape[3]], wide_lse[:, :, 2:-1]
    attention_fwd(*tensors, tile=tile, out=out, lse=kernel_lse if lse else None, **options)
    assert wide.isnan().sum() == wide.numel() - out.numel()
    assert wide_lse.isnan().sum() == wide_lse.numel() - lse * kernel_lse.numel()

    exact, exact_lse = formula(*converted(tensors, torch.float64), **options)
    agree(out, formula(*tensors, **options)[0], exact)
    if lse:
        same = formula(*converted(tensors, torch.float32), **options)[1]
        agree(kernel_lse, same, exact_lse)
    return out


def agree(got: Tensor, same: Tensor, exact: Tensor) -> None:
    """The rule, for one result, the formula in its precision, and the formula in fp64."""
    assert torch.equal(got == -math.inf, exact == -math.inf)
    some = exact > -math.inf
    if some.any():
        error, limit = ((t.double() - exact)[some].abs().max() for t in (got, same))
        rounding = torch.finfo(got.dtype).eps * exact[some].abs().max()
        assert error <= FACTOR[got.dtype] * limit + ROUNDINGS * rounding


# --- inputs -------------------------------------------------------------------------------------


def inside_nan(t: Tensor) -> Tensor:
    """The same tensor as a part of a larger one whose other elements are NaN."""
    wide = t.new_full([n + 3 for n in t.shape], math.nan)
    part = wide[tuple(slice(1, n + 1) for n in t.shape)]
    return part.copy_(t)


def tokens_first(t: Tensor) -> Tensor:
    """The same tensor laid out as projections leave it: all heads of a token side by side."""
    heads_last = t.movedim(1, -2).contiguous()
    return heads_last.movedim(-2, 1)


def widths_first(t: Tensor) -> Tensor:
    """The same tensor with the width as its first dimension in memory."""
    return t.movedim(-1, 0).contiguous().movedim(0, -1)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def factors(
    dtype: torch.dtype,
    *,
    B: int = 2,
    H: int = 2,
    H_k: int = 2,
    N: int = 77,
    M: int = 90,
    r: int = 20,
    d_v: int = 40,
    block: int = 40,
    layout=inside_nan,
) -> tuple[Tensor, Tensor, Tensor]:
    """Qhat, Khat and V of random numbers."""
    blocks = -(-N // block)
    return (
        layout(random(B, H, N, r, dtype=dtype, seed=1)),
        layout(random(B, H_k, blocks, M, r, dtype=dtype, seed=2)),
        layout(random(B, H_k, M, d_v, dtype=dtype, seed=3)),
    )


# --- tests --------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize(
    ("N", "M", "r", "d_v", "block", "tile"),
    [
        (1, 1, 16, 16, 1, Tile(16, 16, 4)),
        (1, 197, 32, 64, 1, Tile(64, 64, 4)),
        (17, 40, 12, 24, 16, Tile(16, 16, 4)),
        (64, 128, 32, 64, 64, Tile(32, 64, 4)),
        (197, 197, 36, 72, 100, Tile(64, 64, 4)),
        (197, 64, 40, 80, 197, Tile(64, 32, 4)),
        (60, 130, 96, 192, 16, Tile(128, 64, 4)),
        (130, 60, 48, 96, 100, Tile(16, 32, 4)),
        (1000, 1000, 12, 24, 100, Tile(128, 128, 4)),
        (1000, 500, 16, 40, 1000, Tile(128, 64, 4)),
    ],
    ids=lambda x: f"{x.block_m}x{x.block_n}" if isinstance(x, Tile) else str(x),
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes(dtype, N, M, r, d_v, block, tile, is_causal):
    H = 1 if N > 500 else 2
    inputs = factors(dtype, B=1, H=H, H_k=H, N=N, M=M, r=r, d_v=d_v, block=block)
    check(*inputs, scale=r**-0.5, is_causal=is_causal, grouping_block=block, tile=tile)


@pytest.mark.parametrize("offset", [1, 13, 30, -20, -200, 500])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_causal_offset(dtype, offset):
    """Among them offsets where a tile is seen whole but for one key, or only by its last row."""
    inputs = factors(dtype, B=1)
    out = check(*inputs, scale=0.2, is_causal=True, causal_offset=offset, grouping_block=40)
    blind = max(0, min(77, -offset))
    assert (out[:, :, :blind] == 0).all()
    assert (out[:, :, blind:] != 0).all()


MASKS = [(2, 2, 77, 90), (2, 1, 77, 90), (1, 2, 1, 90), (77, 90), (2, 1, 77, 1), (1, 1, 1, 1)]


@pytest.mark.parametrize("shape", MASKS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bool_mask(dtype, shape):
    mask = random(*shape, seed=4) > 0.3
    check(*factors(dtype), mask, scale=0.2, grouping_block=40, is_causal=shape == (77, 90))


@pytest.mark.parametrize("shape", MASKS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias(dtype, shape):
    bias = inside_nan(random(*shape, dtype=dtype, seed=4))
    check(*factors(dtype), bias, scale=0.2, grouping_block=40, is_causal=shape == (77, 90))


@pytest.mark.parametrize("bias_dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_bias_of_another_dtype(bias_dtype):
    bias = random(2, 1, 77, 90, dtype=bias_dtype, seed=4)
    check(*factors(torch.float16, B=2), bias, scale=0.2, grouping_block=40)


def test_a_mask_is_read_through_its_strides():
    """Keys before rows in memory, heads from last to first, a batch that is expanded."""
    mask = random(90, 77, 2, seed=4).permute(2, 1, 0).flip(0)[None].expand(2, -1, -1, -1)
    assert mask.stride() == (0, 1, 2, 154)
    check(*factors(torch.float32), mask, scale=0.2, grouping_block=40)


def test_bias_of_lowest_numbers_is_uniform_and_of_minus_infinity_is_nothing():
    """What masks made of finfo.min, or of -inf, do to a row that they cover whole."""
    inputs = factors(torch.float32)
    bias = torch.zeros(77, 90, device=DEVICE)
    bias[::3] = torch.finfo(torch.float32).min
    bias[1::3] = -math.inf
    bias[2::3, :50] = torch.finfo(torch.float32).min
    out = check(*inputs, bias, scale=0.2, grouping_block=40)
    mean = inputs[2].mean(2, keepdim=True).expand_as(out[:, :, ::3])
    torch.testing.assert_close(out[:, :, ::3], mean, rtol=0, atol=1e-6)
    assert (out[:, :, 1::3] == 0).all()


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-35, 5.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale(dtype, scale):
    """Down to a softmax over equal scores, up to scores of about 80, and with masked keys."""
    mask = random(77, 90, seed=4) > 0
    check(*factors(dtype), mask, scale=scale, grouping_block=40, is_causal=True)


@pytest.mark.parametrize(
    ("B", "H", "H_k", "of_batch_1"),
    [(2, 4, 2, ""), (1, 6, 1, ""), (2, 3, 3, "KV"), (2, 2, 1, "K"), (2, 4, 2, "V")],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shared_heads_and_batches(dtype, B, H, H_k, of_batch_1):
    Qhat, Khat, V = factors(dtype, B=B, H=H, H_k=H_k)
    Khat = Khat[:1] if "K" in of_batch_1 else Khat
    V = V[:1] if "V" in of_batch_1 else V
    check(Qhat, Khat, V, scale=0.2, grouping_block=40, is_causal=B == 1)


def test_expanded_heads_and_batches():
    """Expanded views with strides 0, as repeat_kv leaves them."""
    Qhat, Khat, V = factors(torch.float16, B=1, H_k=1)
    Khat, V = Khat.expand(3, 2, -1, -1, -1), V.expand(3, 2, -1, -1)
    check(Qhat.expand(3, -1, -1, -1), Khat, V, scale=0.2, grouping_block=40)


@pytest.mark.parametrize("layout", [torch.clone, tokens_first, inside_nan, widths_first])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(dtype, layout):
    """The last has no unit stride, and is copied by the host."""
    inputs = factors(dtype, H=4, r=16, d_v=32, layout=layout)
    assert (inputs[2].stride(-1) == 1) == (layout is not widths_first)
    check(*inputs, scale=0.2, grouping_block=40)


def test_output_as_tokens_first():
    inputs = factors(torch.float32, block=77)
    out = torch.full((2, 77, 2, 40), math.nan, device=DEVICE).transpose(1, 2)
    attention_fwd(*inputs, scale=0.2, grouping_block=77, tile=SMALL, out=out)
    assert torch.equal(out, check(*inputs, scale=0.2, grouping_block=77, lse=False))


@pytest.mark.parametrize("masked", ["", "bool", "bias"])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sinks_and_softcap(dtype, softcap, masked):
    """Rows that the causality leaves without keys: 0, all of their weight is the sink's."""
    mask = random(77, 90, dtype=dtype, seed=4) if masked else None
    mask = mask > 0 if masked == "bool" else mask
    sinks = torch.tensor([1.5, -math.inf], device=DEVICE)
    options = {"scale": 0.4, "softcap": softcap, "is_causal": True, "causal_offset": -9}
    out = check(*factors(dtype), mask, sinks, grouping_block=40, **options)
    assert (out[:, :, :9] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softcap_of_huge_scores(dtype):
    """exp(2x) overflows and vanishes; tanh(x) is 1 and -1."""
    Qhat, Khat, V = factors(dtype)
    out = check(Qhat * 100, Khat * 100, V, scale=1e6, softcap=5.0, grouping_block=40)
    assert out.isfinite().all()


@pytest.mark.parametrize("softcap", [30.0, 50.0])
def test_softcap_of_ordinary_scores(softcap):
    """The caps of known models, by the documented error of c * 2^-20 in every score."""
    inputs = factors(torch.float32)
    options = {"scale": 2.0, "softcap": softcap, "grouping_block": 40}
    out, lse = inputs[0].new_empty(2, 2, 77, 40), inputs[0].new_empty(2, 2, 77)
    attention_fwd(*inputs, tile=SMALL, out=out, lse=lse, **options)
    exact, exact_lse = formula(*converted(inputs, torch.float64), **options)
    assert (lse - exact_lse).abs().max() <= softcap * 2**-20 + 1e-6
    # A weight moves by the error of its score and of the sum; their sum over |V| bounds the output.
    assert (out - exact).abs().max() <= 2 * softcap * 2**-20 * inputs[2].abs().max()


@pytest.mark.parametrize("sinks_dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_sinks_of_any_dtype_and_stride(sinks_dtype):
    sinks = random(6, dtype=sinks_dtype, seed=5)[::3]
    check(*factors(torch.float32), None, sinks, scale=0.2, grouping_block=40)


@pytest.mark.parametrize("l2_bytes", [0, 2 * 90 * 60 * 4, 1 << 30])
def test_causal_order_of_the_programs(monkeypatch, l2_bytes):
    """One, four or all six heads at a time: every tile of every head is computed."""
    monkeypatch.setattr(module, "L2_BYTES", l2_bytes)
    inputs = factors(torch.float32, B=1, H=6, H_k=3)
    check(*inputs, scale=0.2, grouping_block=40, is_causal=True)


@pytest.mark.parametrize("tile", [Tile(16, 64, 4), Tile(64, 16, 4), Tile(128, 128, 8, 3)])
def test_tiles_do_not_change_the_result(tile):
    inputs = factors(torch.float32, B=1)
    options = {"scale": 0.2, "grouping_block": 40, "is_causal": True, "causal_offset": 7}
    out, expected = (check(*inputs, tile=t, **options) for t in (tile, SMALL))
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Names of the host functions that the special loads go through, as they are called."""
    made: list[str] = []
    for name in ("descriptor", "_with_scratch"):
        function = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, n=name, f=function: (made.append(n), f(*args))[1]
        )
    return made


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("layout", [torch.clone, tokens_first])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensor_descriptors(calls, dtype, layout, masked):
    """With a mask also causal, and K and V of one batch entry for both."""
    mask = random(77, 90, seed=4) > 0 if masked else None
    Qhat, Khat, V = factors(dtype, H=4, r=24, layout=layout)
    Khat, V = (Khat[:1], V[:1]) if masked else (Khat, V)
    tile = Tile(32, 32, 4, use_tma=True)
    check(Qhat, Khat, V, mask, scale=0.2, grouping_block=40, is_causal=masked, tile=tile)
    assert calls == ["descriptor", "descriptor"]


@pytest.mark.parametrize("why", ["strides", "base", "expanded", "step of 0"])
def test_what_descriptors_cannot_read_goes_by_pointers(calls, why):
    Qhat, Khat, V = factors(torch.float16, r=16, layout=torch.clone)
    if why == "strides":
        V = inside_nan(V)
    elif why == "base":
        Khat = F.pad(Khat, (1, 0)).flatten()[1:].as_strided(Khat.shape, (5440, 2720, 1440, 16, 1))
    elif why == "expanded":
        V = V[:, :1].expand(-1, 2, -1, -1)
    elif why == "step of 0":  # of one batch entry, where it is never taken
        V = V[:1].as_strided((1, *V.shape[1:]), (0, *V.stride()[1:]))
    tile = Tile(32, 32, 4, use_tma=True)
    check(Qhat, Khat, V, scale=0.2, grouping_block=40, tile=tile)
    assert calls == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_warp_specialization(calls, dtype):
    tile = Tile(128, 32, 4, use_tma=True, warp_specialize=True)
    inputs = factors(dtype, B=1, N=300, M=128, r=24, block=200, layout=torch.clone)
    check(*inputs, scale=0.2, grouping_block=200, tile=tile)
    assert calls == ["descriptor", "descriptor", "_with_scratch"]


@pytest.mark.parametrize("why", ["causal", "mask", "keys", "queries", "rows"])
def test_where_warps_are_not_specialized(calls, why):
    tile = Tile(128, 32, 4, use_tma=True, warp_specialize=True)
    N, M = 60 if why == "rows" else 200, 100 if why == "keys" else 128
    Qhat, Khat, V = factors(torch.float16, B=1, N=N, M=M, r=24, block=200, layout=torch.clone)
    Qhat = tokens_first(Qhat) if why == "queries" else Qhat
    mask = torch.ones(1, M, dtype=torch.bool, device=DEVICE) if why == "mask" else None
    check(Qhat, Khat, V, mask, scale=0.2, grouping_block=200, tile=tile, is_causal=why == "causal")
    assert calls == ["descriptor", "descriptor"]


@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_full_width_is_exact_attention(dtype, is_causal):
    Q, K, V = (random(2, 4, n, 64, dtype=dtype, seed=n) for n in (70, 90, 90))
    V = random(2, 4, 90, 24, dtype=dtype, seed=3)
    out = torch.empty(2, 4, 70, 24, dtype=dtype, device=DEVICE)
    options = {"scale": 0.125, "is_causal": is_causal}
    attention_fwd(Q, K[:, :, None], V, grouping_block=70, tile=SMALL, out=out, **options)
    exact = F.scaled_dot_product_attention(Q.double(), K.double(), V.double(), **options)
    agree(out, F.scaled_dot_product_attention(Q, K, V, **options), exact)


@pytest.mark.parametrize("block", [16, 100, 150])
@pytest.mark.parametrize("estimator", ["lsh-sample", "lsh-mean"])
def test_factors_of_the_reference(estimator, block):
    """Qhat and Khat from reference.py, against the whole of reference.py, grouped queries too."""
    Q, K, V = random(2, 4, 150, 64), random(2, 2, 130, 64, seed=1), random(2, 2, 130, 48, seed=2)
    options = {"rank": 16, "estimator": estimator, "grouping_block": block}
    blocks = reference.estimate(Q, K, **options)
    Qhat = torch.cat([b.Qhat for b in blocks], 2)
    Khat = torch.stack([b.Khat for b in blocks], 2)
    more = {"scale": 0.125, "is_causal": True, "causal_offset": -5}
    out = torch.empty(2, 4, 150, 48, device=DEVICE)
    attention_fwd(Qhat, Khat, V, grouping_block=block, tile=SMALL, out=out, **more)
    exact = reference.attention(Q.double(), K.double(), V.double(), **options, **more)
    agree(out, reference.attention(Q, K, V, **options, **more), exact)


def test_offsets_beyond_32_bits():
    """Rows 2^26 elements apart in one buffer, which the operating system hardly has to fill."""
    wide, rows = 1 << 26, 40
    buffer = torch.empty(rows * wide, dtype=torch.float16, device=DEVICE)

    def part(start: int, *shape: int) -> Tensor:
        steps = [rows * wide] * (len(shape) - 2) + [wide, 1]
        return buffer.as_strided(shape, steps, start).copy_(random(*shape, dtype=buffer.dtype))

    Qhat, Khat = part(0, 1, 1, rows, 16), part(1000, 1, 1, 1, rows, 16)
    V, bias, out = (
        part(n, 1, 1, rows, width) for n, width in ((2000, 16), (3000, rows), (4000, 16))
    )
    options = {"scale": 0.2, "grouping_block": rows, "tile": Tile(16, 16, 4)}
    attention_fwd(Qhat, Khat, V, bias, out=out, **options)
    near = [t.contiguous() for t in (Qhat, Khat, V, bias)]
    assert torch.equal(out, check(*near, **options))


@pytest.mark.parametrize(("B", "N", "M"), [(0, 5, 5), (1, 0, 5), (1, 5, 0)])
@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
def test_empty(B, N, M, is_causal):
    Qhat, Khat, V = random(B, 2, N, 16), random(B, 2, 1, M, 16), random(B, 2, M, 16)
    out, lse = torch.full((B, 2, N, 16), 7.0), torch.full((B, 2, N), 7.0)
    out, lse = out.to(DEVICE), lse.to(DEVICE)
    options = {"scale": 0.2, "is_causal": is_causal, "grouping_block": 5}
    tile = Tile(32, 32, 4, use_tma=True)
    attention_fwd(Qhat, Khat, V, tile=tile, out=out, lse=lse, **options)
    assert (out == 0).all()
    assert (lse == -math.inf).all()


REFUSED = {
    "dtypes of Qhat, Khat, V, out: got float16, float32, float32, float32; must be one of "
    "float16, bfloat16, float32, the same for all": lambda a: a | {"Qhat": a["Qhat"].half()},
    "Khat: got 2 heads; must divide the 3 heads of Qhat": lambda a: (
        a | {"Qhat": random(2, 3, 9, 16)}
    ),
    "Khat: got 2 grouping blocks for 9 rows in blocks of 4; must be 3, or 1": lambda a: (
        a | {"grouping_block": 4}
    ),
    "grouping_block: got 0; must be at least 1": lambda a: a | {"grouping_block": 0},
    r"V: got shape (2, 2, 8, 16); must be (2, 2, 7, 16) or (1, 2, 7, 16)": lambda a: (
        a | {"V": random(2, 2, 8, 16)}
    ),
    "sinks: got shape (3,); must be (2,)": lambda a: a | {"sinks": random(3)},
    "out: got shape (2, 2, 9, 8); must be (2, 2, 9, 16)": lambda a: a | {"out": a["out"][..., :8]},
    "out: got last stride 2; must be 1": lambda a: a | {"out": random(2, 2, 9, 32)[..., ::2]},
    "lse: got torch.float64; must be torch.float32": lambda a: (
        a | {"lse": random(2, 2, 9).double()}
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message):
    arguments = {
        "Qhat": random(2, 2, 9, 16),
        "Khat": random(2, 2, 2, 7, 16),
        "V": random(2, 2, 7, 16),
        "out": random(2, 2, 9, 16),
        "grouping_block": 5,
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        attention_fwd(**REFUSED[message](arguments), scale=1.0, tile=SMALL)
