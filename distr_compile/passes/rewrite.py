"""Replace one site by one call: ``torch.ops.distr.attention``, or SDPA where it stays exact.

The call takes Q, K, V as (B, H, N, d) and one mask. Getting there needs no size by name: axes are
permuted, flattened and unflattened, and a size that is symbolic is inferred or taken from a reshape
that the model itself made. Where that does not suffice the site stays as it is, with the reason.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from distr_compile.lowering.call import Scores, op_arguments
from distr_compile.passes import open_up
from distr_compile.passes import vocabulary as voc
from distr_compile.passes.decide import Decision
from distr_compile.passes.emit import Emitter
from distr_compile.passes.site import (
    AddStep,
    AttentionSite,
    Factor,
    FillStep,
    Level,
    Operand,
    RefusedError,
    ScaleStep,
    refusal,
)
from distr_compile.passes.vocabulary import same_shape, same_size, shape_of


def rewrite(
    graph: fx.Graph,
    site: AttentionSite,
    decision: Decision,
    number: int,
    bases: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Put ``distr.attention`` in the place of a site.

    Args:
        graph: the site's graph; changed.
        site: from :func:`.match.find`.
        decision: from :func:`.decide.decide`, ``"distr"``.
        number: the site's number within its graph, for the run-time counter.
        bases: A and B, ``(H_k, d, r)`` on the site's device, for an estimator that needs them.

    Raises:
        RefusedError: the operands cannot be laid out; the graph is as it was.
    """

    def attend(
        emit: Emitter, q: Any, k: Any, v: Any, mask: Any, is_causal: bool, scale: Any
    ) -> fx.Node:
        rest: tuple[Any, ...] = ()
        if bases is not None:
            names = (f"distr_basis_q_{number}", f"distr_basis_k_{number}")
            rest = tuple(map(emit.constant, names, bases))
        if site.sinks is not None:
            rest = (*(rest or (None, None)), emit.method("flatten", site.sinks))
        offset = site.causal.offset or None if is_causal and site.causal is not None else None
        scores = Scores(scale, is_causal, offset, site.softcap)
        arguments = op_arguments(decision.approximation, scores, decision.min_seq_len, number)
        op = torch.ops.distr.attention.default
        return emit.function(op, q, k, v, mask, *rest, **arguments)

    if site.kind in {"mha", "encoder"}:
        scale = 1.0 / math.sqrt(site.head_dim)
        emit = Emitter(graph, site.anchor)
        try:
            open_up.spell_out(
                site, emit, lambda q, k, v, mask, causal: attend(emit, q, k, v, mask, causal, scale)
            )
        except Exception as error:
            emit.undo()
            raise refusal(error) from error
        graph.erase_node(site.anchor)
        return
    _replace(graph, site, attend, share_heads=True)


def rewrite_exact(graph: fx.Graph, site: AttentionSite) -> bool:
    """Put SDPA in the place of an exact site that is spelled out, where it means the same.

    Returns:
        Whether it did. Fused calls are left alone, and sites that SDPA cannot say: with a soft cap,
        sinks, several dtypes, or a bias whose dtype is not that of Q.
    """
    if site.kind != "softmax" or site.softcap or site.sinks is not None:
        return False
    if site.compute_dtype is not None:
        return False
    if site.causal is not None and site.causal.offset:  # SDPA's is_causal knows no offset
        assert site.causal.step is not None
        site = replace(site, causal=None, steps=(*site.steps, site.causal.step))
    if not _sdpa_means_the_same(site):
        return False

    def attend(
        emit: Emitter, q: Any, k: Any, v: Any, mask: Any, is_causal: bool, scale: Any
    ) -> fx.Node:
        return emit.function(
            F.scaled_dot_product_attention,
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=0.0,
            is_causal=is_causal,
            scale=scale,
        )

    try:
        _replace(graph, site, attend, share_heads=False)
    except RefusedError:
        return False
    return True


def keep_from_fusion(module: fx.GraphModule) -> None:
    """Write each softmax over another axis than the last one as one over the last, transposed.

    Inductor's ``fuse_attention`` does not look at the axis: it would make SDPA of it, which is
    wrong (pytorch#196468). Fusions of a softmax over the last axis are right and are not touched.
    """
    for body in (m for m in module.modules() if isinstance(m, fx.GraphModule)):
        for softmax in list(body.graph.nodes):
            op = voc.read(softmax)
            if not isinstance(op, voc.Softmax) or op.dim == len(shape_of(softmax)) - 1:
                continue
            if op.inner or "out" in softmax.kwargs:
                _set_apart(body.graph, softmax, op.dim)
                continue
            emit = Emitter(body.graph, softmax)
            x = emit.method("transpose", op.x, op.dim, -1)
            x = emit.method("neg", x) if op.sign < 0 else x
            x = emit.method("softmax", x, -1, dtype=op.dtype)
            softmax.replace_all_uses_with(emit.method("transpose", x, op.dim, -1))
            body.graph.erase_node(softmax)


