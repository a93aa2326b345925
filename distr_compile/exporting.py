"""Programs of ``torch.export`` with attention rewritten, to be saved, loaded and run."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from distr_compile import exported, naming
from distr_compile.bases import BasesOfModel
from distr_compile.lowering import op
from distr_compile.lowering.judge import Judge
from distr_compile.passes.apply import LayerChoice, Placed, apply, find_all
from distr_compile.passes.rewrite import keep_from_fusion
from distr_compile.policy import Attended, Policy
from distr_compile.policy.errors import check_type
from distr_compile.reporting import GraphReport, SiteRow, record
from distr_compile.reporting.publish import publish

HINT = "torch.ops.distr.attention is of the package distr_compile: import distr_compile.ops first"
"""What is said where a program is loaded without the op."""


def export(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    strict: bool = False,
    policy: str | PathLike[str] | Policy | Mapping[str, Any] | None = None,
) -> ExportedProgram:
    """Export a model for inference, with its attention rewritten as ``backend="distr"`` would.

    The program holds calls of ``torch.ops.distr.attention``, each with what was decided for it:
    what "auto" in the policy comes to is measured here, and holds on the machine that runs the
    program. ``distr_compile.report(model)`` then has the decisions. Where the program is loaded,
    ``import distr_compile.ops`` registers the op.

    Args:
        model: in eval mode, if it is to be run so.
        args: arguments of one call.
        kwargs: keyword arguments of that call.
        dynamic_shapes: as for ``torch.export.export``.
        strict: as for ``torch.export.export``: whether Dynamo captures the model.
        policy: a path, a dict or a ``Policy``; None is the file that ``DISTR_POLICY`` names, or the
            defaults.

    Returns:
        A program whose parameters are those of the model, in the same memory, but record no
        gradients.

    Raises:
        PolicyError: the policy is wrong: for itself, or for this model.
        TypeError: it is no module.
        Exception: what ``torch.export.export`` raises of a model it cannot export.
    """
    check_type("model", model, torch.nn.Module, "a torch.nn.Module", "wrap a function in one")
    checked = Policy.from_any(policy)
    shown = naming.canonical(model)
    checked.check_ambiguous(naming.ambiguous(model, shown))
    audit = checked.audit({*shown, *shown.values()})
    audit.check_names()
    with torch.no_grad():
        given = {"dynamic_shapes": dynamic_shapes, "strict": strict}
        program = torch.export.export(model, args, dict(kwargs or {}), **given)
        module = _module(program)
        placed = find_all(module)
        bases = BasesOfModel(checked, model)
        outcome = apply(placed, _Chooser(checked, shown), bases, Judge(), change=True)
        audit = audit.of_graph(_attended(outcome.rows, shown), _modules_of(module, shown))
        audit.check_sizes()
        audit.check_use()
        keep_from_fusion(module)
        module.recompile()
        graph = GraphReport(
            0,
            type(model).__name__,
            mode="export",
            rows=outcome.rows,
            not_attention=outcome.not_attention,
            matched=audit.matched,
            unmatched=audit.unmatched,
        )
        publish(graph)
        record(model, graph, key="export", policy=checked)
        # Traced once more: what was written has values then, and bases are constants of it.
        given = {"dynamic_shapes": dynamic_shapes}
        return _with_hint(torch.export.export(module, args, dict(kwargs or {}), **given))


def _with_hint(program: ExportedProgram) -> ExportedProgram:
    """An error of loading shows a node's stack trace: it says there what has to be imported."""
    for node in program.graph.nodes:
        if node.target is op.call:
            trace = str(node.meta.get("stack_trace") or "").rstrip("\n")
            node.meta["stack_trace"] = f"{trace}\n{HINT}\n"
    return program


def _module(program: ExportedProgram) -> fx.GraphModule:
    """The program as a module that the passes read, with parameters that record no gradients."""
    takes = inspect.signature(program.module).parameters
    module = program.module(**({"check_guards": False} if "check_guards" in takes else {}))
    assert isinstance(module, fx.GraphModule)
    frozen: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                same = frozen.setdefault(id(parameter), _frozen(parameter))
                owner._parameters[name] = same
    for body in (m for m in module.modules() if isinstance(m, fx.GraphModule)):
        for node in body.graph.nodes:
            if "val" in node.meta:
                node.meta.setdefault("example_value", node.meta["val"])
    return module


def _frozen(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach(), requires_grad=False)


class _Chooser:
    """Gives each find its layer, by the paths that the export wrote, and its plan."""

    def __init__(self, policy: Policy, names: Mapping[str, str]) -> None:
        self._policy, self._names = policy, names

    def __call__(self, place: Placed) -> LayerChoice:
        layer = exported.innermost([exported.paths_of(node) for node in place.nodes])
        while layer and layer not in self._names:  # a call of a function that is no module
            layer = layer.rpartition(".")[0]
        short = self._names.get(layer, layer)
        plan = self._policy.resolve(short)
        return LayerChoice(short, plan if plan.rule else self._policy.resolve(layer))


def _modules_of(module: fx.GraphModule, names: Mapping[str, str]) -> Iterator[str]:
    for node in module.graph.nodes:
        for path in exported.paths_of(node):
            yield from {path, names.get(path, path)}


def _attended(rows: Sequence[SiteRow], names: Mapping[str, str]) -> Iterator[Attended]:
    wholes = naming.with_wholes(names, {row.layer for row in rows})
    for row in rows:
        misfits = [reason.text for reason in row.reasons if reason.code == "rank"]
        yield Attended(row.layer, misfits[0] if misfits else None, wholes[row.layer])
