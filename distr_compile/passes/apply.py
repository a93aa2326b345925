"""Run the pass over one graph: match, resolve, decide, rewrite, report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import fx

from distr_compile.bases import BasesOfModel, site_name
from distr_compile.estimators import ESTIMATORS, MIN_QUERIES
from distr_compile.lowering import op
from distr_compile.lowering.judge import Judge
from distr_compile.passes import decide as decisions
from distr_compile.passes import match
from distr_compile.passes import vocabulary as voc
from distr_compile.passes.decide import Decision, decide
from distr_compile.passes.rewrite import may_overflow, names_of_bases, rewrite, rewrite_exact
from distr_compile.passes.site import AttentionSite, OpenSite, RefusedError, Unmatched
from distr_compile.passes.timing import Stopwatch
from distr_compile.passes.vocabulary import shape_of, target_name
from distr_compile.policy import LayerPlan
from distr_compile.reporting import NotAttention, Reason, SiteRow

Found = AttentionSite | Unmatched
Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Placed:
    """One find and where it stands.

    Attributes:
        found: the find.
        graph: the outer graph, or the body of a higher-order op (activation checkpointing, a nested
            compile region, ...).
        calls: the nodes that call this body; empty for the outer graph.
        around: the nodes that call the graphs of those, out to the outer graph.
    """

    found: Found
    graph: fx.Graph
    calls: tuple[fx.Node, ...] = ()
    around: tuple[fx.Node, ...] = ()

    @property
    def nodes(self) -> list[fx.Node]:
        """Nodes that tell which layer it belongs to."""
        if isinstance(self.found, AttentionSite):
            interior = sorted(self.found.interior)
            return [interior[0], self.found.anchor, interior[-1]]
        return [self.found.anchor]

    @property
    def reasons(self) -> tuple[Reason, ...]:
        """Why it stays exact by where it stands: its gradient may be a formula of the model's."""
        if any(
            target_name(call) == "autograd_function_apply" for call in (*self.calls, *self.around)
        ):
            return (Reason("gradients", "a torch.autograd.Function has a backward of its own"),)
        return ()


@dataclass(frozen=True)
class LayerChoice:
    """The layer of a find, what the policy wants for it, and why it cannot have it.

    Attributes:
        name: of the layer.
        plan: from the policy.
        extra: reasons for exact that lie outside the site.
        repeats: names of further layers that the same body of a higher-order op is called for.
        of_blocks: where the graph may serve several modules: the layer in each of them, by the
            module's name, ``name`` among them.
    """

    name: str
    plan: LayerPlan
    extra: tuple[Reason, ...] = ()
    repeats: tuple[str, ...] = ()
    of_blocks: Mapping[str, str] = field(default_factory=dict)

    @property
    def layers(self) -> tuple[str, ...]:
        """Each layer that has a row."""
        return tuple(self.of_blocks.values()) or (self.name, *self.repeats)


@dataclass(frozen=True)
class Outcome:
    """What the pass did with one graph."""

    rows: tuple[SiteRow, ...]
    not_attention: tuple[NotAttention, ...]
    names: dict[int, str]
    """Number of a site -> its name in a file of bases."""
    outputs: dict[int, tuple[fx.Graph, str]]
    """Number of a row -> its graph and the name that its output had there before any rewrite.

    The node that took its place carries that name in ``meta[STANDS_FOR]``.
    """
    served: dict[str, dict[int, int]]
    """By module that runs the graph, where those are several: a site -> the module's row of it."""
    inputs: dict[str, dict[str, torch.Tensor]]
    """By module, likewise: the constants of the graph in whose place it has its own, by name."""


def find_all(
    module: fx.GraphModule, calls: tuple[fx.Node, ...] = (), around: tuple[fx.Node, ...] = ()
) -> list[Placed]:
    """All attention of a graph and of the bodies of its higher-order ops, each searched once.

    ``calls`` and ``around`` are those of :class:`Placed`, if it is such a body.
    """
    placed = [Placed(found, module.graph, calls, around) for found in match.find(module.graph)]
    references: dict[str, list[fx.Node]] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            references.setdefault(str(node.target), []).extend(node.users)
    bodies = dict(module.named_modules(remove_duplicate=False))
    for target, callers in references.items():
        body = bodies.get(target)
        if isinstance(body, fx.GraphModule):
            placed += find_all(body, tuple(callers), (*calls, *around))
    return placed