def _set_apart(graph: fx.Graph, weights: fx.Node, dim: int) -> None:
    """Put a copy that no pattern looks through between weights and their products."""
    for reader in [user for user in weights.users if isinstance(voc.read(user), voc.Product)]:
        emit = Emitter(graph, reader)
        x = emit.method("contiguous", emit.method("transpose", weights, dim, -1))
        reader.replace_input_with(weights, emit.method("transpose", x, dim, -1))


def _sdpa_means_the_same(site: AttentionSite) -> bool:
    """SDPA takes a float mask in Q's dtype only, and a number as scale."""
    assert site.q is not None
    q = voc.tensor_of(site.q.node)
    biases = [voc.tensor_of(s.term) for s in site.steps if isinstance(s, AddStep)]
    if q is None or any(b is None or b.dtype != q.dtype for b in biases):
        return False
    fills = [s for s in site.steps if isinstance(s, FillStep) and s.value != voc.INFINITE]
    return all(s.dtype in {q.dtype, site.dtype} for s in fills)


def _replace(graph: fx.Graph, site: AttentionSite, attend: Any, *, share_heads: bool) -> None:
    readers = _shape_readers(site)
    emit = Emitter(graph, site.output)
    try:
        layout = _Layout(emit, site, share_heads)
        q, k, v = layout.operands()
        mask, scale, q = layout.mask_and_scale(q)
        out = attend(emit, q, k, v, mask, site.is_causal, scale)
        out = layout.output(out)
    except Exception as error:  # what is written is tried on fake tensors: anything may be raised
        emit.undo()
        raise refusal(error) from error
    emit.stand_for(site.output, out)
    for reader, node in readers:
        _read_sizes(graph, reader, node)
    for node in sorted(site.interior, reverse=True):
        graph.erase_node(node)


def _shape_readers(site: AttentionSite) -> list[tuple[fx.Node, fx.Node]]:
    """Nodes that look at the shape or dtype of one that goes: ``bias.view_as(scores)``."""
    found = [
        (user, node)
        for node in site.interior
        for user in node.users
        if node is not site.output and user not in site.interior
    ]
    for user, node in found:
        is_static = all(isinstance(size, int) for size in shape_of(node))
        if not is_static and user.target != "type_as":
            raise RefusedError("layout", f"{user.target} reads a symbolic shape of the scores")
    return found


def _read_sizes(graph: fx.Graph, reader: fx.Node, node: fx.Node) -> None:
    """Give a shape reader the sizes, or the dtype, themselves."""
    value = voc.tensor_of(node)
    assert value is not None
    is_cast = reader.target == "type_as"
    name = "to" if is_cast else str(reader.target).removesuffix("_as")
    arguments = (value.dtype,) if is_cast else tuple(value.shape)
    # The node stays: another attention may have it as a term.
    reader.target, reader.args = name, (reader.args[0], *arguments)


