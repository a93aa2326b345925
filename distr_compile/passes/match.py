"""Find every softmax(QK^T)V of a graph: back from the softmax to QK^T, forward to PV.

No list of patterns: the walk goes through a small vocabulary (:mod:`.vocabulary`) and either
arrives, or stops at a node it can name. Both ends are structure: the product of two activations
whose last axis is the one the softmax runs over, and the product that contracts this axis with V.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from distr_compile.passes import open_up
from distr_compile.passes import vocabulary as voc
from distr_compile.passes.memory import is_plain_fake
from distr_compile.passes.operands import (
    See,
    common_dtype,
    einsum_axes,
    einsum_scores,
    einsum_values,
    operand,
    per_head,
    take_scale,
    unrepeated,
)
from distr_compile.passes.origin import BATCH, TOKEN, Flow, axis_origin
from distr_compile.passes.output import order_to_copy
from distr_compile.passes.site import (
    AddStep,
    AttentionSite,
    Causal,
    Factor,
    FillStep,
    Level,
    Operand,
    RefusedError,
    ScaleStep,
    Step,
    Unmatched,
)
from distr_compile.passes.vocabulary import (
    hint,
    read,
    same_shape,
    same_size,
    shape_of,
    target_name,
)

_TRANSFORM = "vmap, another transform of torch.func or forward-mode AD is around it"

NO_CLAMP = 1.0e4
"""Bounds at least this far out guard against overflow; they do not change ordinary scores."""

_EXPONENTIALS = frozenset({"exp", "exp_", "exp2"})
_UNARY = voc.Fill | voc.Clamp | voc.Cast | voc.Reshape | voc.Permute | voc.Identity | voc.Dropout
_ON_SCORES = _UNARY | voc.Tanh | voc.Append


def find(graph: fx.Graph) -> list[AttentionSite | Unmatched]:
    """All attention of one graph, in graph order: one entry per softmax or fused call."""
    anchors = [(node, kind) for node in graph.nodes if (kind := voc.anchor_kind(node))]
    if not anchors and not any(target_name(node) in _EXPONENTIALS for node in graph.nodes):
        return []
    try:
        flow = Flow(graph)
    except Exception as error:  # fake tensors and dispatch modes are PyTorch's: anything can happen
        text = f"which node writes what is not known: {type(error).__name__}: {error}"
        return [Unmatched(n, kind, "not-run", text[:300], attention=True) for n, kind in anchors]
    inner = {n for a, _ in anchors if isinstance(op := read(a), voc.Softmax) for n in op.inner}
    found = {node: _read_anchor(node, kind, flow) for node, kind in anchors}
    found |= {n: _by_hand(n) for n in graph.nodes if n not in inner and _is_by_hand(n, flow)}
    return sorted(found.values(), key=lambda each: flow.memory.position[each.anchor])


def _is_by_hand(node: fx.Node, flow: Flow) -> bool:
    """Whether scores are exponentiated, and it is not read as a softmax."""
    if target_name(node) not in _EXPONENTIALS or isinstance(read(node), voc.Softmax):
        return False
    scores = [n for n in node.all_input_nodes if voc.is_tensor(n)]
    return any(flow.is_scores(p) for n in scores for p in flow.chained[n])


def _by_hand(node: fx.Node) -> Unmatched:
    text = "exp of the scores, normalised in a way that is not read as a softmax"
    why = RefusedError("softmax-form", text)
    return Unmatched(node, "softmax", why.code, text, why.attention, target_name(node).strip("_"))


def _read_anchor(node: fx.Node, kind: str, flow: Flow) -> AttentionSite | Unmatched:
    walk = _Walk(flow)
    try:
        if kind == "softmax":
            site = walk.softmax(node)
        elif kind == "sdpa":
            site = _sdpa(node, flow)
        elif kind == "mha":
            site = open_up.multi_head_site(node, flow.memory)
        elif kind == "encoder":
            site = open_up.encoder_layer_site(node)
        else:
            raise RefusedError("flex", "flex_attention: its score function is left as it is")
        return _left_alone(site, flow)
    except Exception as error:
        # Anything but a refusal: a graph that the walk was not made for. It stays as it is, too.
        text = f"the walk failed: {type(error).__name__}: {error}"[:300]
        refused = error if isinstance(error, RefusedError) else RefusedError("not-run", text)
        value = voc.tensor_of(node)
        if refused.attention and node in flow.memory.transformed:
            refused = RefusedError("transform", _TRANSFORM)
        elif refused.attention and value is not None and not is_plain_fake(value):
            refused = RefusedError("tensor-subclass", f"a tensor is a {type(value).__name__}")
        form = walk.form() if kind == "softmax" else target_name(node).strip("_")
        flops = _flops(node, kind, flow) if refused.attention else 0
        return Unmatched(node, kind, refused.code, refused.text, refused.attention, form, flops)


def _left_alone(site: AttentionSite, flow: Flow) -> AttentionSite:
    """The site, unless it stands where a call of ours would not mean the same.

    Raises:
        RefusedError: it is inside a transform, works on a tensor subclass, or writes in place what
            others read.
    """
    memory, nodes = flow.memory, set(site.interior)
    read_too = {n for node in nodes for n in node.all_input_nodes}
    if nodes & memory.transformed:
        raise RefusedError("transform", _TRANSFORM)
    values = (voc.tensor_of(n) for n in nodes | read_too)
    others = {type(x).__name__ for x in values if x is not None and not is_plain_fake(x)}
    if others:
        raise RefusedError("tensor-subclass", f"a tensor is a {', '.join(sorted(others))}")
    for writer in nodes:
        # What is written goes with the nodes: nobody else may look at it.
        for reader, position in memory.position.items() if memory.writes(writer) else ():
            looks = any(memory.writes_into(writer, n) for n in reader.all_input_nodes)
            is_input = reader.op in ("placeholder", "get_attr")
            if is_input and memory.writes_into(writer, reader):
                raise RefusedError("in-place-write", "the scores are written into an input")
            if looks and position > memory.position[writer] and reader not in nodes | memory.dead:
                raise RefusedError("in-place-write", f"{reader} reads what is written in place")
    return site


def _flops(node: fx.Node, kind: str, flow: Flow) -> int:
    """FLOPs of both products of an attention that was not read through, if one is seen."""
    op = read(node)
    if isinstance(op, voc.Softmax):
        products = flow.chained[op.x] | flow.behind[op.x]
        widths = [hint(shape_of(flow.read(p).a)[-1]) for p in products if shape_of(flow.read(p).a)]  # type: ignore[union-attr]
        return 4 * _count(shape_of(node)) * max(widths, default=0)
    if isinstance(op, voc.Sdpa):
        return 4 * _count(shape_of(op.q)) * hint(shape_of(op.k)[-2])
    shape = shape_of(node.args[0])  # type: ignore[arg-type]
    axis = 0 if kind == "mha" else 1 if kind == "encoder" else -2
    return 4 * _count(shape) * hint(shape[axis]) if len(shape) > 1 else 0


def _count(shape: tuple[Any, ...]) -> int:
    count = 1
    for size in shape:
        count *= max(hint(size), 0)
    return count


def _no_product(text: str = "the softmax is not fed by a product QK^T") -> RefusedError:
    return RefusedError("no-qk-product", text, attention=False)


def _is_cut_off(node: fx.Node) -> bool:
    """Whether scores come into the graph as an input: the product is before a graph break."""
    while node.op != "placeholder":
        op = read(node)
        if not isinstance(op, voc.Add | voc.Scale | _ON_SCORES):
            return False
        node = op.x
    return len(shape_of(node)) > 2


def _weighs_values(softmax: fx.Node, flow: Flow) -> bool:
    """Whether the result of a softmax is multiplied with something, as P with V."""
    node = softmax
    while len(node.users) == 1:
        node = next(iter(node.users))
        op = flow.read(node)
        if isinstance(op, voc.Product):
            return True
        if not isinstance(op, _UNARY):
            return False
    return False


@dataclass
class _Walk:
    """The state of one walk from a softmax: what was met between QK^T and PV."""

    flow: Flow
    backward: list[str] = field(default_factory=list)
    forward: list[str] = field(default_factory=list)
    interior: list[fx.Node] = field(default_factory=list)
    sink: voc.Append | None = None
    permuted: bool = False

    def form(self) -> str:
        return " ".join([*reversed(self.backward), *self.forward])

    def softmax(self, node: fx.Node) -> AttentionSite:
        op = read(node)
        rank = len(shape_of(node))
        if not isinstance(op, voc.Softmax) or rank == 0:
            raise _no_product("the softmax's arguments are not known")
        flow = self.flow
        self.backward.append(f"softmax({str(op.dtype)[6:]})" if op.dtype else target_name(node))
        made = flow.memory.definition(op.x, min(op.inner, default=node)) or op.x
        candidates = flow.chained[made] | flow.behind[made]
        if not candidates and _is_cut_off(op.x) and _weighs_values(node, flow):
            raise RefusedError("graph-break", "QK^T and the softmax are in different graphs")
        if not candidates:
            raise _no_product()
        try:
            product, events, places, dim = self._back(op, node)
            q, k, product_op, axes = self._product(product, places, dim)
            is_plain = axes == tuple(range(len(axes)))
            scores_lead = tuple(shape_of(product)[places[axis]] for axis in axes[:-2])
            if is_plain:
                axes = tuple(range(rank))  # reshaped on the way, if at all
            elif len(axes) != rank or any(isinstance(e, voc.Reshape) for e, _ in events):
                raise RefusedError("layout", "the scores are reshaped and their axes permuted")
            out, out_level, v, output_dims = self._forward(node, axes)
        except RefusedError as refused:
            if not any(flow.is_scores(p) for p in candidates):
                raise _no_product() from refused
            if op.dim != rank - 1 and refused.code.startswith("weights-"):
                text = f"the softmax runs over axis {op.dim} of {rank}, and {refused}"
                raise RefusedError("softmax-axis", text) from refused
            raise
        scores = Level((*scores_lead, q.shape[-2], k.shape[-2]))
        replayed = _replay(flow, scores, events, product_op, product, is_plain)
        return self._assemble(
            node, product, product_op, (q, k, v), scores, replayed, out, out_level, output_dims
        )

    # -- back to QK^T ----------------------------------------------------------------------------

    def _back(
        self, softmax: voc.Softmax, anchor: fx.Node
    ) -> tuple[fx.Node, list[tuple[voc.Op, fx.Node]], tuple[int, ...], int]:
        """From the softmax to the product.

        Returns:
            The product; the events on the way, (record, node), last one first; where each axis of
            the softmax is among the product's; and which of them the softmax runs over. Where the
            scores are reshaped on the way, the axes before the first reshape stand for its axes.
        """
        flow = self.flow
        events: list[tuple[voc.Op, fx.Node]] = []
        if softmax.sign < 0:
            events.append((voc.Scale(softmax.x, softmax.sign), anchor))
        places, dim = tuple(range(len(shape_of(softmax.x)))), softmax.dim
        capped = False
        self.interior += [anchor, *softmax.inner]
        if any(flow.memory.writers(n, n, anchor) for n in softmax.inner):
            raise RefusedError("in-place-write", "the exponentials are written in place")
        node = flow.now(softmax.x, min(softmax.inner, default=anchor))
        while not isinstance(op := flow.read(node), voc.Product):
            if not flow.chained[node]:
                self._blocked(node)
            self._read_by_us_only(node)
            self.interior.append(node)
            self.backward.append(target_name(node).strip("_"))
            source: Any = getattr(op, "x", None)
            if isinstance(op, voc.Add):
                if maximum := _row_maximum(op, node):
                    made = flow.now(op.x, node)
                    if any(flow.memory.writers(made, n, node) for n in maximum - {node}):
                        raise RefusedError("in-place-write", "the scores are written in place")
                    self._refuse_shift(capped)
                    self.interior.extend(maximum - {node})
                    node = made
                    continue
                source, term, first = self._scores_side(op.x, op.y)
                if not first and op.alpha != 1:
                    raise RefusedError("scores-edited", "the scores are subtracted from a tensor")
                if capped or not voc.is_tensor(term):
                    self._refuse_shift(capped)
                else:
                    events.append((voc.Add(source, term, op.alpha), node))
            elif isinstance(op, voc.Scale):
                source, factor, first = self._scores_side(op.x, op.factor)
                if op.divide and not first:
                    raise RefusedError("scores-edited", "a tensor is divided by the scores")
                events.append((voc.Scale(source, factor, op.divide), node))
            elif isinstance(op, voc.Clamp):
                self._check_clamp(op, node)
            elif isinstance(op, voc.Permute):
                events.append((op, node))
                places = tuple(op.dims[place] for place in places)
            elif capped and isinstance(op, voc.Fill):
                raise RefusedError("soft-cap", "the scores are masked inside the soft cap's tanh")
            elif isinstance(op, voc.Tanh):
                if capped:
                    raise RefusedError("soft-cap", "the scores pass through tanh twice")
                capped = True
                events.append((op, node))
            elif isinstance(op, voc.Append):
                self._take_sink(op, events)
                events.append((op, node))
            elif isinstance(op, voc.Fill | voc.Reshape):
                events.append((op, node))
            elif not isinstance(op, voc.Cast | voc.Identity):
                raise RefusedError("scores-edited", f"{target_name(node)} before the softmax")
            if isinstance(op, voc.Reshape) or len(shape_of(source)) != len(places):
                places, dim = _reshaped(places, dim, shape_of(source))
            node = flow.now(source, node)
        self._read_by_us_only(node)
        self.backward.append(target_name(node))
        self.interior.append(node)
        if op.addend is not None and capped:
            self._refuse_shift(capped)
        return node, events, places, dim

    def _check_clamp(self, op: voc.Clamp, node: fx.Node) -> None:
        low, high = (
            default if bound is None else self.flow.constants.number(bound, node)
            for bound, default in ((op.low, -math.inf), (op.high, math.inf))
        )
        if low is None or high is None or low > -NO_CLAMP or high < NO_CLAMP:
            raise RefusedError("scores-edited", "the scores are clamped")

    def _take_sink(self, op: voc.Append, events: list[tuple[voc.Op, fx.Node]]) -> None:
        if self.sink is not None:
            raise RefusedError("sinks", "more than one sink column is concatenated to the scores")
        if self.flow.behind[op.column] or self.flow.chained[op.column]:
            raise RefusedError("concat-scores", "one softmax runs over several score matrices")
        if not all(isinstance(event, voc.Reshape) for event, _ in events):
            raise RefusedError("sinks", "scores and sinks are changed after they are concatenated")
        self.sink = op

    def _refuse_shift(self, capped: bool) -> None:
        """One number added to all scores: softmax ignores it, tanh or a sink beside them do not."""
        if capped:
            raise RefusedError("soft-cap", "a term is added to the scores inside the cap's tanh")
        if self.sink is not None:
            raise RefusedError("sinks", "the scores are shifted before the sinks stand beside them")

    def _scores_side(self, a: Any, b: Any) -> tuple[fx.Node, Any, bool]:
        """Which operand carries QK^T: the one with a product of two activations."""
        flow = self.flow
        chains = [flow.chained[x] if isinstance(x, fx.Node) else frozenset() for x in (a, b)]
        if bool(chains[0]) != bool(chains[1]):
            first = bool(chains[0])
        else:
            real = [any(flow.is_scores(p) for p in chain) for chain in chains]
            if real[0] == real[1]:
                raise RefusedError("two-products", "the scores are a sum of two products")
            first = real[0]
        scores, other = (a, b) if first else (b, a)
        if isinstance(other, fx.Node) and flow.behind[other] - flow.chained[scores]:
            raise RefusedError("two-products", "a second product of activations is in the scores")
        return scores, other, first

    def _read_by_us_only(self, node: fx.Node) -> None:
        """Refuse where somebody else looks at the scores, or writes to them."""
        memory = self.flow.memory
        others = [
            user
            for user in node.users
            if user not in self.interior
            and not voc.reads_shape_only(user, node)
            and user not in memory.dead
        ]
        if not others:
            return
        if any(memory.writes_into(user, node) for user in others):
            raise RefusedError("in-place-write", "the scores are written in place")
        if any(user.op == "output" for user in others):
            raise RefusedError("weights-reused", "the scores are returned")
        names = ", ".join(sorted({target_name(u) for u in others}))
        raise RefusedError("weights-reused", f"the scores are also read by: {names}")

    def _blocked(self, node: fx.Node) -> None:
        """The walk cannot go on: find the node in the way and say what it means."""
        flow = self.flow
        while True:
            op = flow.read(node)
            if isinstance(op, _ON_SCORES) and (made := flow.memory.definition(op.x, node)):
                node = made
            elif isinstance(op, voc.Scale | voc.Add):
                other = op.factor if isinstance(op, voc.Scale) else op.y
                fed = [x for x in (op.x, other) if isinstance(x, fx.Node) and flow.behind[x]]
                if not fed:
                    break
                node = fed[0]
            else:
                break
        name = target_name(node) or node.op
        self.backward.append(name.strip("_"))
        if name in {"linear", "conv1d", "conv2d"} and flow.behind[node]:
            raise RefusedError("cross-head-mix", f"{name} mixes the scores across heads")
        if not flow.behind[node]:
            raise _no_product()
        if name in {"cat", "concat"}:
            parts: Any = node.args[0] if node.args else node.kwargs.get("tensors", ())
            scored = [p for p in parts if isinstance(p, fx.Node) and flow.behind[p]]
            if len(scored) == 1:
                raise RefusedError("sinks", "more than a sink column is concatenated to the scores")
            raise RefusedError("concat-scores", "one softmax runs over several score matrices")
        if _is_banded(node, flow):
            raise RefusedError("banded", "the scores are cut to a band (a window of keys)")
        raise RefusedError("scores-edited", f"the scores pass through {name} before the softmax")

    # -- the product -----------------------------------------------------------------------------

    def _product(
        self, node: fx.Node, places: tuple[int, ...], dim: int
    ) -> tuple[Operand, Operand, voc.Product, tuple[int, ...]]:
        """Q as (..., N_q, d) and K as (..., N_k, d), and the softmax's axes as (lead..., N_q, N_k).

        Args:
            node: the product.
            places: where each axis of the softmax is among the product's.
            dim: the softmax's axis, of the keys.
        """
        op = self.flow.read(node)
        assert isinstance(op, voc.Product)
        flow = self.flow
        before = flow.behind[op.a] | flow.behind[op.b]
        is_mixed = not flow.is_scores(node) or target_name(node) == "linear"
        if is_mixed and any(map(flow.is_scores, before)):
            raise RefusedError("cross-head-mix", f"{target_name(node)} mixes the scores' heads")
        rank, see = len(places), self._see(node)
        is_einsum = op.equation is not None
        if is_einsum:
            query, key = einsum_axes(op, places[dim])[-2:]
        else:
            key = places[dim]
            query = {rank - 1: rank - 2, rank - 2: rank - 1}.get(key, -1)
            if query < 0:
                why = f"the softmax runs over axis {dim} of {rank}, not over keys"
                raise RefusedError("softmax-axis", why)
        lead = [i for i in range(rank) if places[i] not in (query, key)]
        axes = (*lead, places.index(query), dim)
        own = tuple(places[i] for i in axes)
        if is_einsum:
            q, k = einsum_scores(see, op, own)
        else:
            if own[:-2] != tuple(range(rank - 2)):
                raise RefusedError("layout", "the axes of the scores are permuted")
            q = operand(see, op.a, rank, transposed=False)
            k = operand(see, op.b, rank, transposed=True)
            if key < query:
                q, k = k, q
        if q.dims[-2] >= 0 and axis_origin(q.node, q.dims[-2], self.flow.axes) == BATCH:
            raise RefusedError("batch-attention", "attention runs across the batch dimension")
        for x in (q, k):
            if x.dims[-1] >= 0 and axis_origin(x.node, x.dims[-1], self.flow.axes) == TOKEN:
                raise RefusedError(
                    "channel-attention",
                    "channel attention: the product contracts over tokens, not over width",
                )
        return q, k, op, axes

    def _see(self, out: fx.Node) -> See:
        return lambda node: self.flow.through(node, out)

    # -- forward to PV ---------------------------------------------------------------------------

    def _forward(
        self, softmax: fx.Node, axes: tuple[int, ...]
    ) -> tuple[fx.Node, Level, Operand, tuple[int, ...]]:
        """From the softmax to the product with V: output node, its level, V, the output's axes."""
        node, shape = softmax, shape_of(softmax)
        rank, sink = len(shape), self.sink
        while True:
            user = self._only_user(node)
            op = self.flow.read(user)
            if isinstance(op, voc.Product):
                break
            self.forward.append(target_name(user).strip("_"))
            self.interior.append(user)
            if isinstance(op, voc.Dropout):
                raise RefusedError("dropout", "the weights are dropped out: training")
            if isinstance(op, voc.Permute):
                axes = tuple(op.dims.index(axis) for axis in axes)
                self.permuted |= op.dims[:-2] != tuple(range(rank - 2))
                shape = shape_of(user)
            elif isinstance(op, voc.Reshape):
                new = shape_of(user)
                if axes != tuple(range(rank)) or not same_shape(new[-2:], shape[-2:]):
                    raise RefusedError("layout", "the weights are reshaped over keys or queries")
                shape, rank = new, len(new)
                axes = tuple(range(rank))
            elif sink is not None and axes[-1] == rank - 1 and _drops_sink(user, sink):
                sink, shape = None, shape_of(user)
            elif not isinstance(op, voc.Cast | voc.Identity):
                self._weights_edited(user)
            node = user
        self.forward.append(target_name(user))
        self.interior.append(user)
        if sink is not None:
            raise RefusedError("sinks", "the sinks' weights are multiplied with V, too")
        if op.a is op.b:
            raise RefusedError("weights-reused", "the weights are multiplied with themselves")
        if op.addend is not None or op.alpha != 1:
            raise RefusedError("weights-edited", "PV is scaled or added to in the same call")
        if not user.users:
            raise RefusedError("dead", "nothing reads the result of this attention")
        if any(_scatters(reader, user) for reader in user.users):
            raise RefusedError("in-place-write", "the output is written to rows chosen by a tensor")
        see = self._see(user)
        lead = tuple(shape[axis] for axis in axes[:-2])
        matrix = tuple(shape[axis] for axis in axes[-2:])
        output_axes = tuple(range(len(shape_of(user))))
        plain = tuple(range(rank))
        if op.equation is not None:
            v, output_axes = einsum_values(see, op, node, axes)
        elif op.a is node and axes == plain:
            v, lead = operand(see, op.b, len(output_axes), transposed=False), shape_of(user)[:-2]
        elif op.b is node and axes == (*plain[:-2], rank - 1, rank - 2):
            v, lead = operand(see, op.a, len(output_axes), transposed=True), shape_of(user)[:-2]
            output_axes = (*output_axes[:-2], output_axes[-1], output_axes[-2])
        elif axes[-1] == (rank - 1 if op.a is node else rank - 2):
            raise RefusedError("layout", "the axes of the weights are permuted")
        else:
            raise RefusedError("softmax-axis", "the weights are contracted over queries, not keys")
        return user, Level((*lead, *matrix)), v, output_axes

    def _only_user(self, node: fx.Node) -> fx.Node:
        memory = self.flow.memory
        users = [
            user
            for user in node.users
            if not voc.reads_shape_only(user, node) and user not in memory.dead
        ]
        if not users:
            raise RefusedError("dead", "nothing reads the result of this softmax")
        if any(user.op == "output" for user in users):
            raise RefusedError(
                "weights-reused", "the weights leave the graph: returned, or read after a break"
            )
        if any(memory.writes_into(user, node) and user.users == {} for user in users):
            raise RefusedError("weights-edited", "the weights are written in place")
        if len(users) > 1:
            names = ", ".join(sorted({target_name(u) for u in users}))
            raise RefusedError("weights-reused", f"the weights are read more than once: {names}")
        return users[0]

    def _weights_edited(self, node: fx.Node) -> None:
        name = target_name(node) or node.op
        if self.permuted or name in {"linear", "conv2d", "conv1d", "permute", "movedim"}:
            raise RefusedError("cross-head-mix", f"{name} mixes the weights across heads")
        raise RefusedError("weights-edited", f"the weights pass through {name} after the softmax")

    # -- the whole -------------------------------------------------------------------------------

    def _assemble(
        self,
        anchor: fx.Node,
        product: fx.Node,
        op: voc.Product,
        operands: tuple[Operand, Operand, Operand],
        scores: Level,
        replayed: tuple[list[Level], list[Step], float],
        out: fx.Node,
        out_level: Level,
        output_dims: tuple[int, ...],
    ) -> AttentionSite:
        q, k, v = operands
        flow, see = self.flow, self._see(out)
        levels, steps, softcap = replayed
        if not same_shape(levels[-1].shape[-2:], scores.shape[-2:]):
            raise RefusedError("layout", "the softmax runs over reshaped keys")
        if not same_size(v.shape[-2], scores.shape[-1]):
            raise RefusedError("layout", "V is not as long as the keys")
        plain = [lv for lv in levels if same_shape(lv.shape[-2:], scores.shape[-2:])]
        # Of the levels the one that all others broadcast to.
        widest = max(_count(level.lead) for level in [*plain, out_level])
        full = [level for level in [*plain, out_level] if _count(level.lead) == widest]
        canonical = min(full, key=_preference)
        out_value = voc.tensor_of(out)
        assert out_value is not None
        q, k, _ = common_dtype(see, q, k, v, product, out_value)
        (q, q_factors), (k, k_factors) = take_scale(see, q), take_scale(see, k)
        q, k, compute_dtype = common_dtype(see, q, k, v, product, out_value)
        if voc.is_tensor(op.alpha):
            raise RefusedError("scores-edited", "baddbmm's alpha is a tensor")
        alpha = () if op.alpha == 1 else (Factor(op.alpha),)
        shared = _shared_heads(see, k, v)
        for x, reader in ((q, product), (k, product), (v, out)):
            _check_writes(flow, x.node, reader, out)
        for step in steps:
            for term in _tensors(step):
                _check_writes(flow, term, step.reader, out)
        sinks = self._sinks(canonical, out)
        mask_kind, causal, steps = _mask_kind(flow, steps)
        self._erase_dead()
        return AttentionSite(
            kind="softmax",
            anchor=anchor,
            form=self.form(),
            output=out,
            dtype=compute_dtype or out_value.dtype,
            device=out_value.device,
            **_sizes(canonical, q, shared[0] if shared else k, v),
            q=q,
            k=k,
            v=v,
            shared_k=shared[0] if shared else None,
            shared_v=shared[1] if shared else None,
            compute_dtype=compute_dtype,
            factors=(*q_factors, *k_factors, *alpha),
            steps=tuple(steps),
            softcap=softcap,
            sinks=sinks,
            scores=scores,
            canonical=canonical,
            out=out_level,
            output_dims=output_dims,
            mask_kind=mask_kind,
            causal=causal,
            interior=tuple(dict.fromkeys(self.interior)),
            copy_order=order_to_copy(flow.memory, out),
            requires_grad=out_value.requires_grad,
        )

    def _erase_dead(self) -> None:
        """Dead readers of what goes, and theirs, go too."""
        stack = list(self.interior)
        while stack:
            dead = [u for u in stack.pop().users if u in self.flow.memory.dead]
            self.interior += dead
            stack += dead

    def _sinks(self, canonical: Level, out: fx.Node) -> fx.Node | None:
        """One number per head, from the column that the scores were given."""
        if self.sink is None:
            return None
        _check_writes(self.flow, self.sink.column, self.sink.column, out)
        sinks = per_head(self._see(out), self.sink.column)
        value = voc.tensor_of(sinks)
        heads = shape_of(self.sink.x)[-3:-2]
        if sinks is None or value is None or not value.dtype.is_floating_point:
            raise RefusedError("sinks", "the sinks are not one number per head")
        if not same_shape(canonical.lead[-1:], heads):
            raise RefusedError("sinks", "the sinks are concatenated under other axes of the heads")
        _check_writes(self.flow, sinks, sinks, out)
        return sinks


