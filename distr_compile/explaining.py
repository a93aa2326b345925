"""What the backend would do to a model, without compiling anything."""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from types import CodeType, FrameType
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from distr_compile import identity, naming, underneath
from distr_compile.backend import run_pass
from distr_compile.lowering.judge import Judge
from distr_compile.policy import Policy, PolicyError
from distr_compile.policy.errors import check_callable
from distr_compile.reporting import GraphReport, NotAttention, Reason, Report

SET_ASIDE = (
    "the model has plans of distr_compile.transformers.apply: they were set aside here, to tell of "
    "the policy given; a compile keeps them, and its policy is for other attention"
)
"""Said of a model that has such plans."""


def explain(
    model: nn.Module | Callable[..., Any],
    *args: Any,
    policy: str | PathLike[str] | Policy | Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Report:
    """Run ``model(*args, **kwargs)`` once, eagerly, and report every attention in it.

    The graphs are captured and matched as ``backend="distr"`` would, but neither changed nor
    compiled. Where the policy leaves something to what is faster, that is measured and kept as a
    compile would, unless ``DISTR_MEASURE=0`` forbids it, and so the CPU kernel may be built.
    A module in eval mode, or a method of one, runs under ``torch.no_grad()``. What Dynamo
    learns meanwhile is dropped, so that a later compile is as if this had not been called. What the
    model was compiled with, in place too, is set aside meanwhile, and so are plans of
    ``distr_compile.transformers.apply``: the policy given is what counts.

    Args:
        model: a module or a function, compiled or not.
        *args: its arguments.
        policy: a path, a :class:`Policy` or a dict; without one ``DISTR_POLICY`` or the defaults.
        **kwargs: its keyword arguments.

    Returns:
        One row for each attention, with what would become of it and why. What ran outside of every
        graph, where no pass can see it, is in ``not_attention`` with the reason "outside-graph".

    Raises:
        PolicyError: the policy is wrong: for itself, or for this model (a rule that names no
            module, modules without attention, or a group size none of its layers can take).
        TypeError: there is nothing to call.
    """
    check_callable(model)
    return explain_by(Judge, model, args, kwargs, policy)


def explain_by(
    judge: Callable[[], Judge],
    model: nn.Module | Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    policy: str | PathLike[str] | Policy | Mapping[str, Any] | None = None,
) -> Report:
    """Explain as :func:`explain` does; ``judge`` makes, for each graph, who says what is faster."""
    had_plans = underneath.has_plans(model)
    with underneath.plain(model) as own:
        report = _explained(judge, own, args, kwargs, Policy.from_any(policy))
    if had_plans and report.parts:
        first = replace(report.parts[0], notes=(*report.parts[0].notes, SET_ASIDE))
        report = replace(report, parts=(first, *report.parts[1:]))
    return report


def _explained(
    judge: Callable[[], Judge],
    model: nn.Module | Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    checked: Policy,
) -> Report:
    owner = identity.key_of(model)
    graphs: list[GraphReport] = []
    without_attention = 0
    audit = checked.audit()
    outside = Outside(owner)

    def observe(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        nonlocal without_attention, audit
        result = run_pass(gm, checked, judge(), change=False)
        graph, audit = result.graph, audit + result.audit
        if graph.is_empty:
            without_attention += 1
        else:
            graphs.append(graph)
        return outside.excluding(gm.forward)

    is_inference = isinstance(owner, nn.Module) and not owner.training
    grad_mode = torch.no_grad() if is_inference else contextlib.nullcontext()
    with grad_mode, untraced() as options, outside:
        try:
            torch.compile(model, backend=observe, **options)(*args, **kwargs)
        except Exception as error:
            inner = getattr(error, "inner_exception", None)
            if isinstance(inner, PolicyError):
                raise inner from None
            raise
    name = getattr(model, "__name__", type(model).__name__)
    if outside.found:
        last = graphs.pop() if graphs else GraphReport(0, name)
        found = (*last.not_attention, *outside.found)
        graphs.append(replace(last, not_attention=found))
    numbered = tuple(replace(graph, index=i) for i, graph in enumerate(graphs))
    report = Report(numbered, name, without_attention)
    audit.check_sizes()
    audit.check_use()
    return report


@contextlib.contextmanager
def untraced() -> Iterator[dict[str, Any]]:
    """Drop what Dynamo captures and learns meanwhile; yields options for ``torch.compile``.

    Its graphs would count against the ``recompile_limit`` of the model's own compile, and the sizes
    it has seen would make the next compile dynamic.
    """
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list, reset_code
    from torch._dynamo import config, convert_frame, pgo

    # Newer versions keep entries of one torch.compile apart from all others.
    can_isolate = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    was_compiled: dict[CodeType, bool] = {}

    def remember(code: CodeType, new_code: CodeType) -> None:
        was_compiled.setdefault(code, bool(_debug_get_cache_entry_list(code)))

    sizes = pgo.get_code_state()
    sizes_before = copy.deepcopy(dict(sizes))
    hook = convert_frame.register_bytecode_hook(remember)
    try:
        with config.patch(
            # Every call captures anew, with a backend of its own: not to be counted.
            recompile_limit=2**16,
            accumulated_recompile_limit=2**16,
            # torch 2.11 may abort the process once guards of that kind are dropped.
            use_recursive_dict_tags_for_guards=False,
        ):
            yield {"isolate_recompiles": True} if can_isolate else {}
    finally:
        hook.remove()
        for code, before in was_compiled.items():
            # Older versions drop all or nothing: then the model's own graphs compile once more.
            if not (before and can_isolate):
                reset_code(code)
        sizes.clear()
        sizes.update(sizes_before)


class Outside(TorchDispatchMode):
    """Finds the attention that is executed outside of the captured graphs.

    That is code which Dynamo skips, or was told to (``torch.compiler.disable``). A dispatch mode
    sees it without changing what Dynamo captures, which a patched function or a function mode
    would.

    Args:
        owner: the module whose ``named_modules()`` name the layers.
    """

    supports_higher_order_operators = True  # else flex attention raises under the mode
    _OPS = re.compile(r"(?!_log_softmax).*(softmax|attention|transformer_encoder_layer_fwd)")

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let Dynamo capture under this mode."""
        return True

    def __init__(self, owner: object) -> None:
        super().__init__()
        self.found: list[NotAttention] = []
        self._depth = 0
        self._names: dict[int, str] = {}
        if isinstance(owner, nn.Module):
            shown = naming.canonical(owner)
            self._names = {id(module): shown[name] for name, module in owner.named_modules()}

    def excluding(self, graph: Callable[..., Any]) -> Callable[..., Any]:
        """``graph``, not watched while it runs."""

        def run(*args: Any) -> Any:
            self._depth += 1
            try:
                return graph(*args)
            finally:
                self._depth -= 1

        return run

    def watching(self, model: Callable[..., Any]) -> Callable[..., Any]:
        """``model``, watched while it runs."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self:
                return model(*args, **kwargs)

        return run

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        op = func.name().rpartition("::")[2].partition(".")[0]  # "aten::_softmax.out"
        first = out[0] if isinstance(out, tuple) else out
        is_run = self._depth == 0 and not isinstance(first, FakeTensor)  # not while compiling
        if is_run and self._OPS.match(op) and "backward" not in op:
            shape = tuple(first.shape) if isinstance(first, torch.Tensor) else ()
            text = "Dynamo makes no graph of this code (skipped or disabled): it runs as it is"
            entry = NotAttention(self._layer(), op, shape, Reason("outside-graph", text))
            self.found.append(entry)
        return out

    def _layer(self) -> str:
        """Name of the innermost module whose method is running."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            name = self._names.get(id(frame.f_locals.get("self")))
            if name is not None:
                return name
            frame = frame.f_back
        return ""
