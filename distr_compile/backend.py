"""The Dynamo backend ``distr``: rewrite the graph, report, hand the rest to Inductor.

Registered under the entry-point group ``torch_dynamo_backends``, so that ``backend="distr"`` works
without importing this package.
"""

from __future__ import annotations

import difflib
import functools
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

from distr_compile import exported, identity, naming
from distr_compile.bases import BasesOfModel
from distr_compile.estimators import ESTIMATORS
from distr_compile.lowering import stored, tangents
from distr_compile.lowering.choose import EXACT
from distr_compile.lowering.judge import Judge
from distr_compile.lowering.sdpa import best_sdpa
from distr_compile.lowering.told import Listener, listening
from distr_compile.passes.apply import LayerChoice, Placed, apply, find_all, planned_before
from distr_compile.passes.emit import declare_constants
from distr_compile.passes.rewrite import keep_from_fusion
from distr_compile.policy import Attended, LayerPlan, Policy, RuleAudit
from distr_compile.reporting import GraphReport, Reason, SiteRow, record, report
from distr_compile.reporting.breaks import break_before
from distr_compile.reporting.publish import publish
from distr_compile.running import Shared, noticed, serving, with_inputs

COMPILERS = ("inductor", "aot_eager", "eager")
OPTION_KEYS = ("policy", "mode", "compiler", "report", "measure", "root")

_NOT_OURS_TO_PLAN = (
    "calls of distr attention that were in the graph already, and are in no row: {}, planned by "
    "transformers.apply, distr_compile.attention or an export; the policy of this compile does not "
    "apply to them"
)


@dataclass(frozen=True)
class Options:
    """What ``torch.compile(options=...)`` and ``mode=`` said.

    Attributes:
        policy: from a path, a :class:`Policy` or a dict; without one ``DISTR_POLICY`` or the
            defaults.
        compiler: what compiles the rewritten graph.
        report: where the JSON report is written after each compiled graph; that of the compiled
            object, so that submodules compiled one by one need a path each.
        inductor: Inductor's configuration, those of ``mode`` included.
        measure: whether "auto" in the policy may measure what is faster; else what is stored holds.
        root: the module at which the names of layers begin, "" for the compiled one.
    """

    policy: Policy
    compiler: str
    report: Path | None
    inductor: dict[str, Any]
    measure: bool = True
    root: str = ""

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None, mode: str | None) -> Options:
        """Check the options.

        Raises:
            ValueError: an unknown key or value (got, accepted, nearest).
            PolicyError: the policy is wrong.
        """
        given = dict(options or {})
        policy = Policy.from_any(given.pop("policy", None))
        mode = given.pop("mode", None) or mode
        compiler = given.pop("compiler", "inductor")
        if compiler not in COMPILERS:
            near = _nearest(str(compiler), COMPILERS)
            raise ValueError(f"compiler: got {compiler!r}; accepted: {', '.join(COMPILERS)}{near}")
        path = given.pop("report", None)
        if path is not None and not isinstance(path, str | os.PathLike):
            raise ValueError(f"report: got {path!r}; accepted: a path for a JSON file")
        measure = given.pop("measure", True)
        if not isinstance(measure, bool):
            raise ValueError(f"measure: got {measure!r}; accepted: True, False")
        root = given.pop("root", "")
        if not isinstance(root, str):
            raise ValueError(f"root: got {root!r}; accepted: the name of a module of the model")
        if compiler == "inductor":
            inductor = _inductor_config(given, mode)
        else:
            inductor = {}
            names = [*sorted(given), *(["mode"] if mode not in (None, "default") else [])]
            _check_known(given)
            if names:
                raise ValueError(
                    f"{', '.join(names)}: for Inductor, but compiler is {compiler!r}; leave it out "
                    "or set compiler to 'inductor'"
                )
        report = Path(path) if path is not None else None
        return cls(policy, compiler, report, inductor, measure, root)