def _sdpa(node: fx.Node, flow: Flow) -> AttentionSite:
    """A call of ``F.scaled_dot_product_attention``."""
    op = read(node)
    if not isinstance(op, voc.Sdpa) or not all(map(voc.is_tensor, (op.q, op.k, op.v))):
        raise RefusedError("scores-edited", "the arguments of SDPA are not known")
    if not node.users:
        raise RefusedError("dead", "nothing reads the result of this attention")
    if isinstance(op.dropout_p, fx.Node) or op.dropout_p != 0:
        raise RefusedError("dropout", "the weights are dropped out: training")
    if not isinstance(op.is_causal, bool) or not isinstance(op.enable_gqa, bool):
        raise RefusedError("scores-edited", "is_causal or enable_gqa is not a constant")
    if voc.is_tensor(op.scale):
        raise RefusedError("scores-edited", "the scale is a tensor")
    out = voc.tensor_of(node)
    assert out is not None
    rank = len(out.shape)

    def see(x: fx.Node) -> voc.Op | None:
        return flow.through(x, node)

    q, k, v = (operand(see, x, rank, transposed=False) for x in (op.q, op.k, op.v))
    q, k, compute_dtype = common_dtype(see, q, k, v, node, out)
    is_causal, mask, mask_kind = op.is_causal, op.mask, "none"
    offset: int | None = 0 if is_causal else None
    if mask is not None:
        value = voc.tensor_of(mask)
        if value is None:
            raise RefusedError("scores-edited", "SDPA's mask is not a tensor")
        mask_kind = "bool" if value.dtype is torch.bool else "float"
        if not is_causal:
            offset = flow.constants.causal_offset(mask, node, q.shape[-2], k.shape[-2])
        if not is_causal and offset is not None:
            is_causal, mask, mask_kind = True, None, "none"
    kinds = [kind for kind, is_there in (("causal", is_causal), (mask_kind, mask)) if is_there]
    level = Level((*out.shape[:-2], q.shape[-2], k.shape[-2]))
    shared = None if op.enable_gqa else _shared_heads(see, k, v)
    return AttentionSite(
        kind="sdpa",
        anchor=node,
        form="scaled_dot_product_attention",
        output=node,
        dtype=compute_dtype or out.dtype,
        device=out.device,
        **_sizes(level, q, shared[0] if shared else k, v),
        q=q,
        k=k,
        v=v,
        shared_k=shared[0] if shared else None,
        shared_v=shared[1] if shared else None,
        factors=() if op.scale is None else (Factor(op.scale),),
        scores=level,
        canonical=level,
        out=level,
        output_dims=tuple(range(rank)),
        mask=mask,
        mask_kind="+".join(kinds) or "none",
        causal=None if offset is None else Causal(offset),
        compute_dtype=compute_dtype,
        interior=(node,),
        copy_order=order_to_copy(flow.memory, node),
        requires_grad=out.requires_grad,
    )