def planned_before(module: fx.GraphModule) -> int:
    """How many calls of our op a graph and the bodies of its higher-order ops have already."""
    bodies = [each for each in module.modules() if isinstance(each, fx.GraphModule)]
    nodes = [node for body in bodies for node in body.graph.nodes]
    return sum(node.target is op.call for node in nodes)


def apply(
    placed: list[Placed],
    choose: Callable[[Placed], LayerChoice],
    bases: BasesOfModel,
    judge: Judge | None = None,
    *,
    change: bool,
) -> Outcome:
    """Decide about every find and, if ``change``, rewrite its graph.

    Args:
        placed: from :func:`find_all`.
        choose: the layer of a find and its plan.
        bases: gives A and B to the estimators that need them.
        judge: says what is faster where a plan leaves that open; None where nothing hangs on it.
        change: False leaves the graphs as they are and reports what would be done.
    """
    # Choices first: a rewrite takes out the nodes that tell the layer.
    choices = [(place, choose(place)) for place in placed]
    layers = [choice.name for place, choice in choices if isinstance(place.found, AttentionSite)]
    sites: list[_Site] = []
    rows: list[Callable[[int], SiteRow]] = []
    others: list[NotAttention] = []
    outputs: list[tuple[fx.Graph, str]] = []
    served: dict[str, dict[int, int]] = {}
    for place, choice in choices:
        found, names, output = place.found, choice.layers, place.found.anchor
        served_by = enumerate(choice.of_blocks, start=len(rows))
        if isinstance(found, AttentionSite):
            count = layers[: len(sites)].count(choice.name), layers.count(choice.name)
            decision = decide(found, choice.plan, (*choice.extra, *place.reasons))
            site = _Site(found, place.graph, site_name(choice.name, *count), len(rows), decision)
            if decision.is_distr and ESTIMATORS[choice.plan.estimator].needs == "bases":
                owners = choice.of_blocks.values() or (choice.name,)
                site.bases = [site.look_up(bases, site_name(each, *count)) for each in owners]
                site.blocks = tuple(choice.of_blocks)
            sites.append(site)
            output = found.output
            rows += [partial(site.row, layer) for layer in names]
        elif found.why.attention:
            rows += [partial(_unmatched_row, found, choice.extra, layer) for layer in names]
        else:
            others += [_not_attention(found, layer) for layer in names]
            continue
        site_number = len(outputs)  # of its first row
        for row, block in served_by:
            served.setdefault(block, {})[site_number] = row
        outputs += [(place.graph, output.name)] * len(names)
    # Last output first: an operand may be the output of an attention before it.
    for site in sorted(sites, key=lambda site: site.found.output, reverse=True):
        site.rewrite(judge, change)
    return Outcome(
        rows=tuple(row(number) for number, row in enumerate(rows)),
        not_attention=tuple(others),
        names={site.number: site.name for site in sites},
        outputs=dict(enumerate(outputs)),
        served=served,
        inputs=_inputs(sites),
    )


