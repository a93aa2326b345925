"""A model whose attentions are answered by a Python function, one call at a time.

The pass rewrites the model as always, but in the place of its op stands a function of ours. What
becomes of an attention may then change from call to call, and nothing is compiled again.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from distr_compile import identity, underneath
from distr_compile.accuracy import ranks
from distr_compile.accuracy.batch import Batches, walk
from distr_compile.accuracy.evaluate import device_of
from distr_compile.backend import Chooser
from distr_compile.bases import BasesOfModel
from distr_compile.estimators import ESTIMATORS, MIN_RANK
from distr_compile.explaining import untraced
from distr_compile.lowering.call import (
    Approximation,
    Scores,
    Shape,
    op_arguments,
    read_arguments,
)
from distr_compile.passes.apply import Outcome, Placed, apply, find_all
from distr_compile.passes.decide import Decision, decide
from distr_compile.passes.site import AttentionSite
from distr_compile.policy import LayerPlan, Policy, PolicyError
from distr_compile.restoring import Repeatable

_OP = torch.ops.distr.attention.default

_OBSERVING = Policy({"estimator": "projection", "rank": MIN_RANK, "min_seq_len": 0})
"""Makes the pass rewrite whatever can be approximated at all."""


@dataclass(eq=False)
class Site:
    """One attention that can be approximated.

    Attributes:
        name: its layer's, numbered where a graph has several of a layer (``bases.site_name``).
        layer: full dotted name of the module.
        possible: the candidates that some graph could run here.
        refused: those that some graph could not -> why not.
        calls: how often it was called, by shape.
    """

    name: str
    layer: str
    possible: set[str] = field(default_factory=set)
    refused: dict[str, str] = field(default_factory=dict)
    calls: Counter[Shape] = field(default_factory=Counter)


@dataclass(frozen=True)
class Candidate:
    """What a candidate means at one site of one graph.

    Attributes:
        approximation: what the op is told.
        min_seq_len: below this length a call is exact.
        bases: A and B, for an estimator that needs them.
    """

    approximation: Approximation
    min_seq_len: int
    bases: tuple[Tensor, Tensor] | None


@dataclass(frozen=True, eq=False)
class Call:
    """One call of an attention.

    Attributes:
        site: where.
        q, k, v, mask, sinks: as the op takes them.
        scores: the rest of the softmax's input.
        number: of the site within its graph.
        candidates: those that can run here.
    """

    site: Site
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    sinks: Tensor | None
    scores: Scores
    number: int
    candidates: Mapping[str, Candidate]

    def exact(self) -> Tensor:
        """The output of exact attention."""
        return self._run(Candidate(Approximation.none(self.q.shape[3]), _LONGER, None))

    def approximate(self, label: str) -> Tensor:
        """The output with one of the candidates."""
        return self._run(self.candidates[label])

    def _run(self, chosen: Candidate) -> Tensor:
        A, B = chosen.bases or (None, None)
        if A is not None and B is not None:
            A, B = A.to(self.q.device), B.to(self.q.device)
        arguments = op_arguments(chosen.approximation, self.scores, chosen.min_seq_len, self.number)
        out: Tensor = _OP(self.q, self.k, self.v, self.mask, A, B, self.sinks, **arguments)
        return out

    @property
    def shape(self) -> Shape:
        """See :class:`Shape`."""
        return Shape.of(self.q, self.k, self.v, self.mask, self.scores.is_causal)


_LONGER = 2**31
"""More tokens than there are: the op then computes exactly, by PyTorch."""


def _everywhere(layer: str) -> bool:
    return True


@dataclass(eq=False)
class Instrument:
    """A Dynamo backend: the pass, then ``answer`` in the place of its op, then plain execution.

    Attributes:
        answer: gives the output of a call.
        wanted: whether a layer's attentions are to be answered so; the others are exact.
        policies: candidates, each as the policy that gives a layer its plan; what the backend would
            refuse at a site is no candidate there.
        sites: those found so far, by name; includes the mixed ones.
        exact: the attentions that were left exact in some graph -> why.
        mixed: those whose calls cannot be told from another's -> why. They are not answered.
        layers: of every attention, by name.
    """

    answer: Callable[[Call], Tensor]
    wanted: Callable[[str], bool] = _everywhere
    policies: Mapping[str, Policy] = field(default_factory=dict)
    sites: dict[str, Site] = field(default_factory=dict)
    exact: dict[str, str] = field(default_factory=dict)
    mixed: dict[str, str] = field(default_factory=dict)
    layers: dict[str, str] = field(default_factory=dict)
    _codes: dict[str, object] = field(default_factory=dict)

    @contextlib.contextmanager
    def on(self, model: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
        """The model to call instead of ``model``, without gradients; compiled once in a context.

        What it was compiled with before is set aside meanwhile; see ``underneath.plain``.
        """
        with torch.no_grad(), untraced() as options, underneath.plain(model) as own:
            yield torch.compile(own, backend=self, **options)

    @property
    def usable(self) -> dict[str, Site]:
        """The sites that are answered."""
        return {name: site for name, site in self.sites.items() if name not in self.mixed}

    @property
    def refused(self) -> dict[str, str]:
        """The attentions that never are -> why not."""
        reasons = {**self.exact, **self.mixed}
        return {name: why for name, why in reasons.items() if name not in self.usable}

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile one graph."""
        root = identity.find_root()
        placed = find_all(gm)
        frame = identity.guard_frame_module([node for place in placed for node in place.nodes])
        sites = [place for place in placed if isinstance(place.found, AttentionSite)]
        # Before the rewrite, which takes out the nodes that tell the layer.
        plans = [self._plans(place, root, frame) for place in sites]
        chooser = Chooser(_OBSERVING, root, frame)
        bases = BasesOfModel(_OBSERVING, None)  # never asked: the plan needs none
        outcome = apply(placed, chooser, bases, change=True)
        plans_at = dict(zip(outcome.names, plans, strict=True))
        shared = _shared_sites(outcome)
        hooks: dict[int, Callable[..., Tensor]] = {}
        for row in outcome.rows:
            name = outcome.names.get(row.site, row.layer)
            if not self.wanted(row.layer):
                continue
            self.layers[name] = row.layer
            if row.decision == "exact":
                self.exact[name] = "; ".join(reason.text for reason in row.reasons)
            elif row.site in shared:
                self.mixed[name] = "one body is called for several layers"
            elif self._codes.setdefault(name, frame.code_key) != frame.code_key:
                self.mixed[name] = "a graph break cuts the layer in two: its attentions mix"
            else:
                site = self.sites.setdefault(name, Site(name, row.layer))
                hooks[row.site] = self._hook(site, *plans_at[row.site], root)
        for module in gm.modules():
            if isinstance(module, fx.GraphModule):
                _hook_in(module, hooks)
        return gm.forward

    def _plans(
        self, place: Placed, root: identity.Root | None, frame: identity.FrameModule
    ) -> tuple[AttentionSite, dict[str, Decided]]:
        """What the backend would decide here for each of the candidates."""
        site = place.found
        assert isinstance(site, AttentionSite)
        decided = {}
        for label, policy in self.policies.items():
            choice = Chooser(policy, root, frame)(place)
            decision = decide(site, choice.plan, choice.extra)
            reasons = "; ".join(reason.text for reason in decision.reasons)
            decided[label] = Decided(decision, reasons)
        return site, decided

    def _hook(
        self,
        site: Site,
        found: AttentionSite,
        decided: Mapping[str, Decided],
        root: identity.Root | None,
    ) -> Callable[..., Tensor]:
        """The function that stands in a graph for the op at ``site``."""
        candidates: dict[str, Candidate] = {}
        for label, one in decided.items():
            try:
                if one.refused:
                    raise PolicyError(one.refused)
                pair = None
                if ESTIMATORS[one.decision.plan.estimator].needs == "bases":
                    bases = BasesOfModel(self.policies[label], root.module if root else None)
                    sizes = {"head_dim": found.head_dim, "key_heads": found.num_key_heads}
                    pair = bases(site.name, rank=one.decision.rank, **sizes)
            except PolicyError as error:
                site.refused[label] = str(error)
                continue
            site.possible.add(label)
            candidates[label] = Candidate(
                one.decision.approximation, one.decision.min_seq_len, pair
            )

        def hook(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            mask: Tensor | None = None,
            basis_q: None = None,
            basis_k: None = None,
            sinks: Tensor | None = None,
            **options: Any,
        ) -> Tensor:
            given = read_arguments(options)
            call = Call(site, q, k, v, mask, sinks, given.scores, given.site, candidates)
            if site.name in self.mixed:
                return call.exact()
            site.calls[call.shape] += 1
            return self.answer(call)

        return hook