# -- helpers ------------------------------------------------------------------------------------


def _sizes(level: Level, q: Operand, k: Operand, v: Operand) -> dict[str, Any]:
    batch: Any = 1
    for size in level.lead[:-1]:
        batch = batch * size
    heads = level.lead[-1] if level.lead else 1
    has_heads = len(k.shape) == len(level.shape) and len(k.shape) > 2
    return {
        "batch": batch,
        "num_heads": heads,
        "num_key_heads": k.shape[-3] if has_heads else heads,
        "num_queries": q.shape[-2],
        "num_keys": k.shape[-2],
        "head_dim": q.shape[-1],
        "value_dim": v.shape[-1],
    }


def _shared_heads(see: See, k: Operand, v: Operand) -> tuple[Operand, Operand] | None:
    """K and V before ``repeat_kv``, where both were repeated by the same count."""
    before_k, before_v = unrepeated(see, k), unrepeated(see, v)
    if before_k is None or before_v is None or before_k[1] != before_v[1]:
        return None
    return before_k[0], before_v[0]


def _tensors(step: Step) -> list[fx.Node]:
    if isinstance(step, AddStep):
        return [step.term]
    if isinstance(step, FillStep):
        return [step.condition]
    return [step.factor] if voc.is_tensor(step.factor) else []  # type: ignore[list-item]


