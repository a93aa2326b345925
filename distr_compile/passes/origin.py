"""Where values and axes come from: two questions the matcher asks about Q, K and the scores.

*Origins* tell an activation from a table of parameters (a relative-position table times Q is a
bias, a projection of something times Q is a second set of scores). *Axes* tell width from tokens
from
batch: channel attention has the very operations of attention, but its product contracts over
tokens.
"""

from __future__ import annotations

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

_PROJECTIONS = frozenset({"linear", "conv1d", "conv2d", "conv3d", "addmm", "conv_transpose2d"})
_STOPS = frozenset(
    "linear conv1d conv2d conv3d addmm layer_norm group_norm batch_norm rms_norm embedding "
    "cross_entropy topk argmax".split()
)
_MAX_PRODUCTS = 4
_CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})


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
        self.origins: dict[fx.Node, frozenset[str]] = {}
        self.chained: dict[fx.Node, frozenset[fx.Node]] = {}
        self.behind: dict[fx.Node, frozenset[fx.Node]] = {}
        self.axes: dict[Axis, str | None] = {}
        self._weights: dict[fx.Node, bool] = {}
        self._ops: dict[fx.Node, voc.Op | None] = {}
        # Storage -> what was written into it so far is made of.
        self._stored_origins: dict[int, frozenset[str]] = {}
        self._stored_behind: dict[int, frozenset[fx.Node]] = {}
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

        That is so where neither is written in place after the node, and the node is no write.
        """
        op, memory = self.read(node), self.memory
        source = getattr(op, "x", None)
        if source is None or memory.writes(node) or memory.writers(node, node, out):
            return None
        if self.cuts_gradient(node, out):
            return None
        return None if memory.writers(source, node, out) else op

    def is_activation(self, node: fx.Node) -> bool:
        """Whether a node's values depend on the input or passed a layer."""
        return bool(self.origins[node] & {INPUT, PROJECTION})

    def is_scores(self, product: fx.Node, op: voc.Op | None = None) -> bool:
        """Whether both factors of a product are activations, as Q and K are."""
        op = op or self.read(product)
        return isinstance(op, voc.Product) and self.is_activation(op.a) and self.is_activation(op.b)

    def cuts_gradient(self, node: fx.Node, out: fx.Node) -> bool:
        """Whether no gradient of ``out`` passes a node that has inputs which record one."""
        value, given = voc.tensor_of(node), map(voc.tensor_of, node.all_input_nodes)
        if value is None or not any(x is not None and x.requires_grad for x in given):
            return False
        # What a view made under no_grad says of itself cannot be trusted.
        is_unrecorded = node in self.memory.without_grad and out not in self.memory.without_grad
        return is_unrecorded or (value.dtype.is_floating_point and not value.requires_grad)

    def _visit(self, node: fx.Node) -> None:
        inputs = node.all_input_nodes
        op = voc.read(node)
        if target_name(node) == "linear":
            op = voc.linear_product(node)
            op = op if op is not None and self.is_scores(node, op) else None
        self._ops[node] = op
        self.origins[node] = self._origin(node, op, inputs)
        self.chained[node] = self._chain(node, op)
        self._weights[node] = isinstance(op, voc.Softmax) or (
            isinstance(op, voc.Cast | voc.Reshape | voc.Permute | voc.Identity | voc.Dropout)
            and self._weights[op.x]
        )
        self.behind[node] = self._depend(node, op, inputs)
        for storage in self.memory.writes(node):
            origins = self._stored_origins.get(storage, frozenset())
            self._stored_origins[storage] = origins | self.origins[node]
            stored = (self._stored_behind.get(storage, frozenset()), self.behind[node])
            self._stored_behind[storage] = self._first(stored)

    def _storages(self, inputs: list[fx.Node]) -> frozenset[int]:
        """The memory that some nodes lie in: what was written there is read with them."""
        return frozenset().union(*map(self.memory.storages, inputs))

    def before(self, node: fx.Node, reader: fx.Node) -> frozenset[fx.Node]:
        """The products that what ``reader`` reads of ``node`` is reached from."""
        made = self.memory.definition(node, reader)
        return self.chained[made] if made is not None else frozenset()

    def _origin(self, node: fx.Node, op: voc.Op | None, inputs: list[fx.Node]) -> frozenset[str]:
        if node.op == "placeholder":
            value = voc.tensor_of(node)
            name = str(node.target)
            is_table = isinstance(value, torch.nn.Parameter) or "_buffers_" in name
            return frozenset({TABLE if is_table or "_parameters_" in name else INPUT})
        if node.op == "get_attr":
            return frozenset({TABLE})
        if target_name(node) in _PROJECTIONS and op is None:
            return frozenset({PROJECTION})
        union: frozenset[str] = frozenset().union(
            *(self.origins[n] for n in inputs),
            *(self._stored_origins.get(s, frozenset()) for s in self._storages(inputs)),
        )
        if isinstance(op, voc.Product) and TABLE in union:
            factors = [self.origins[op.a], self.origins[op.b]]
            if any(f == {TABLE} for f in factors):
                return frozenset({PROJECTION})
        return union

    def _chain(self, node: fx.Node, op: voc.Op | None) -> frozenset[fx.Node]:
        if isinstance(op, voc.Product):
            is_output = self._weights[op.a] or self._weights[op.b]  # PV, not QK^T
            return frozenset() if is_output else frozenset({node})
        if isinstance(op, voc.Scale):
            return self._several(node, op.x, op.factor)
        if isinstance(op, voc.Add):
            return self._several(node, op.x, op.y)
        if isinstance(
            op,
            voc.Fill
            | voc.Clamp
            | voc.Tanh
            | voc.Append
            | voc.Cast
            | voc.Reshape
            | voc.Permute
            | voc.Identity
            | voc.Dropout,
        ):
            return self.before(op.x, node)
        return frozenset()

    def _several(self, reader: fx.Node, *nodes: Any) -> frozenset[fx.Node]:
        return self._first(self.before(n, reader) for n in nodes if isinstance(n, fx.Node))

    def _first(self, products: Iterable[frozenset[fx.Node]]) -> frozenset[fx.Node]:
        found = frozenset().union(*products)
        return frozenset(sorted(found, key=self.memory.position.__getitem__)[:_MAX_PRODUCTS])

    def _depend(
        self, node: fx.Node, op: voc.Op | None, inputs: list[fx.Node]
    ) -> frozenset[fx.Node]:
        if isinstance(op, voc.Softmax | voc.Sdpa):
            return frozenset()
        if target_name(node) in _STOPS:  # a layer ends the walk, unless it mixes heads of scores
            return self.chained[inputs[0]] if _mixes_heads(node) else frozenset()
        value = voc.tensor_of(node)
        if value is not None and not value.dtype.is_floating_point:
            return frozenset()  # an index or a mask: chosen by scores, but no scores
        if isinstance(op, voc.Product):
            if self._weights[op.a] or self._weights[op.b]:
                return frozenset()
            if self.is_scores(node):
                return frozenset({node})
            return self._behind_all(inputs) if op.equation else frozenset()
        return self._behind_all(inputs)

    def _behind_all(self, inputs: list[fx.Node]) -> frozenset[fx.Node]:
        stored = [self._stored_behind.get(s, frozenset()) for s in self._storages(inputs)]
        return self._first([*(self.behind[n] for n in inputs), *stored])


