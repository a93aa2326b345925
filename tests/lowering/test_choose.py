"""Who computes a call: order, refusals, failures, and what is remembered of them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from distr_compile.kernels.attention import cpu as kernel
from distr_compile.kernels.attention import reference
from distr_compile.lowering import choose, cpu, cuda
from distr_compile.lowering.call import Approximation, Call, Scores, Shape, call_of
from distr_compile.lowering.choose import Implementation, KernelWarning
from distr_compile.lowering.told import Listener, listening
from distr_compile.reporting import Handover

op = torch.ops.distr.attention.default

OPTIONS: dict[str, Any] = {
    "scale": 0.2,
    "rank": 16,
    "estimator": "projection",
    "grouping_block": 8,
}

Fake = Callable[..., Implementation]


def qkv(dtype: torch.dtype = torch.float32, **sizes: int) -> tuple[Tensor, Tensor, Tensor]:
    at = {"N": 20, "M": 24, "d": 32} | sizes
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 4, at[n], at["d"], generator=generator) for n in "NMM")
    return q.to(dtype), k.to(dtype), v.to(dtype)


def exact(q: Tensor, k: Tensor, v: Tensor, **softmax: Any) -> Tensor:
    wide = [t.double() for t in (q, k, v)]
    return reference.attention(*wide, scale=0.2, rank=q.shape[3], **softmax)


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the implementations; forgets the failures of other tests."""
    monkeypatch.setattr(choose, "_failed", {})

    def put(*implementations: Implementation) -> None:
        monkeypatch.setattr(choose, "implementations", lambda: implementations)

    return put


def failing(name: str, error: Exception, seen: list[str], *, spoil: bool = False) -> Implementation:
    def run(call: Call) -> None:
        seen.append(name)
        if spoil:
            call.out[..., :1] = torch.nan
        raise error

    return Implementation(name, lambda *_: None, run)


def filling(name: str, value: float, seen: list[str]) -> Implementation:
    def run(call: Call) -> None:
        seen.append(name)
        call.out.fill_(value)

    return Implementation(name, lambda *_: None, run)


def refusing(name: str) -> Implementation:
    def run(call: Call) -> None:
        raise AssertionError("it was asked to run")

    return Implementation(name, lambda *_: f"{name} will not", run)


def test_a_failing_first_hands_over_to_the_second(order: Callable[..., None]) -> None:
    seen: list[str] = []
    first = failing("first", RuntimeError("no registers\nmore"), seen, spoil=True)
    order(refusing("none"), first, filling("second", 3.0, seen), filling("third", 4.0, seen))
    q, k, v = qkv()
    why = "first, cpu, torch.float32, d = 32, r = 16, d_v = 32: RuntimeError: no registers$"
    with pytest.warns(KernelWarning, match=why):
        got = op(q, k, v, **OPTIONS)
    assert (got == 3).all(), "what a failed attempt wrote is written over"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (op(q, k, v, **OPTIONS) == 3).all()
    assert seen == ["first", "second", "second"], "remembered: not tried again"


def test_a_failure_is_remembered_for_calls_of_its_kind_only(order: Callable[..., None]) -> None:
    seen: list[str] = []
    order(failing("first", RuntimeError("x"), seen), filling("second", 0, []))
    q, k, v = qkv()
    odd = torch.randn(2, 4, 20, 33)[..., 1:]  # rows are 33 numbers apart and start 4 bytes later
    kinds: list[tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]] = [
        ((q, k, v), {}),
        ((q.half(), k.half(), v.half()), {}),
        ((odd, k, v), {}),
        ((q, k, v), {"rank": 24}),
        ((q, k, v), {"is_causal": True}),
    ]
    for tensors, more in kinds:
        for again in (False, True):
            seen.clear()
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                op(*tensors, **OPTIONS | more)
            assert (len(seen), len(said)) == ((0, 0) if again else (1, 1))
    seen.clear()
    longer = qkv(N=52, M=56)  # the length alone does not matter
    op(*longer, **OPTIONS)
    assert not seen


def test_the_fallback_of_what_failed_comes_before_the_next(order: Callable[..., None]) -> None:
    seen: list[str] = []
    other = filling("another form", 2.0, seen)
    first = replace(failing("first", RuntimeError("x"), seen), fallback=other)
    order(first, filling("second", 3.0, seen))
    q, k, v = qkv()
    with pytest.warns(KernelWarning, match="first"):
        assert (op(q, k, v, **OPTIONS) == 2).all()
    assert (op(q, k, v, **OPTIONS) == 2).all()
    assert seen == ["first", "another form", "another form"]
    assert not choose.refusals(Shape.of(q, k, v, None, False), Approximation("projection", 16))
    order(replace(first, name="first again", fallback=refusing("none")), filling("second", 3.0, []))
    with pytest.warns(KernelWarning, match="first again"):
        assert (op(q, k, v, **OPTIONS) == 3).all()


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("Triton Error [CUDA]: invalid argument"),
        RuntimeError("HIP error: unspecified launch failure"),
    ],
    ids=str,
)
def test_what_a_device_reports_is_not_remembered(
    order: Callable[..., None], error: Exception
) -> None:
    seen: list[str] = []
    order(failing("first", error, seen), filling("second", 3.0, seen))
    for _ in range(2):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert (op(*qkv(), **OPTIONS) == 3).all()
        assert [w.category for w in said] == [KernelWarning]
    assert seen == ["first", "second"] * 2
    assert not choose._failed


