"""The fused CPU kernel against the formula in fp64.

The rule is that of ``test_attention_fwd.py``: the error is at most ``FACTOR`` times that of the
formula evaluated in the dtype of the inputs, plus two roundings of the largest result.
"""

from __future__ import annotations

import itertools
import math
import platform
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distr_compile.kernels.attention import build, cpu, reference
from distr_compile.kernels.roles import prefix_edge
from distr_compile.lowering import cpu_fused
from distr_compile.lowering.call import call_of
from tests.kernels.cpu_kernel import require_kernel

FACTOR = {torch.float32: 2.0, torch.float16: 1.0, torch.bfloat16: 1.0}
DTYPES = list(FACTOR)


@pytest.fixture(autouse=True)
def kernel() -> None:
    require_kernel()


# --- the formula --------------------------------------------------------------------------------


def formula(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    is_causal: bool = False,
    causal_offset: int = 0,
    grouping_block: int = 0,
    softcap: float = 0.0,
    exact: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in the dtype of the inputs, all scores at once."""
    N, M, rep = q.shape[2], v.shape[2], q.shape[1] // v.shape[1]
    block = grouping_block or N
    parts = []
    for start in range(0, N, block):
        K = k[:, :, start // block if k.shape[2] > 1 else 0].repeat_interleave(rep, 1)
        s = q[:, :, start : start + block] @ K.mT
        if exact is not None:
            rows = exact[0][:, :, start : start + block]
            own = rows @ exact[1].repeat_interleave(rep, 1).mT
            s = torch.where(torch.arange(M) < prefix_edge(start, M, causal_offset), s, own)
        parts.append(s)
    s = torch.cat(parts, 2) * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if mask is not None:
        s = s.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else s + mask.to(s.dtype)
    if is_causal:
        sees = torch.arange(M) <= torch.arange(N)[:, None] + causal_offset
        s = s.masked_fill(~sees, -math.inf)
    if sinks is not None:
        s = torch.cat([s, sinks.to(s.dtype)[:, None, None].expand(*s.shape[:3], 1)], -1)
    lse = s.logsumexp(-1)
    p = torch.where(lse[..., None] > -math.inf, (s - lse[..., None]).exp(), 0)
    return p[..., :M] @ v.repeat_interleave(rep, 1), lse


def check(q: Tensor, k: Tensor, v: Tensor, *more: Tensor | None, **options: Any) -> Tensor:
    """Run the kernel, compare with ``formula`` by the rule above, return the output."""
    options.setdefault("scale", q.shape[3] ** -0.5)
    shape = (*q.shape[:3], v.shape[3])
    # Both outputs lie inside larger ones, full of NaN, that must stay so around them.
    wide = q.new_full((shape[0], shape[1], shape[2] + 3, shape[3] + 5), math.nan)
    wide_lse = torch.full((*shape[:2], shape[2] + 3), math.nan)
    out, lse = wide[:, :, 2:-1, : shape[3]], wide_lse[:, :, 2:-1]
    cpu.attention(q, k, v, *more, out=out, lse=lse, **options)
    assert wide.isnan().sum() == wide.numel() - out.numel()
    assert wide_lse.isnan().sum() == wide_lse.numel() - lse.numel()

    def in_dtype(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        cast = [t if t is None or t.dtype == torch.bool else t.to(dtype) for t in (q, k, v, *more)]
        pair = options.get("exact")
        here = {} if pair is None else {"exact": tuple(t.to(dtype) for t in pair)}
        return formula(*cast, **{**options, **here})

    exact, exact_lse = in_dtype(torch.float64)
    agree(out, in_dtype(q.dtype)[0], exact)
    score = largest_score(q, k, options["scale"])
    agree(lse, in_dtype(torch.float32)[1], exact_lse, some=exact_lse > -math.inf, summed=score)
    assert torch.equal(lse == -math.inf, exact_lse == -math.inf)
    return out


def largest_score(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """No part of the sum of a score is larger, whatever the order in which it is added up."""
    widest = [t.double().norm(dim=-1).amax() if t.numel() else torch.zeros(()) for t in (q, k)]
    return abs(scale) * widest[0] * widest[1]


def agree(
    got: Tensor,
    same: Tensor,
    exact: Tensor,
    some: Tensor | None = None,
    summed: Tensor | None = None,
) -> None:
    """``summed`` is the sum of what the result may be a small difference of: half an eps of it."""
    if some is not None:
        got, same, exact = (t[some] for t in (got, same, exact))
    if exact.numel():
        error, limit = ((t.double() - exact).abs().max().item() for t in (got, same))
        # Of a weight, and of the result itself: one number alone may be right to the last bit.
        rounding = 2 * torch.finfo(got.dtype).eps * exact.abs().max().item()
        if summed is not None:
            rounding = max(rounding, torch.finfo(got.dtype).eps / 2 * summed.max().item())
        assert error <= FACTOR[got.dtype] * limit + rounding


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def inputs(
    *, B: int = 1, H: int = 2, Hk: int = 2, N: int = 70, M: int = 130, r: int = 32, dv: int = 40,
    blocks: int = 1, dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        random(B, H, N, r, dtype=dtype),
        random(B, Hk, blocks, M, r, dtype=dtype, seed=1),
        random(B, Hk, M, dv, dtype=dtype, seed=2),
    )


# --- shapes and strides -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [24, 40, 72, 80, 96, 192])
@pytest.mark.parametrize("tokens", [1, 17, 197, 1000])
def test_odd_shapes(tokens: int, width: int, dtype: torch.dtype) -> None:
    check(*inputs(H=1, Hk=1, N=tokens, M=tokens, r=width, dv=width, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("N", "M", "r", "dv"),
    [(5, 1, 1, 1), (65, 96, 17, 3), (1, 97, 33, 129), (129, 31, 16, 64), (16, 1000, 64, 7)],
)
def test_lengths_and_widths_that_differ(
    N: int, M: int, r: int, dv: int, dtype: torch.dtype
) -> None:
    check(*inputs(B=2, H=4, Hk=2, N=N, M=M, r=r, dv=dv, dtype=dtype))
    check(*inputs(N=N, M=M, r=r, dv=dv, dtype=dtype), is_causal=True, causal_offset=M - N)


def layouts(t: Tensor) -> Iterator[Tensor]:
    """The same tensor in other memory."""
    yield t.transpose(1, 2).contiguous().transpose(1, 2)  # tokens before heads
    yield t.movedim(-1, 0).contiguous().movedim(0, -1)  # widths first
    yield torch.stack([t, t + 1], -1)[..., 0]  # every second number
    wide = t.new_full([n + 3 for n in t.shape], math.nan)  # inside NaN
    yield wide[tuple(slice(1, n + 1) for n in t.shape)].copy_(t)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_do_not_matter(dtype: torch.dtype) -> None:
    q, k, v = inputs(B=2, N=200, dtype=dtype)
    mask = random(2, 2, 200, 130, seed=3)
    wanted = check(q, k, v, mask)
    for q2, k2, v2, mask2 in zip(*map(layouts, (q, k, v, mask)), strict=True):
        got = check(q2, k2, v2, mask2)
        assert torch.equal(got, wanted)
    one = k[:1, :1].expand(2, 2, 1, 130, 32)
    assert torch.equal(check(q, one, v), check(q, one.clone(), v))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("H", "Hk", "kb", "vb"), [(6, 2, 1, 2), (4, 1, 2, 1), (8, 8, 1, 1)])
def test_heads_and_batches_are_shared(
    H: int, Hk: int, kb: int, vb: int, dtype: torch.dtype
) -> None:
    q, k, v = inputs(B=2, H=H, Hk=Hk, dtype=dtype)
    check(q, k[:kb], v[:vb])
    check(q, k[:kb], v[:vb], is_causal=True, causal_offset=60)


def test_nothing_to_compute() -> None:
    q, k, v = inputs(N=20, M=20)
    assert (cpu.attention(q, k[..., :0, :], v[:, :, :0], scale=1.0, out=v.clone()) == 0).all()
    assert cpu.attention(q[:, :, :0], k, v, scale=1.0, out=v[:, :, :0]).shape == (1, 2, 0, 40)
    check(q, k[..., :0, :], v[:, :, :0], None, torch.ones(2))


# --- variants -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [-80, -7, 0, 1, 60, 129, 200])
def test_causal_offsets(offset: int, dtype: torch.dtype) -> None:
    q, k, v = inputs(H=4, dtype=dtype)
    got = check(q, k, v, is_causal=True, causal_offset=offset)
    assert (got[:, :, : max(-offset, 0)] == 0).all()
    check(q, k, v, random(130, seed=3) > -1, is_causal=True, causal_offset=offset)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masks(dtype: torch.dtype) -> None:
    q, k, v = inputs(B=3, H=4, dtype=dtype)
    sizes = [(1, n) for n in (3, 4, 70, 130)]
    for shape in itertools.chain([(130,), (70, 1), (4, 1, 130)], itertools.product(*sizes)):
        values = random(*shape, seed=3)
        for mask in (values, values > -0.8, (values * 3).bfloat16(), values.half()):
            check(q, k, v, mask)
    check(q, k, v, random(70, 130, seed=4).double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [(0, 96), (96, 130), (10, 120), (0, 130)], ids=str)
def test_rows_and_tiles_that_are_hidden(keys: tuple[int, int], dtype: torch.dtype) -> None:
    q, k, v = inputs(dtype=dtype)
    sees = torch.ones(70, 130, dtype=torch.bool)
    sees[:, slice(*keys)] = False
    sees[[0, 13, 69]] = False
    for mask in (sees, torch.zeros(70, 130).masked_fill(~sees, -math.inf), sees[1:2], sees[:1]):
        got = check(q, k, v, mask)
        assert (got[:, :, [0, 13, 69]] == 0).all() or len(mask) == 1
    hidden = k.clone()
    hidden[..., slice(*keys), :] = math.nan
    got, wanted = (
        cpu.attention(q, keys, v, sees[1:2], scale=0.1, out=torch.empty_like(got))
        for keys in (hidden, k)
    )
    assert torch.equal(got, wanted)


def test_lowest_finite_mask_gives_the_mean_of_v() -> None:
    q, k, v = inputs()
    mask = torch.full((70, 130), torch.finfo(torch.float32).min)
    for lowest in (mask, mask[:1]):
        got = cpu.attention(q, k, v, lowest, scale=0.1, out=torch.empty(1, 2, 70, 40))
        torch.testing.assert_close(got, v.mean(2, keepdim=True).expand_as(got))


def test_nan_and_infinity_reach_their_own_row_only() -> None:
    q, k, v = inputs()
    wanted = cpu.attention(q, k, v, scale=0.1, out=torch.empty(1, 2, 70, 40))
    for x in (math.nan, math.inf):
        q2 = q.clone()
        q2[0, 1, 33, 3] = x
        got = cpu.attention(q2, k, v, scale=0.1, out=torch.empty(1, 2, 70, 40))
        assert got[0, 1, 33].isnan().all()
        got[0, 1, 33] = wanted[0, 1, 33]
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.0, 0.3, 1.5, 50.0])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_softcap_and_sinks(softcap: float, has_sinks: bool, dtype: torch.dtype) -> None:
    q, k, v = inputs(H=4, dtype=dtype)
    sinks = torch.tensor([1.5, -30.0, 0.25, 40.0], dtype=dtype) if has_sinks else None
    sees = random(1, 1, 70, 130, seed=4) > -0.5
    sees[:, :, [2, 39]] = False
    for mask in (None, sees, random(4, 70, 130, seed=5, dtype=dtype)):
        check(q, k, v, mask, sinks, softcap=softcap)
        check(q, k, v, mask, sinks, softcap=softcap, is_causal=True, causal_offset=-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [1, 16, 37, 64, 69])
def test_a_khat_for_every_block(block: int, dtype: torch.dtype) -> None:
    q, k, v = inputs(B=2, H=4, dtype=dtype, blocks=math.ceil(70 / block))
    check(q, k, v, grouping_block=block)
    check(q, k, v, grouping_block=block, is_causal=True, causal_offset=11)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [-20, 0, 5, 100])
@pytest.mark.parametrize("block", [16, 37, 69])
def test_strict_form(block: int, offset: int, dtype: torch.dtype) -> None:
    q, k, v = inputs(B=2, H=4, dtype=dtype, r=16, blocks=math.ceil(70 / block))
    exact = random(2, 4, 70, 33, dtype=dtype, seed=6), random(2, 2, 130, 33, dtype=dtype, seed=7)
    options: dict[str, Any] = {"exact": exact, "grouping_block": block, "causal_offset": offset}
    check(q, k, v, **options)
    check(q, k, v, is_causal=True, **options)
    check(q, k, v, random(70, 130, seed=3) > 0, is_causal=True, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "r"), [(32, 16), (40, 17), (72, 50), (128, 64)])
def test_factors_made_in_the_kernel(d: int, r: int, dtype: torch.dtype) -> None:
    """With bases the kernel is attention on Q A and K B, rounded to the dtype of the inputs."""
    q, k, v = inputs(B=2, H=4, dtype=dtype, r=d)
    A, B = (random(2, 2, 3, d, r, seed=s) / d**0.5 for s in (8, 9))
    rows = [q[:, :, i * 25 : i * 25 + 25].float() for i in range(3)]
    Qhat = torch.cat([t @ A[:, :, i].repeat_interleave(2, 1) for i, t in enumerate(rows)], 2)
    Khat = k.float() @ B
    options: dict[str, Any] = {"scale": 0.2, "grouping_block": 25}
    exact = formula(Qhat.double(), Khat.double(), v.double(), **options)[0]
    same = formula(Qhat.to(dtype), Khat.to(dtype), v, **options)[0]
    out = torch.full_like(same, math.nan)
    agree(cpu.attention(q, k, v, bases=cpu.laid_out(A, B), out=out, **options), same, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_bits_do_not_depend_on_threads(causal: bool, dtype: torch.dtype) -> None:
    q, k, v = inputs(B=2, H=4, N=300, M=400, r=24, blocks=3, dtype=dtype)
    exact = random(2, 4, 300, 33, dtype=dtype, seed=6), random(2, 2, 400, 33, dtype=dtype, seed=7)
    options: dict[str, Any] = {"scale": 0.2, "grouping_block": 123, "is_causal": causal}
    before, got = torch.get_num_threads(), []
    try:
        for threads, pair in itertools.product((1, 2, 3), (None, exact)):
            torch.set_num_threads(threads)
            out = torch.empty(2, 4, 300, 40, dtype=dtype)
            got.append(cpu.attention(q, k, v, exact=pair, out=out, **options))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(got[0], t) for t in got[2::2])
    assert all(torch.equal(got[1], t) for t in got[3::2])


# --- accuracy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [1.0, 4.0])
@pytest.mark.parametrize("tokens", [197, 1000, 3000])
@pytest.mark.parametrize("width", [40, 64, 128])
def test_fp32_is_about_as_exact_as_sdpa(width: int, tokens: int, spread: float) -> None:
    """The root mean square error over fp64 is at most 1.5 times that of SDPA."""
    q, k, v = (random(1, 2, tokens, width, seed=s) for s in range(3))
    q = q * spread
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    sdpa = F.scaled_dot_product_attention(q, k, v)
    out = torch.empty_like(sdpa)
    cpu_fused.exact_attention(call_of(q, k, v, scale=width**-0.5, out=out))
    error, limit = ((t.double() - exact).square().mean().sqrt().item() for t in (out, sdpa))
    assert error <= 1.5 * limit


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_call_is_that_of_the_definition(data: st.DataObject) -> None:
    B, Hk, rep, N, M, d, dv = (
        data.draw(st.integers(1, most)) for most in (2, 3, 3, 90, 210, 50, 50)
    )
    dtype = data.draw(st.sampled_from(DTYPES))
    q = random(B, Hk * rep, N, d, dtype=dtype)
    k, v = random(B, Hk, M, d, dtype=dtype, seed=1), random(B, Hk, M, dv, dtype=dtype, seed=2)
    mask = None
    if data.draw(st.booleans()):
        full = (B, Hk * rep, N, M)
        shape = [data.draw(st.sampled_from([1, n])) for n in full]
        mask = random(*shape, seed=3)
        mask = mask > -0.5 if data.draw(st.booleans()) else mask
    options: dict[str, Any] = {
        "scale": data.draw(st.sampled_from([d**-0.5, 1.0, -0.3])),
        "is_causal": data.draw(st.booleans()),
        "causal_offset": data.draw(st.integers(-20, 60)),
        "softcap": data.draw(st.sampled_from([0.0, 2.0])),
        "sinks": data.draw(st.sampled_from([None, random(Hk * rep, seed=4)])),
    }
    options["causal_offset"] *= options["is_causal"]
    got = torch.full((B, Hk * rep, N, dv), math.nan, dtype=dtype)
    cpu_fused.exact_attention(call_of(q, k, v, mask, out=got, **options))

    def defined(working: torch.dtype, v: Tensor = v) -> Tensor:
        cast = [t.to(working) for t in (q, k, v)]
        bias = mask if mask is None or mask.dtype == torch.bool else mask.to(working)
        return reference.attention(*cast, bias, rank=d, **options)

    # A weight is wrong by as much of it as its score is wrong by.
    summed = defined(torch.float64, v.abs()) * (1 + largest_score(q, k, options["scale"]))
    agree(got, defined(dtype), defined(torch.float64), summed=summed)


@pytest.mark.parametrize(
    "flags",
    [
        ("-DDISTR_PACK_BYTES=65536", "-DDISTR_STATE_BYTES=65536"),  # keys in several waves
        ("-mno-amx-bf16",),
        ("-mno-avx512f",),
        ("-mno-avx",),
    ],
    ids=["small workspace", "no tiles", "AVX2", "SSE"],
)
def test_other_builds(flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    if flags[0].startswith("-m") and platform.machine() != "x86_64":
        pytest.skip("these are flags of x86")
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-O1", *flags))
    monkeypatch.setattr(cpu, "_loaded", None)
    try:
        for dtype in DTYPES:
            q, k, v = inputs(B=2, H=4, N=130, M=500, r=33, blocks=3, dtype=dtype)
            mask = random(2, 1, 130, 500, seed=3)
            exact = random(2, 4, 130, 40, dtype=dtype), random(2, 2, 500, 40, dtype=dtype, seed=7)
            options: dict[str, Any] = {"grouping_block": 45, "causal_offset": 300}
            check(q, k, v, **options, is_causal=True)
            check(q, k, v, mask, torch.ones(4), softcap=2.0, **options)
            check(q, k, v, mask > 0, exact=exact, **options)
        assert cpu.unavailable_reason() is None
    finally:
        cpu.forget()


def test_it_tells_why_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.SWITCH, "0")
    q, k, v = inputs()
    assert cpu.unavailable_reason() == "DISTR_CPU_KERNEL=0 forbids it"
    assert not cpu.available(q.dtype)
    with pytest.raises(RuntimeError, match="not available: DISTR_CPU_KERNEL=0"):
        cpu.attention(q, k, v, scale=1.0, out=torch.empty(1, 2, 70, 40))