def _preference(level: Level) -> tuple[int, int, int]:
    """Four axes first (batch, heads, N, N), then more, then fewer; of two the less broadcast."""
    rank = len(level.shape)
    return (0 if rank == 4 else 1 if rank > 4 else 2, -rank, -_count(level.lead))


def _reshape_args(node: fx.Node) -> tuple[Any, ...] | None:
    """The sizes a ``view`` or ``reshape`` was called with."""
    if target_name(node) not in {"view", "reshape"}:
        return None
    args = node.args[1:]
    if len(args) == 1 and isinstance(args[0], list | tuple):
        args = tuple(args[0])
    return tuple(args) if len(args) == len(shape_of(node)) else None


def _reshaped(
    places: tuple[int, ...], dim: int, before: tuple[Any, ...]
) -> tuple[tuple[int, ...], int]:
    """The axes before a reshape, which only scores whose last axis is the keys' may have."""
    if dim != len(places) - 1:
        raise RefusedError("softmax-axis", f"the softmax runs over axis {dim} of reshaped scores")
    if places != tuple(range(len(places))):
        raise RefusedError("layout", "the scores are reshaped and their axes permuted")
    return tuple(range(len(before))), len(before) - 1


def _replay(
    flow: Flow,
    scores: Level,
    events: list[tuple[voc.Op, fx.Node]],
    op: voc.Product,
    product: fx.Node,
    is_plain: bool,
) -> tuple[list[Level], list[Step], float]:
    """Go over the events forwards: the shapes the scores take, the steps at each, the soft cap.

    As long as the axes are not (lead..., query, key), only numbers may happen to the scores.
    """
    levels, level = [scores], scores
    steps: list[Step] = []
    softcap = 0.0
    width: Any = None
    permutes = sum(isinstance(event, voc.Permute) for event, _ in events)
    if op.addend is not None:
        if not isinstance(op.beta, int | float):
            raise RefusedError("scores-edited", "baddbmm's beta is not a number")
        steps.append(AddStep(op.addend, op.beta, level, product))
    for event, node in reversed(events):
        shape = shape_of(node) or shape_of(event.x)  # type: ignore[union-attr]  # a write by setitem returns nothing
        permutes -= isinstance(event, voc.Permute)
        in_order = is_plain and permutes == 0 and not isinstance(event, voc.Permute)
        if isinstance(event, voc.Append):
            width = shape[-1]
        if width is not None:  # the level is that of the keys' scores
            if not same_size(shape[-1], width):
                raise RefusedError("layout", "the softmax runs over reshaped keys")
            shape = (*shape[:-1], level.shape[-1])
        if isinstance(event, voc.Reshape):
            level = Level(shape, _reshape_args(node))
            levels.append(level)
        elif in_order and not same_shape(shape[-2:], level.shape[-2:]):
            raise RefusedError("layout", "a bias or mask broadcasts the scores over rows or keys")
        elif in_order and not same_shape(shape[:-2], level.lead):  # the bias has a batch of its own
            level = Level((*shape[:-2], *level.shape[-2:]))
            levels.append(level)
        if isinstance(event, voc.Scale):
            steps.append(_scale_step(event, node, level, steps))
            softcap = _times_cap(softcap, event)
        elif isinstance(event, voc.Tanh):
            softcap = 1.0
        elif isinstance(event, voc.Add):
            term = voc.tensor_of(event.y)
            if term is None or term.dtype.is_complex:
                raise RefusedError("scores-edited", "a complex tensor is added")
            steps.append(AddStep(event.y, event.alpha, level, node))  # type: ignore[arg-type]
        elif isinstance(event, voc.Fill):
            steps.append(_fill_step(flow, event, node, level))
        if not in_order and (len(levels) > 1 or any(map(_tensors, steps))):
            raise RefusedError("layout", "the axes of the scores are permuted around a bias")
    # b tanh(a s) is odd in both: |b| tanh(a b s / |b|), the soft cap |b| of scores scaled by a b.
    return levels, steps, abs(softcap)


