"""Run the pass over one graph: match, resolve, decide, rewrite, report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from distr_compile.bases import BasesOfModel, site_name
from distr_compile.estimators import ESTIMATORS
from distr_compile.passes import decide as decisions
from distr_compile.passes import match
from distr_compile.passes import vocabulary as voc
from distr_compile.passes.decide import Decision, decide
from distr_compile.passes.rewrite import rewrite, rewrite_exact
from distr_compile.passes.site import AttentionSite, RefusedError, Unmatched
from distr_compile.passes.vocabulary import shape_of
from distr_compile.policy import LayerPlan
from distr_compile.reporting import NotAttention, Reason, SiteRow

Found = AttentionSite | Unmatched


@dataclass(frozen=True)
class Placed:
    """One find and where it stands.

    Attributes:
        found: the find.
        graph: the outer graph, or the body of a higher-order op (activation checkpointing, a nested
            compile region, ...).
        calls: the nodes that call this body; empty for the outer graph.
    """

    found: Found
    graph: fx.Graph
    calls: tuple[fx.Node, ...] = ()

    @property
    def output(self) -> fx.Node:
        """The node that holds its result, or stands for it."""
        return self.found.anchor if isinstance(self.found, Unmatched) else self.found.output

    @property
    def nodes(self) -> list[fx.Node]:
        """Nodes that tell which layer it belongs to."""
        if isinstance(self.found, AttentionSite):
            interior = sorted(self.found.interior)
            return [interior[0], self.found.anchor, interior[-1]]
        return [self.found.anchor]


@dataclass(frozen=True)
class LayerChoice:
    """The layer of a find, what the policy wants for it, and why it cannot have it.

    Attributes:
        name: of the layer.
        plan: from the policy.
        extra: reasons for exact that lie outside the site.
        repeats: names of further layers that the same body of a higher-order op is called for.
    """

    name: str
    plan: LayerPlan
    extra: tuple[Reason, ...] = ()
    repeats: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What the pass did with one graph."""

    rows: tuple[SiteRow, ...]
    not_attention: tuple[NotAttention, ...]
    decides_at_run_time: bool
    names: dict[int, str]
    """Number of a site -> its name in a file of bases."""
    outputs: dict[int, tuple[fx.Graph, str]]
    """Number of a row -> its graph and the name that its output had there before any rewrite.

    The node that took its place carries that name in ``meta[STANDS_FOR]``.
    """


def find_all(module: fx.GraphModule) -> list[Placed]:
    """All attention of a graph and of the bodies of its higher-order ops."""
    return [
        Placed(found, body.graph, calls)
        for body, calls in _bodies(module, ())
        for found in match.find(body.graph)
    ]


def _bodies(
    module: fx.GraphModule, calls: tuple[fx.Node, ...]
) -> Iterator[tuple[fx.GraphModule, tuple[fx.Node, ...]]]:
    """A graph module and all it refers to, each once, with the nodes that call it."""
    yield module, calls
    references: dict[str, list[fx.Node]] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            references.setdefault(str(node.target), []).extend(node.users)
    for target, callers in references.items():
        body = _attribute(module, target)
        if isinstance(body, fx.GraphModule):
            yield from _bodies(body, tuple(callers))


def _attribute(module: torch.nn.Module, path: str) -> Any:
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


def apply(
    placed: list[Placed],
    choose: Callable[[Placed], LayerChoice],
    bases: BasesOfModel,
    *,
    change: bool,
) -> Outcome:
    """Decide about every find and, if ``change``, rewrite its graph.

    Args:
        placed: from :func:`find_all`.
        choose: the layer of a find and its plan.
        bases: gives A and B to the estimators that need them.
        change: False leaves the graphs as they are and reports what would be done.
    """
    # Choices first: a rewrite takes out the nodes that tell the layer.
    choices = [choose(place) for place in placed]
    site_names = _site_names(placed, choices)
    numbers, count = [], 0
    for place, choice in zip(placed, choices, strict=True):
        numbers.append(count)
        is_row = isinstance(place.found, AttentionSite) or place.found.attention
        count += (1 + len(choice.repeats)) * is_row
    named = {
        number: name
        for number, place, name in zip(numbers, placed, site_names, strict=True)
        if isinstance(place.found, AttentionSite)
    }
    stands = [(place.graph, place.output.name) for place in placed]
    decided: dict[int, tuple[Decision, bool]] = {}
    pairs: dict[int, tuple[torch.Tensor, torch.Tensor] | None] = {}
    for index, (place, choice) in enumerate(zip(placed, choices, strict=True)):
        found = place.found
        if isinstance(found, AttentionSite):
            decision = decide(found, choice.plan, choice.extra)
            decided[index], pairs[index] = (decision, False), None
            if decision.is_distr and ESTIMATORS[choice.plan.estimator].needs == "bases":
                sizes = {"head_dim": found.head_dim, "key_heads": found.num_key_heads}
                pairs[index] = bases(site_names[index], rank=decision.rank, **sizes)
    for index in _from_the_end(placed) if change else ():
        place, found = placed[index], placed[index].found
        if isinstance(found, AttentionSite):
            decision, _ = decided[index]
            args = (place.graph, found, decision, numbers[index], pairs[index])
            decided[index] = _rewrite(*args)
    rows: list[SiteRow] = []
    others: list[NotAttention] = []
    outputs: dict[int, tuple[fx.Graph, str]] = {}
    for index, (place, choice) in enumerate(zip(placed, choices, strict=True)):
        found = place.found
        for name in (choice.name, *choice.repeats):
            if isinstance(found, Unmatched) and not found.attention:
                others.append(_not_attention(found, name))
                continue
            outputs[len(rows)] = stands[index]
            if isinstance(found, Unmatched):
                rows.append(_unmatched_row(found, name, choice.extra, len(rows)))
            else:
                rows.append(_row(found, name, *decided[index], len(rows)))
    decides_at_run_time = any(
        decision.is_distr
        and (decision.min_seq_len > 0 or not isinstance(placed[index].found.num_queries, int))  # type: ignore[union-attr]
        for index, (decision, _) in decided.items()
    )
    return Outcome(tuple(rows), tuple(others), decides_at_run_time, named, outputs)


