"""Where values and axes come from: two questions the matcher asks about Q, K and the scores.

*Origins* tell an activation from a table of parameters (a relative-position table times Q is a
bias, a projection of something times Q is a second set of scores). *Axes* tell width from tokens
from batch: channel attention has the very operations of attention, but contracts over tokens.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from distr_compile.passes import vocabulary as voc
from distr_compile.passes.constants import Constants
from distr_compile.passes.memory import Memory
from distr_compile.passes.site import RefusedError
from distr_compile.passes.vocabulary import hint, read, shape_of, target_name

TABLE, INPUT, PROJECTION = "table", "input", "projection"

_CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})
_PROJECTIONS = _CONVOLUTIONS | {"linear", "addmm", "conv_transpose2d"}
_STOPS = _CONVOLUTIONS | frozenset(
    "linear addmm layer_norm group_norm batch_norm rms_norm embedding cross_entropy topk "
    "argmax".split()
)
_MAX_PRODUCTS = 4
_NOTHING: frozenset[Any] = frozenset()


class Flow:
    """One forward walk over a graph, answering for every node what it is made of.

    What was written in place into the memory that a node reads counts as read by it.

    Attributes:
        memory: which node writes what.
        constants: the values of what hangs on constants only.
        origins: node -> subset of {table, input, projection}; empty for constants.
        chained: node -> products it is reached from through operations on scores.
        behind: node -> products of two activations it depends on, through anything but a layer.
        axes: what :func:`axis_origin` found out so far.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.memory = Memory(graph)
        self.constants = Constants(self.memory)
        # Under the name of a storage: of what was written into it so far.
        self.origins: dict[fx.Node | int, frozenset[str]] = {}
        self.behind: dict[fx.Node | int, frozenset[fx.Node]] = {}
        self.chained: dict[fx.Node, frozenset[fx.Node]] = {}
        self.axes: dict[Axis, str | None] = {}
        self._weights: set[fx.Node] = set()
        self._ops: dict[fx.Node, voc.Op | None] = {}
        for node in graph.nodes:
            self._visit(node)

    def read(self, node: Any) -> voc.Op | None:
        """What a node means (:func:`.vocabulary.read`); ``linear`` may be a product here."""
        return self._ops.get(node)

    def now(self, node: fx.Node, reader: fx.Node) -> fx.Node:
        """The node that made what ``reader`` reads of ``node``.

        Raises:
            RefusedError: some of it was written in place in a way that cannot be followed.
        """
        found = self.memory.definition(node, reader)
        if found is None:
            raise RefusedError("in-place-write", f"{node} is written in place before it is read")
        return found

    def through(self, node: fx.Node, out: fx.Node) -> voc.Op | None:
        """What a node means, if ``out`` may read its source in its stead.

        That is so where neither is written in place after the node, the node is no write, and it
        does not leave the graph with a gradient, which somebody may ask of it there.
        """
        op, memory = self.read(node), self.memory
        if not isinstance(op, voc.Unary) or memory.writes(node) or self.cuts_gradient(node, out):
            return None
        value = voc.tensor_of(node)
        is_recorded = value is not None and value.requires_grad
        if is_recorded and any(user.op == "output" for user in node.users):
            return None
        is_changed = memory.may_change(node, node, out) or memory.may_change(op.x, node, out)
        return None if is_changed else op

    def is_scores(self, product: fx.Node, op: voc.Op | None = None) -> bool:
        """Whether both factors of a product, as Q and K, hang on the input or passed a layer."""
        op, active = op or self.read(product), {INPUT, PROJECTION}
        return isinstance(op, voc.Product) and all(self.origins[x] & active for x in (op.a, op.b))

    def cuts_gradient(self, node: fx.Node, out: fx.Node) -> bool:
        """Whether no gradient of ``out`` passes a node that has inputs which record one."""
        value, given = voc.tensor_of(node), map(voc.tensor_of, node.all_input_nodes)
        if value is None or not any(x is not None and x.requires_grad for x in given):
            return False
        # What a view made under no_grad says of itself cannot be trusted.
        is_unrecorded = node in self.memory.without_grad and out not in self.memory.without_grad
        return is_unrecorded or (value.dtype.is_floating_point and not value.requires_grad)

    def before(self, node: Any, reader: fx.Node) -> frozenset[fx.Node]:
        """The products that what ``reader`` reads of ``node`` is reached from."""
        made = self.memory.definition(node, reader) if isinstance(node, fx.Node) else None
        return self.chained[made] if made is not None else _NOTHING

    def _visit(self, node: fx.Node) -> None:
        is_linear, memory = target_name(node) == "linear", self.memory
        op = voc.linear_product(node) if is_linear else voc.read(node)
        if is_linear and not self.is_scores(node, op):
            op = None
        inputs = node.all_input_nodes
        sources = [*inputs, *frozenset().union(*map(memory.storages, inputs))]
        self._ops[node] = op
        self.origins[node] = self._origin(node, op, sources)
        self.chained[node] = self._chain(node, op)
        if isinstance(op, voc.Softmax) or (
            isinstance(op, voc.MOVED | voc.Dropout) and op.x in self._weights
        ):
            self._weights.add(node)
        self.behind[node] = self._depend(node, op, sources)
        for storage in memory.writes(node):
            self.origins[storage] = self._all_origins([storage, node])
            self.behind[storage] = self._all_behind([storage, node])

    def _all_origins(self, sources: Iterable[fx.Node | int]) -> frozenset[str]:
        return _NOTHING.union(*(self.origins.get(x, _NOTHING) for x in sources))

    def _all_behind(self, sources: Iterable[fx.Node | int]) -> frozenset[fx.Node]:
        return self._first(*(self.behind.get(x, _NOTHING) for x in sources))

    def _origin(self, node: fx.Node, op: voc.Op | None, sources: list[Any]) -> frozenset[str]:
        if node.op == "placeholder":
            is_table = isinstance(voc.tensor_of(node), torch.nn.Parameter)
            is_table = is_table or any(x in str(node.target) for x in ("_buffers_", "_parameters_"))
            return frozenset({TABLE if is_table else INPUT})
        if node.op == "get_attr":
            return frozenset({TABLE})
        if target_name(node) in _PROJECTIONS and op is None:
            return frozenset({PROJECTION})
        if isinstance(op, voc.Product) and {TABLE} in (self.origins[op.a], self.origins[op.b]):
            return frozenset({PROJECTION})
        return self._all_origins(sources)

    def _chain(self, node: fx.Node, op: voc.Op | None) -> frozenset[fx.Node]:
        if isinstance(op, voc.Product):
            return _NOTHING if self._is_output(op) else frozenset({node})
        if isinstance(op, voc.Scale):
            return self._first(self.before(op.x, node), self.before(op.factor, node))
        if isinstance(op, voc.Add):
            return self._first(self.before(op.x, node), self.before(op.y, node))
        return self.before(op.x, node) if isinstance(op, voc.ON_SCORES) else _NOTHING

    def _is_output(self, op: voc.Product) -> bool:
        """Whether a product is PV, not QK^T."""
        return op.a in self._weights or op.b in self._weights

    def _first(self, *products: frozenset[fx.Node]) -> frozenset[fx.Node]:
        found = _NOTHING.union(*products)
        return frozenset(sorted(found)[:_MAX_PRODUCTS])

    def _depend(self, node: fx.Node, op: voc.Op | None, sources: list[Any]) -> frozenset[fx.Node]:
        if isinstance(op, voc.Softmax | voc.Sdpa):
            return _NOTHING
        if target_name(node) in _STOPS:  # a layer ends the walk, unless it mixes heads of scores
            return self.chained[sources[0]] if _mixes_heads(node) else _NOTHING
        value = voc.tensor_of(node)
        if value is not None and not value.dtype.is_floating_point:
            return _NOTHING  # an index or a mask: chosen by scores, but no scores
        if isinstance(op, voc.Product) and not self._is_output(op) and self.is_scores(node):
            return frozenset({node})
        if isinstance(op, voc.Product) and (self._is_output(op) or not op.equation):
            return _NOTHING
        return self._all_behind(sources)