def _inductor_config(given: Mapping[str, Any], mode: str | None) -> dict[str, Any]:
    """Inductor's configuration of a mode and its own options, which override the mode's."""
    from torch._inductor import list_mode_options

    modes = list(dict.fromkeys(("default", *list_mode_options())))
    if mode is not None and mode not in modes:
        near = _nearest(str(mode), modes)
        raise ValueError(f"mode: got {mode!r}; accepted: {', '.join(modes)}{near}")
    try:
        return dict(torch._TorchCompileInductorWrapper(mode, dict(given), None).config)
    except RuntimeError as error:  # an unknown name or a wrong type
        _check_known(given)
        raise ValueError(f"options: {error}") from None


def _check_known(given: Mapping[str, Any]) -> None:
    """Refuse the first option that Inductor has none of."""
    from torch._inductor import config

    known = config.get_config_copy() if given else {}
    for key in given:
        if key.replace("-", "_") not in known:
            near = _nearest(key, [*OPTION_KEYS, *known])
            raise ValueError(
                f"options: got unknown key {key!r}; accepted: {', '.join(OPTION_KEYS)} and "
                f"Inductor's options{near}"
            )


def _nearest(word: str, words: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def distr(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
    name: str | None = None,
) -> Callable[..., Any]:
    """Compile one Dynamo graph with its attention rewritten.

    Args:
        gm: the graph, torch IR; changed.
        example_inputs: fake or real inputs.
        options: ``policy``, ``mode``, ``compiler``, ``report``, ``measure``, ``root``, and
            Inductor's own; see :class:`Options`.
        mode: as in ``torch.compile``.
        name: as in ``torch.compile``, where it has one: Inductor names the compiled code so.

    Raises:
        ValueError, PolicyError: wrong options or policy. Dynamo wraps them in
            ``BackendCompilerFailed`` (``.inner_exception``).
    """
    return compile_graph(gm, example_inputs, _parsed(options, mode), name)


@dataclass(frozen=True)
class _Parsed:
    """What was read of the options for the first graph of one ``torch.compile``.

    Attributes:
        backend: of that ``torch.compile``.
        given: the mapping of its options, that very object, and the mode.
        options: what they said.
    """

    backend: weakref.ref[Any]
    given: tuple[Mapping[str, Any] | None, str | None]
    options: Options

    def is_of(self, options: Mapping[str, Any] | None, mode: str | None) -> bool:
        """Whether these are they."""
        return self.given[0] is options and self.given[1] == mode


# By identity: what torch.compile makes of a backend is equal to others, and has no hash.
_PARSED: dict[int, _Parsed] = {}


def _parsed(options: Mapping[str, Any] | None, mode: str | None) -> Options:
    """The options as they were for the first graph: what one call compiled has one policy.

    Raises:
        ValueError, PolicyError: as ``Options.parse``.
    """
    backend, given = identity.compiling_backend(), (options, mode)
    known = _PARSED.get(id(backend))
    if known is not None and known.backend() is backend and known.is_of(options, mode):
        return known.options
    parsed = Options.parse(options, mode)
    # A function that serves as a backend is the same for every torch.compile.
    if isinstance(backend, getattr(torch, "_TorchCompileWrapper", ())):
        _PARSED[id(backend)] = _Parsed(weakref.ref(backend, _forget(id(backend))), given, parsed)
    return parsed


def _forget(key: int) -> Callable[[weakref.ref[Any]], None]:
    def callback(ref: weakref.ref[Any]) -> None:
        if (known := _PARSED.get(key)) is not None and known.backend is ref:
            _PARSED.pop(key, None)

    return callback


def compile_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    parsed: Options,
    name: str | None = None,
    shared: Shared | None = None,
) -> Callable[..., Any]:
    """Rewrite, report and compile one graph; see :func:`distr`.

    Args:
        gm: see :func:`distr`, likewise ``example_inputs`` and ``name``.
        example_inputs: see ``gm``.
        parsed: the options.
        name: see ``gm``.
        shared: the modules that the graph serves, where those are several.
    """
    judge = Judge(parsed.measure)
    result = run_pass(gm, parsed.policy, judge, change=True, begin=parsed.root, shared=shared)
    if shared is not None:
        shared.audits.append(result.audit)
    if result.inputs:
        names = list(next(iter(result.inputs.values())))
        gm = with_inputs(gm, names)
        given = gm.graph.find_nodes(op="placeholder")[-len(names) :]
        example_inputs = [*example_inputs, *(node.meta["example_value"] for node in given)]
    with _exact_kernels(result, example_inputs):
        compiled = _with_tangents(_compile(gm, example_inputs, parsed, name), gm)
    # Only now: Dynamo may abandon a graph while it is compiled and come back with another.
    if not result.graph.is_empty:
        publish(result.graph)
    if result.owner is not None:
        of_compile = {"policy": parsed.policy, "backend": result.backend}
        record(result.owner, result.graph, key=result.key, **of_compile)
        if parsed.report is not None:
            report(result.owner).to_json(parsed.report)
    rows = result.graph.rows
    has_ops = any(row.decision == "distr" or row.kernel not in (None, EXACT) for row in rows)
    if result.served:
        compiled = serving(compiled, result.graph, result.served, result.inputs)
    elif has_ops:
        compiled = _heard(compiled, result.graph)
    return compiled if shared is None else noticed(compiled)