@dataclass(frozen=True)
class Decided:
    """The backend's decision about one candidate at one site; ``refused`` is empty or says why."""

    decision: Decision
    refused: str


def _shared_sites(outcome: Outcome) -> set[int]:
    """Numbers of the rows of bodies that are called for several layers: a row for each of them."""
    shared: set[int] = set()
    first = -1
    for row in outcome.rows:
        if row.site in outcome.names:
            first = row.site
        elif row.decision == "distr":
            shared |= {first, row.site}
    return shared


def _hook_in(module: fx.GraphModule, hooks: Mapping[int, Callable[..., Tensor]]) -> None:
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target is _OP:
            node.target = hooks.get(read_arguments(node.kwargs).site, _exact)
    module.recompile()


def _exact(q: Tensor, *rest: Any, **options: Any) -> Tensor:
    given = read_arguments(options)
    exact = op_arguments(Approximation.none(q.shape[3]), given.scores, _LONGER, given.site)
    out: Tensor = _OP(q, *rest, **exact)
    return out


@dataclass(frozen=True)
class SiteErrors:
    """What one pass over the data measured.

    Attributes:
        errors: site -> candidate -> relative Frobenius error of the attention's output, over all
            calls; candidates that cannot run at a site are left out.
        sites: by name, with their shapes and the candidates they refused.
        refused: the attentions that cannot be approximated -> why not.
        mixed: those of them whose calls cannot be told from another's.
        layers: of all attentions, by name.
    """

    errors: Mapping[str, Mapping[str, float]]
    sites: Mapping[str, Site]
    refused: Mapping[str, str]
    mixed: Mapping[str, str]
    layers: Mapping[str, str]


