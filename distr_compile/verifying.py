"""Is every rewrite right, on this model and these inputs? ``distr_compile.verify`` answers.

The model runs once in eager and once rewritten, with every ``distr.attention`` computing exact
attention from its own arguments (``lowering/exactly.py``). What then differs by more than rounding
is a fault of the pass: a lost mask, a wrong scale, a write that was ignored.

Outputs alone would not show everything: behind a gate of zero nothing shows. So each Dynamo graph
is also run twice beside the real run, on copies of its inputs: as Dynamo made it, which gives the
value of every attention's output, and rewritten, where the node that took its place is compared
with that value and then goes on with it. The error of an attention is so its own, however many
others come before it.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from tabulate import tabulate
from torch import Tensor, fx, nn
from torch.fx._lazy_graph_module import _LazyGraphModule

from distr_compile import identity, underneath
from distr_compile.backend import Result, run_pass
from distr_compile.comparing import (
    bound_of,
    is_equal,
    named_tensors,
    relative_error,
    row_error,
    unlike,
    without_nan,
)
from distr_compile.explaining import Outside, untraced
from distr_compile.lowering.exactly import computing_exactly
from distr_compile.passes.emit import STANDS_FOR
from distr_compile.policy import Policy, PolicyError
from distr_compile.policy.errors import check_callable
from distr_compile.reporting import SiteRow
from distr_compile.restoring import RandomState, Snapshot, clones, copied

SCHEMA_VERSION = 1

Status = Literal["ok", "wrong", "not-verified"]


@dataclass(frozen=True)
class SiteCheck:
    """One attention and how far its rewrite is from what the model computes there.

    Attributes:
        layer: name of the layer as in ``named_modules()``.
        decision: "distr", "exact" (its nodes were left alone) or "exact, sdpa" (it became one call
            of SDPA).
        error: the largest relative error of a row, see :func:`row_error`; None if not verified.
        bound: what ``error`` may be at most.
        status: "ok", "wrong" or "not-verified".
        why: what is to be known of a status other than ok; may be empty.
        dtype: of the attention, such as "float32".
        graph: number of the compiled graph, -1 for what ran outside of every graph.
        site: number of the attention within its graph.
    """

    layer: str
    decision: str
    error: float | None
    bound: float
    status: Status
    why: str = ""
    dtype: str = ""
    graph: int = 0
    site: int = 0


@dataclass(frozen=True)
class OutputCheck:
    """One tensor that the model returned or wrote to, and how far the rewritten model's is from it.

    Attributes:
        name: where it stands, such as "out['logits']", "args[0] (written)" or "norm.running_mean
            (written)".
        error: the relative error, see :func:`relative_error`; None if there was nothing to compare.
        bound: what ``error`` may be at most.
        status: "ok", "wrong" or "not-verified".
        why: what is to be known of a status other than ok; may be empty.
    """

    name: str
    error: float | None
    bound: float
    status: Status
    why: str = ""


@dataclass(frozen=True, repr=False)
class Verification:
    """What :func:`verify` found; ``print`` it for the table.

    Attributes:
        rows: one per attention of the captured graphs.
        outputs: one per floating tensor that the model returned, or wrote to in place.
        name: class name of the model, or name of the function.
    """

    rows: tuple[SiteCheck, ...]
    outputs: tuple[OutputCheck, ...]
    name: str = ""

    @property
    def ok(self) -> bool:
        """Whether every attention and every output was compared and is within its bound.

        Where there is neither, nothing was compared, and it is not. Neither is it where attention
        ran outside of every graph. A softmax there counts as attention if there is no other: some
        are of routers or of sampling.
        """
        statuses = [row.status for row in self.rows] + [check.status for check in self.outputs]
        return bool(statuses) and all(status == "ok" for status in statuses)

    def summary(self) -> str:
        """Say the totals in one line."""
        sites = _totals("attention", [row.status for row in self.rows])
        outputs = _totals("output", [check.status for check in self.outputs])
        return ("ok: " if self.ok else "NOT OK: ") + f"{sites}; {outputs}"

    def __str__(self) -> str:
        sites = [
            {"layer": row.layer or "(root)", "decision": row.decision, "dtype": row.dtype}
            | _said(row)
            for row in self.rows
        ]
        outputs = [{"output": check.name} | _said(check) for check in self.outputs]
        blocks = [self.name, _table(sites), _table(outputs), self.summary()]
        return "\n\n".join(block for block in blocks if block)

    def __repr__(self) -> str:
        return f"<Verification of {self.name}: {self.summary()}>"

    def to_dict(self) -> dict[str, Any]:
        """Return the verification as plain data; an infinite error is "inf"."""
        return {
            "schema": SCHEMA_VERSION,
            "name": self.name,
            "ok": self.ok,
            "rows": [_plain(row) for row in self.rows],
            "outputs": [_plain(check) for check in self.outputs],
        }

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the verification as JSON; it is also written to ``path``.

        Raises:
            OSError: the file cannot be written.
        """
        text = json.dumps(self.to_dict(), indent=1)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text


