"""What became of attention that modules call directly, without a graph: rows for the report.

A module of transformers with ``attn_implementation="distr"`` decides call by call. The first call
of each outcome is kept as a row of the module, so that ``distr_compile.report(model)`` says of such
a model, too, which layers are approximated, which are not, and why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from distr_compile.bases import BasesOfModel
from distr_compile.lowering import training
from distr_compile.lowering.call import Shape
from distr_compile.passes.decide import Decision, flops
from distr_compile.policy import LayerPlan
from distr_compile.reporting import GraphReport, SiteRow, record
from distr_compile.reporting.rows import CALLED

ATTRIBUTE = "_distr_outcomes"
"""Where a module keeps which outcomes it has a row for, and its id: a copy begins anew."""

NAME = "distr"
"""What ``attn_implementation`` is to be for such a model."""

ASSIGNED = "_distr_assigned"
"""Where a module keeps what ``distr_compile.transformers.apply`` gave it."""


@dataclass(frozen=True)
class Assigned:
    """What a policy has for one module of a model.

    Attributes:
        name: full dotted name in the model that was given to ``apply``.
        plan: what the policy says of it.
        bases: of the model, where its estimator needs them.
        is_plain: its calls are exact and have no row: the model runs as without a policy.
    """

    name: str
    plan: LayerPlan
    bases: BasesOfModel | None = None
    is_plain: bool = False


def is_asking(module: torch.nn.Module) -> bool:
    """Whether a module has a plan of ``apply``, or is a model that asks for such attention."""
    config: Any = getattr(module, "config", None)
    return ASSIGNED in module.__dict__ or getattr(config, "_attn_implementation", None) == NAME


def note(
    module: torch.nn.Module, shape: Shape, decision: Decision, *, mask_grad: bool = False
) -> None:
    """Keep what became of a call, unless the module had a call with this outcome before.

    An outcome is a decision with its reasons' codes; lengths do not make another one, so that a
    text that is generated token by token has two rows a layer. In a trace nothing is kept.

    Args:
        module: that makes the call.
        shape: of the call.
        decision: what was made of it.
        mask_grad: whether a gradient is recorded of its mask, which not every backward gives.
    """
    if torch.compiler.is_compiling():
        return
    codes = tuple(reason.code for reason in decision.reasons)
    outcome = (decision.plan, shape.trained, mask_grad, codes)
    owner, kept = module.__dict__.get(ATTRIBUTE, (0, set()))
    if owner != id(module):
        owner, kept = module.__dict__[ATTRIBUTE] = (id(module), set())
    if outcome in kept:
        return
    kept.add(outcome)
    mode = ("train" if module.training else "eval") + (", grad" if shape.trained else "")
    row = _row(shape, decision, mask_grad)
    graph = GraphReport(0, type(module).__name__, (row,), mode=mode)
    record(module, graph, key=outcome, policy=decision.plan)


def _row(shape: Shape, decision: Decision, mask_grad: bool) -> SiteRow:
    keys = (shape.batch, shape.num_key_heads, shape.num_keys)
    names: tuple[str, str | None, Mapping[str, str]] = "sdpa", None, {}
    if decision.is_distr:
        names = training.who_computes(shape, decision.approximation, mask_grad=mask_grad)
    kernel, backward, refused = names
    mask = "causal" if shape.is_causal else "none"
    if shape.mask is not None:
        mask = "bool" if shape.mask[1] == torch.bool else "float"
    return SiteRow(
        layer="",
        form=CALLED,
        shapes={
            "q": (shape.batch, shape.num_heads, shape.num_queries, shape.head_dim),
            "k": (*keys, shape.head_dim),
            "v": (*keys, shape.value_dim),
        },
        dtype=str(shape.dtype).removeprefix("torch."),
        mask=mask,
        **decision.columns(shape.head_dim),
        flops=flops(shape),
        kernel=kernel,
        backward=backward,
        refused=refused,
    )