@dataclass(frozen=True)
class Result:
    """What the pass did with one graph.

    Attributes:
        graph: its report.
        owner: the compiled module or function it belongs to, if that is known.
        key: names the graph among the owner's.
        outputs: as in ``Outcome``.
        backend: tells two compiled objects of one owner apart.
        audit: what the rules of the policy did in the graph.
        served: as in ``Outcome``, likewise ``inputs``.
        inputs: see ``served``.
    """

    graph: GraphReport
    owner: Any
    key: tuple[Any, ...]
    outputs: Mapping[int, tuple[fx.Graph, str]] = field(default_factory=dict)
    backend: object = None
    audit: RuleAudit = field(default_factory=RuleAudit)
    served: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    inputs: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)


@contextmanager
def _unseen() -> Iterator[None]:
    """Keep what fake tensors save for a backward from the hooks of who calls, as checkpointing has.

    It would count tensors in the call that compiles which no recomputation saves.
    """
    autograd: Any = torch._C._autograd
    if not autograd._saved_tensors_hooks_is_enabled():
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        yield


@_unseen()
def run_pass(
    gm: fx.GraphModule,
    policy: Policy,
    judge: Judge | None = None,
    *,
    change: bool,
    begin: str = "",
    shared: Shared | None = None,
) -> Result:
    """Match, decide and rewrite (if ``change``) one graph, inside a backend call.

    ``judge`` says what is faster; without one "auto" in the policy counts as 0, or "sdpa". Names of
    layers begin at the module ``begin``. ``shared`` says which modules the graph serves, if not the
    one that is being compiled.
    """
    root = identity.find_root() if shared is None else shared.root()
    modules = None
    if root is not None and root.module is not None:
        of_programs = set(exported.layers(gm.graph, root.module))
        if begin:
            root = replace(root, shown=naming.canonical(root.module, begin))
        modules = sorted({*root.shown, *root.shown.values(), *of_programs})
        policy.check_ambiguous(naming.ambiguous(root.module, root.shown))
    audit = policy.audit(modules)
    audit.check_names()
    placed = find_all(gm)
    # Also without attention: layers behind graph breaks must not use up Dynamo's recompilations.
    nodes = [node for place in placed for node in place.nodes]
    alike = root.module if root is not None and policy.bases is None else None
    is_apart = bool(policy.rule or policy.bases)
    guard = functools.partial(identity.guard_frame_module, nodes, is_apart=is_apart, root=alike)
    frame = guard(is_shared=shared is not None)
    alone = None
    if shared is not None and not _may_share(placed, Chooser(policy, root, frame, shared)):
        alone, shared, frame = shared, None, guard()
    name = type(root.module).__name__ if root and root.module is not None else frame.function
    graph = GraphReport(0, name, mode=_mode(frame))
    outputs: Mapping[int, tuple[fx.Graph, str]] = {}
    served: Mapping[str, Mapping[int, int]] = {}
    inputs: Mapping[str, Mapping[str, torch.Tensor]] = {}
    key = (*_graph_key(gm, frame, shared), graph.mode)
    planned = planned_before(gm)
    if placed or planned or frame.limit_note():
        chooser = Chooser(policy, root, frame, shared)
        whole, compiled = (root.module, root.backend) if root is not None else (None, None)
        bases = BasesOfModel(policy, whole, compiled)
        outcome = apply(placed, chooser, bases, judge, change=change)
        chooser.notes += [*bases.notes, *[_NOT_OURS_TO_PLAN.format(planned)] * bool(planned)]
        declare_constants(gm)
        audit = audit.of_graph(_attended(outcome.rows, root), _modules_of(gm, root))
        if _is_whole(gm, root, frame):
            audit.check_sizes()
        outputs, served, inputs = outcome.outputs, outcome.served, outcome.inputs
        # Of another autocast, or of a flag that makes a mask.
        key = (*key, *((row.form, row.mask, row.dtype) for row in outcome.rows))
        graph = replace(
            graph,
            rows=outcome.rows,
            not_attention=outcome.not_attention,
            matched=audit.matched,
            unmatched=audit.unmatched if shared is None or shared.is_all else (),
            notes=tuple(dict.fromkeys(chooser.notes)),
        )
        graph = _with_break(graph, gm, frame)
        if (several := shared or alone) is not None:
            graph = replace(graph, notes=(*graph.notes, *several.notes))
            served = served if alone is None else _by_block(outcome.rows, alone)
            key = (*key, *(row.decision for row in outcome.rows))
            graph = several.count(graph, key)
    owner, backend = (root.key, root.backend) if root is not None else (None, None)
    about = (outputs, backend, audit, served, inputs)
    return Result(graph, owner, key, *about)


