"""The op with the bases of ``calibrated``: value, checks, and what feeds the kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from distr_compile.kernels.attention import reference
from distr_compile.kernels.calibrated import launch
from distr_compile.lowering import cuda
from distr_compile.lowering.call import call_of
from distr_compile.lowering.op import attention

OP = torch.ops.distr.attention.default
OPTIONS: dict[str, Any] = {
    "scale": 0.2, "rank": 20, "estimator": "calibrated", "grouping_block": 0,
}  # fmt: skip


def operands(dtype: torch.dtype = torch.float32, *, rows: int = 40) -> tuple[Tensor, ...]:
    """Q, K, V, A, B: 4 query heads on 2 key heads of width 32, rank 20, tokens before heads."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, rows, 4, 32), (1, 50, 2, 32), (1, 50, 2, 24))
    q, k, v = (torch.randn(s, generator=generator).to(dtype).transpose(1, 2) for s in shapes)
    A, B = (torch.randn(2, 32, 20, generator=generator) / 5 for _ in range(2))
    return q, k, v, A, B


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block", [0, 16])
def test_value(dtype: torch.dtype, causal: bool, block: int) -> None:
    """That of softmax(scale Q A (K B)^T) V written out in fp64; one block whatever is asked."""
    q, k, v, A, B = operands(dtype)
    mask = torch.rand(2, 1, 40, 50, generator=torch.Generator().manual_seed(1)) > 0.2
    options = OPTIONS | {"grouping_block": block, "is_causal": causal}
    got = OP(q, k, v, mask, A, B, **options)
    Q, K, V = (t.double() for t in (q, k, v))
    Khat = (K @ B.double()).repeat_interleave(2, 1)
    scores = 0.2 * (Q @ A.double().repeat_interleave(2, 0)) @ Khat.mT
    seen = mask & torch.ones(40, 50, dtype=torch.bool).tril() if causal else mask
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()
    wanted = weights @ V.repeat_interleave(2, 1)
    rounding = torch.finfo(dtype).eps * 8
    torch.testing.assert_close(got.double(), wanted, rtol=rounding, atol=rounding)
    defined = reference.attention(
        Q, K, V, mask, scale=0.2, is_causal=causal, rank=20, estimator="calibrated",
        grouping_block=block, bases=(A, B),
    )  # fmt: skip
    torch.testing.assert_close(defined, wanted, rtol=1e-10, atol=1e-10)


def test_opcheck() -> None:
    q, k, v, A, B = operands()
    torch.library.opcheck(OP, (q, k, v, None, A, B), OPTIONS)


def test_short_calls_are_exact_and_ask_for_no_product() -> None:
    q, k, v, A, B = operands(rows=5)
    got = OP(q, k, v, None, A * torch.nan, B, **OPTIONS, softcap=3.0)
    wanted = reference.attention(q, k, v, scale=0.2, rank=32, softcap=3.0)
    torch.testing.assert_close(got, wanted)


def test_autocast_leaves_the_bases_alone() -> None:
    q, k, v, A, B = operands()
    with torch.autocast("cpu", torch.bfloat16):
        got = OP(q, k, v, None, A, B, **OPTIONS)
    low = (t.bfloat16() for t in (q, k, v))
    assert torch.equal(got, OP(*low, None, A, B, **OPTIONS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factors_for_kernels(dtype: torch.dtype) -> None:
    """As exact as the rounding of A and of the product allows, three roundings in all."""
    q, k, _, A, B = operands(dtype)
    for rows, basis, got in zip(
        (q, k), (A.repeat_interleave(2, 0), B), launch.factors(q, k, A, B), strict=True
    ):
        wanted = rows.double() @ basis.double()
        size = rows.double().abs() @ basis.double().abs()
        assert got.dtype == dtype
        assert got.shape == (*rows.shape[:3], 20)
        assert ((got.double() - wanted).abs() <= 2 * torch.finfo(dtype).eps * size).all()


def test_factors_too_large_for_fp16_are_its_largest() -> None:
    q, k, _, A, B = operands(torch.float16)
    Qhat, Khat = launch.factors(q * 1e4, k, A * 1e3, B)
    assert Qhat.isfinite().all()
    assert Qhat.abs().max() == torch.finfo(torch.float16).max
    assert Khat.isfinite().all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without")
@pytest.mark.parametrize("causal", [False, True])
def test_kernels_take_the_factors(causal: bool) -> None:
    """What the op does on a GPU, in Triton's interpreter: an inner width that is no power of 2."""
    q, k, v, A, B = operands()
    out = torch.empty(2, 40, 4, 24).transpose(1, 2)
    cuda.attention(call_of(*launch.factors(q, k, A, B), v, is_causal=causal, **OPTIONS, out=out))
    wanted = OP(q, k, v, None, A, B, is_causal=causal, **OPTIONS)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)


BAD: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "none": (None, None, {}, "got None with calibrated"),
    "one": (0, None, {}, "got None with calibrated"),
    "other estimator": (0, 0, {"estimator": "projection"}, "got a tensor with projection"),
    "rank": (0, 0, {"rank": 19}, r"got \(2, 32, 20\); must be .* = \(2, 32, 19\)"),
    "heads": (lambda t: t[:1], 0, {}, r"basis_q: got \(1, 32, 20\)"),
    "dimensions": (0, lambda t: t[0], {}, r"basis_k: got \(32, 20\)"),
    "dtype": (
        lambda t: t.half(),
        0,
        {},
        "basis_q: got torch.float16 on cpu; must be",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bases_that_do_not_fit(name: str) -> None:
    q, k, v, A, B = operands()
    change_a, change_b, options, message = BAD[name]
    pair = (
        None if change is None else change(t) if callable(change) else t
        for t, change in ((A, change_a), (B, change_b))
    )
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, None, *pair, **(OPTIONS | options))
