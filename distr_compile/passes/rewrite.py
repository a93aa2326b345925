"""Replace one site by one call: ``torch.ops.distr.attention``, or SDPA where it stays exact.

The call takes Q, K, V as (B, H, N, d) and one mask. Getting there needs no size by name: axes are
permuted, flattened and unflattened, and a size that is symbolic is inferred or taken from a reshape
that the model itself made. Where that does not suffice the site stays as it is, with the reason.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from distr_compile.lowering.call import Approximation, Scores, op_arguments
from distr_compile.passes import open_up
from distr_compile.passes import vocabulary as voc
from distr_compile.passes.decide import Decision
from distr_compile.passes.emit import Emitter, dtype_of
from distr_compile.passes.open_up import Attend
from distr_compile.passes.site import AttentionSite, Level, OpenSite, Operand, RefusedError, refusal
from distr_compile.passes.steps import AddStep, FillStep, Written
from distr_compile.passes.timing import Stopwatch, shape_of_call
from distr_compile.passes.vocabulary import hint, same_shape, same_size, shape_of, tensor_of


def rewrite(
    graph: fx.Graph,
    site: AttentionSite,
    decision: Decision,
    number: int,
    bases: tuple[torch.Tensor, torch.Tensor] | None = None,
    *,
    watch: Stopwatch | None = None,
    change: bool = True,
) -> int:
    """Put ``distr.attention`` in the place of a site.

    Args:
        graph: the site's graph; changed.
        site: from :func:`.match.find`.
        decision: from :func:`.decide.decide`; if ``"exact"``, the op computes exactly.
        number: the site's number within its graph, for the run-time counter.
        bases: A and B, ``(H_k, d, r)`` on the site's device, for an estimator that needs them.
        watch: is asked whether the call is faster than what it replaces.
        change: False only tries it, and leaves the graph as it was.

    Returns:
        The length below which the op computes exactly; 0 for none.

    Raises:
        RefusedError: the operands cannot be laid out, or the call is not faster; the graph is as it
            was.
    """
    limit = decision.min_seq_len

    def attend(
        emit: Emitter, q: Any, k: Any, v: Any, mask: Any, is_causal: bool, scale: Any
    ) -> fx.Node:
        nonlocal limit
        rest: tuple[Any, ...] = ()
        if bases is not None:
            rest = tuple(map(emit.constant, names_of_bases(number), bases))
        if site.sinks is not None:
            rest = (*(rest or (None, None)), emit.method("flatten", site.sinks))
        if site.dropout_p:
            rest = (*rest, *(None,) * (3 - len(rest)), emit.seed(site.device))
        offset = site.causal.offset or None if is_causal and site.causal is not None else None
        scores = Scores(scale, is_causal, offset, site.softcap, site.dropout_p)
        approximation = Approximation.none(site.head_dim)
        if decision.is_distr:
            approximation = decision.approximation
        if watch is not None:
            kind = {"sinks": site.sinks is not None, "trained": site.requires_grad}
            shape = shape_of_call((q, k, v), mask, scores, site.dtype, **kind)
            if site.is_sharded:
                watch.see_shards(*map(tensor_of, (q, k, v)))
            if decision.is_distr:
                least = watch.least_length(
                    shape, approximation, site.symbolic_lengths, mask_grad=_records(mask)
                )
                limit = max(limit, least)
            else:
                watch.prefer_ours(shape)
        arguments = op_arguments(approximation, scores, limit, number)
        op = torch.ops.distr.attention.default
        return emit.function(op, q, k, v, mask, *rest, **arguments)

    _replace(graph, site, attend, share_heads=True, change=change)
    return limit


def names_of_bases(number: int) -> tuple[str, str]:
    """The constants that hold A and B of a site."""
    return f"distr_basis_q_{number}", f"distr_basis_k_{number}"


def _records(node: fx.Node | None) -> bool:
    """Whether a gradient of a node is recorded."""
    value = None if node is None else tensor_of(node)
    return value is not None and value.requires_grad


def rewrite_exact(graph: fx.Graph, site: AttentionSite, *, change: bool = True) -> bool:
    """Put SDPA in the place of an exact site that is spelled out, where it means the same.

    Returns:
        Whether it did, or without ``change`` would. Fused calls are left alone, and sites that
        SDPA cannot say: with a soft cap, sinks, several dtypes, or a bias whose dtype is not that
        of Q.
    """
    if site.causal is not None and site.causal.step and site.causal.offset:
        # SDPA's is_causal knows no offset.
        site = replace(site, causal=None, steps=(*site.steps, site.causal.step))
    if not isinstance(site, OpenSite) or not _sdpa_means_the_same(site):
        return False

    def attend(
        emit: Emitter, q: Any, k: Any, v: Any, mask: Any, is_causal: bool, scale: Any
    ) -> fx.Node:
        options = {"attn_mask": mask, "dropout_p": 0.0, "is_causal": is_causal, "scale": scale}
        return emit.function(F.scaled_dot_product_attention, q, k, v, **options)

    try:
        _replace(graph, site, attend, share_heads=False, change=change)
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


def _sdpa_means_the_same(site: OpenSite) -> bool:
    """SDPA knows no soft cap and no sinks, takes a float mask in Q's dtype only, and its dropout
    draws other numbers than the model's."""
    if site.kind != "softmax" or site.softcap or site.sinks or site.compute_dtype:
        return False
    if site.dropout_p:  # it would drop others than the model does
        return False
    dtype = dtype_of(site.q.node)
    if any(dtype_of(s.tensor) != dtype for s in site.steps if isinstance(s, AddStep)):
        return False
    fills = [s for s in site.steps if isinstance(s, FillStep) and s.value != voc.INFINITE]
    return all(s.dtype in {dtype, site.dtype} for s in fills)


