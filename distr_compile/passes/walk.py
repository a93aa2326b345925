"""One walk from a softmax: back to QK^T, forward to PV, and the site in between."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import fx

from distr_compile.passes import vocabulary as voc
from distr_compile.passes.hidden import mask_of
from distr_compile.passes.levels import Levels, all_ones
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
from distr_compile.passes.shapes import reads_shape_only
from distr_compile.passes.site import (
    Factor,
    Level,
    OpenSite,
    Operand,
    RefusedError,
    Step,
    count,
    dropped,
)
from distr_compile.passes.steps import (
    KINDS,
    ScaleStep,
    Way,
    check_clamps,
    drops_sink,
    replay,
)
from distr_compile.passes.vocabulary import read, same_shape, same_size, shape_of, target_name


def _no_attention(text: str) -> RefusedError:
    return RefusedError("no-qk-product", text, attention=False)


def _no_product(fed_by: fx.Node) -> RefusedError:
    name = target_name(fed_by)
    what = f"{name}, not by a product QK^T" if name else "an input or a parameter, as it is"
    return _no_attention(f"the softmax is fed by {what}")


@dataclass
class Walk(Way):
    """The state of one walk from a softmax: what was met between QK^T and PV.

    Attributes:
        backward, forward: names of operations on both sides of the softmax.
        permuted: the weights' leading axes were.
        leads: the leading axes of the weights after each of their reshapes.
    """

    backward: list[str] = field(default_factory=list)
    forward: list[str] = field(default_factory=list)
    permuted: bool = False
    leads: list[tuple[Any, ...]] = field(default_factory=list)

    def form(self) -> str:
        """The spelling, as names of operations from the product to where the walk ended."""
        return " ".join([*reversed(self.backward), *self.forward])

    def softmax(self, node: fx.Node) -> OpenSite:
        """The attention around a softmax.

        Raises:
            RefusedError: it is none, or none that can be rewritten; with the reason.
        """
        op, flow = read(node), self.flow
        rank = len(shape_of(node))
        if not isinstance(op, voc.Softmax) or rank == 0:
            raise _no_attention(f"{target_name(node)} is no softmax over one axis known here")
        self.backward.append(f"softmax({str(op.dtype)[6:]})" if op.dtype else target_name(node))
        made = flow.memory.definition(op.x, min(op.inner, default=node)) or op.x
        candidates = flow.chained[made] | flow.behind[made]
        if not candidates and _is_cut_off(op.x) and _weighs_values(node, flow):
            raise RefusedError("graph-break", "QK^T and the softmax are in different graphs")
        if not candidates:
            raise _no_product(made)
        try:
            product, product_op = self._back(op, node)
            q, k, axes = self._product(product, product_op)
            is_plain = axes == tuple(range(len(axes)))
            lead = tuple(shape_of(product)[self.places[axis]] for axis in axes[:-2])
            if is_plain:
                axes = tuple(range(rank))  # reshaped on the way, if at all
            elif len(axes) != rank or any(isinstance(e, voc.Reshape) for e, _ in self.events):
                raise RefusedError("layout", "the scores are reshaped and their axes permuted")
            out, out_level, v, output_dims = self._forward(node, axes)
        except RefusedError as refused:
            if not any(flow.is_scores(p) for p in candidates):
                raise _no_product(made) from refused
            if op.dim != rank - 1 and refused.code.startswith("weights-"):
                text = f"the softmax runs over axis {op.dim} of {rank}, and {refused}"
                raise RefusedError("softmax-axis", text) from refused
            raise
        scores = Level((*lead, q.shape[-2], k.shape[-2]))
        replay(self, scores, product, product_op, is_plain)
        canonical = _canonical(self.levels, out_level, q, k, v)
        matrix = scores.shape[-2:]
        weights = [Level((*lead, *matrix), is_reshaped=True) for lead in self.leads]
        levels = (*self.levels, *weights, out_level)
        q, k, factors, dtype = self._scaled(product, product_op, out, (q, k, v))
        check_clamps(self, factors, product)
        reads = [(q.node, product), (k.node, product), (v.node, out)]
        reads += [(s.tensor, s.reader) for s in self.steps if s.tensor is not None]
        for node_read, reader in reads:
            self._check_writes(node_read, reader, out)
        sinks = self._sinks(Levels(levels, matrix), canonical, out)
        self._erase_dead()
        return open_site(
            flow,
            out,
            (q, k, v),
            levels,
            canonical,
            self.steps,
            kind="softmax",
            anchor=node,
            form=self.form(),
            compute_dtype=dtype,
            factors=factors,
            softcap=self.softcap,
            dropout_p=self.dropout_p,
            sinks=sinks,
            output_dims=output_dims,
            interior=tuple(dict.fromkeys(self.interior)),
        )

    # -- back to QK^T ----------------------------------------------------------------------------

    def _back(self, softmax: voc.Softmax, anchor: fx.Node) -> tuple[fx.Node, voc.Product]:
        """Walk from the softmax back to the product of Q and K."""
        flow = self.flow
        if softmax.sign < 0:
            self.events.append((voc.Scale(softmax.x, softmax.sign), anchor))
        self.places, self.dim = tuple(range(len(shape_of(softmax.x)))), softmax.dim
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
            kind = KINDS.get(type(op))
            if kind is None:
                raise RefusedError("scores-edited", f"{target_name(node)} before the softmax")
            source = kind.back(self, op, node)
            if isinstance(op, voc.Reshape) or len(shape_of(source)) != len(self.places):
                self._reshaped(len(shape_of(source)))
            node = flow.now(source, node)
        self._read_by_us_only(node)
        self.backward.append(target_name(node))
        self.interior.append(node)
        if op.addend is not None and self.capped:
            self.refuse_shift()
        return node, op

    def _reshaped(self, rank: int) -> None:
        """The axes before a reshape, which only scores whose last axis is the keys' may have."""
        places, dim = self.places, self.dim
        if dim != len(places) - 1:
            raise RefusedError(
                "softmax-axis", f"the softmax runs over axis {dim} of reshaped scores"
            )
        if places != tuple(range(len(places))):
            raise RefusedError("layout", "the scores are reshaped and their axes permuted")
        self.places, self.dim = tuple(range(rank)), rank - 1

    def _read_by_us_only(self, node: fx.Node) -> None:
        """Refuse where somebody else looks at the scores, or writes to them."""
        others = [user for user in self._readers(node) if user not in self.interior]
        if not others:
            return
        if any(self.flow.memory.writes_into(user, node) for user in others):
            raise RefusedError("in-place-write", "the scores are written in place")
        if any(user.op == "output" for user in others):
            raise RefusedError("weights-reused", "the scores are returned")
        names = ", ".join(sorted({target_name(u) for u in others}))
        raise RefusedError("weights-reused", f"the scores are also read by: {names}")

    def _readers(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that read a node's values and are read themselves."""
        dead = self.flow.memory.dead
        return [u for u in node.users if not reads_shape_only(u, node) and u not in dead]

    def _blocked(self, node: fx.Node) -> None:
        """The walk cannot go on: find the node in the way and say what it means."""
        flow = self.flow
        while isinstance(op := flow.read(node), voc.ON_SCORES | voc.Scale | voc.Add):
            if isinstance(op, voc.ON_SCORES):
                node = flow.now(op.x, node)
                continue
            other = op.factor if isinstance(op, voc.Scale) else op.y
            fed = [x for x in (op.x, other) if isinstance(x, fx.Node) and flow.behind[x]]
            if not fed:
                break
            node = fed[0]
        name = target_name(node) or node.op
        self.backward.append(name.strip("_"))
        if name in {"linear", "conv1d", "conv2d"} and flow.behind[node]:
            raise RefusedError("cross-head-mix", f"{name} mixes the scores across heads")
        if not flow.behind[node]:
            raise _no_product(node)
        if name in {"cat", "concat"}:
            parts: Any = node.args[0] if node.args else node.kwargs.get("tensors", ())
            scored = [p for p in parts if isinstance(p, fx.Node) and flow.behind[p]]
            if len(scored) == 1:
                raise RefusedError("sinks", "more than a sink column is concatenated to the scores")
            raise RefusedError("concat-scores", "one softmax runs over several score matrices")
        if is_banded(node, flow):
            raise banded()
        if name in {"setitem", "copy_"}:
            raise RefusedError("in-place-write", f"the scores are what {name} wrote in place")
        raise RefusedError("scores-edited", f"the scores pass through {name} before the softmax")

    # -- the product -----------------------------------------------------------------------------

    def _product(self, node: fx.Node, op: voc.Product) -> tuple[Operand, Operand, tuple[int, ...]]:
        """Q: (..., N_q, d), K: (..., N_k, d), and the softmax's axes as (lead..., N_q, N_k)."""
        flow, places, dim = self.flow, self.places, self.dim
        before = flow.behind[op.a] | flow.behind[op.b]
        is_mixed = not flow.is_scores(node) or target_name(node) == "linear"
        if is_mixed and any(map(flow.is_scores, before)):
            raise RefusedError("cross-head-mix", f"{target_name(node)} mixes the scores' heads")
        rank, see = len(places), partial(flow.through, out=node)
        if op.equation is not None:
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
        if op.equation is not None:
            q, k = einsum_scores(see, op, own)
        else:
            if own[:-2] != tuple(range(rank - 2)):
                raise RefusedError("layout", "the axes of the scores are permuted")
            q = operand(see, op.a, rank, transposed=False)
            k = operand(see, op.b, rank, transposed=True)
            if key < query:
                q, k = k, q
        if q.dims[-2] >= 0 and axis_origin(q.node, q.dims[-2], flow.axes) == BATCH:
            raise RefusedError("batch-attention", "attention runs across the batch dimension")
        for x in (q, k):
            if x.dims[-1] >= 0 and axis_origin(x.node, x.dims[-1], flow.axes) == TOKEN:
                text = "channel attention: the product contracts over tokens, not over width"
                raise RefusedError("channel-attention", text)
        return q, k, axes

    # -- forward to PV ---------------------------------------------------------------------------

    def _forward(
        self, softmax: fx.Node, axes: tuple[int, ...]
    ) -> tuple[fx.Node, Level, Operand, tuple[int, ...]]:
        """Walk from the softmax to the product with V: its node, level, V, and its axes."""
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
                if self.dropout_p:
                    raise RefusedError("dropout", "the weights are dropped out twice")
                self.dropout_p = dropped(op.p)
            elif isinstance(op, voc.Permute):
                axes = tuple(op.dims.index(axis) for axis in axes)
                self.permuted |= op.dims[:-2] != tuple(range(rank - 2))
                shape = shape_of(user)
            elif isinstance(op, voc.Reshape):
                new = shape_of(user)
                if axes != tuple(range(rank)) or not same_shape(new[-2:], shape[-2:]):
                    raise RefusedError("layout", "the weights are reshaped over keys or queries")
                shape, rank = new, len(new)
                axes = tuple(range(rank))
                self.leads.append(new[:-2])
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
        if any(_scatters(reader, user) for reader in user.users):
            raise RefusedError("in-place-write", "the output is written to rows chosen by a tensor")
        see = partial(self.flow.through, out=user)
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
        memory, users = self.flow.memory, self._readers(node)
        if not users:
            raise RefusedError("dead", "nothing reads the result of this softmax")
        if any(user.op == "output" for user in users):
            text = "the weights leave the graph: returned, or read after a break"
            raise RefusedError("weights-reused", text)
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

    def _scaled(
        self,
        product: fx.Node,
        op: voc.Product,
        out: fx.Node,
        operands: tuple[Operand, Operand, Operand],
    ) -> tuple[Operand, Operand, tuple[Factor, ...], torch.dtype | None]:
        """Q and K without their upcasts and factors, these, and the dtype to compute in."""
        (q, k, v), see = operands, partial(self.flow.through, out=out)
        has_tensor = any(isinstance(s, ScaleStep) and s.tensor is not None for s in self.steps)
        common = partial(common_dtype, see, keeps_upcast=has_tensor)
        q, k, dtype = common(q, k, v, product, out)
        factors: tuple[Factor, ...] = ()
        # The tensor goes into Q: where that may overflow, the numbers that keep it small stay.
        if not (has_tensor and (dtype or voc.fake(q.node).dtype) == torch.float16):
            (q, q_factors), (k, k_factors) = take_scale(see, q), take_scale(see, k)
            q, k, dtype = common(q, k, v, product, out)
            factors = (*q_factors, *k_factors)
        if voc.is_tensor(op.alpha):
            raise RefusedError("scores-edited", "baddbmm's alpha is a tensor")
        if op.alpha != 1:
            factors = (*factors, Factor(op.alpha))
        return q, k, factors, dtype

    def _check_writes(self, node: fx.Node, start: fx.Node, out: fx.Node) -> None:
        """Refuse where a tensor may change between the model's read (start) and ours (out)."""
        if self.flow.memory.may_change(node, start, out):
            raise RefusedError("in-place-write", "an operand is written in place during attention")

    def _erase_dead(self) -> None:
        """Dead readers of what goes, and theirs, go too."""
        stack = list(self.interior)
        while stack:
            dead = [u for u in stack.pop().users if u in self.flow.memory.dead]
            self.interior += dead
            stack += dead

    def _sinks(self, levels: Levels, canonical: Level, out: fx.Node) -> fx.Node | None:
        """One number per head, from the column that the scores were given."""
        if self.sink is None or self.sink_level is None:
            return None
        self._check_writes(self.sink.column, self.sink.column, out)
        sinks = per_head(partial(self.flow.through, out=out), self.sink.column)
        value = voc.tensor_of(sinks)
        heads = shape_of(self.sink.x)[-3:-2]
        if sinks is None or value is None or not value.dtype.is_floating_point:
            raise RefusedError("sinks", "the sinks are not one number per head")
        lead = levels.carried(heads, self.sink_level, canonical)
        if not same_shape(lead[-1:], heads) or not all_ones(lead[:-1]):
            raise RefusedError("sinks", "the sinks are concatenated under other axes of the heads")
        self._check_writes(sinks, sinks, out)
        return sinks


def _canonical(levels: list[Level], out: Level, q: Operand, k: Operand, v: Operand) -> Level:
    """The level of the rewritten call: of those of scores and output the one all broadcast to."""
    scores = (q.shape[-2], k.shape[-2])
    if not same_shape(levels[-1].shape[-2:], scores):
        raise RefusedError("layout", "the softmax runs over reshaped keys")
    if not same_size(q.shape[-1], k.shape[-1]):
        raise RefusedError("layout", "Q and K have different widths: one is broadcast")
    if not same_size(v.shape[-2], scores[-1]):
        raise RefusedError("layout", "V is not as long as the keys")
    plain = [*(level for level in levels if same_shape(level.shape[-2:], scores)), out]
    widest = max(count(level.lead) for level in plain)
    return min((level for level in plain if count(level.lead) == widest), key=_preference)


def _preference(level: Level) -> tuple[int, int, int]:
    """Four axes first (batch, heads, N, N), then more, then fewer; of two the less broadcast."""
    rank = len(level.shape)
    return (0 if rank == 4 else 1 if rank > 4 else 2, -rank, -count(level.lead))


def open_site(
    flow: Flow,
    output: fx.Node,
    operands: tuple[Operand, Operand, Operand],
    levels: tuple[Level, ...],
    canonical: Level,
    steps: list[Step],
    *,
    is_causal: bool = False,
    share_heads: bool = True,
    compute_dtype: torch.dtype | None,
    **rest: Any,
) -> OpenSite:
    """A site with the operands Q, K and V.

    ``is_causal``: later keys are hidden, besides what the steps hide. ``share_heads``: repeated
    heads of K and V are looked for. The others are fields of the site.
    """
    q, k, v = operands
    mask_kind, causal, left = mask_of(flow, output, levels[0], steps, is_causal)
    shared = _shared_heads(partial(flow.through, out=output), k, v) if share_heads else None
    key, level = shared[0] if shared else k, canonical.shape
    heads = level[-3] if len(level) > 2 else 1
    value = voc.fake(output)
    return OpenSite(
        output=output,
        dtype=compute_dtype or value.dtype,
        device=value.device,
        requires_grad=value.requires_grad,
        batch=math.prod(canonical.lead[:-1]),
        num_heads=heads,
        num_key_heads=key.shape[-3] if len(key.shape) == len(level) > 2 else heads,
        num_queries=q.shape[-2],
        num_keys=k.shape[-2],
        head_dim=q.shape[-1],
        value_dim=v.shape[-1],
        q=q,
        k=k,
        v=v,
        shared=shared,
        levels=levels,
        canonical=canonical,
        steps=left,
        given=tuple(steps),
        mask_kind=mask_kind,
        causal=causal,
        compute_dtype=compute_dtype,
        copy_order=order_to_copy(flow.memory, output),
        **rest,
    )


def _shared_heads(see: See, k: Operand, v: Operand) -> tuple[Operand, Operand] | None:
    """K and V before ``repeat_kv``, where both were repeated by the same count."""
    before_k, before_v = unrepeated(see, k), unrepeated(see, v)
    if before_k is None or before_v is None or before_k[1] != before_v[1]:
        return None
    return before_k[0], before_v[0]


# -- small pieces of graphs that the walk meets --------------------------------------------------


def _scatters(writer: fx.Node, value: fx.Node) -> bool:
    """Whether ``other[index] = value`` with an index that holds a tensor: queries were selected."""
    if target_name(writer) != "setitem" or writer.args[2] is not value:
        return False
    index = writer.args[1]
    return any(map(voc.is_tensor, index if isinstance(index, tuple) else (index,)))


def banded() -> RefusedError:
    """The refusal of scores for which :func:`is_banded` holds."""
    return RefusedError("banded", "the scores are cut to a band (a window of keys)")


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


def _is_cut_off(node: fx.Node) -> bool:
    """Whether scores come into the graph as an input: the product is before a graph break."""
    while node.op != "placeholder":
        op = read(node)
        if not isinstance(op, voc.Add | voc.Scale | voc.ON_SCORES):
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
        if not isinstance(op, voc.ONE_TO_ONE):
            return False
    return False