@dataclass
class _Layout:
    """Brings a site's tensors to (B, H, N, d) and back."""

    emit: Emitter
    site: AttentionSite
    share_heads: bool

    # -- Q, K, V ---------------------------------------------------------------------------------

    def operands(self) -> tuple[fx.Node, fx.Node, fx.Node]:
        site = self.site
        assert site.q is not None
        assert site.k is not None
        assert site.v is not None
        assert site.scores is not None
        assert site.out is not None
        assert site.canonical is not None
        k, v = site.k, site.v
        if self.share_heads and site.shared_k is not None and site.shared_v is not None:
            k, v = site.shared_k, site.shared_v
        nodes = [
            self._operand(x, level)
            for x, level in ((site.q, site.scores), (k, site.scores), (v, site.out))
        ]
        leads = [lead for _, lead in nodes]
        canonical = site.canonical.lead
        leads.append((_product(canonical[:-1]), canonical[-1] if canonical else 1))
        full = [self._widest([lead[i] for lead in leads]) for i in range(2)]
        kv_heads = self._widest([leads[1][1], leads[2][1]])
        q = self._expand(nodes[0], (full[0], full[1]))
        key = self._expand(nodes[1], (leads[1][0], kv_heads))
        value = self._expand(nodes[2], (leads[2][0], kv_heads))
        return self._in_one_dtype(q), self._in_one_dtype(key), self._in_one_dtype(value)

    def _in_one_dtype(self, x: fx.Node) -> fx.Node:
        dtype = self.site.compute_dtype
        return x if dtype is None else self.emit.method("to", x, dtype)

    def _operand(self, x: Operand, level: Level) -> tuple[fx.Node, tuple[Any, Any]]:
        """An operand as four axes, and its (batch, heads)."""
        emit, node = self.emit, x.node
        for view in x.replay:
            node = emit.again(view, node)
        own = [d for d in x.dims if d >= 0]
        if own != list(range(len(own))):
            if own == [*range(len(own) - 2), len(own) - 1, len(own) - 2]:
                node = emit.method("transpose", node, -2, -1)
            else:
                node = emit.method("permute", node, *own)
        for position, d in enumerate(x.dims):
            if d < 0:
                node = emit.method("unsqueeze", node, position)
        return self._to_canonical(node, x.shape[:-2])

    def _to_canonical(
        self, node: fx.Node, lead: tuple[Any, ...]
    ) -> tuple[fx.Node, tuple[Any, Any]]:
        """(lead..., a, b) -> (batch, heads, a, b)."""
        canonical = self.site.canonical
        assert canonical is not None
        target = canonical.lead
        while len(lead) < len(target) and _fits((1,) * (len(target) - len(lead)) + lead, target):
            node, lead = self.emit.method("unsqueeze", node, 0), (1, *lead)
        if not _fits(lead, target):
            node = _regroup(self.emit, node, lead, target, canonical.args)
            lead = target if not _all_ones(lead) else (1,) * len(target)
        if len(target) > 2:
            merged, heads = lead[:-1], lead[-1]
            if not same_shape(merged, target[:-1]) and not _all_ones(merged):
                raise RefusedError("layout", "an operand is broadcast over some leading axes")
            node = self.emit.method("flatten", node, 0, len(target) - 2)
            return node, (1 if _all_ones(merged) else _product(merged), heads)
        for _ in range(2 - len(target)):
            node = self.emit.method("unsqueeze", node, 0)
        padded = (*(1,) * (2 - len(target)), *lead)
        return node, (padded[0], padded[1])

    @staticmethod
    def _widest(sizes: list[Any]) -> Any:
        return next((s for s in sizes if not same_size(s, 1)), 1)

    def _expand(self, x: tuple[fx.Node, tuple[Any, Any]], lead: tuple[Any, Any]) -> fx.Node:
        node, own = x
        sizes = []
        for mine, wanted in zip(own, lead, strict=True):
            grows = same_size(mine, 1) and not same_size(wanted, 1)
            if grows and not isinstance(wanted, int):
                raise RefusedError("layout", "an operand is broadcast to a symbolic size")
            sizes.append(wanted if grows else -1)
        if sizes == [-1, -1]:
            return node
        return self.emit.method("expand", node, *sizes, -1, -1)

    # -- scale and mask --------------------------------------------------------------------------

    def mask_and_scale(self, q: fx.Node) -> tuple[fx.Node | None, Any, fx.Node]:
        """One mask (bool or additive), one scale, and Q times the factors that are tensors."""
        site, emit = self.site, self.emit
        scale: Any = self._scale(site)
        bias: fx.Node | None = None
        seen: fx.Node | None = None
        for step in site.steps:
            if isinstance(step, ScaleStep):
                factor: Any = step.factor
                if voc.is_tensor(factor):
                    factor, dtype = self._term(factor, step.level), voc.tensor_of(q).dtype  # type: ignore[union-attr]
                    q = emit.method("div" if step.divide else "mul", q, factor)
                    q = q if voc.tensor_of(q).dtype == dtype else emit.method("to", q, dtype)  # type: ignore[union-attr]
                else:
                    scale = self._times(scale, Factor(factor, step.divide))
                if bias is not None:
                    bias = emit.method("div" if step.divide else "mul", bias, factor)
            elif isinstance(step, AddStep):
                term = self._term(step.term, step.level)
                if not voc.tensor_of(step.term).dtype.is_floating_point:  # type: ignore[union-attr]
                    term = emit.method("to", term, torch.promote_types(site.dtype, torch.float32))
                if step.alpha != 1:
                    term = emit.method("mul", term, step.alpha)
                bias = term if bias is None else emit.method("add", bias, term)
            else:
                bias, seen = self._fill(step, bias, seen)
        if bias is not None and seen is not None:
            hidden = emit.method("logical_not", seen)
            bias, seen = emit.method("masked_fill", bias, hidden, voc.INFINITE), None
        mask = bias if bias is not None else seen
        if isinstance(scale, fx.Node):
            # As an argument of the call a symbolic float would be specialised; here it is not.
            q, scale = emit.method("mul", q, scale), 1.0
        if site.mask is not None:
            mask = self._term(site.mask, site.scores)  # type: ignore[arg-type]
        return mask, scale, q

    def _fill(
        self, step: FillStep, bias: fx.Node | None, seen: fx.Node | None
    ) -> tuple[fx.Node | None, fx.Node | None]:
        emit = self.emit
        condition = self._term(step.condition, step.level)
        if step.value == voc.INFINITE:
            keep = condition if step.keep else emit.method("logical_not", condition)
            return bias, keep if seen is None else emit.method("logical_and", seen, keep)
        hidden = emit.method("logical_not", condition) if step.keep else condition
        # The model replaces scores, the mask is added: it must be so low that they vanish.
        value, dtype = min(step.value, voc.ABSORBING), step.dtype
        if bias is None:
            return emit.additive(hidden, dtype, value), seen
        if dtype != self.site.dtype:  # scores upcast first: the number may not fit the bias's dtype
            bias = emit.method("to", bias, dtype)
        return emit.method("masked_fill", bias, hidden, value), seen

    def _scale(self, site: AttentionSite) -> Any:
        if site.kind == "sdpa" and not site.factors:
            width = site.head_dim
            return 1.0 / math.sqrt(width)
        scale: Any = 1.0
        for factor in site.factors:
            scale = self._times(scale, factor)
        return scale

    def _times(self, scale: Any, factor: Factor) -> Any:
        if isinstance(scale, fx.Node) or isinstance(factor.value, fx.Node):
            if scale == 1.0 and not factor.divide:
                return factor.value
            op = operator.truediv if factor.divide else operator.mul
            return self.emit.function(op, scale, factor.value)
        return scale / factor.value if factor.divide else scale * factor.value

    def _term(self, term: fx.Node, level: Level) -> fx.Node:
        """A tensor that broadcasts at ``level``, made to broadcast against (B, H, N_q, N_k)."""
        emit, site = self.emit, self.site
        assert site.canonical is not None
        assert site.scores is not None
        target = site.canonical.lead
        shape = shape_of(term)
        while len(shape) < 2:
            term, shape = emit.method("unsqueeze", term, 0), (1, *shape)
        if not same_shape(level.shape[-2:], site.scores.shape[-2:]):
            # A bias over split axes (query rows and columns of an image): no broadcast survives.
            whole = emit.method("expand", term, *_sizes(level))
            matrix = _sizes(Level(site.scores.shape[-2:]))
            front = len(level.shape) - _tail_length(level, site.scores)
            node = emit.method("flatten", whole, front)
            node = emit.method("unflatten", node, front, tuple(matrix))
            shape, term = (*level.shape[:front], *site.scores.shape[-2:]), node
            level = Level(shape, (*level.args[:front], -1, -1) if level.args else None)
        while len(shape) > 2 and same_size(shape[0], 1):
            term, shape = emit.method("squeeze", term, 0), shape[1:]
        lead, full = shape[:-2], level.lead
        if not lead:
            return term
        if same_shape(full, target):
            return self._four_axes(term, lead, level)
        if _fits(full, target):
            return self._four_axes(term, lead, Level((*target, 1, 1)))
        keeps_heads = same_size(full[-1], target[-1]) if target else False
        if keeps_heads and len(lead) == 1:
            return term
        if keeps_heads:
            grown = emit.method("expand", term, *_sizes(level)[:-3], -1, -1, -1)
            grown = emit.method("flatten", grown, 0, len(full) - 2)
            if len(target) == 2:
                return grown
            grown = emit.method("unflatten", grown, 0, _unflat(target[:-1], None))
            return self._four_axes(grown, (*target[:-1], lead[-1]), Level((*target, 1, 1)))
        if not same_shape(lead, full):
            term = emit.method("expand", term, *_sizes(level)[:-2], -1, -1)
        term = _regroup(emit, term, full, target, site.canonical.args)
        return self._four_axes(term, target, Level((*target, 1, 1)))

    def _four_axes(self, term: fx.Node, lead: tuple[Any, ...], level: Level) -> fx.Node:
        """Merge all leading axes but the heads, for scores of more than four axes."""
        full = level.lead
        if len(full) <= 2 or len(lead) <= 1:
            return term
        if not same_shape(lead[:-1], full[:-1]):
            term = self.emit.method("expand", term, *_sizes(level)[:-3], -1, -1, -1)
        return self.emit.method("flatten", term, 0, len(full) - 2)

    # -- the output ------------------------------------------------------------------------------

    def output(self, out: fx.Node) -> fx.Node:
        """(B, H, N_q, d_v) -> the shape and axis order of the output the model had."""
        emit, site = self.emit, self.site
        assert site.canonical is not None
        assert site.out is not None
        canonical, lead = site.canonical.lead, site.out.lead
        if len(canonical) > 2:
            out = emit.method("unflatten", out, 0, _unflat(canonical[:-1], None))
        for _ in range(2 - len(canonical)):
            out = emit.method("squeeze", out, 0)
        if not same_shape(canonical, lead):
            out = _regroup(emit, out, canonical, lead, site.out.args)
        axes = site.output_dims
        if axes != tuple(range(len(axes))):
            out = emit.method("permute", out, *axes)
        value = voc.tensor_of(site.output)
        if value is not None and value.dtype != site.dtype:
            out = emit.method("to", out, value.dtype)
        return out if site.copy_order is None else self._ordered(out, site.copy_order)

    def _ordered(self, out: fx.Node, order: tuple[int, ...]) -> fx.Node:
        """A copy, if need be, with the axes in this order in memory."""
        if order == tuple(range(len(order))):
            return self.emit.method("contiguous", out)
        out = self.emit.method("contiguous", self.emit.method("permute", out, *order))
        return self.emit.method("permute", out, *map(order.index, range(len(order))))