def _totals(noun: str, statuses: Sequence[Status]) -> str:
    text = f"{statuses.count('ok')} of {len(statuses)} {noun}{'s' * (len(statuses) != 1)} ok"
    for status in ("wrong", "not-verified"):
        if count := statuses.count(status):
            text += f", {count} {status}"
    return text


def _said(check: SiteCheck | OutputCheck) -> dict[str, str]:
    error = "-" if check.error is None else f"{check.error:.1e}"
    status = check.status + (f": {check.why}" if check.why else "")
    return {"error": error, "bound": f"{check.bound:.0e}", "status": status}


def _table(lines: Sequence[Mapping[str, str]]) -> str:
    if not lines:
        return ""
    return tabulate(lines, headers="keys", tablefmt="simple", disable_numparse=True)


def _plain(check: SiteCheck | OutputCheck) -> dict[str, Any]:
    data = dataclasses.asdict(check)
    if data["error"] is not None and not math.isfinite(data["error"]):
        data["error"] = str(data["error"])
    return data


def verify(
    model: nn.Module | Callable[..., Any],
    *args: Any,
    policy: str | os.PathLike[str] | Policy | Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Verification:
    """Run ``model(*args, **kwargs)`` in eager and rewritten, and compare outputs and attentions.

    In the rewritten run every ``distr.attention`` computes exact attention in fp64 (fp32 where the
    device has no fp64) from its own arguments. A module in eval mode, or a method of one, runs
    under ``torch.no_grad()``; others run as grad mode is. Both runs start from the same random
    numbers and copies of the inputs, and the second from what the model held before the first.
    Afterwards the tensors, attributes and containers of the modules, the inputs and the random
    numbers are what they were before the call. What Dynamo learns is dropped. What the model was
    compiled with, in place too, is set aside meanwhile, and so are plans of
    ``distr_compile.transformers.apply``.

    Args:
        model: a module or a function, compiled or not.
        *args: its arguments.
        policy: a path, a :class:`Policy` or a dict; without one ``DISTR_POLICY``, or else group
            size 2 everywhere. Its ``min_seq_len`` counts as 0 in every layer, so that what the
            policy wants approximated is checked on any device and at any size.
        **kwargs: its keyword arguments.

    Returns:
        Errors of all attentions and outputs with their bounds, the latter from ``BOUNDS``.

    Raises:
        PolicyError: the policy is wrong, for itself or for this model.
        TypeError: there is nothing to call.
        Exception: whatever the model raises, and whatever the rewritten model raises.
    """
    check_callable(model)
    with underneath.plain(model) as own:
        return _verified(own, args, kwargs, _at_any_length(Policy.from_any(policy)))


def _verified(
    model: nn.Module | Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    checked: Policy,
) -> Verification:
    owner = identity.key_of(model)
    is_inference = isinstance(owner, nn.Module) and not owner.training
    grad_mode = torch.no_grad() if is_inference else contextlib.nullcontext()
    watch = _Watch(checked, Outside(owner))
    before, numbers = Snapshot(model), RandomState.now()

    def run(call: Callable[..., Any]) -> dict[str, Tensor]:
        inputs = copied((args, kwargs))
        given = {name: t.detach().clone() for name, t in named_tensors(inputs, "inputs")}
        try:
            out = call(*inputs[0], **inputs[1])
            return _seen(out, inputs, given, before)
        finally:
            before.restore()
            numbers.restore()

    with grad_mode:
        with torch.compiler.set_stance("force_eager"):
            expected = run(model)
        with untraced() as options, computing_exactly():
            try:
                got = run(watch.outside.watching(torch.compile(model, backend=watch, **options)))
            except Exception as error:
                inner = getattr(error, "inner_exception", None)
                if isinstance(inner, PolicyError):
                    raise inner from None
                raise
    dtypes = before.dtypes | {t.dtype for t in expected.values()}
    dtypes |= {t.dtype for _, t in named_tensors((args, kwargs), "inputs")}
    dtypes |= {dtype for graph in watch.called for dtype in graph.dtypes.values()}
    name = getattr(model, "__name__", type(model).__name__)
    return Verification(watch.checks(), tuple(_outputs(expected, got, bound_of(dtypes))), name)


def _at_any_length(policy: Policy) -> Policy:
    changed = policy.with_default(min_seq_len=0)
    for rule in policy.rule:
        if "min_seq_len" in dict(rule.fields):
            changed = changed.with_rule(rule.layers, min_seq_len=0)
    return changed


# --- outputs -----------------------------------------------------------------------------------


def _seen(
    out: Any, inputs: Any, given: Mapping[str, Tensor], before: Snapshot
) -> dict[str, Tensor]:
    """Copies of what a call returned and of all that it wrote to, by name."""
    seen = {
        name: t.detach().clone().requires_grad_(t.requires_grad) for name, t in named_tensors(out)
    }
    for name, tensor in named_tensors(inputs, "inputs"):
        if name in given and not is_equal(tensor, given[name]):
            seen[
                f"{name.replace('inputs[0]', 'args').replace('inputs[1]', 'kwargs')} (written)"
            ] = tensor.detach().clone()
    written = {f"{name} (written)": t for name, t in before.written().items()}
    return seen | {name: t for name, t in written.items() if t.is_floating_point()}


def _outputs(
    expected: Mapping[str, Tensor], got: Mapping[str, Tensor], bound: float
) -> Iterator[OutputCheck]:
    for name in dict.fromkeys((*expected, *got)):
        want, have = expected.get(name), got.get(name)
        if want is None or have is None:
            why = "only the rewritten model has it" if want is None else "the rewritten lacks it"
            yield OutputCheck(name, math.inf, bound, "wrong", why)
        elif why := unlike(want, have):
            yield OutputCheck(name, math.inf, bound, "wrong", why)
        elif want.isnan().all() and want.numel():
            yield OutputCheck(name, None, bound, "not-verified", "it is NaN everywhere in eager")
        else:
            error = relative_error(want, without_nan(want, have))
            yield OutputCheck(name, error, bound, "ok" if error <= bound else "wrong")


# --- the graphs ---------------------------------------------------------------------------------


class _Watch:
    """A Dynamo backend: the pass, plain execution, and both graphs once more beside each call."""

    def __init__(self, policy: Policy, outside: Outside) -> None:
        self.policy, self.outside = policy, outside
        self.graphs: list[_Graph] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        original = copy.deepcopy(gm)
        paths = {id(part.graph): path for path, part in _graph_modules(gm)}
        result = run_pass(gm, self.policy, change=True)
        if not result.graph.rows:
            return self.outside.excluding(gm.forward)
        graph = _Graph(result, original, gm, paths)
        self.graphs.append(graph)
        return self.outside.excluding(graph)

    @property
    def called(self) -> list[_Graph]:
        """The graphs that ran; Dynamo may abandon one that it has handed over."""
        return [graph for graph in self.graphs if graph.calls]

    def checks(self) -> tuple[SiteCheck, ...]:
        """The checks of all rows, graph by graph, then one for each layer outside of them."""
        checks = [check for i, graph in enumerate(self.called) for check in graph.checks(number=i)]
        outside = [each for each in self.outside.found if not checks or _is_attention(each.op)]
        texts = {each.layer: each.reason.text for each in outside}
        for layer, text in texts.items():
            checks.append(SiteCheck(layer, "exact", None, 0.0, "not-verified", text, graph=-1))
        return tuple(checks)


def _is_attention(op: str) -> bool:
    """Whether an op is attention for certain; the math of SDPA has a softmax of its own."""
    return "softmax" not in op or "safe_softmax" in op


def _graph_modules(gm: fx.GraphModule) -> list[tuple[str, fx.GraphModule]]:
    return [(path, m) for path, m in gm.named_modules() if isinstance(m, fx.GraphModule)]


@dataclass
class _Site:
    """What was measured at one attention.

    Attributes:
        values: of its output in the graph as Dynamo made it, in the order of the calls within one
            run of the graph.
        error: the largest so far; None before the first comparison.
        bound: the largest so far.
        why: see ``SiteCheck``.
    """

    values: list[Tensor] = field(default_factory=list)
    error: float | None = None
    bound: float = 0.0
    why: str = "no call reached it"

    def compare(self, want: Tensor, got: Any, dtype: torch.dtype | None) -> None:
        """Take one more pair of values into account."""
        dtypes = {want.dtype, dtype} if dtype else {want.dtype}
        self.bound = max(self.bound, bound_of(dtypes))
        if not isinstance(got, Tensor) or want.shape != got.shape or want.dtype != got.dtype:
            self.error = math.inf
            self.why = unlike(want, got) if isinstance(got, Tensor) else "its value is no tensor"
            return
        error = row_error(want, without_nan(want, got))
        if not want.nan_to_num().any() and not error:
            if self.error is None:
                self.why = "its value is 0 or NaN everywhere"
            return
        self.error = max(error, self.error or 0.0)
        self.why = "" if math.isfinite(self.error) else "not finite in the same places"


class _Graph:
    """One graph that the pass was given: as it was, as it is, and what differed between them."""

    def __init__(
        self,
        result: Result,
        original: fx.GraphModule,
        rewritten: fx.GraphModule,
        paths: Mapping[int, str],
    ) -> None:
        self.rows = result.graph.rows
        self.calls = 0
        self._forward = rewritten.forward
        self._original, self._follower = original, copy.deepcopy(rewritten)
        places = {
            number: (paths[id(graph)], name)
            for number, (graph, name) in result.outputs.items()
            if id(graph) in paths
        }
        # Rows of one body that is called for several layers share a site.
        self._sites = {place: _Site() for place in places.values()}
        self._at = {
            row.site: self._sites[places[row.site]] for row in self.rows if row.site in places
        }
        self.dtypes = {row.site: _dtype(row, original) for row in self.rows if row.dtype}
        dtypes = {places[n]: self.dtypes.get(n) for n in places}
        for place, site in self._sites.items():
            _tap(self._original, *place, _Recorder(site))
            _tap(self._follower, *place, _Comparer(site, dtypes[place]))

    def __call__(self, *inputs: Any) -> Any:
        """Run both graphs on copies, then the rewritten one on the inputs themselves."""
        self.calls += 1
        numbers = RandomState.now()
        for site in self._sites.values():
            site.values.clear()
        try:
            for graph in (self._original, self._follower):
                self._beside(graph, inputs)
                numbers.restore()
        except Exception as error:  # it may be what this graph does when it really runs
            numbers.restore()
            for site in self._sites.values():
                if site.error is None:
                    text = str(error).strip().partition("\n")[0][:100]
                    site.why = f"the graph does not run alone: {type(error).__name__}: {text}"
        return self._forward(*inputs)

    def _beside(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> None:
        _LazyGraphModule.force_recompile(graph)  # else its first call prints what it raises
        tensors = clones((x for x in inputs if isinstance(x, Tensor)), keep_grad=False)
        with torch.no_grad():
            graph.forward(*(tensors.get(id(x), x) for x in inputs))

    def checks(self, number: int) -> Iterator[SiteCheck]:
        """One per row."""
        for row in self.rows:
            site = self._at.get(row.site, _Site(why="the pass does not tell what stands for it"))
            known = self.dtypes.get(row.site)
            bound = site.bound or bound_of({known} if known else set())
            status: Status = "not-verified"
            if site.error is not None:
                status = "ok" if site.error <= bound else "wrong"
            yield SiteCheck(
                layer=row.layer,
                decision=_decision(row),
                error=site.error,
                bound=bound,
                status=status,
                why=site.why,
                dtype=row.dtype,
                graph=number,
                site=row.site,
            )


def _dtype(row: SiteRow, gm: fx.GraphModule) -> torch.dtype:
    """The lowest precision that may have taken part: models in fp64 have softmaxes in fp32."""
    dtype: torch.dtype = getattr(torch, row.dtype)
    if dtype != torch.float64:
        return dtype
    values = (n.meta.get("example_value") for _, m in _graph_modules(gm) for n in m.graph.nodes)
    in_single = any(isinstance(v, Tensor) and v.dtype == torch.float32 for v in values)
    return torch.float32 if in_single else dtype


def _decision(row: SiteRow) -> str:
    is_rewritten = row.decision == "exact" and row.kernel is not None
    return f"exact, {row.kernel}" if is_rewritten else row.decision


def _tap(gm: fx.GraphModule, path: str, name: str, see: Callable[[Any, bool], Any]) -> None:
    """Hand the value of what stands for a site's output to ``see``, and go on with its answer."""
    try:
        body = gm.get_submodule(path)
    except AttributeError:
        return
    assert isinstance(body, fx.GraphModule)
    stands = [node for node in body.graph.nodes if node.meta.get(STANDS_FOR) == name]
    is_rewritten = bool(stands)
    stands = stands or [node for node in body.graph.nodes if node.name == name]
    if not stands:
        return
    with body.graph.inserting_after(stands[0]):
        tap = body.graph.call_function(see, (stands[0], is_rewritten))
    stands[0].replace_all_uses_with(tap, delete_user_cb=lambda user: user is not tap)
    body.recompile()


def _value(value: Any) -> Tensor | None:
    """The tensor to compare: of several outputs the first; None where nothing has values.

    Of a tensor inside a transform (vmap, grad) it is the one underneath, with its batch axes.
    """
    first = value[0] if isinstance(value, (tuple, list)) and value else value
    while isinstance(first, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(first):
        first = torch._C._functorch.get_unwrapped(first)
    return first if type(first) in (Tensor, nn.Parameter) else None  # traced, distributed, ...


class _Recorder:
    """Keeps the values of a site."""

    def __init__(self, site: _Site) -> None:
        self.site, self.__name__ = site, "record"

    def __call__(self, value: Any, is_rewritten: bool) -> Any:
        tensor = _value(value)
        if tensor is None:
            self.site.why = "its value is not that of a plain tensor"
        else:
            self.site.values.append(tensor.detach().clone())
        return value


class _Comparer:
    """Compares with the values kept, in their order, and goes on with them."""

    def __init__(self, site: _Site, dtype: torch.dtype | None) -> None:
        self.site, self.dtype, self.__name__ = site, dtype, "compare"

    def __call__(self, value: Any, is_rewritten: bool) -> Any:
        tensor = _value(value)
        if tensor is None or not self.site.values:
            return value
        want = self.site.values.pop(0)
        self.site.compare(want, tensor, self.dtype)
        first = value[0] if isinstance(value, (tuple, list)) else value
        if not is_rewritten or first is not tensor or want.shape != tensor.shape:
            return value
        known = torch.empty_like(tensor).copy_(want)
        return (known, *value[1:]) if isinstance(value, (tuple, list)) else known
