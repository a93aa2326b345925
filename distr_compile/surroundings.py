"""What stands around the blocks of ``compile_blocks`` and runs as it is: its attention, reported.

Nobody compiles it, so nobody hands it to a backend. A module outside of all blocks is therefore
captured in its own first call, with the arguments that the model gives it: its graphs are matched
as a compile would match them, and run as they are. No module runs twice, and later calls are those
of the plain module.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import CodeType
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.utils import counters

from distr_compile.backend import Options, run_pass
from distr_compile.explaining import untraced
from distr_compile.policy import Policy
from distr_compile.reporting import GraphReport, Reason, SiteRow, record, report
from distr_compile.reporting.publish import publish
from distr_compile.running import Shared

_AS_IT_IS = Policy({"group_size": 1, "exact": "keep"})
_REASON = Reason(
    "outside-blocks",
    "it stands outside of the blocks that compile_blocks compiles, and runs as it is; accepted: "
    "layers within a block, or the whole model, compiled with backend='distr'",
)
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, torch.jit.ScriptModule)


def watch(
    model: nn.Module, shown: Mapping[str, str], blocks: Sequence[nn.Module], options: Options
) -> None:
    """Have the attention outside of the blocks reported, module by module when it is first called.

    Args:
        model: is called once or more often afterwards; ``distr_compile.report(model)`` then has a
            row for each attention that was found, exact for the reason "outside-blocks".
        shown: every name of a module -> the one that reports go by, as ``Root`` has it.
        blocks: the modules that are compiled.
        options: of the compile.
    """
    inside = {id(module) for block in blocks for module in block.modules()}
    for whole, module in model.named_modules():
        is_plain = type(module).__module__.startswith("torch.nn.") and not any(module.children())
        holds_blocks = any(id(each) in inside for each in module.modules())
        if holds_blocks or is_plain or isinstance(module, _CONTAINERS):
            continue
        if module._compiled_call_impl is None:
            call: Any = _FirstCall(model, module, shown[whole], options)
            module._compiled_call_impl = call


def notes(model: nn.Module, blocks: Sequence[nn.Module]) -> tuple[str, ...]:
    """Sentences about modules that hold blocks and spell attention in their own code.

    That code is captured by nobody. Only the names in it are looked at.
    """
    held = {id(block) for block in blocks}
    inside = {id(module) for block in blocks for module in block.modules()}
    found: dict[str, list[str]] = {}
    for module in model.modules():
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        if id(module) in inside or not any(id(each) in held for each in module.modules()):
            continue
        words = code.co_names if isinstance(code, CodeType) else ()
        said = [w for w in words if ("softmax" in w or "attention" in w) and not hasattr(module, w)]
        if said:
            found[f"{type(module).__qualname__}.forward()"] = said
    return tuple(
        f"{function} has {', '.join(said)} in its own code, around the blocks: it runs as it is, "
        "exactly, and attention in it is not in this report"
        for function, said in found.items()
    )


@dataclass(eq=False)
class _FirstCall:
    """Stands in the place of a module's compiled call until that is called.

    Attributes:
        model: the whole model.
        module: one outside of its blocks.
        name: of that module.
        options: of the compile of the blocks.
    """

    model: nn.Module
    module: nn.Module
    name: str
    options: Options

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call: Callable[..., Any] = self.module._call_impl
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return call(*args, **kwargs)
        for each in self.module.modules():  # they are seen as parts of this one
            if isinstance(each._compiled_call_impl, _FirstCall):
                each._compiled_call_impl = None
        with _captured_only() as settings:
            look: Any = torch.compile(self.module, backend=self._look, **settings)
            return look(*args, **kwargs)

    def _look(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        shared = Shared(self.model, (self.name,), False, self.options.root)
        result = run_pass(gm, _AS_IT_IS, change=False, shared=shared)
        rows = tuple(map(_outside, result.graph.rows))
        graph = GraphReport(
            0, result.graph.root, rows, result.graph.not_attention, mode=result.graph.mode
        )
        if not graph.is_empty:
            publish(graph)
            record(self.model, graph, (_REASON.code, result.key), self.options.policy)
            if self.options.report is not None:
                report(self.model).to_json(self.options.report)
        return gm.forward


def _outside(row: SiteRow) -> SiteRow:
    others = (reason for reason in row.reasons if reason.code != "group-size-1")
    return replace(row, reasons=(_REASON, *others))


@contextlib.contextmanager
def _captured_only() -> Iterator[dict[str, Any]]:
    """Leave no trace in Dynamo; what it cannot capture runs as it is, and it counts no graph.

    Yields options for ``torch.compile``.
    """
    log, before = logging.getLogger("torch._dynamo.convert_frame"), dict(counters["stats"])
    was_disabled, log.disabled = log.disabled, True
    try:
        with untraced() as settings, torch._dynamo.config.patch(suppress_errors=True):
            yield settings
    finally:
        log.disabled = was_disabled
        counters["stats"].clear()
        counters["stats"].update(before)