def _may_share(placed: Sequence[Placed], choose: Chooser) -> bool:
    """Whether several modules may run a graph: bodies of higher-order ops take no further inputs.

    And a body that is called for several layers of one module is for the policy to look at.
    """
    for place in placed:
        choice = choose(place)
        needs_bases = ESTIMATORS[choice.plan.estimator].needs == "bases"
        is_apart = bool(place.calls) or not choice.of_blocks
        if len(place.calls) > 1 or (needs_bases and is_apart and not choice.plan.is_exact):
            return False
    return True


def _by_block(rows: tuple[SiteRow, ...], shared: Shared) -> dict[str, dict[int, int]]:
    """The rows of a graph that one module runs, one of several, as ``Outcome.served`` has them."""
    served: dict[str, dict[int, int]] = {}
    for row in rows:
        if (block := shared.block_of(row.layer)) is not None:
            served.setdefault(block, {})[row.site] = row.site
    return served


def _mode(frame: identity.FrameModule) -> str:
    """Grad mode and training flag: a graph of training is another one than that of evaluation."""
    grad = torch.is_grad_enabled()
    if frame.module is None:
        return "grad" if grad else "no grad"
    if frame.module.training:
        return "train" if grad else "train, no grad"
    return "eval, grad" if grad else "eval"


