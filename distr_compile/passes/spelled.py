"""Small pieces of graphs that the walk meets: a question about each."""

from __future__ import annotations

from typing import Any

from torch import fx

from distr_compile.passes import vocabulary as voc
from distr_compile.passes.origin import Flow
from distr_compile.passes.vocabulary import read, same_shape, shape_of, target_name


def scatters(writer: fx.Node, value: fx.Node) -> bool:
    """Whether ``other[index] = value`` with an index that holds a tensor: queries were selected."""
    if target_name(writer) != "setitem" or writer.args[2] is not value:
        return False
    index = writer.args[1]
    return any(map(voc.is_tensor, index if isinstance(index, tuple) else (index,)))


def drops_sink(user: fx.Node, sink: voc.Append) -> bool:
    """Whether a slice takes the keys' weights and leaves out the sink's."""
    whole, keys = slice(None, None, None), shape_of(sink.x)[-1]
    weights: Any = user.args[0]
    if not same_shape(shape_of(user), (*shape_of(weights)[:-1], keys)):
        return False
    if target_name(user) != "getitem" or not isinstance(user.args[1], tuple):
        return False
    *others, last = user.args[1]
    reaches_last = Ellipsis in others or len(others) == len(shape_of(user)) - 1
    starts = (1,) if sink.front else (None, 0)
    return (
        reaches_last
        and all(other is Ellipsis or other == whole for other in others)
        and isinstance(last, slice)
        and last.start in starts
        and last.step in (None, 1)
    )


def row_maximum(op: voc.Add, reader: fx.Node) -> set[fx.Node]:
    """``x - amax(x, -1)`` shifts rows, which softmax ignores: the nodes that read x for it."""
    if op.alpha != -1 or not isinstance(op.y, fx.Node):
        return set()
    if not same_shape(shape_of(op.y), (*shape_of(op.x)[:-1], 1)):
        return set()
    node = op.y
    readers = {node}
    while target_name(node) in {"unsqueeze", "getitem", "detach"}:
        if not isinstance(node.args[0], fx.Node):
            return set()
        node = node.args[0]
        readers.add(node)
    if target_name(node) not in {"amax", "max"} or node.args[0] is not op.x:
        return set()
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    rank = len(shape_of(op.x))
    if not isinstance(dim, int) or dim % rank != rank - 1:
        return set()
    is_ours = all(user in readers or user is reader for n in readers for user in n.users)
    return readers if is_ours else set()


def is_banded(node: fx.Node, flow: Flow) -> bool:
    """Whether a window was cut out of the scores: as_strided, unfold or diagonal nearby."""
    seen, stack = {node}, [node]
    while stack and len(seen) < 64:
        current = stack.pop()
        if target_name(current) in {"as_strided", "unfold", "diagonal"}:
            return True
        near = [] if target_name(current) in {"linear", "softmax"} else current.all_input_nodes
        near = near + [user for user in current.users if flow.memory.writes_into(user, current)]
        for other in near:
            if other not in seen:
                seen.add(other)
                stack.append(other)
    return False


def is_cut_off(node: fx.Node) -> bool:
    """Whether scores come into the graph as an input: the product is before a graph break."""
    while node.op != "placeholder":
        op = read(node)
        if not isinstance(op, voc.Add | voc.Scale | voc.ON_SCORES):
            return False
        node = op.x
    return len(shape_of(node)) > 2


def weighs_values(softmax: fx.Node, flow: Flow) -> bool:
    """Whether the result of a softmax is multiplied with something, as P with V."""
    node = softmax
    while len(node.users) == 1:
        node = next(iter(node.users))
        op = flow.read(node)
        if isinstance(op, voc.Product):
            return True
        if not isinstance(op, voc.ONE_TO_ONE):
            return False
    return False