def _replace(
    graph: fx.Graph, site: AttentionSite, attend: Attend, *, share_heads: bool, change: bool = True
) -> None:
    readers = _shape_readers(site)
    emit = Emitter(graph, site.output)
    try:
        if isinstance(site, OpenSite):
            out = _write(site, emit, attend, share_heads)
        else:
            out = open_up.spell_out(site, emit, attend)
    except Exception as error:  # what is written is tried on fake tensors: anything may be raised
        emit.undo()
        raise refusal(error) from error
    if not change:
        emit.undo()
        return
    if site.kind == "mha":
        open_up.replace_results(site, out)
    emit.stand_for(site.output, out)
    for reader, node in readers:
        _read_sizes(reader, node)
    for node in sorted(site.interior, reverse=True):
        graph.erase_node(node)


def _write(site: OpenSite, emit: Emitter, attend: Attend, share_heads: bool) -> fx.Node:
    layout = _Layout(emit, site)
    q, k, v = layout.operands(share_heads)
    call = Written(emit, layout.term, site.dtype, q)
    for factor in site.factors:
        call.times(factor)
    for step in site.steps:
        step.write(call)
    mask = call.mask()
    if isinstance(call.scale, fx.Node):
        # As an argument of the call a symbolic float would be specialised; here it is not.
        call.q, call.scale = emit.method("mul", call.q, call.scale), 1.0
    return layout.output(attend(emit, call.q, k, v, mask, site.is_causal, call.scale))


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


def _read_sizes(reader: fx.Node, node: fx.Node) -> None:
    """Give a shape reader the sizes, or the dtype, themselves."""
    is_cast = reader.target == "type_as"
    name = "to" if is_cast else str(reader.target).removesuffix("_as")
    arguments = (dtype_of(node),) if is_cast else shape_of(node)
    # The node stays: another attention may have it as a term.
    reader.target, reader.args = name, (reader.args[0], *arguments)


