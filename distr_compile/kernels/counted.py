"""Which rows of Q and K count, by the mask: the others are padding, and no basis depends on them.

And where the rows of a batch entry that count begin and end: its grouping blocks begin with the
first of them, and "auto" takes the block of so many rows, so that they are those of the sequence
alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from distr_compile.kernels.roles import Asked, prefix_edge
from distr_compile.kernels.rows import four_dimensions

ROWS_AT_ONCE = 128
"""Rows of a mask that are read at a time, where the first that counts is looked for."""


class Span(NamedTuple):
    """Batch entries whose grouping blocks lie alike.

    Attributes:
        entries: the batch entries.
        first: the row with which the first block begins.
        stop: one past the last row of the last block.
        block: query rows per grouping block.
        seen: for each block the keys before this number have a part in its A and B, if they count;
            None where all have.
    """

    entries: slice
    first: int
    stop: int
    block: int
    seen: tuple[int, ...] | None = None


def ends_of(queries: Tensor) -> tuple[Tensor, Tensor]:
    """The first row that counts for any head, and one past the last, ``(B or 1,)`` each.

    Args:
        queries: as from ``counted_rows``. Where no row counts the ends are those of all rows.
    """
    counted = queries.any(2).any(1).to(torch.uint8)
    return counted.argmax(-1), counted.shape[-1] - counted.flip(-1).argmax(-1)


def spans(
    mask: Tensor | None,
    counts: tuple[Tensor | None, Tensor | None],
    sizes: tuple[int, int, int],
    block_of: Callable[[int], int],
    *,
    causal_offset: int | None,
    by_place: bool,
) -> list[Span]:
    """Where the grouping blocks of a call lie, on the host; successive entries alike go together.

    Args:
        mask: as in ``counted_rows``, of four dimensions.
        counts: the rows and the keys that count, as from ``counted_rows``; None for the rows where
            blocks begin with row 0 anyway, None for the keys where they have no part in A and B.
        sizes: B, N and M.
        block_of: the query rows of a block, of a number of rows that count.
        causal_offset: row i sees keys ``j <= i + causal_offset``; None where all do.
        by_place: whether A and B depend on the place of a row in its block. If not, a block that
            holds all rows that count is as good as one of all rows, which other entries may share.
    """
    batch, num_queries, _ = sizes
    queries, keys = counts
    if mask is None or queries is None or not queries.numel():
        return [Span(slice(0, batch), 0, num_queries, max(1, block_of(num_queries)))]
    found, ends = [], ends_of(queries)
    for first, stop in zip(*(t.tolist() for t in ends), strict=True):
        block = max(1, block_of(stop - first))
        stop = min(num_queries, first + -(-(stop - first) // block) * block)
        if stop - first <= block:
            first, stop = first if by_place else 0, num_queries
            block = stop - first
        found.append((first, stop, block))
    place, together = 0, []
    for places, some in itertools.groupby(found):
        entries = slice(place, place + len(list(some)))
        span, place = Span(entries, *places), entries.stop
        if keys is None or mask.shape[-2] == 1:
            together.append(span)
        else:
            own = (ends[0][entries, None], ends[1][entries, None])
            together += _told_apart(span, _seen(mask, keys, span, own, causal_offset))
    if len(found) == 1:  # the mask is the same for all
        together = [span._replace(entries=slice(0, batch)) for span in together]
    return together


def strict_spans(
    mask: Tensor | None,
    sizes: tuple[int, int, int],
    block_of: Callable[[int], int],
    causal_offset: int,
) -> list[Span]:
    """``spans`` of the strict form: blocks begin with the first row that sees a key before it.

    Where the first block holds all rows from there on, every score is exact, wherever it begins.

    Args:
        mask: of four dimensions, or None.
        sizes: B, N and M.
        block_of: the query rows of a block, of a number of rows.
        causal_offset: the keys before row i are ``j <= i + causal_offset``.
    """
    batch, num_queries, num_keys = sizes
    firsts = [0]
    if mask is not None and mask.numel():
        firsts = first_rows(mask, num_queries, num_keys, causal_offset)
    found = []
    for first in firsts:
        block = max(1, block_of(num_queries - first))
        alone = (0, max(1, num_queries)) if num_queries - first <= block else (first, block)
        found.append(alone)
    place, together = 0, []
    for (first, block), some in itertools.groupby(found):
        entries = slice(place, place + len(list(some)))
        place = entries.stop
        together.append(Span(entries, first, num_queries, block))
    if len(found) == 1:  # the mask is the same for all
        together = [together[0]._replace(entries=slice(0, batch))]
    return together


def first_rows(mask: Tensor, num_queries: int, num_keys: int, causal_offset: int) -> list[int]:
    """The first row i that sees a key ``j <= i + causal_offset``, or 0, for each entry of the mask.

    That hangs on no part of the mask later than the row itself. Read some rows at a time, until
    each entry has its row.

    Args:
        mask: of four dimensions, not empty.
        num_queries: N.
        num_keys: M.
        causal_offset: see above.
    """
    found = torch.full(mask.shape[:1], num_queries, device=mask.device)
    for start in range(0, num_queries, ROWS_AT_ONCE):
        stop = min(start + ROWS_AT_ONCE, num_queries)
        known = min(num_keys, stop + causal_offset)
        if known <= 0:
            continue
        part = _narrowed(_narrowed(mask, -2, start, stop), -1, 0, known)
        if part.dtype != torch.bool:
            part = part > torch.finfo(part.dtype).min / 2
        seen = part.any(1).expand(-1, stop - start, known).tril(start + causal_offset).any(-1)
        row = torch.where(seen, torch.arange(start, stop, device=mask.device), num_queries)
        found = torch.minimum(found, row.amin(-1))
        if bool((found < num_queries).all()):
            break
    firsts: list[int] = torch.where(found < num_queries, found, 0).tolist()
    return firsts


def _seen(
    mask: Tensor,
    keys: Tensor,
    span: Span,
    ends: tuple[Tensor, Tensor],
    causal_offset: int | None,
) -> Tensor:
    """``Span.seen`` of each entry of a span: ``(entries, blocks)``, in no row falling.

    It is one past the last key that a row of the block, or an earlier one, sees; or as many more as
    makes no difference, because they do not count. Rows before the first that counts, and after the
    last, ``ends``, are not asked.
    """
    some, keys = (t if t.shape[0] == 1 else t[span.entries] for t in (mask, keys))
    num_keys, seen = keys.shape[-1], []
    counts, place = keys.any(1), torch.arange(num_keys, device=mask.device)
    for start in range(span.first, span.stop, span.block):
        stop = min(start + span.block, span.stop)
        row, part = torch.arange(start, stop, device=mask.device), some[..., start:stop, :]
        asked = (row >= ends[0]) & (row < ends[1])
        if not bool(asked.all()):
            hides = False if mask.dtype == torch.bool else -torch.inf
            part = part.masked_fill(~asked[:, None, :, None], hides)
        visible = _any_seen(part, -2).any(1).expand(-1, num_keys)
        last = (visible * (place + 1)).amax(-1, keepdim=True)
        later = torch.where(counts & (place >= last), place, num_keys)
        limit = num_keys if causal_offset is None else max(0, min(num_keys, stop + causal_offset))
        seen.append(later.amin(-1).clamp(max=limit))
    return torch.stack(seen, -1).cummax(-1).values


def _told_apart(span: Span, seen: Tensor) -> list[Span]:
    """The span, cut where ``seen`` is not the same for all of its entries."""
    place, parts = span.entries.start, []
    for limits, some in itertools.groupby(seen.tolist()):
        number = len(list(some))
        stop = span.entries.stop if len(seen) == 1 else place + number
        parts.append(span._replace(entries=slice(place, stop), seen=tuple(limits)))
        place = stop
    return parts


def counted_rows(
    mask: Tensor | None, num_queries: int, num_keys: int, key_heads: int, rep: int
) -> tuple[Tensor | None, Tensor | None]:
    """Which query and key rows enter the Gram matrices; the others are hidden by the mask.

    Left out are keys hidden from every query, queries from which every key is hidden, and, where
    ``num_queries == num_keys`` (self-attention with padding), query i where key i is left out. A
    float entry hides when it is at most half the lowest finite number of its dtype, and NaN hides
    its query and its key. Causality is not looked at: the keys are cut where it ends a block.
    Nothing of the size of the mask is made.

    Args:
        mask: bool (True = attend) or floating, broadcastable to ``(B, H, N, M)``; or none.
        num_queries: N.
        num_keys: M.
        key_heads: H_k.
        rep: query heads per key head.

    Returns:
        Two bool tensors, ``(B or 1, H_k or 1, rep, N)`` for the queries of each head and
        ``(B or 1, H_k or 1, M)`` for the keys, views where the mask is broadcast; None for both
        without a mask or any entry of one.
    """
    if mask is None or not mask.numel():
        return None, None
    mask = _split_heads(mask, key_heads, rep)
    queries, keys = _any_seen(mask, -1), _any_seen(mask, -2).any(2)
    if num_queries == num_keys:
        queries = queries & keys[:, :, None]
    return queries.expand(-1, -1, rep, num_queries), keys.expand(-1, -1, num_keys)


def counted_for(
    mask: Tensor | None, num_queries: int, num_keys: int, key_heads: int, rep: int, asked: Asked
) -> tuple[Tensor | None, Tensor | None]:
    """``counted_rows``, or ``counted_before`` where the form that is asked for is strict."""
    sizes = (num_queries, num_keys, key_heads, rep)
    if not asked.strict:
        return counted_rows(mask, *sizes)
    return counted_before(
        mask,
        *sizes,
        block=asked.block,
        causal_offset=asked.causal_offset or 0,
        first=asked.first,
    )


def counted_before(
    mask: Tensor | None,
    num_queries: int,
    num_keys: int,
    key_heads: int,
    rep: int,
    *,
    block: int,
    causal_offset: int,
    first: int = 0,
) -> tuple[Tensor | None, Tensor | None]:
    """``counted_rows`` for the strict form: what counts in later blocks, told by earlier ones only.

    Once for each row, when its block ends and the basis of the next block is to come: query i
    counts if it sees any key before the next block's edge (``prefix_edge``), a key if any query up
    to then sees it. So no block looks at a part of the mask that is later than its own first row,
    and sums over what counts grow from block to block. In self-attention query i is left out with
    key i, unless ``causal_offset`` is negative: key i is later than query i then.

    Args:
        mask: as in ``counted_rows``, likewise ``num_queries``, ``num_keys``, ``key_heads``, rep.
        num_queries: N.
        num_keys: M.
        key_heads: H_k.
        rep: query heads per key head.
        block: query rows per grouping block, at least 1.
        causal_offset: see ``prefix_edge``.
        first: the row with which the first block begins; those before it do not count.

    Returns:
        As ``counted_rows``; keys that are in no basis do not count.
    """
    if mask is None or not mask.numel():
        return None, None
    mask = _split_heads(mask, key_heads, rep)
    query_parts, key_parts, edge = [], [], 0
    if first:
        none = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=mask.device)
        query_parts.append(none.expand(*mask.shape[:2], rep, first))
    for start in range(first, num_queries, block):
        stop = min(start + block, num_queries)
        before, edge = edge, prefix_edge(stop, num_keys, causal_offset)
        queries = _any_seen(_narrowed(_narrowed(mask, -2, start, stop), -1, 0, edge), -1)
        keys = _any_seen(_narrowed(_narrowed(mask, -2, first, stop), -1, before, edge), -2).any(2)
        query_parts.append(queries.expand(-1, -1, rep, stop - start))
        key_parts.append(keys.expand(-1, -1, edge - before))
    key_parts.append(key_parts[0].new_zeros(*key_parts[0].shape[:2], num_keys - edge))
    queries, keys = torch.cat(query_parts, -1), torch.cat(key_parts, -1)
    if num_queries == num_keys and causal_offset >= 0:
        queries = queries & keys[:, :, None]
    return queries, keys


def _split_heads(mask: Tensor, key_heads: int, rep: int) -> Tensor:
    """The mask as ``(B, H_k, rep, N, M)``, sizes of 1 kept."""
    mask = four_dimensions(mask)
    split: Tensor = mask.unflatten(1, (key_heads, rep) if mask.shape[1] > 1 else (1, 1))
    return split


def _any_seen(mask: Tensor, dim: int) -> Tensor:
    """Whether any entry along ``dim`` shows its key to its query; see ``counted_rows``."""
    if mask.dtype == torch.bool or not mask.shape[dim]:
        return mask.any(dim)
    return mask.amax(dim) > torch.finfo(mask.dtype).min / 2


def _narrowed(mask: Tensor, dim: int, start: int, stop: int) -> Tensor:
    """Part of a dimension, unless it is broadcast."""
    return mask if mask.shape[dim] == 1 else mask.narrow(dim, start, stop - start)
