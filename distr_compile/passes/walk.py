"""One walk from a softmax: back to QK^T, forward to PV, and the site in between."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from distr_compile.passes import vocabulary as voc
from distr_compile.passes.operands import (
    See,
    common_dtype,
    einsum_axes,
    einsum_scores,
    einsum_values,
    operand,
    per_head,
    take_scale,
)
from distr_compile.passes.origin import BATCH, TOKEN, Flow, axis_origin
from distr_compile.passes.output import order_to_copy
from distr_compile.passes.replay import (
    count,
    mask_kind_of,
    preference,
    replay,
    shared_heads,
    sizes_of,
    tensors_of,
)
from distr_compile.passes.site import (
    AttentionSite,
    Factor,
    Level,
    Operand,
    RefusedError,
    Step,
)
from distr_compile.passes.spelled import (
    drops_sink,
    is_banded,
    is_cut_off,
    row_maximum,
    scatters,
    weighs_values,
)
from distr_compile.passes.vocabulary import read, same_shape, same_size, shape_of, target_name

NO_CLAMP = 1.0e4
"""Bounds at least this far out guard against overflow; they do not change ordinary scores."""


def _no_product(text: str = "the softmax is not fed by a product QK^T") -> RefusedError:
    return RefusedError("no-qk-product", text, attention=False)


def _reshaped(
    places: tuple[int, ...], dim: int, before: tuple[Any, ...]
) -> tuple[tuple[int, ...], int]:
    """The axes before a reshape, which only scores whose last axis is the keys' may have."""
    if dim != len(places) - 1:
        raise RefusedError("softmax-axis", f"the softmax runs over axis {dim} of reshaped scores")
    if places != tuple(range(len(places))):
        raise RefusedError("layout", "the scores are reshaped and their axes permuted")
    return tuple(range(len(before))), len(before) - 1


def _check_writes(flow: Flow, node: fx.Node, start: fx.Node, out: fx.Node) -> None:
    """Refuse where a tensor may change between the model's read (``start``) and ours (``out``)."""
    if flow.memory.writers(node, start, out):
        raise RefusedError("in-place-write", "an operand is written in place during attention")


@dataclass
class Walk:
    """The state of one walk from a softmax: what was met between QK^T and PV."""

    flow: Flow
    backward: list[str] = field(default_factory=list)
    forward: list[str] = field(default_factory=list)
    interior: list[fx.Node] = field(default_factory=list)
    sink: voc.Append | None = None
    permuted: bool = False

    def form(self) -> str:
        """The spelling, as names of operations from the product to where the walk ended."""
        return " ".join([*reversed(self.backward), *self.forward])

    def softmax(self, node: fx.Node) -> AttentionSite:
        """The attention around a softmax.

        Raises:
            RefusedError: it is none, or none that can be rewritten; with the reason.
        """
        op = read(node)
        rank = len(shape_of(node))
        if not isinstance(op, voc.Softmax) or rank == 0:
            raise _no_product("the softmax's arguments are not known")
        flow = self.flow
        self.backward.append(f"softmax({str(op.dtype)[6:]})" if op.dtype else target_name(node))
        made = flow.memory.definition(op.x, min(op.inner, default=node)) or op.x
        candidates = flow.chained[made] | flow.behind[made]
        if not candidates and is_cut_off(op.x) and weighs_values(node, flow):
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
        replayed = replay(flow, scores, events, product_op, product, is_plain)
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
        for inner in softmax.inner:
            self._read_by_us_only(inner)
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
                if maximum := row_maximum(op, node):
                    made = flow.now(op.x, node)
                    if any(flow.memory.writers(made, n, node) for n in maximum - {node}):
                        raise RefusedError("in-place-write", "the scores are written in place")
                    self._refuse_shift(capped)
                    self.interior.extend(maximum - {node})
                    node = made
                    continue
                source, term, first = self._scores_side(node, op.x, op.y)
                if not first and op.alpha != 1:
                    raise RefusedError("scores-edited", "the scores are subtracted from a tensor")
                if capped or not voc.is_tensor(term):
                    self._refuse_shift(capped)
                else:
                    events.append((voc.Add(source, term, op.alpha), node))
            elif isinstance(op, voc.Scale):
                source, factor, first = self._scores_side(node, op.x, op.factor)
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

    def _scores_side(self, reader: fx.Node, a: Any, b: Any) -> tuple[fx.Node, Any, bool]:
        """Which operand carries QK^T: the one with a product of two activations."""
        flow = self.flow
        none: frozenset[fx.Node] = frozenset()
        chains = [flow.before(x, reader) if isinstance(x, fx.Node) else none for x in (a, b)]
        if bool(chains[0]) != bool(chains[1]):
            first = bool(chains[0])
        else:
            real = [any(flow.is_scores(p) for p in chain) for chain in chains]
            if real[0] == real[1]:
                raise RefusedError("two-products", "the scores are a sum of two products")
            first = real[0]
        scores, other = (a, b) if first else (b, a)
        if isinstance(other, fx.Node) and flow.behind[other] - flow.before(scores, reader):
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
            if isinstance(op, voc.ON_SCORES):
                node = flow.now(op.x, node)
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
        if is_banded(node, flow):
            raise RefusedError("banded", "the scores are cut to a band (a window of keys)")
        if name in {"setitem", "copy_"}:
            raise RefusedError("in-place-write", f"the scores are what {name} wrote in place")
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
            elif sink is not None and axes[-1] == rank - 1 and drops_sink(user, sink):
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
        if any(scatters(reader, user) for reader in user.users):
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
        if not same_size(q.shape[-1], k.shape[-1]):
            raise RefusedError("layout", "Q and K have different widths: one is broadcast")
        if not same_size(v.shape[-2], scores.shape[-1]):
            raise RefusedError("layout", "V is not as long as the keys")
        plain = [lv for lv in levels if same_shape(lv.shape[-2:], scores.shape[-2:])]
        # Of the levels the one that all others broadcast to.
        widest = max(count(level.lead) for level in [*plain, out_level])
        full = [level for level in [*plain, out_level] if count(level.lead) == widest]
        canonical = min(full, key=preference)
        out_value = voc.tensor_of(out)
        assert out_value is not None
        q, k, _ = common_dtype(see, q, k, v, product, out_value)
        (q, q_factors), (k, k_factors) = take_scale(see, q), take_scale(see, k)
        q, k, compute_dtype = common_dtype(see, q, k, v, product, out_value)
        if voc.is_tensor(op.alpha):
            raise RefusedError("scores-edited", "baddbmm's alpha is a tensor")
        alpha = () if op.alpha == 1 else (Factor(op.alpha),)
        shared = shared_heads(see, k, v)
        for x, reader in ((q, product), (k, product), (v, out)):
            _check_writes(flow, x.node, reader, out)
        for step in steps:
            for term in tensors_of(step):
                _check_writes(flow, term, step.reader, out)
        sinks = self._sinks(canonical, out)
        mask_kind, causal, steps = mask_kind_of(flow, scores, steps)
        self._erase_dead()
        return AttentionSite(
            kind="softmax",
            anchor=anchor,
            form=self.form(),
            output=out,
            dtype=compute_dtype or out_value.dtype,
            device=out_value.device,
            **sizes_of(canonical, q, shared[0] if shared else k, v),
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
