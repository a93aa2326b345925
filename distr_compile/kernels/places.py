"""Where the grouping blocks of a padded call lie, on a device whose host does not wait for it.

What ``spans`` of ``counted.py`` says on the host, as numbers that kernels read; every batch entry
has as many blocks as any could have, of which the last are empty.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distr_compile.estimators import estimator_named, most_blocks
from distr_compile.kernels.blocks import Places
from distr_compile.kernels.counted import ends_of
from distr_compile.kernels.padding import cdiv
from distr_compile.kernels.plan import launch
from distr_compile.kernels.roles import Asked


def most_of(num_queries: int, estimator: str, grouping_block: int) -> tuple[int, int]:
    """Grouping blocks of an entry, and rows of a block, at most; 0 leaves the block to "auto"."""
    if grouping_block:
        rows = max(1, min(grouping_block, num_queries))
        return max(1, cdiv(num_queries, rows)), rows
    return most_blocks(num_queries, estimator)


def places(
    mask: Tensor,
    queries: Tensor,
    batch: int,
    num_keys: int,
    asked: Asked,
    *,
    keys_count: bool,
) -> Places:
    """Where the blocks lie by a mask of four dimensions.

    Args:
        mask: broadcastable to ``(B, H, N, M)``, of four dimensions.
        queries: which rows count, as from ``counted_rows``.
        batch: B.
        num_keys: M.
        asked: of it the estimator, the block that is given, and the causal offset.
        keys_count: whether keys have a part in A and B.
    """
    num_queries, grouping_block = queries.shape[-1], asked.given_block
    causal_offset = asked.causal_offset
    first, stop = ends_of(queries)
    rows = stop - first
    block = torch.full_like(first, max(1, grouping_block))
    if not grouping_block:
        block = estimator_named(asked.estimator).auto_block(rows, _least, _most)
    whole = torch.full_like(first, num_queries)
    ends = torch.stack([torch.zeros_like(first), whole, first, stop, block], 1)
    number, most_rows = most_of(num_queries, asked.estimator, grouping_block)
    has_rows = mask.shape[2] > 1
    seen = None
    if keys_count and (has_rows or causal_offset is not None):
        start = torch.arange(number, device=mask.device) * block[:, None] + first[:, None]
        seen = torch.full_like(start, num_keys)
        if has_rows:
            seen = _seen(mask, first, stop, block, number, num_keys)
        if causal_offset is not None:
            end = torch.where(rows <= block, whole, first + block)[:, None] + start - first[:, None]
            seen = seen.minimum((end.clamp(max=num_queries) + causal_offset).clamp(0, num_keys))
        seen = seen.expand(batch, -1).to(torch.int32).contiguous()
    ends = ends.expand(batch, -1).to(torch.int32).contiguous()
    return Places(ends, seen, number, most_rows)


def _seen(
    mask: Tensor, first: Tensor, stop: Tensor, block: Tensor, number: int, num_keys: int
) -> Tensor:
    """One past the last key that a row of each block, or an earlier one, sees."""
    from distr_compile.kernels.triton_places import _last_seen_kernel

    entries, num_queries = len(first), mask.shape[2]
    last = mask.new_empty(entries, num_queries, dtype=torch.int32)
    steps = [0 if n == 1 else s for n, s in zip(mask.shape, mask.stride(), strict=True)]
    is_bool = mask.dtype == torch.bool
    lowest = 0.0 if is_bool else torch.finfo(mask.dtype).min / 2
    launch(
        _last_seen_kernel,
        (entries * cdiv(num_queries, 16),),
        mask.view(torch.uint8) if is_bool else mask,
        last,
        *steps,
        mask.shape[1],
        num_queries,
        num_keys if mask.shape[3] > 1 else 1,
        LOWEST=lowest,
        ROWS=16,
        KEYS=256,
    )
    if mask.shape[3] == 1:
        last = last * num_keys
    row = torch.arange(num_queries, device=mask.device)
    counts = (row >= first[:, None]) & (row < stop[:, None])
    place = ((row - first[:, None]) // block[:, None]).clamp(0, number - 1)
    seen = last.new_zeros(entries, number)
    seen.scatter_reduce_(1, place, torch.where(counts, last, 0), "amax")
    return seen.cummax(-1).values


def _least(x: Any, y: Any) -> Any:
    return (
        torch.minimum(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else y.clamp(max=x)
    )


def _most(x: Any, y: Any) -> Any:
    return y.clamp(min=x)