@dataclass
class _Site:
    """A site on its way through the pass.

    Attributes:
        found, graph: the site and where it stands.
        name: among the bases; those of one layer are numbered in graph order.
        number: that of its first row.
        decision: may become exact when it is rewritten.
        bases: A and B on the site's device, for an estimator that needs them; where several modules
            may run the graph, those of each.
        blocks: these modules; else empty.
        watch: what was found of its call: how fast it is, and what computes it.
        kernel: what computes it; None where its nodes are left alone.
    """

    found: AttentionSite
    graph: fx.Graph
    name: str
    number: int
    decision: Decision
    bases: Sequence[Pair] = ()
    blocks: tuple[str, ...] = ()
    watch: Stopwatch = field(default_factory=Stopwatch)
    kernel: str | None = None

    def look_up(self, bases: BasesOfModel, name: str) -> Pair:
        """A and B that a file has under ``name``."""
        sizes = {"head_dim": self.found.head_dim, "key_heads": self.found.num_key_heads}
        pair = bases(name, rank=self.decision.rank, **sizes)
        # Tensors that outlive the call must serve autograd too.
        with torch.inference_mode(False):
            A, B = (basis.contiguous().to(self.found.device) for basis in pair)
        return A, B

    def rewrite(self, judge: Judge | None, change: bool) -> None:
        """Put a call in the site's place, or leave it with the reason; or only try."""
        plan, watch, found = self.decision.plan, self.watch, self.found
        watch.ours = plan.exact == "auto" and self._may_be_ours
        watch.judge = judge if plan.min_seq_len == "auto" else None
        if self.decision.is_distr and (refused := self._refused(change)) is not None:
            reason = Reason(refused.code, refused.text)
            self.decision = Decision((reason,), self.decision.rank, 0, plan)
        is_kept = plan.exact == "keep" or found.written_later or found.is_sharded
        if self.decision.is_distr or is_kept:
            return
        watch.judge = judge
        asks = watch.ours and judge is not None
        if asks and self._refused(change) is None:
            return
        if rewrite_exact(self.graph, found, change=change):
            self.kernel = "sdpa"

    def _refused(self, change: bool) -> RefusedError | None:
        """Write the op in the site's place; why it cannot be, where it cannot."""
        bases = self.bases[0] if self.bases and self.decision.is_distr else None
        given = (self.graph, self.found, self.decision, self.number, bases)
        try:
            limit = rewrite(*given, watch=self.watch, change=change)
        except RefusedError as refused:
            return refused
        self.decision = replace(self.decision, min_seq_len=limit)
        self.kernel = self.watch.kernel
        return None

    @property
    def _may_be_ours(self) -> bool:
        """Whether our kernel may compute it exactly: as SDPA would, where no gradient is recorded.

        Soft caps and sinks are left to the model, which PyTorch compiles: no time of that is known.
        """
        found = self.found
        return (
            isinstance(found, OpenSite)
            and not found.symbolic
            and found.num_queries >= MIN_QUERIES
            and found.dtype in {torch.float32, torch.bfloat16, torch.float16}
            and found.compute_dtype is None
            and not may_overflow(found)
            and not (found.softcap or found.sinks or found.dropout_p or found.requires_grad)
            and all(reason.code != "shared-graph" for reason in self.decision.reasons)
        )

    def row(self, layer: str, number: int) -> SiteRow:
        """The row of a layer that it stands in."""
        found, decision, watch = self.found, self.decision, self.watch
        measured = watch.measured
        keys = (found.batch, found.num_key_heads, found.num_keys)
        return SiteRow(
            layer=layer,
            form=found.form,
            shapes={
                "q": _shape((found.batch, found.num_heads, found.num_queries, found.head_dim)),
                "k": _shape((*keys, found.head_dim)),
                "v": _shape((*keys, found.value_dim)),
            },
            dtype=str(found.dtype).removeprefix("torch."),
            mask=found.mask_kind,
            **decision.columns(found.head_dim),
            flops=decisions.flops(found),
            site=number,
            kernel=self.kernel,
            backward=watch.backward if decision.is_distr else None,
            sharding=watch.sharding if decision.is_distr else None,
            refused=watch.refused,
            min_seq_len=decision.min_seq_len,
            measured=None if measured is None else {**measured.seconds, **measured.gains},
        )


def _inputs(sites: list[_Site]) -> dict[str, dict[str, torch.Tensor]]:
    """The constants that each of several modules has its own of."""
    inputs: dict[str, dict[str, torch.Tensor]] = {}
    for site in sites:
        if len(site.blocks) > 1 and site.decision.is_distr:
            names = names_of_bases(site.number)
            for block, pair in zip(site.blocks, site.bases, strict=True):
                inputs.setdefault(block, {}).update(zip(names, pair, strict=True))
    return inputs


def _unmatched_row(found: Unmatched, extra: tuple[Reason, ...], layer: str, number: int) -> SiteRow:
    value = voc.tensor_of(found.anchor)
    return SiteRow(
        layer=layer,
        form=found.form,
        shapes={"scores": _shape(shape_of(found.anchor))},
        dtype=str(value.dtype).removeprefix("torch.") if value is not None else "",
        mask="",
        decision="exact",
        reasons=(Reason(found.why.code, found.why.text), *extra),
        flops=found.flops,
        site=number,
    )


def _not_attention(found: Unmatched, layer: str) -> NotAttention:
    reason = Reason(found.why.code, found.why.text)
    return NotAttention(layer, found.kind, _shape(shape_of(found.anchor)), reason)


def _shape(sizes: tuple[Any, ...]) -> tuple[int | str, ...]:
    return tuple(size if isinstance(size, int) else str(size) for size in sizes)
