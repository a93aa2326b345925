"""Brings the tensors of a site to the axes of one call, and its result back.

The call takes Q, K, V as (B, H, N, d) and one mask. Getting there needs no size by name: axes are
permuted, flattened and unflattened, and a size that is symbolic is inferred or taken from a reshape
that the model itself made.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any

from torch import fx

from distr_compile.passes.emit import Emitter
from distr_compile.passes.levels import Lead, Levels, all_ones
from distr_compile.passes.site import Level, OpenSite, Operand, RefusedError
from distr_compile.passes.vocabulary import fake, same_shape, same_size, shape_of


@dataclass
class Layout:
    """Brings a site's tensors to (B, H, N, d) and back.

    Attributes:
        emit: writes nodes.
        site: whose tensors they are.
    """

    emit: Emitter
    site: OpenSite

    @property
    def levels(self) -> Levels:
        """The shapes that its scores take."""
        return Levels(self.site.levels, self.site.scores.shape[-2:])

    # -- Q, K, V ---------------------------------------------------------------------------------

    def operands(self, share_heads: bool) -> list[fx.Node]:
        """Q, K and V; with ``share_heads`` K and V before their heads were repeated."""
        site, lead = self.site, self.site.canonical.lead
        k, v = site.shared if share_heads and site.shared else (None, None)
        made = [
            self._operand(site.q, site.scores),
            self._operand(site.k, site.scores, k),
            self._operand(site.v, site.out, v),
        ]
        leads = [lead for _, lead in made]
        call = (math.prod(lead[:-1]), lead[-1] if lead else 1)
        batch, heads = map(_widest, zip(*leads, call, strict=True))
        key_heads = _widest((leads[1][1], leads[2][1]))
        wanted = [(batch, heads), (leads[1][0], key_heads), (leads[2][0], key_heads)]
        found = [self._expand(*each, full) for each, full in zip(made, wanted, strict=True)]
        dtype = site.compute_dtype
        return found if dtype is None else [self.emit.method("to", x, dtype) for x in found]

    def _operand(
        self, x: Operand, level: Level, shared: Operand | None = None
    ) -> tuple[fx.Node, tuple[Any, Any]]:
        """An operand of a level as four axes, and its (batch, heads).

        ``shared`` is the operand before its heads were repeated.
        """
        emit, target = self.emit, self.site.canonical.lead
        lead = self._lead(x, level)
        if shared is not None:
            x, lead = shared, _unrepeated(lead, x.shape[:-2], shared.shape[:-2])
        node = self._plain(x)
        if not same_shape(x.shape[:-2], lead):
            node = _regroup(emit, node, x.shape[:-2], lead, self.site.canonical.args)
        if len(target) <= 2:
            added = (1,) * (2 - len(target))
            return emit.leading(node, len(added)), (*added, *lead)  # type: ignore[return-value]
        merged, heads = lead[:-1], lead[-1]
        if not same_shape(merged, target[:-1]) and not all_ones(merged):
            raise RefusedError("layout", "an operand is broadcast over some leading axes")
        node = emit.method("flatten", node, 0, len(target) - 2)
        return node, (1 if all_ones(merged) else math.prod(merged), heads)

    def _lead(self, x: Operand, level: Level) -> Lead:
        """The leading axes of an operand of a level, at that of the call."""
        lead, target = x.shape[:-2], self.site.canonical.lead
        if level is self.site.canonical and _fits(lead, target):
            return lead
        return self.levels.carried(lead, level, self.site.canonical)

    def _plain(self, x: Operand) -> fx.Node:
        """An operand as (lead..., rows, width)."""
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
        return node

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
        emit, matrix = self.emit, self.site.scores.shape[-2:]
        full, shape = self.levels.lead(level), shape_of(term)
        if full is None:
            raise RefusedError("layout", "a bias is added to scores of an unknown shape")
        added = (1,) * (2 - len(shape))
        term, shape = emit.leading(term, len(added)), (*added, *shape)
        if not same_shape(level.shape[-2:], matrix):
            # A bias over split axes (query rows and columns of an image): no broadcast survives.
            front = len(full)
            whole = emit.method("expand", term, *_arguments_of(level))
            sizes = tuple(_arguments_of(Level(matrix)))
            term = emit.method("unflatten", emit.method("flatten", whole, front), front, sizes)
            shape = (*full, *matrix)
        while len(shape) > 2 and same_size(shape[0], 1):
            term, shape = emit.leading(term, -1), shape[1:]
        lead = shape[:-2]
        return self._four_axes(*self._carried(term, lead, level)) if lead else term

    def _carried(self, term: fx.Node, lead: Lead, level: Level) -> tuple[fx.Node, Lead]:
        """A term at the level of the call, with as few of its broadcast axes written out as can be.

        Where a reshape merges an axis that it has with one that it has not, it is expanded: over
        all axes but the heads, else over those too.
        """
        own, wanted = self._least_expanded(lead, level)
        if own is not lead:
            sizes = _arguments_of(level)[: len(own)]
            if same_size(own[-1], lead[-1]):
                sizes[-1] = -1
            term = self.emit.method("expand", term, *sizes, -1, -1)
        while wanted and same_size(wanted[0], 1):
            wanted = wanted[1:]
        if not same_shape(own, wanted):
            is_whole = len(wanted) == len(self.site.canonical.lead)
            args = self.site.canonical.args if is_whole else None
            term = _regroup(self.emit, term, own, wanted, args)
        return term, wanted

    def _least_expanded(self, lead: Lead, level: Level) -> tuple[Lead, Lead]:
        """The leading axes to give a term, the first that can be carried, and what they become."""
        full, canonical = self.levels.lead(level) or (), self.site.canonical
        for own in (lead, (*full[:-1], lead[-1])):
            with contextlib.suppress(RefusedError):
                return own, self.levels.carried(own, level, canonical)
        return full, self.levels.carried(full, level, canonical)

    def _four_axes(self, term: fx.Node, lead: Lead) -> fx.Node:
        """Merge all leading axes but the heads, for a call of more than four axes."""
        canonical = self.site.canonical
        full = canonical.lead
        if len(full) <= 2 or len(lead) <= 1:
            return term
        if not same_shape(lead[:-1], full[:-1]):
            term = self.emit.method("expand", term, *_arguments_of(canonical)[:-3], -1, -1, -1)
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
        if (dtype := fake(site.output).dtype) != site.dtype:
            out = emit.method("to", out, dtype)
        return out if site.copy_order is None else self._ordered(out, site.copy_order)

    def _ordered(self, out: fx.Node, order: tuple[int, ...]) -> fx.Node:
        """A copy, if need be, with the axes in this order in memory."""
        if order == tuple(range(len(order))):
            return self.emit.method("contiguous", out)
        out = self.emit.method("contiguous", self.emit.method("permute", out, *order))
        return self.emit.method("permute", out, *map(order.index, range(len(order))))


# -- sizes --------------------------------------------------------------------------------------


def _fits(lead: tuple[Any, ...], target: tuple[Any, ...]) -> bool:
    """Same number of axes, each equal, broadcast, or (the heads) a divisor."""
    if not lead or len(lead) != len(target):
        return len(lead) == len(target)
    fits = [same_size(a, b) or same_size(a, 1) for a, b in zip(lead, target, strict=True)]
    heads = (*lead[-1:], *target[-1:])
    divides = all(isinstance(size, int) for size in heads) and heads[1] % heads[0] == 0
    return all(fits[:-1]) and (fits[-1] or divides)


def _unrepeated(lead: Lead, repeated: Lead, own: Lead) -> Lead:
    """The axes that ``lead`` gives the repeated operand, with its own number of heads.

    Raises:
        RefusedError: the heads were merged with other axes, or split.
    """
    if not lead or not same_size(lead[-1], repeated[-1]):
        raise RefusedError("layout", "repeated heads are merged with other axes")
    return (*lead[:-1], own[-1])


def _widest(sizes: tuple[Any, ...]) -> Any:
    return next((size for size in sizes if not same_size(size, 1)), 1)


def _arguments_of(level: Level) -> list[Any]:
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
    if all_ones(lead):
        return emit.leading(node, len(target) - len(lead))
    if not same_size(math.prod(lead), math.prod(target)):
        raise RefusedError("layout", "an operand is broadcast over leading axes that are merged")
    while lead and target and same_size(lead[-1], target[-1]):
        lead, target = lead[:-1], target[:-1]  # the last axes stay what they are
    if not lead or not target:
        return emit.leading(node, len(target) - len(lead))
    if len(lead) > 1:
        node = emit.method("flatten", node, 0, len(lead) - 1)
    return emit.method("unflatten", node, 0, _unflat(target, args)) if len(target) > 1 else node