Plan = Policy | LayerPlan | Mapping[str, Any]
"""A policy, or one plan for all layers, as itself or as the fields of ``[default]``."""


def site_errors(
    model: Callable[..., Any], batches: Batches, plans: Mapping[str, Plan]
) -> SiteErrors:
    """Run the exact model over the batches once and measure every plan at every attention.

    Args:
        model: the module that will be compiled. It runs exactly, without gradients.
        batches: as ``batch.walk`` takes them.
        plans: label -> what to measure. A single plan counts at any length; a policy, where its own
            ``min_seq_len`` lets it.

    Raises:
        PolicyError: a plan is wrong.
    """
    errors = ErrorSums()
    policies = {label: as_policy(plan) for label, plan in plans.items()}
    instrument = Instrument(errors.observe, policies=policies)
    share = ranks.Share(walk(batches))

    def own() -> bytes:
        with instrument.on(model) as run:
            again = Repeatable(model)
            for batch in share:
                moved = batch.to(device_of(model))
                again.once(run, moved.args, moved.kwargs)
        return b"" if ranks.world() == 1 else json.dumps(_told(errors, instrument)).encode()

    found = ranks.exchange(own)
    share.require_same()
    if ranks.world() > 1:
        errors, instrument = ErrorSums(), Instrument(errors.observe)
        for each in found:
            _add(errors, instrument, json.loads(each), device_of(model))
    sites = instrument.usable
    relative = {name: errors.relative(name) for name in sites}
    return SiteErrors(relative, sites, instrument.refused, instrument.mixed, instrument.layers)


def _told(errors: ErrorSums, instrument: Instrument) -> dict[str, Any]:
    """What one process has seen, as JSON has it."""
    sites = [
        {
            "name": site.name,
            "layer": site.layer,
            "possible": sorted(site.possible),
            "refused": site.refused,
            "calls": [[shape.to_json(), count] for shape, count in site.calls.items()],
        }
        for site in instrument.sites.values()
    ]
    left = {name: getattr(instrument, name) for name in ("exact", "mixed", "layers")}
    return {"sites": sites, **left, "norms": errors.exact, "errors": errors.error}


def _add(
    errors: ErrorSums, instrument: Instrument, told: Mapping[str, Any], device: torch.device
) -> None:
    """Add what another process has seen, on its own device, to what is known."""
    for each in told["sites"]:
        site = instrument.sites.setdefault(each["name"], Site(each["name"], each["layer"]))
        site.possible.update(each["possible"])
        site.refused.update(each["refused"])
        for shape, count in each["calls"]:
            site.calls[Shape.from_json(shape, device)] += count
    for name in ("exact", "mixed", "layers"):
        getattr(instrument, name).update(told[name])
    for name, norm in told["norms"].items():
        errors.exact[name] += norm
    for name, of_site in told["errors"].items():
        sums = errors.error.setdefault(name, defaultdict(float))
        for label, square in of_site.items():
            sums[label] += square


def layer_errors(
    model: Callable[..., Any], batches: Batches, plans: Mapping[str, Plan]
) -> dict[str, dict[str, float]]:
    """Only the ``errors`` of :func:`site_errors`."""
    measured = site_errors(model, batches, plans)
    return {name: dict(errors) for name, errors in measured.errors.items()}


def as_policy(plan: Plan) -> Policy:
    """A policy that says the same, at any length if it was a single plan.

    Raises:
        PolicyError: an unknown field or a value that is not accepted.
    """
    if isinstance(plan, Policy):
        return plan
    return Policy(default=plan).with_default(min_seq_len=0)


class ErrorSums:
    """Squared norms of the errors of all candidates, and of the exact outputs, in fp64.

    Attributes:
        exact: site -> the exact output's, over all calls at which a candidate could run.
        error: site -> candidate -> its error's.
    """

    def __init__(self) -> None:
        self.exact: defaultdict[str, float] = defaultdict(float)
        self.error: dict[str, defaultdict[str, float]] = {}

    def observe(self, call: Call) -> Tensor:
        """Measure all candidates; answer with the exact output."""
        out = call.exact()
        name = call.site.name
        errors = self.error.setdefault(name, defaultdict(float))
        self.exact[name] += _squared(out)
        for label in call.candidates:
            errors[label] += _squared(call.approximate(label) - out)
        return out

    def relative(self, name: str) -> dict[str, float]:
        """Candidate -> relative error at a site."""
        norm = self.exact[name]
        squares = self.error[name].items() if name in self.error else ()
        return {label: (square / norm) ** 0.5 if norm else 0.0 for label, square in squares}


def _squared(x: Tensor) -> float:
    # Products of fp32 summed in fp32 would lose digits of long outputs; fp16 overflows.
    dtype = torch.float32 if x.device.type == "mps" else torch.float64
    return float(x.to(dtype).square().sum())
