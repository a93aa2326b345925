"""What the report says where an implementation fails at run time and another computes the call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext as _nothing
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distr_compile
from distr_compile.kernels.attention import backward as backward_kernel
from distr_compile.kernels.attention import cpu as kernel
from distr_compile.lowering import choose
from distr_compile.lowering.choose import KernelWarning
from distr_compile.reporting import Reason, Report
from tests.backend_models import WIDTH, Attention, approximate
from tests.kernels.cpu_kernel import require_kernel

COMPILERS = ["eager", "aot_eager", "inductor"]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    require_kernel()
    monkeypatch.setattr(choose, "_failed", {})
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def break_(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(module, name, fail)


def compiled(model: nn.Module, compiler: str, **plan: Any) -> Any:
    policy = {"default": {"min_seq_len": 0, **plan}}
    options: dict[str, Any] = {"policy": policy, "compiler": compiler}
    return torch.compile(model, backend="distr", options=options)


def tokens() -> Tensor:
    return torch.randn(2, 40, WIDTH)


def says(reason: Reason | None, *parts: str) -> bool:
    return (
        reason is not None
        and reason.code == "kernel-failed"
        and all(part in reason.text for part in parts)
    )


@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_forward_that_fails(compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's products compute it: approximated still, and no exact call."""
    model, x = Attention().eval(), tokens()
    called = compiled(model, compiler)
    with torch.no_grad():
        called(x)
        (row,) = distr_compile.report(called).rows
        assert (row.kernel, row.runtime_kernel, row.runtime_reason) == ("distr-cpu", None, None)
        break_(monkeypatch, kernel, "attention")
        with pytest.warns(KernelWarning, match="no such instruction"):
            got = called(x)
        torch.testing.assert_close(got, approximate(model, x), rtol=1e-4, atol=1e-5)
    assert (row.kernel, row.runtime_kernel) == ("distr-cpu", "torch-products")
    assert says(row.runtime_reason, "distr-cpu, cpu", "no such instruction", "torch-products comp")
    assert (row.runtime_exact_calls, row.runtime_backward_reason) == (0, None)
    text = str(distr_compile.report(called))
    assert "(ran: torch-products)" in text
    assert "kernel-failed [1]" in text
    again = Report.from_json(distr_compile.report(called).to_json()).rows[0]
    assert (again.runtime_kernel, again.runtime_reason) == ("torch-products", row.runtime_reason)


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_training_that_fails(compiler: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward runs when the compiled call is long over, and the row says it all the same."""
    model, x = Attention(), tokens()
    called = compiled(model, compiler, training="approximate")

    def gradients() -> list[Tensor]:
        model.zero_grad()
        called(x).square().mean().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    wanted = gradients()
    (row,) = distr_compile.report(called).rows
    assert (row.kernel, row.backward) == ("distr-cpu", "distr-cpu")
    if way == "forward":
        break_(monkeypatch, kernel, "attention")
    else:
        break_(monkeypatch, backward_kernel, "backward")
    for _ in range(2):  # the second time it is remembered, without a warning
        with pytest.warns(KernelWarning) if not choose._failed else _nothing():
            got = gradients()
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)
    forward = (row.runtime_kernel, row.runtime_reason)
    backward = (row.runtime_backward, row.runtime_backward_reason)
    failed, sound = (forward, backward) if way == "forward" else (backward, forward)
    assert failed[0] == "torch-products"
    name = "distr-cpu" if way == "forward" else "distr-cpu, backward"
    assert says(failed[1], f"{name}, cpu", "no such instruction")
    assert sound == (None, None)
    again = Report.from_json(distr_compile.report(called).to_json()).rows[0]
    assert (again.runtime_backward, again.runtime_backward_reason) == backward
    assert str(distr_compile.report(called)).count("(ran: torch-products)") == 1


def test_each_model_hears_of_its_own_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have a site of number 0, and one backward for both."""
    models = [Attention(), Attention()]
    first, second = (compiled(m, "aot_eager", training="approximate") for m in models)
    x = tokens()
    losses = [first(x).sum(), second(x).sum()]
    rows = [distr_compile.report(one).rows[0] for one in (first, second)]
    break_(monkeypatch, backward_kernel, "backward")
    with pytest.warns(KernelWarning):
        losses[1].backward()
    assert [row.runtime_backward for row in rows] == [None, "torch-products"]
    losses[0].backward()
    assert [row.runtime_backward for row in rows] == ["torch-products"] * 2


def test_all_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call is exact: counted, and the row says by what and why."""
    model, x = Attention().eval(), tokens()
    called = compiled(model, "eager")

    def fail(*_: Any) -> None:
        raise RuntimeError("nothing works")

    broken = [choose.Implementation(n, lambda *_: None, fail) for n in ("one", "two")]
    with torch.no_grad():
        called(x)
        monkeypatch.setattr(choose, "implementations", lambda: broken)
        with pytest.warns(KernelWarning, match="nothing works"):
            torch.testing.assert_close(called(x), model(x), rtol=1e-4, atol=1e-5)
    (row,) = distr_compile.report(called).rows
    assert (row.runtime_exact_calls, row.runtime_kernel) == (1, "sdpa")
    assert says(row.runtime_reason, "one, cpu", "two, cpu", "sdpa computed the call")
