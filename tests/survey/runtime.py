"""Count the attention of a model while it runs, without its graph and without our pass.

Every softmax, every fused attention call and every opaque attention module that PyTorch executes is
one event. A ``TorchFunctionMode`` sees all spellings of softmax (method, ``torch.``, ``F.``,
``torch.special.``), and it is off while the function it intercepted runs, so the softmax inside
``F.multi_head_attention_forward`` is not counted a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .models import split

SOFTMAX: dict[Callable[..., Any], str] = {
    Tensor.softmax: "softmax",
    torch.softmax: "softmax",
    torch.special.softmax: "softmax",
    F.softmax: "softmax",
}
FUSED: dict[Callable[..., Any], str] = {
    F.scaled_dot_product_attention: "sdpa",
    F.multi_head_attention_forward: "mha",
    torch._transformer_encoder_layer_fwd: "encoder-layer",
    torch._native_multi_head_attention: "mha",
}


@dataclass(frozen=True)
class Event:
    """One executed attention-like operation.

    ``shape`` is that of the scores for a softmax, of the query otherwise; ``dim`` is the axis of a
    softmax. ``module`` is the innermost module being called, named as in ``named_modules()``.
    """

    op: str
    shape: tuple[int, ...]
    dim: int | None
    module: str
    module_class: str


class _Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.stack: list[tuple[str, str]] = [("", "")]

    def record(self, op: str, tensor: Tensor, dim: int | None) -> None:
        self.events.append(Event(op, tuple(tensor.shape), dim, *self.stack[-1]))

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in SOFTMAX:
            scores = args[0] if args else kwargs["input"]
            dim = args[1] if len(args) > 1 else kwargs.get("dim")
            self.record("softmax", scores, dim)
        elif func in FUSED:
            query = args[0] if args else kwargs.get("query", kwargs.get("src"))
            self.record(FUSED[func], query, None)
        return func(*args, **kwargs)


@contextmanager
def _module_stack(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Keep ``recorder.stack`` equal to the modules whose forward is running."""
    names = {id(module): name for name, module in model.named_modules()}

    def enter(module: nn.Module, args: Any) -> None:
        recorder.stack.append((names.get(id(module), "?"), type(module).__name__))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        recorder.stack.pop()

    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _flex_attention(recorder: _Recorder) -> Iterator[None]:
    """flex_attention is no torch function: it is wrapped where transformers calls it."""
    from transformers.integrations import flex_attention as integration

    original = integration.compile_friendly_flex_attention

    def counted(query: Tensor, *args: Any, **kwargs: Any) -> Any:
        recorder.record("flex", query, None)
        with torch._C.DisableTorchFunction():
            return original(query, *args, **kwargs)

    with mock.patch.object(integration, "compile_friendly_flex_attention", counted):
        yield


def record(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Any, list[Event]]:
    """Run ``model(**inputs)`` eagerly; return its output and what attention it executed, in order.

    Positional inputs are under the keys "0", "1", ....
    """
    recorder = _Recorder()
    args, kwargs = split(inputs)
    with torch.no_grad(), _module_stack(model, recorder), _flex_attention(recorder), recorder:
        output = model(*args, **kwargs)
    return output, recorder.events