@dataclass
class Chooser:
    """Gives each find its layer and plan; collects notes for the report."""

    policy: Policy
    root: identity.Root | None
    frame: identity.FrameModule
    shared: Shared | None = None

    def __post_init__(self) -> None:
        self.notes: list[str] = [self.frame.limit_note()] if self.frame.limit_note() else []

    def __call__(self, place: Placed) -> LayerChoice:
        """The layer of one find, its plan, and a reason if other layers share the graph."""
        layer = None
        if self.root is not None:
            layer = identity.common_layer(place.nodes, self.root, self.frame)
        if layer is None or self.root is None:
            return LayerChoice("", self.policy.resolve(""))
        plan, name = self._plan(layer.names), self.root.show(layer.name)
        if self.shared is not None:
            return LayerChoice(name, plan, of_blocks=self.shared.layers(name))
        whole = identity.shared_by(layer, self.root, self.frame, place.calls)
        sharers = tuple(map(self.root.show, whole))
        repeats: tuple[str, ...] = ()
        if len(place.calls) > 1:  # one body, called for several layers
            repeats = tuple(other for other in sharers if other != name)
        if len(sharers) <= 1:
            return LayerChoice(name, plan)
        why = "one body is called for all of them" if repeats else self.frame.reason
        shared = f"graph shared by layers {', '.join(sharers)}"
        self.notes.append(f"{shared}: {why}")
        plans = {replace(self._plan((each,)), rule=()) for each in whole}
        differ = "whose plans differ"
        if len(plans) == 1:
            if ESTIMATORS[plan.estimator].needs == "nothing":
                return LayerChoice(name, plan, repeats=repeats)
            differ = "each of which has bases of its own"
        reason = Reason("shared-graph", f"{shared}, {differ}: {why}")
        return LayerChoice(name, plan, (reason,), repeats)

    def _plan(self, names: tuple[str, ...]) -> LayerPlan:
        short = names if self.root is None else tuple(map(self.root.show, names))
        return plan_of(self.policy, (*short, *names))


def plan_of(policy: Policy, names: Sequence[str]) -> LayerPlan:
    """A module with several names takes the plan of the first name that a rule knows.

    Args:
        policy: has the rules.
        names: at least one; those without wrappers come first.
    """
    plans = [policy.resolve(name) for name in dict.fromkeys(names)]
    return next((plan for plan in plans if plan.rule), plans[0])