# -- sizes --------------------------------------------------------------------------------------


def _all_ones(lead: tuple[Any, ...]) -> bool:
    return all(same_size(s, 1) for s in lead)


def _fits(lead: tuple[Any, ...], target: tuple[Any, ...]) -> bool:
    """Same number of axes, each equal, broadcast, or (the heads) a divisor."""
    if len(lead) != len(target):
        return False
    *batch, heads = zip(lead, target, strict=True) if lead else [(1, 1)]
    return all(same_size(a, b) or same_size(a, 1) for a, b in batch) and (
        same_size(heads[0], heads[1])
        or same_size(heads[0], 1)
        or (all(isinstance(h, int) for h in heads) and heads[1] % heads[0] == 0)
    )


def _product(sizes: tuple[Any, ...]) -> Any:
    result: Any = 1
    for size in sizes:
        result = result * size
    return result


def _sizes(level: Level) -> list[Any]:
    """The sizes of a level as arguments: ints, or the nodes its reshape was called with."""
    sizes: list[Any] = []
    for i, size in enumerate(level.shape):
        given = level.args[i] if level.args is not None else None
        if isinstance(size, int):
            sizes.append(size)
        elif isinstance(given, fx.Node):
            sizes.append(given)
        else:
            raise RefusedError("layout", "a mask is broadcast to a symbolic size")
    return sizes