def _mixes_heads(layer: fx.Node) -> bool:
    """Whether a layer's channels are heads: a convolution of them, a linear after a permute."""
    if target_name(layer) in {"conv1d", "conv2d"}:
        return True
    op = read(layer.args[0]) if target_name(layer) == "linear" else None
    while isinstance(op, voc.Cast | voc.Reshape | voc.Permute | voc.Identity | voc.Scale):
        rank = len(shape_of(op.x))
        if isinstance(op, voc.Permute) and set(op.dims[-2:]) != {rank - 2, rank - 1}:
            return True
        op = read(op.x)
    return False


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
        if name in _CONVOLUTIONS:
            answer = {0: BATCH, 1: CHANNEL}.get(axis, TOKEN)
            break
        if name in {"linear", "embedding"} and axis == rank - 1:
            answer = CHANNEL
            break
        is_layer = name in {"linear", "embedding"}
        following = (node.args[0], axis) if is_layer else _previous_axis(node, axis, rank)
        if following is None or not voc.is_tensor(following[0]):
            break
        node, axis = following  # type: ignore[assignment]
    size, place = hint(shape_of(node)[axis]) if rank else -1, axis
    for node, axis in reversed(way):
        before, size = size, hint(shape_of(node)[axis])
        moved, place = axis > place and not isinstance(read(node), voc.Permute), axis
        if answer == BATCH and (before != size or moved):
            answer = (
                None  # tokens folded into the batch, or taken out of it: a new axis is in front
            )
        if answer is None and target_name(node) == "linear" and axis > 0:
            answer = TOKEN
        known[node, axis] = answer
    return answer


