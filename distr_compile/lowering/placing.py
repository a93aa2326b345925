"""Where the grouping blocks of a call lie, by its mask, and what counts there.

For the CPU kernel and for PyTorch's products, forward and backward. Where the host cannot look at
a mask, as a CUDA graph is recorded, blocks begin with row 0 as if there were no padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from distr_compile.estimators import arithmetic
from distr_compile.kernels.counted import Span, counted_rows, spans, strict_spans
from distr_compile.kernels.roles import Asked
from distr_compile.kernels.rows import four_dimensions
from distr_compile.lowering.call import Call

FUNCTIONS = ("ONE_BLOCK", "BY_PLACE", "READS_PANELS", "elements", "counted", "bases", "groups")
"""What is asked of the module of an estimator; ``kernels/roles.py`` says what each is."""

Counts = tuple[Tensor | None, Tensor | None]
"""The query rows, and the keys, that have a part in A and B, by ``counted`` of the module."""


@dataclass(frozen=True)
class Placing:
    """What says where the blocks of a call lie.

    Attributes:
        q: ``(B, H, N, d)``.
        k: ``(B or 1, H_k, M, d)``.
        mask: broadcastable to ``(B, H, N, M)``, or None.
        module: of the estimator, with ``FUNCTIONS``.
        block_of: query rows of a block, of a number of rows.
    """

    q: Tensor
    k: Tensor
    mask: Tensor | None
    module: ModuleType
    block_of: Callable[[int], int]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """B, N and M."""
        return self.q.shape[0], self.q.shape[2], self.k.shape[2]

    def of(self, asked: Asked) -> tuple[list[Span], Counts]:
        """Where they lie, and what counts, by the causal offset and the form that ``asked`` has."""
        rep = self.q.shape[1] // self.k.shape[1]
        sizes = (self.q.shape[2], self.k.shape[2], self.k.shape[1], rep)
        if not asked.strict:
            counts = self.module.counted(self.mask, *sizes, asked)
            return self.by_counts(counts, asked.causal_offset), counts
        found, parts = self.strictly(asked.causal_offset or 0), []
        for span in found:
            some = self.mask
            if len(found) > 1 and some is not None:
                some = four_dimensions(some)[span.entries]
            own = replace(asked, first=span.first, block=span.block)
            queries, keys = self.module.counted(some, *sizes, own)
            if len(found) == 1 or queries is None or keys is None:
                return found, (queries, keys)
            number = span.entries.stop - span.entries.start
            parts.append([t.expand(number, *t.shape[1:]) for t in (queries, keys)])
        queries, keys = (torch.cat(each) for each in zip(*parts, strict=True))
        return found, (queries, keys)

    def by_counts(self, counts: Counts, causal_offset: int | None) -> list[Span]:
        """Where they lie, by what counts."""
        if self.module.ONE_BLOCK:
            batch, num_queries, _ = self.sizes
            return [Span(slice(0, batch), 0, num_queries, max(1, num_queries))]
        if self._is_recorded:
            counts = None, None
        mask = None if self.mask is None else four_dimensions(self.mask)
        found = spans(
            mask,
            counts,
            self.sizes,
            self.block_of,
            causal_offset=causal_offset,
            by_place=self.module.BY_PLACE,
        )
        return self._clamped(found)

    def strictly(self, causal_offset: int) -> list[Span]:
        """Where those of the strict form lie."""
        if self.module.ONE_BLOCK:
            return self.by_counts((None, None), None)
        mask = None if self.mask is None or self._is_recorded else four_dimensions(self.mask)
        return self._clamped(strict_spans(mask, self.sizes, self.block_of, causal_offset))

    @property
    def _is_recorded(self) -> bool:
        return self.q.is_cuda and torch.cuda.is_current_stream_capturing()

    def _clamped(self, found: list[Span]) -> list[Span]:
        most = self.sizes[1]
        return [span._replace(block=max(1, min(span.block, most))) for span in found]


def spans_of(call: Call, is_approximated: bool) -> list[Span]:
    """Where the grouping blocks of a call lie that ``cpu.run`` computed; not what they saw."""
    q, k, mask, how = call.q, call.k, call.mask, call.approximation
    batch, _, num_queries, _ = q.shape
    if not is_approximated:
        return [Span(slice(0, batch), 0, num_queries, max(1, num_queries))]
    module = arithmetic(how.estimator, "cpu", *FUNCTIONS)
    places = Placing(q, k, mask, module, how.block_of)
    if call.is_prefix:
        return places.strictly(call.scores.offset or 0)
    queries = None
    if not module.ONE_BLOCK:
        queries, _ = counted_rows(mask, num_queries, k.shape[2], k.shape[1], call.rep)
    return places.by_counts((queries, None), None)