def _from_the_end(placed: list[Placed]) -> list[int]:
    """Indices, last output first: an operand may be the output of an attention before it."""
    position = {n: i for graph in {p.graph for p in placed} for i, n in enumerate(graph.nodes)}
    return sorted(range(len(placed)), key=lambda i: position[placed[i].output], reverse=True)


def _site_names(placed: list[Placed], choices: list[LayerChoice]) -> list[str]:
    """The name of each find among the bases; those of one layer are numbered in graph order."""
    layers = [
        choice.name if isinstance(place.found, AttentionSite) else None
        for place, choice in zip(placed, choices, strict=True)
    ]
    return [
        site_name(layer or "", layers[:i].count(layer), layers.count(layer))
        for i, layer in enumerate(layers)
    ]


def _rewrite(
    graph: fx.Graph,
    site: AttentionSite,
    decision: Decision,
    number: int,
    bases: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[Decision, bool]:
    if decision.is_distr:
        try:
            if bases is not None:
                bases = _on_device(bases, site.device)
            rewrite(graph, site, decision, number, bases)
        except RefusedError as refused:
            reason = Reason(refused.code, refused.text)
            return Decision("exact", (reason,), decision.rank, 0, decision.plan), False
        return decision, False
    is_sdpa = decision.plan.exact == "sdpa" and rewrite_exact(graph, site)
    return decision, is_sdpa


def _on_device(
    bases: tuple[torch.Tensor, torch.Tensor], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    # Tensors that outlive the call must serve autograd too.
    with torch.inference_mode(False):
        A, B = (basis.contiguous().to(device) for basis in bases)
        return A, B


def _row(
    site: AttentionSite, layer: str, decision: Decision, is_sdpa: bool, number: int
) -> SiteRow:
    shapes = {
        "q": _shape((site.batch, site.num_heads, site.num_queries, site.head_dim)),
        "k": _shape((site.batch, site.num_key_heads, site.num_keys, site.head_dim)),
        "v": _shape((site.batch, site.num_key_heads, site.num_keys, site.value_dim)),
    }
    approximation: dict[str, Any] = {}
    if decision.is_distr:
        plan, groups_are_whole = decision.plan, site.head_dim % decision.rank == 0
        approximation = {
            "group_size": site.head_dim // decision.rank if groups_are_whole else None,
            "rank": decision.rank,
            "estimator": plan.estimator,
            "rounds": plan.rounds,
            "sees": decision.sees,
            "grouping_block": plan.grouping_block,
        }
    return SiteRow(
        layer=layer,
        form=site.form,
        shapes=shapes,
        dtype=str(site.dtype).removeprefix("torch."),
        mask=site.mask_kind,
        decision=decision.decision,
        **approximation,
        reasons=decision.reasons,
        flops=decisions.flops(site),
        site=number,
        sdpa=is_sdpa,
    )


def _unmatched_row(found: Unmatched, layer: str, extra: tuple[Reason, ...], number: int) -> SiteRow:
    value = voc.tensor_of(found.anchor)
    return SiteRow(
        layer=layer,
        form=found.form,
        shapes={"scores": _shape(shape_of(found.anchor))},
        dtype=str(value.dtype).removeprefix("torch.") if value is not None else "",
        mask="",
        decision="exact",
        reasons=(Reason(found.code, found.text), *extra),
        flops=found.flops,
        site=number,
    )


def _not_attention(found: Unmatched, layer: str) -> NotAttention:
    reason = Reason(found.code, found.text)
    return NotAttention(layer, found.kind, _shape(shape_of(found.anchor)), reason)


def _shape(sizes: tuple[Any, ...]) -> tuple[int | str, ...]:
    return tuple(size if isinstance(size, int) else str(size) for size in sizes)