def _is_whole(gm: fx.GraphModule, root: identity.Root | None, frame: identity.FrameModule) -> bool:
    """Whether this graph is all of the compiled model: no graph break before or after it."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    broken = reason is None or getattr(reason, "graph_break", True)
    return not broken and not frame.resumed and root is not None and frame.module is root.module


def _attended(rows: tuple[SiteRow, ...], root: identity.Root | None) -> Iterator[Attended]:
    """The attention of a graph, as the rules of a policy see it."""
    wholes = naming.with_wholes(root.shown if root else {}, {row.layer for row in rows})
    for row in rows:
        misfits = [reason.text for reason in row.reasons if reason.code == "rank"]
        yield Attended(row.layer, misfits[0] if misfits else None, wholes[row.layer])


def _modules_of(gm: fx.GraphModule, root: identity.Root | None) -> Iterator[str]:
    """Names of the modules whose code is in a graph, as far as they are known."""
    names = {} if root is None else root.names
    if root is not None and root.module is not None:
        for layer in set(exported.layers(gm.graph, root.module)):
            yield from {layer, root.show(layer)}
    for node in gm.graph.nodes:
        for key in node.meta.get("nn_module_stack") or ():
            module = str(key).partition("@")[0]
            if root is not None and module.isdecimal():  # not so in an exported program
                for name in names.get(int(module), ()):
                    yield from {name, root.show(name)}


def _with_break(graph: GraphReport, gm: fx.GraphModule, frame: identity.FrameModule) -> GraphReport:
    """Where a graph break cut an attention in two: with where it is and how to avoid it."""
    reasons = [r for row in graph.rows for r in row.reasons]
    reasons += [entry.reason for entry in graph.not_attention]
    if all(reason.code != "graph-break" for reason in reasons):
        return graph
    own = getattr(gm, "compile_subgraph_reason", None)
    text = break_before(identity.entered_at(frame), own)

    def said(reason: Reason) -> Reason:
        is_break = reason.code == "graph-break"
        return Reason(reason.code, f"{reason.text.rstrip('.')}. {text}") if is_break else reason

    rows = (replace(row, reasons=tuple(map(said, row.reasons))) for row in graph.rows)
    others = (replace(entry, reason=said(entry.reason)) for entry in graph.not_attention)
    return replace(graph, rows=tuple(rows), not_attention=tuple(others))


def _graph_key(
    gm: fx.GraphModule, frame: identity.FrameModule, shared: Shared | None
) -> tuple[Any, ...]:
    """Names a graph among those of one model: a graph compiled again replaces its report."""
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    # A symbol's name changes from compile to compile. The names of tensors tell the pieces apart
    # into which DDPOptimizer cuts one graph: equal layers have inputs of equal shapes.
    given = [(n.name, n.meta.get("example_value")) for n in inputs]
    shapes = [
        (name, tuple(s if isinstance(s, int) else "?" for s in v.shape), v.dtype, v.requires_grad)
        for name, v in given
        if isinstance(v, torch.Tensor)
    ]
    module: Any = (id(frame.module) if frame.module is not None else 0, frame.held)
    if shared is not None:
        module = shared.blocks
    # The same frame compiled for another value of a flag is another graph, and both may run.
    returned = str(next(iter(reversed(gm.graph.nodes))).args)
    return (frame.code_key, module, tuple(shapes), returned, torch.is_grad_enabled())


def _exact_kernels(result: Result, example_inputs: Sequence[Any]) -> AbstractContextManager[None]:
    """The device's fastest SDPA for exact attention of fixed sizes without a mask tensor.

    Elsewhere PyTorch's choice stands: cuDNN compiles a kernel for every new length, and rows that a
    mask hides altogether are its own affair.
    """
    devices = [x.device for x in example_inputs if isinstance(x, torch.Tensor) and x.is_cuda]
    rows = [row for row in result.graph.rows if row.decision == "exact"]
    is_plain = all(row.mask in ("none", "causal") for row in rows)
    is_static = all(isinstance(n, int) for row in rows for s in row.shapes.values() for n in s)
    if devices and rows and is_plain and is_static:
        return best_sdpa(devices[0])
    return nullcontext()


def _compile(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, name: str | None
) -> Callable[..., Any]:
    if options.compiler == "eager":
        return gm.forward
    if options.compiler == "aot_eager":
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(gm, list(example_inputs))
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    keep_from_fusion(gm)
    config: Any = torch.compiler.config
    # Keys know the graph of the forward only: not what the ops' backward is, nor how large what
    # they save. Another version of this package would find programs that call them as they were.
    tag = f"{config.cache_key_tag}distr-{stored.code_digest()}"
    # Also around each graph: a backward that is compiled when it is called is so outside of this.
    inner = config.patch(cache_key_tag=tag)(compile_fx_inner)
    patches = options.inductor or None
    with config.patch(cache_key_tag=tag):
        compiled: Any = compile_fx(gm, example_inputs, inner, config_patches=patches)
    return compiled  # type: ignore[no-any-return]


def _with_tangents(compiled: Callable[..., Any], gm: fx.GraphModule) -> Callable[..., Any]:
    """A compiled graph that is run node by node where an input carries a tangent.

    Compiled code has no forward-mode AD: it fails, or leaves tangents out. Attention is exact here:
    that of the op (``tangents.py``), and SDPA by PyTorch's products.
    """

    @functools.wraps(compiled)
    def run(*args: Any) -> Any:
        if tangents.are_carried(args):
            with tangents.products():
                return gm.forward(*args)
        return compiled(*args)

    return run


def _heard(compiled: Callable[..., Any], graph: GraphReport) -> Callable[..., Any]:
    """Note, in the rows of ``graph``, the calls in which its ops do otherwise than the rows say."""
    listener = Listener(graph.hear)

    @functools.wraps(compiled)
    def run(*args: Any) -> Any:
        with listening(listener):
            return compiled(*args)

    return run
