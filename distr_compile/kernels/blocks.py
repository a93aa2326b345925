"""Where the grouping blocks of a padded call lie, as numbers that a kernel reads."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Places:
    """Where the grouping blocks of each batch entry lie.

    Attributes:
        ends: ``(B, 5)`` int32, of each entry: the first row that uses a block, one past the last,
            the first row of which a block is made, one past the last, and query rows per block. In
            between, every row uses the block that it belongs to.
        seen: ``(B, blocks)`` int32: the keys before this number have a part in the block, if they
            count; None where all have.
        blocks: blocks of an entry, at most.
        rows: rows of a block, at most.
    """

    ends: Tensor
    seen: Tensor | None
    blocks: int
    rows: int

    def part(self, entries: slice, blocks: slice) -> Places:
        """The places of some entries, and of some blocks, whose first is then block 0."""
        ends, seen = self.ends[entries], self.seen
        if seen is not None:
            seen = seen[entries, blocks].contiguous()
        number = min(blocks.stop, self.blocks) - blocks.start
        if number < self.blocks:
            low, high, first, stop, rows = ends.unbind(1)
            begin = first + blocks.start * rows
            end = torch.minimum(stop, first + blocks.stop * rows)
            low = begin if blocks.start else low
            high = torch.where(end < stop, end, high)
            some = torch.stack([low, high, begin, end, rows], 1)
            nothing = torch.zeros_like(some)
            nothing[:, 4] = 1
            ends = torch.where((begin < stop)[:, None], some, nothing)
        return replace(self, ends=ends.contiguous(), seen=seen, blocks=number)