def _mixes_heads(layer: fx.Node) -> bool:
    """Whether a layer's channels are heads: a convolution of them, a linear after a permute."""
    name = target_name(layer)
    op = read(layer.args[0]) if name == "linear" else None
    while isinstance(op, voc.MOVED | voc.Scale):
        rank = len(shape_of(op.x))
        if isinstance(op, voc.Permute) and set(op.dims[-2:]) != {rank - 2, rank - 1}:
            return True
        op = read(op.x)
    return name in {"conv1d", "conv2d"}


# -- axes ---------------------------------------------------------------------------------------

CHANNEL, TOKEN, BATCH = "channel", "token", "batch"

Axis = tuple[fx.Node, int]


def axis_origin(node: fx.Node, axis: int, known: dict[Axis, str | None]) -> str | None:
    """What an axis of a node was when it left the last layer: channel, token or batch.

    Follows the axis back through views, permutations and pointwise operations to a linear layer
    (its last axis is channels), a convolution (axis 1 channels, axis 0 batch) or an embedding.
    Where the walk ends elsewhere, an axis that a linear layer kept between its first and its last
    is of tokens; of any other nothing is concluded: ``None``.

    Args:
        node, axis: the axis in question.
        known: answers of earlier walks over the same graph, extended: layers share their ways back.
    """
    answer: str | None = None
    way: list[Axis] = []
    while rank := len(shape_of(node)):
        axis %= rank
        if (node, axis) in known:
            answer = known[node, axis]
            break
        way.append((node, axis))
        name = target_name(node)
        is_layer = name in {"linear", "embedding"}
        if name in _CONVOLUTIONS or (is_layer and axis == rank - 1):
            answer = CHANNEL if is_layer else {0: BATCH, 1: CHANNEL}.get(axis, TOKEN)
            break
        following: Any = (node.args[0], axis) if is_layer else _previous_axis(node, axis, rank)
        if following is None or not voc.is_tensor(following[0]):
            break
        node, axis = following
    size, place = hint(shape_of(node)[axis]) if rank else -1, axis
    for node, axis in reversed(way):
        before, size = size, hint(shape_of(node)[axis])
        moved, place = axis > place and not isinstance(read(node), voc.Permute), axis
        if answer == BATCH and (before != size or moved):
            answer = None  # tokens folded into the batch, or taken out: a new axis is in front
        if answer is None and target_name(node) == "linear" and axis > 0:
            answer = TOKEN
        known[node, axis] = answer
    return answer


