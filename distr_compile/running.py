"""Several modules of one model that run one graph: which of them runs it, and what that changes.

Dynamo hands a module's weights to a graph, which may so serve any module of that kind. What is not
the module's own, its bases and its rows of the report, hangs on who is running. That is known where
the module is called, outside of all graphs: :func:`entered` notes it for as long as the call lasts,
in the thread that calls, and :func:`serving` looks it up when the graph runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.source import ConstantSource

from distr_compile import identity
from distr_compile.lowering.told import Listener, listening
from distr_compile.policy import RuleAudit
from distr_compile.reporting import GraphReport, Handover
from distr_compile.reporting.rows import Way


@dataclass(eq=False)
class _Call:
    """One call of a module: its name, and whether a graph ran in it."""

    block: str = ""
    had_graph: bool = False


_running: ContextVar[_Call] = ContextVar("distr_running_block", default=_Call())  # noqa: B039


@dataclass(frozen=True)
class Live:
    """Live counters of a ``GraphReport``, under the names that they have there."""

    calls: dict[int, int] = field(default_factory=dict)
    handed: dict[tuple[int, Way], Handover] = field(default_factory=dict)
    called: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Shared:
    """Modules of one model that run one graph, each with its own weights.

    Attributes:
        model: gives layers their names.
        blocks: names of the modules, which have equal plans; one of them is being compiled.
        is_all: whether the model has no other such modules.
        begin: the module at which the names of layers begin, "" for the model.
        notes: what the reports of their graphs say besides.
        audits: what the rules of the policy met, graph by graph; other groups may add to it, too.
        live: the counters of each graph that they run, by its key. Graphs of one key have the same
            rows: where Dynamo captures one anew, for other strides say, both go on running.
    """

    model: nn.Module
    blocks: tuple[str, ...]
    is_all: bool
    begin: str = ""
    notes: tuple[str, ...] = ()
    audits: list[RuleAudit] = field(default_factory=list, repr=False, compare=False)
    live: dict[object, Live] = field(default_factory=dict, repr=False, compare=False)

    def root(self) -> identity.Root:
        """The model, in the place of the module that is being compiled."""
        return identity.root_of(self.model, self.begin)

    def block_of(self, name: str) -> str | None:
        """The block that a layer stands in; None where it is in none of them."""
        return next((b for b in self.blocks if name == b or name.startswith(f"{b}.")), None)

    def layers(self, name: str) -> dict[str, str]:
        """The layer of each block that stands in it where ``name`` stands in its own.

        Empty where ``name`` is in none of the blocks.
        """
        own = self.block_of(name)
        return {} if own is None else {block: block + name[len(own) :] for block in self.blocks}

    def count(self, graph: GraphReport, key: object) -> GraphReport:
        """A graph with all calls counted, on from those of the last graph of this key."""
        live = self.live.setdefault(key, Live())
        live.called.update({row.site: live.called.get(row.site, 0) for row in graph.rows})
        return replace(graph, calls=live.calls, handed=live.handed, called=live.called)


def entered(
    block: str, call: Callable[..., Any], without: Callable[[], None] | None = None
) -> Callable[..., Any]:
    """A callable that calls ``call`` as the module ``block``; calls nest, also in each other.

    ``without`` is told of each call in which no graph of :func:`noticed` ran.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        around, this = _running.get(), _Call(block)
        token = _running.set(this)
        try:
            result = call(*args, **kwargs)
        finally:
            _running.reset(token)
        if this.had_graph:
            around.had_graph = True
        elif without is not None and not torch.compiler.is_compiling():
            without()
        return result

    return run


def noticed(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """A graph of several modules, for Dynamo to call: that it ran is known to who is running."""

    @functools.wraps(compiled)
    def run(*args: Any) -> Any:
        _running.get().had_graph = True
        return compiled(*args)

    return run


def serving(
    compiled: Callable[..., Any],
    graph: GraphReport,
    rows: Mapping[str, Mapping[int, int]],
    inputs: Mapping[str, Mapping[str, Tensor]],
) -> Callable[..., Any]:
    """A graph of several modules, for Dynamo to call.

    Args:
        compiled: takes the inputs that Dynamo knows, and after them those of ``inputs``.
        graph: its report, which counts the calls of each row, and those that ran exactly.
        rows: by module: the number of a site -> that of the module's row of it.
        inputs: by module and name: what the graph takes after Dynamo's inputs, in one order; empty
            where that is nothing.

    Raises:
        RuntimeError: when called: none of the modules is running, and there are ``inputs``.
    """

    def listener(own: Mapping[int, int]) -> Listener:
        return Listener(lambda site, handover: graph.hear(own[site], handover))

    listeners = {block: listener(own) for block, own in rows.items()}

    @functools.wraps(compiled)
    def run(*args: Any) -> Any:
        block = _running.get().block
        own = rows.get(block)
        if own is None:
            if not inputs:
                return compiled(*args)
            raise RuntimeError(
                f"compile_blocks: the graph of {', '.join(rows)} was run while "
                f"{block or 'no block'} was called; accepted: calls of these modules themselves"
            )
        graph.count_calls(own.values())

        with listening(listeners[block]):
            return compiled(*args, *inputs.get(block, {}).values())

    return run


def with_inputs(module: fx.GraphModule, names: Sequence[str]) -> fx.GraphModule:
    """A copy of a graph in which constants ``names`` are inputs, after all that it has.

    A copy, since Dynamo looks at the inputs of its own graph once more when that is compiled.
    """
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    inputs = list(module.graph.find_nodes(op="placeholder"))
    for node in inputs:
        copies[node] = graph.node_copy(node)
        copies[node]._dynamo_source = node._dynamo_source  # type: ignore[attr-defined]
    for name in names:
        same = [node for node in module.graph.find_nodes(op="get_attr") if node.target == name]
        given = graph.placeholder(name)
        given.meta["example_value"] = same[0].meta["example_value"]
        given._dynamo_source = ConstantSource(name)  # type: ignore[attr-defined]
        copies |= dict.fromkeys(same, given)
    result = graph.graph_copy(module.graph, copies, return_output_node=True)
    assert isinstance(result, tuple)
    graph.output(*result[:1])
    copied = fx.GraphModule(module, graph, type(module).__name__)
    copied.meta = module.meta
    for key in ("_param_name_to_source", "compile_subgraph_reason"):
        if hasattr(module, key):
            setattr(copied, key, getattr(module, key))
    return copied