def _times_cap(softcap: float, event: voc.Scale) -> float:
    """The soft cap after one more factor; of a symbolic one it fixes the value, by a guard."""
    if not softcap:
        return softcap
    factor: Any = voc.value_of(event.factor)
    if isinstance(factor, torch.SymFloat | torch.SymInt):
        factor = float(factor)
    if not isinstance(factor, int | float):
        raise RefusedError("soft-cap", "the soft cap is a tensor")
    if factor == 0 or not math.isfinite(factor):
        raise RefusedError("soft-cap", f"the soft cap's factor is {factor}")
    return softcap / factor if event.divide else softcap * factor


def _scale_step(event: voc.Scale, node: fx.Node, level: Level, before: list[Step]) -> ScaleStep:
    factor = event.factor
    if voc.is_tensor(factor):
        shape = shape_of(factor)  # type: ignore[arg-type]
        if shape and not same_size(shape[-1], 1):
            raise RefusedError("scores-edited", "the scores are scaled key by key")
        if not voc.tensor_of(factor).dtype.is_floating_point:  # type: ignore[union-attr]
            raise RefusedError("scores-edited", "the scores are scaled by integers")
    elif not isinstance(factor, int | float | fx.Node):
        raise RefusedError("scores-edited", "the scale is not a number")
    hidden = [s.value for s in before if isinstance(s, FillStep)]
    if hidden and not (isinstance(factor, int | float) and factor > 0):
        raise RefusedError("scores-edited", "masked scores are scaled by a tensor")
    for value in hidden:
        if (value / factor if event.divide else value * factor) > voc.HIDDEN:  # type: ignore[operator]
            raise RefusedError("scores-edited", "masked scores are scaled until seen again")
    return ScaleStep(factor, event.divide, level, node)