@dataclass
class _Layout:
    """Brings a site's tensors to (B, H, N, d) and back."""

    emit: Emitter
    site: OpenSite

    # -- Q, K, V ---------------------------------------------------------------------------------

    def operands(self, share_heads: bool) -> list[fx.Node]:
        site, lead = self.site, self.site.canonical.lead
        k, v = site.shared if share_heads and site.shared else (site.k, site.v)
        nodes, leads = zip(*map(self._operand, (site.q, k, v)), strict=True)
        call = (math.prod(lead[:-1]), lead[-1] if lead else 1)
        batch, heads = map(_widest, zip(*leads, call, strict=True))
        key_heads = _widest((leads[1][1], leads[2][1]))
        wanted = [(batch, heads), (leads[1][0], key_heads), (leads[2][0], key_heads)]
        found = list(map(self._expand, nodes, leads, wanted))
        dtype = site.compute_dtype
        return found if dtype is None else [self.emit.method("to", x, dtype) for x in found]

    def _operand(self, x: Operand) -> tuple[fx.Node, tuple[Any, Any]]:
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
        lead, target = x.shape[:-2], self.site.canonical.lead
        added = (1,) * (len(target) - len(lead))
        if added and _fits((*added, *lead), target):
            node, lead = emit.leading(node, len(added)), (*added, *lead)
        if not _fits(lead, target):
            node = _regroup(emit, node, lead, target, self.site.canonical.args)
            lead = (1,) * len(target) if _all_ones(lead) else target
        if len(target) <= 2:
            added = (1,) * (2 - len(target))
            return emit.leading(node, len(added)), (*added, *lead)  # type: ignore[return-value]
        merged, heads = lead[:-1], lead[-1]
        if not same_shape(merged, target[:-1]) and not _all_ones(merged):
            raise RefusedError("layout", "an operand is broadcast over some leading axes")
        node = emit.method("flatten", node, 0, len(target) - 2)
        return node, (1 if _all_ones(merged) else math.prod(merged), heads)

    def _expand(self, node: fx.Node, own: tuple[Any, Any], wanted: tuple[Any, Any]) -> fx.Node:
        sizes = []
        for mine, full in zip(own, wanted, strict=True):
            grows = same_size(mine, 1) and not same_size(full, 1)
            if grows and not isinstance(full, int):
                raise RefusedError("layout", "an operand is broadcast to a symbolic size")
            sizes.append(full if grows else -1)
        return node if sizes == [-1, -1] else self.emit.method("expand", node, *sizes, -1, -1)

    # -- masks -----------------------------------------------------------------------------------

    def term(self, term: fx.Node, level: Level) -> fx.Node:
        """A tensor that broadcasts at ``level``, made to broadcast against (B, H, N_q, N_k)."""
        emit, target, matrix = self.emit, self.site.canonical.lead, self.site.scores.shape[-2:]
        shape = shape_of(term)
        added = (1,) * (2 - len(shape))
        term, shape = emit.leading(term, len(added)), (*added, *shape)
        if not same_shape(level.shape[-2:], matrix):
            # A bias over split axes (query rows and columns of an image): no broadcast survives.
            whole = emit.method("expand", term, *_sizes(level))
            sizes = tuple(_sizes(Level(matrix)))
            front = len(level.shape) - _tail_length(level, matrix)
            term = emit.method("unflatten", emit.method("flatten", whole, front), front, sizes)
            shape = (*level.shape[:front], *matrix)
            level = Level(shape, (*level.args[:front], -1, -1) if level.args else None)
        while len(shape) > 2 and same_size(shape[0], 1):
            term, shape = emit.leading(term, -1), shape[1:]
        lead, full, call = shape[:-2], level.lead, Level((*target, 1, 1))
        if not lead:
            return term
        if _fits(full, target):
            return self._four_axes(term, lead, level if same_shape(full, target) else call)
        if target and same_size(full[-1], target[-1]):
            if len(lead) == 1:
                return term
            grown = emit.method("expand", term, *_sizes(level)[:-3], -1, -1, -1)
            grown = emit.method("flatten", grown, 0, len(full) - 2)
            if len(target) == 2:
                return grown
            grown = emit.method("unflatten", grown, 0, _unflat(target[:-1], None))
            return self._four_axes(grown, (*target[:-1], lead[-1]), call)
        if not same_shape(lead, full):
            term = emit.method("expand", term, *_sizes(level)[:-2], -1, -1)
        term = _regroup(emit, term, full, target, self.site.canonical.args)
        return self._four_axes(term, target, call)

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
        canonical, lead = site.canonical.lead, site.out.lead
        if len(canonical) > 2:
            out = emit.method("unflatten", out, 0, _unflat(canonical[:-1], None))
        out = emit.leading(out, min(len(canonical) - 2, 0))
        if not same_shape(canonical, lead):
            out = _regroup(emit, out, canonical, lead, site.out.args)
        axes = site.output_dims
        if axes != tuple(range(len(axes))):
            out = emit.method("permute", out, *axes)
        if (dtype := dtype_of(site.output)) != site.dtype:
            out = emit.method("to", out, dtype)
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
    if not lead or len(lead) != len(target):
        return len(lead) == len(target)
    fits = [same_size(a, b) or same_size(a, 1) for a, b in zip(lead, target, strict=True)]
    heads = (*lead[-1:], *target[-1:])
    divides = all(isinstance(size, int) for size in heads) and heads[1] % heads[0] == 0
    return all(fits[:-1]) and (fits[-1] or divides)


def _widest(sizes: tuple[Any, ...]) -> Any:
    return next((size for size in sizes if not same_size(size, 1)), 1)


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
        return emit.leading(node, len(target) - len(lead))
    if not same_size(math.prod(lead), math.prod(target)):
        raise RefusedError("layout", "an operand is broadcast over leading axes that are merged")
    if len(lead) > 1:
        node = emit.method("flatten", node, 0, len(lead) - 1)
    if not target:
        return emit.leading(node, -1)
    if len(target) > 1:
        node = emit.method("unflatten", node, 0, _unflat(target, args))
    return node


def _tail_length(level: Level, matrix: tuple[Any, ...]) -> int:
    """How many trailing axes of ``level`` make up (N_q, N_k)."""
    area, product = math.prod(map(hint, matrix)), 1
    for count, size in enumerate(reversed(level.shape), start=1):
        product *= hint(size)
        if product == area:
            return count
    raise RefusedError("layout", "a bias is added to scores of an unknown shape")
