"""Write calls into a graph in front of a node."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from distr_compile.passes.memory import call, local_of

STANDS_FOR = "distr_stands_for"
"""Key in the metadata of the node that took a site's place: the name of the site's output."""


def erase_idle(graph: fx.Graph, node: fx.Node) -> None:
    """Take out a node of which nothing comes, and its readers."""
    for user in list(node.users):
        erase_idle(graph, user)
    graph.erase_node(node)


def declare_constants(module: fx.GraphModule) -> None:
    """Tell AOTAutograd of the buffers that :meth:`Emitter.constant` made.

    Of a graph of Dynamo it wants to know where every buffer comes from, for guards on those that
    are one tensor under two names; ours are none of the model's.
    """
    sources = getattr(module, "_param_name_to_source", None)
    if sources is not None:
        for name, _ in module.named_buffers():
            sources.setdefault(name, ConstantSource(name))


class Emitter:
    """Inserts nodes before ``anchor``; they carry its layer and stack trace in their metadata."""

    def __init__(self, graph: fx.Graph, anchor: fx.Node) -> None:
        self.graph, self._anchor = graph, anchor
        self._made: list[fx.Node] = []
        kept = ("nn_module_stack", "stack_trace", "source_fn_stack")
        self._meta = {key: anchor.meta[key] for key in kept if key in anchor.meta}

    def function(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A ``call_function`` node."""
        return self._call("call_function", target, args, kwargs)

    def method(self, name: str, *args: Any, **kwargs: Any) -> fx.Node:
        """A ``call_method`` node."""
        return self._call("call_method", name, args, kwargs)

    def leading(self, node: fx.Node, count: int) -> fx.Node:
        """``count`` more leading axes of size 1, or so many fewer."""
        for _ in range(abs(count)):
            node = self.method("unsqueeze" if count > 0 else "squeeze", node, 0)
        return node

    def again(self, node: fx.Node, source: fx.Node) -> fx.Node:
        """``node`` once more, over another first argument; a view as a reshape, if it has to be."""
        with self.graph.inserting_before(self._anchor):
            copy = self.graph.node_copy(node, lambda n: n)
        copy.args = (source, *copy.args[1:])
        if copy.target == "view":
            copy.target = "reshape"
        elif copy.target is torch.ops.aten.view.default:
            copy.target = torch.ops.aten.reshape.default
        return self._keep(copy)

    def thirds(self, x: fx.Node, dim: int = 0) -> list[fx.Node]:
        """Three equal chunks."""
        chunks = self.method("chunk", x, 3, dim)
        return [self.function(operator.getitem, chunks, i) for i in range(3)]

    def additive(self, hidden: fx.Node, dtype: torch.dtype, value: float = -math.inf) -> fx.Node:
        """A float tensor that is ``value`` where ``hidden`` is True and 0 elsewhere."""
        zeros = self.function(torch.zeros_like, hidden, dtype=dtype)
        return self.method("masked_fill", zeros, hidden, value)

    def constant(self, name: str, value: torch.Tensor) -> fx.Node:
        """A tensor that belongs to the graph: a buffer ``name`` of its module."""
        module = self.graph.owning_module
        assert module is not None
        module.register_buffer(name, value)
        with self.graph.inserting_before(self._anchor):
            node = self.graph.get_attr(name)
        self._made.append(node)
        example = self._anchor.meta.get("example_value")
        fake = local_of(example[0] if isinstance(example, tuple) else example)
        if isinstance(fake, FakeTensor):
            node.meta["example_value"] = fake.fake_mode.from_tensor(value, static_shapes=True)
        return node

    def undo(self) -> None:
        """Take out everything written so far; nothing may read it yet."""
        for node in reversed(self._made):
            self.graph.erase_node(node)
            if node.op == "get_attr":
                delattr(self.graph.owning_module, str(node.target))
        self._made.clear()

    def _call(self, kind: str, target: Any, args: Any, kwargs: Any) -> fx.Node:
        with self.graph.inserting_before(self._anchor):
            return self._keep(self.graph.create_node(kind, target, args, kwargs))

    def _keep(self, node: fx.Node) -> fx.Node:
        node.meta.update(self._meta)
        node.meta.pop("example_value", None)
        self._made.append(node)  # first: what follows may raise
        value = _example_value(node, self._anchor)
        if value is not None:
            node.meta["example_value"] = value
        return node


def _example_value(node: fx.Node, anchor: fx.Node) -> Any:
    """The node's fake value, which Dynamo records for its own nodes; None if it is not known.

    Without it AOTAutograd's cache refuses every graph that calls a method on the node.
    """
    inputs = {n: n.meta.get("example_value") for n in node.all_input_nodes}
    # Their own mode: the one now in force is another, made for the backend.
    near = list(inputs.values()) or [anchor.meta.get("example_value")]
    leaves = [local_of(x) for x in tree_leaves(near)]
    modes = [x.fake_mode for x in leaves if isinstance(x, FakeTensor)]
    if not modes or any(value is None for value in inputs.values()):
        return None
    args, kwargs = fx.map_arg((node.args, node.kwargs), inputs.__getitem__)
    # The Python dispatcher, as in Dynamo: else SDPA's C++ parts make symbolic sizes constants.
    with modes[0], enable_python_dispatcher():
        return call(node, args, kwargs)