def test_out_of_memory_is_raised_and_not_remembered(order: Callable[..., None]) -> None:
    seen: list[str] = []
    order(failing("first", torch.OutOfMemoryError("full"), seen), filling("second", 0, []))
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            op(*qkv(), **OPTIONS)
    assert seen == ["first"] * 2
    assert not choose._failed


def test_memory_that_a_cpu_lacks_is_raised_too(order: Callable[..., None]) -> None:
    error = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
    order(failing("first", error, []), filling("second", 0, []))
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        op(*qkv(), **OPTIONS)
    assert not choose._failed


def test_where_all_fail_the_result_is_exact_and_told(order: Callable[..., None]) -> None:
    """With and without what SDPA cannot say."""
    order(failing("first", RuntimeError("no such thing"), []), refusing("none"))
    told: list[tuple[int, Handover | None]] = []
    q, k, v = qkv()
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    for extra in ({}, {"softcap": 1.5}, {"sinks": sinks}):
        with listening(Listener(lambda *seen: told.append(seen))), pytest.warns(KernelWarning):
            got = op(q, k, v, site=5, **OPTIONS, **extra)
        torch.testing.assert_close(got.double(), exact(q, k, v, **extra), rtol=1e-5, atol=1e-6)
        assert got.transpose(1, 2).is_contiguous()
    assert [site for site, _ in told] == [5] * 3
    assert all("no such thing" in str(text) for _, text in told)


def test_without_triton_the_next_one_computes(
    order: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "distr_compile.kernels.attention.triton_fwd", None)
    triton = Implementation("distr-triton", lambda *_: None, cuda.IMPLEMENTATION.run)
    order(triton, cpu.IMPLEMENTATION)
    q, k, v = qkv()
    with pytest.warns(KernelWarning, match="distr-triton.*Module"):
        got = op(q, k, v, **OPTIONS)
    wanted = reference.attention(*(t.double() for t in (q, k, v)), **OPTIONS)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)


def test_exact_calls_run_in_the_fused_kernel(order: Callable[..., None]) -> None:
    """A rank of d asks for exact attention by our kernel; a short call is SDPA's."""
    seen: list[str] = []
    order(filling("ours", 1.0, seen))
    q, k, v = qkv()
    options = OPTIONS | {"rank": 32}
    assert (op(q, k, v, **options) == 1).all()
    got = op(q, k, v, min_seq_len=21, **options)
    torch.testing.assert_close(got.double(), exact(q, k, v), rtol=1e-5, atol=1e-6)
    assert seen == ["ours"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("extra", [{}, {"softcap": 1.5}, {"is_causal": True, "causal_offset": 3}])
def test_exact_calls_against_fp64(dtype: torch.dtype, extra: dict[str, Any]) -> None:
    q, k, v = qkv(dtype, N=197, M=100, d=40)
    got = op(q, k, v, **OPTIONS | {"rank": 40}, **extra).double()
    wanted = exact(q, k, v, **extra)
    assert (got - wanted).abs().max() <= 8 * torch.finfo(dtype).eps * wanted.abs().max()


def test_who_refuses_what() -> None:
    q, k, v = qkv()
    approximation = Approximation("projection", 16)
    shape = Shape.of(q, k, v, None, False)
    on_gpu = shape._replace(device=torch.device("cuda"))
    names = {
        (shape, approximation): "distr-cpu" if kernel.available(q.dtype) else "torch-products",
        (shape._replace(dtype=torch.float64), approximation): "torch-products",
        (shape._replace(dtype=torch.float64), Approximation.none(32)): "sdpa",
        (on_gpu, approximation): "distr-triton",
        (on_gpu, Approximation.none(32)): "distr-triton",
        (on_gpu._replace(dtype=torch.float64), approximation): "torch-products",
    }
    for (where, how), name in names.items():
        assert choose.name_of(where, how) == name
    said = choose.refusals(shape._replace(dtype=torch.float64), approximation)
    assert list(said) == ["distr-triton", "distr-cpu"]
    assert "float64" in said["distr-cpu"]


def test_a_call_knows_its_shape() -> None:
    q, k, v = qkv()
    mask = torch.ones(1, 1, 20, 24, dtype=torch.bool)
    k = k.transpose(1, 2).contiguous().transpose(1, 2)
    call = Call(
        *(q, k, v, mask, None),
        scores=Scores(0.2, True, 4, 2.0),
        approximation=Approximation("projection", 16),
        bases=None,
        out=torch.empty_like(q),
    )
    shape = call.shape
    assert (shape.num_queries, shape.num_keys, shape.causal_offset) == (20, 24, 4)
    assert (shape.softcap, shape.sinks, shape.mask) == (True, False, ((1, 1, 20, 24), torch.bool))
    assert shape.order == ((0, 1, 2, 3), (0, 2, 1, 3), (0, 1, 2, 3))


def test_an_option_that_the_op_has_not_is_refused() -> None:
    q, k, v = qkv()
    with pytest.raises(TypeError, match=r"options: got \['sink'\]; accepted: .*'scale'"):
        call_of(q, k, v, scale=0.2, out=torch.empty_like(q), sink=None)