def _previous_axis(node: fx.Node, axis: int, rank: int) -> tuple[Any, int] | None:
    op, name = read(node), target_name(node)
    if isinstance(op, voc.Permute):
        return op.x, op.dims[axis]
    if isinstance(op, voc.Product):
        if op.equation is not None:
            return _einsum_axis(op, axis)
        if axis == rank - 1:
            return op.b, len(shape_of(op.b)) - 1
        aligned = axis - (rank - len(shape_of(op.a)))
        return (op.a, aligned) if aligned >= 0 else None
    if isinstance(op, voc.Reshape) or name in {"flatten", "unflatten", "reshape", "view"}:
        found = _reshaped_axis(shape_of(node.args[0]), shape_of(node), axis)
        return None if found is None else (node.args[0], found)
    if node.target is operator.getitem:
        return _indexed_axis(node, axis)
    if name in {"cat", "concat"}:
        tensors = [x for x in voc.argument(node, 0, "tensors") if len(shape_of(x)) == rank]
        widest = max(tensors, key=lambda t: hint(shape_of(t)[axis]), default=None)
        return (widest, axis) if widest is not None else None
    # Pointwise: the operand of the same rank whose axis is not broadcast.
    size = hint(shape_of(node)[axis])
    for source in node.all_input_nodes:
        shape = shape_of(source)
        offset = rank - len(shape)
        is_kept = shape and axis >= offset and hint(shape[axis - offset]) == size
        if is_kept and (offset == 0 or name in {"add", "mul"}):
            return source, axis - offset
    return None


def _einsum_axis(op: voc.Product, axis: int) -> tuple[fx.Node, int] | None:
    first, second, out = op.labels
    if not out or "." in first + second:
        return None
    sides = ((first, op.a), (second, op.b))
    return next(((x, ls.index(out[axis])) for ls, x in sides if out[axis] in ls), None)


def _reshaped_axis(source: tuple[Any, ...], result: tuple[Any, ...], axis: int) -> int | None:
    """The input axis that an output axis of a reshape is made of (the largest share of it)."""
    a, b = [hint(s) for s in source], [hint(s) for s in result]
    if any(s < 1 for s in (*a, *b)) or b[axis] == 1:
        return None
    low, high = math.prod(b[axis + 1 :]), math.prod(b[axis:])  # it spans strides [low, high)
    best, share, stride = None, 1.0, 1
    for i, size in reversed(list(enumerate(a))):
        overlap = min(high, stride * size) / max(low, stride)
        if overlap > share:
            best, share = i, overlap
        stride *= size
    return best


def _indexed_axis(node: fx.Node, axis: int) -> tuple[Any, int] | None:
    source: Any = node.args[0]
    if not isinstance(source, fx.Node):
        return None
    if not voc.is_tensor(source):  # one of several outputs: chunk, split, unbind, ...
        name = target_name(source)
        origin: Any = source.args[0] if source.args else None
        if name == "unbind":
            dim = voc.argument(source, 1, "dim", 0)
            dim = dim % len(shape_of(origin)) if isinstance(dim, int) else 0
            return origin, axis + (axis >= dim)
        return (origin, axis) if name in {"chunk", "split", "tensor_split"} else None
    index: Any = node.args[1]
    entries = index if isinstance(index, tuple) else (index,)
    skipped = len(shape_of(source)) - sum(e is not None and e is not Ellipsis for e in entries)
    places: list[int | None] = []  # output axis -> input axis
    position = 0
    for entry in (*entries, Ellipsis):
        if entry is None:
            places.append(None)
            continue
        if not (entry is Ellipsis or isinstance(entry, slice | int)):
            break
        width = skipped if entry is Ellipsis else 1
        if not isinstance(entry, int):
            places += range(position, position + width)
        position += width
    place = places[axis] if axis < len(places) else None
    return None if place is None else (source, place)
