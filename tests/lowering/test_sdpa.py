"""Names of architectures, and which backend of SDPA goes first, without the devices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from distr_compile import backend
from distr_compile.lowering import architecture as architectures
from distr_compile.lowering import sdpa
from distr_compile.lowering.architecture import architecture
from distr_compile.lowering.sdpa import best_sdpa
from distr_compile.reporting import GraphReport, Reason, SiteRow

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((8, 0), "sm_80"),
        ((9, 0), "sm_90"),
        ((8, 7), "sm_86"),
        ((12, 0), "sm_89"),
        ((7, 5), "sm_75"),
    ],
)
def test_architectures_by_capability(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], name: str
) -> None:
    architectures.architecture.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert architecture(GPU) == name
    architectures.architecture.cache_clear()


def test_a_cpu_has_the_default_architecture() -> None:
    assert architecture(CPU) == "default"


# --- cuDNN before FlashAttention-2, where it is faster -----------------------------------------


def order() -> list[int]:
    return list(torch._C._get_sdp_priority_order())


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "architecture", lambda device: "sm_90")


@pytest.mark.usefixtures("hopper")
def test_cudnn_goes_first_and_everything_is_put_back() -> None:
    before = order()
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    try:
        with best_sdpa(GPU):
            cudnn = int(SDPBackend.CUDNN_ATTENTION)
            assert order() == [cudnn, *(b for b in before if b != cudnn)]
            assert not torch.backends.cuda.mem_efficient_sdp_enabled()
    finally:
        torch.backends.cuda.enable_mem_efficient_sdp(True)
    assert order() == before


@pytest.mark.usefixtures("hopper")
def test_an_order_that_somebody_set_is_left_alone() -> None:
    mine = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION]
    with sdpa_kernel(mine, set_priority=True):
        before = order()
        with best_sdpa(GPU):
            assert order() == before
        assert order() == before


def test_other_devices_keep_the_order() -> None:
    before = order()
    with best_sdpa(CPU):
        assert order() == before


def row(**fields: Any) -> SiteRow:
    shape = (2, 4, 128, 64)
    defaults = {"layer": "a", "form": "sdpa", "dtype": "float16", "mask": "none"}
    defaults |= {"decision": "exact", "reasons": (Reason("rank", "too narrow"),)}
    return SiteRow(**defaults | {"shapes": {"q": shape, "k": shape, "v": shape}} | fields)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("fields", "changes"),
    [
        ({}, True),
        ({"mask": "causal"}, True),
        ({"mask": "bool"}, False),
        ({"shapes": {"q": (2, 4, "s0", 64)}}, False),
        ({"decision": "distr", "reasons": ()}, False),
    ],
)
def test_only_for_plain_exact_attention_of_fixed_sizes(
    fields: dict[str, Any], changes: bool
) -> None:
    with torch._subclasses.FakeTensorMode():
        inputs = [torch.empty(2, 3, device="cuda"), 5]
    result = backend.Result(GraphReport(0, "M", (row(**fields),)), None, (), False)
    before = order()
    with backend._exact_kernels(result, inputs):
        assert (order() != before) == changes
    with backend._exact_kernels(result, [torch.empty(2)]):
        assert order() == before
    nothing = replace(result, graph=GraphReport(0, "Model"))
    with backend._exact_kernels(nothing, inputs):
        assert order() == before


def test_the_graph_is_compiled_in_that_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order is the one in force when the compiler runs, which is when SDPA chooses."""
    seen: list[list[int]] = []
    monkeypatch.setattr(sdpa, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(backend, "_exact_kernels", lambda result, inputs: best_sdpa(GPU))
    original: Callable[..., Any] = backend._compile

    def watched(*args: Any) -> Any:
        seen.append(order())
        return original(*args)

    monkeypatch.setattr(backend, "_compile", watched)
    torch._dynamo.reset()
    q = torch.randn(1, 2, 32, 32)
    attend = torch.nn.functional.scaled_dot_product_attention
    compiled = torch.compile(
        lambda q: attend(q, q, q), backend=backend.distr, options={"compiler": "eager"}
    )
    torch.testing.assert_close(compiled(q), attend(q, q, q))
    assert [first[0] for first in seen] == [int(SDPBackend.CUDNN_ATTENTION)]