def _unflat(target: tuple[Any, ...], args: tuple[Any, ...] | None) -> tuple[Any, ...]:
    """Sizes for ``unflatten``; at most one is inferred."""
    symbolic = [i for i, size in enumerate(target) if not isinstance(size, int)]
    if len(symbolic) <= 1:
        return tuple(-1 if i in symbolic else size for i, size in enumerate(target))
    given = [args[i] if args is not None else None for i in range(len(target))]
    if all(isinstance(g, int | fx.Node) for g in given):
        return tuple(given)
    raise RefusedError("layout", "more than one leading size is symbolic")


def _regroup(
    emit: Emitter,
    node: fx.Node,
    lead: tuple[Any, ...],
    target: tuple[Any, ...],
    args: tuple[Any, ...] | None,
) -> fx.Node:
    """(lead..., a, b) -> (target..., a, b): the same elements under other leading axes."""
    if _all_ones(lead):
        for _ in range(len(lead) - len(target)):
            node = emit.method("squeeze", node, 0)
        for _ in range(len(target) - len(lead)):
            node = emit.method("unsqueeze", node, 0)
        return node
    total, wanted = _product(lead), _product(target)
    if not same_size(total, wanted):
        raise RefusedError("layout", "an operand is broadcast over leading axes that are merged")
    if len(lead) > 1:
        node = emit.method("flatten", node, 0, len(lead) - 1)
    if not target:
        return emit.method("squeeze", node, 0)
    if len(target) > 1:
        node = emit.method("unflatten", node, 0, _unflat(target, args))
    return node


def _tail_length(level: Level, scores: Level) -> int:
    """How many trailing axes of ``level`` make up (N_q, N_k)."""
    area = voc.hint(scores.shape[-2]) * voc.hint(scores.shape[-1])
    product = 1
    for count, size in enumerate(reversed(level.shape), start=1):
        product *= voc.hint(size)
        if product == area:
            return count
    raise RefusedError("layout", "a bias is added to scores of an unknown shape")