def _previous_axis(node: fx.Node, axis: int, rank: int) -> tuple[fx.Node, int] | None:
    op = read(node)
    if isinstance(op, voc.Permute):
        return op.x, op.dims[axis]
    if isinstance(op, voc.Product):
        if op.equation is not None:
            return _einsum_axis(op, axis)
        if axis == rank - 1:
            return op.b, len(shape_of(op.b)) - 1
        return _aligned(op.a, axis, rank)
    name = target_name(node)
    if isinstance(op, voc.Reshape) or name in {"flatten", "unflatten", "reshape", "view"}:
        source: Any = node.args[0]
        found = _reshaped_axis(shape_of(source), shape_of(node), axis)
        return None if found is None else (source, found)
    if node.target is operator.getitem:
        return _indexed_axis(node, axis)
    if name in {"chunk", "split", "unbind"}:  # seen through getitem only
        return None
    if name in {"cat", "concat"}:
        parts: Any = node.args[0] if node.args else node.kwargs.get("tensors")
        tensors = [p for p in parts if voc.is_tensor(p) and len(shape_of(p)) == rank]
        widest = max(tensors, key=lambda t: hint(shape_of(t)[axis]), default=None)
        return (widest, axis) if widest is not None else None
    # Pointwise: the operand of the same rank whose axis is not broadcast.
    size = hint(shape_of(node)[axis])
    for source in node.all_input_nodes:
        shape = shape_of(source)
        offset = rank - len(shape)
        is_kept = shape and axis >= offset and hint(shape[axis - offset]) == size
        if is_kept and (len(shape) == rank or name in {"add", "mul"}):
            return source, axis - offset
    return None


def _aligned(source: fx.Node, axis: int, rank: int) -> tuple[fx.Node, int] | None:
    position = axis - (rank - len(shape_of(source)))
    return (source, position) if position >= 0 else None


def _einsum_axis(op: voc.Product, axis: int) -> tuple[fx.Node, int] | None:
    left, _, out = (op.equation or "").partition("->")
    first, _, second = left.partition(",")
    if not out or "." in left:
        return None
    label = out[axis]
    for labels, source in ((first, op.a), (second, op.b)):
        if label in labels:
            return source, labels.index(label)
    return None


def _reshaped_axis(source: tuple[Any, ...], result: tuple[Any, ...], axis: int) -> int | None:
    """The input axis that an output axis of a reshape is made of (the largest share of it)."""
    a, b = [hint(s) for s in source], [hint(s) for s in result]
    if any(s < 1 for s in a) or any(s < 1 for s in b):
        return None
    if b[axis] == 1:
        return None
    low = 1
    for size in b[axis + 1 :]:
        low *= size
    high = low * b[axis]  # the output axis spans strides [low, high)
    best, share, stride = None, 1.0, 1
    for i in range(len(a) - 1, -1, -1):
        overlap = min(high, stride * a[i]) / max(low, stride)
        if overlap > share:
            best, share = i, overlap
        stride *= a[i]
    return best


def _indexed_axis(node: fx.Node, axis: int) -> tuple[fx.Node, int] | None:
    source: Any = node.args[0]
    index: Any = node.args[1]
    if not voc.is_tensor(source):  # one of several outputs: chunk, split, unbind, ...
        if not isinstance(source, fx.Node):
            return None
        name = target_name(source)
        origin: Any = source.args[0] if source.args else None
        if name == "unbind":
            dim = source.args[1] if len(source.args) > 1 else source.kwargs.get("dim", 0)
            dim = dim % len(shape_of(origin)) if isinstance(dim, int) else 0
            return origin, axis + (axis >= dim)
        return (origin, axis) if name in {"chunk", "split", "tensor_split"} else None
    entries = index if isinstance(index, tuple) else (index,)
    consumed = sum(e is not None and e is not Ellipsis for e in entries)
    position, out = 0, 0
    for entry in entries:
        if entry is Ellipsis:
            skipped = len(shape_of(source)) - consumed
            if out <= axis < out + skipped:
                return source, position + axis - out
            position, out = position + skipped, out + skipped
        elif entry is None:
            if out == axis:
                return None
            out += 1
        elif isinstance(entry, slice):
            if out == axis:
                return source, position
            position, out = position + 1, out + 1
        elif isinstance(entry, int):
            position += 1
        else:
            return None
    return source, position + axis - out