def _fill_step(flow: Flow, event: voc.Fill, node: fx.Node, level: Level) -> FillStep:
    value = flow.constants.number(event.value, node)
    if value is None:
        raise RefusedError("scores-edited", "the mask's fill value is not a constant")
    if value > voc.HIDING:
        raise RefusedError("scores-edited", f"scores are replaced by {value:g}: hides nothing")
    condition, scores = voc.tensor_of(event.condition), voc.tensor_of(event.x)
    if condition is None or condition.dtype is not torch.bool:
        raise RefusedError("scores-edited", "the mask's condition is not boolean")
    if value != voc.INFINITE and scores is not None and scores.dtype is torch.float16:
        raise RefusedError("fp16-mask", "a finite fp16 fill value overflows as an additive mask")
    value_of_node = voc.tensor_of(node)
    dtype = (scores if value_of_node is None else value_of_node).dtype  # type: ignore[union-attr]
    return FillStep(event.condition, value, event.keep, level, node, dtype)


def _mask_kind(flow: Flow, steps: list[Step]) -> tuple[str, Causal | None, list[Step]]:
    """What hides or biases keys, for the report; whether that is "causal"; the steps left."""
    masks = [s for s in steps if isinstance(s, AddStep | FillStep)]
    if not masks:
        return "none", None, steps
    if len(masks) == 1:
        only = masks[0]
        rows, keys = only.level.shape[-2:]
        offset, find = None, flow.constants.causal_offset
        if isinstance(only, FillStep):
            offset = find(only.condition, only.reader, rows, keys, hidden=not only.keep)
        elif only.alpha == 1:
            offset = find(only.term, only.reader, rows, keys)
        if offset is not None:
            return "causal", Causal(offset, only), [s for s in steps if s is not only]
    is_bool = all(isinstance(s, FillStep) and s.value == voc.INFINITE for s in masks)
    return ("bool" if is_bool else "float"), None, steps


def _check_writes(flow: Flow, node: fx.Node, start: fx.Node, out: fx.Node) -> None:
    """Refuse where a tensor may change between the model's read (``start``) and ours (``out``)."""
    if flow.memory.writers(node, start, out):
        raise RefusedError("in-place-write", "an operand is written in place during attention")


def _scatters(writer: fx.Node, value: fx.Node) -> bool:
    """Whether ``other[index] = value`` with an index that holds a tensor: queries were selected."""
    if target_name(writer) != "setitem" or writer.args[2] is not value:
        return False
    index = writer.args[1]
    return any(map(voc.is_tensor, index if isinstance(index, tuple) else (index,)))


def _drops_sink(user: fx.Node, sink: voc.Append) -> bool:
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


def _row_maximum(op: voc.Add, reader: fx.Node) -> set[fx.Node]:
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


def _is_banded(node: fx.Node, flow: Flow) -> bool:
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
