"""A and B of the estimator ``projection`` in plain PyTorch calls, in bounded memory.

The definition is ``kernels/reference_projection.py``. Here the rows of Q and K are read in pieces,
and keys that several grouping blocks count are read once.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from distr_compile.kernels import reference_projection as projection
from distr_compile.kernels.reference import start_columns


def bases(
    Q: Tensor,
    K: Tensor,
    queries: Tensor | None,
    keys: Tensor | None,
    *,
    block: int,
    rank: int,
    rounds: int,
    seed: int,
    causal_offset: int | None,
    panel: int,
    key_rows: int,
    strict: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """A and B ``(b h, d, r)`` of each grouping block in turn: Qhat = Q A and Khat = K B.

    Args:
        Q: ``(b, h, rep, N, d)``.
        K: ``(b or 1, h, M, d)``.
        queries: ``(b or 1, h or 1, rep, N)``, from ``projection.counted_rows``, or with ``strict``
            from ``counted_before``; or None for all.
        keys: ``(b or 1, h or 1, M)``, likewise.
        block: query rows per grouping block.
        rank: r.
        rounds: 1 or 2.
        seed: names the start of the iteration.
        causal_offset: row i sees keys ``j <= i + causal_offset``; None where all do.
        panel: query rows to read at a time.
        key_rows: keys to read at a time.
        strict: from the query rows before the block and the keys before it; ``causal_offset`` is a
            number then. What comes for the first block, which has none, is of no use.
    """
    rep, num_queries, head_dim = Q.shape[2:]
    num_keys, added = K.shape[2], 0
    begin = start_from(head_dim, rank, seed)
    sum_q, sum_k = _GramSum(Q), _GramSum(K)
    for start in range(0, num_queries, block):
        stop = min(start + block, num_queries)
        if strict:  # to the rows of earlier blocks come those of the last one
            new_rows, num_rows = range(max(start - block, 0), start, panel), start
            seen = projection.prefix_edge(start, num_keys, causal_offset or 0)
        else:
            new_rows, num_rows = range(start, stop, panel), stop - start
            sum_q = _GramSum(Q)
            seen = num_keys if causal_offset is None else min(num_keys, stop + causal_offset)
        for first in new_rows:
            rows = slice(first, min(first + panel, new_rows.stop))
            counts = None if queries is None else queries[..., rows].flatten(2, 3)
            sum_q.add(Q[..., rows, :].flatten(2, 3), counts)
        # From one block to the next more keys count, never fewer.
        seen = max(0, seen)
        for first in range(added, seen, key_rows):
            rows = slice(first, min(first + key_rows, seen))
            sum_k.add(K[..., rows, :], None if keys is None else keys[..., rows])
        added = seen
        Cq, Q_exponent = sum_q.normalised(ridge=projection.RIDGE)
        Ck, K_exponent = sum_k.normalised(ridge=0)
        A, B = projection.projection_bases(Cq, Ck, begin, rounds=rounds)
        size = projection.balance(
            Cq,
            Ck,
            Q_exponent,
            K_exponent,
            num_queries=max(num_rows, 1) * rep,
            num_keys=max(seen, 1),
            rank=rank,
        )
        yield (A * size).flatten(0, 1), (B / size).flatten(0, 1)


@lru_cache(maxsize=16)
def start_from(head_dim: int, rank: int, seed: int) -> Tensor:
    """What the iteration starts from, ``(d, r)``: at most 128 KiB for d = 256, r = 128."""
    with torch.inference_mode(False):  # a tensor that outlives the call must serve autograd too
        return start_columns(head_dim, rank, seed=seed).contiguous()


class _GramSum:
    """The sum of x^T x over rows x that come in pieces; ends as ``projection.gram`` of them all.

    Kept as a multiple of the square of a power of two near the largest entry so far.
    """

    def __init__(self, like: Tensor) -> None:
        """Of no rows yet, for rows with the batch size, heads, width and dtype of ``like``."""
        b, h, d = like.shape[0], like.shape[1], like.shape[-1]
        self._dtype = torch.promote_types(like.dtype, torch.float32)
        self._C = like.new_zeros(b, h, d, d, dtype=self._dtype)
        self._largest = self._C.new_zeros(b, h, 1, 1)

    def add(self, rows: Tensor, counts: Tensor | None) -> None:
        """Add rows ``(b, h, n, d)``, those only that ``counts`` (b, h, n, broadcast) says."""
        rows = rows.to(self._dtype).nan_to_num(nan=0, posinf=0, neginf=0)
        if counts is not None:
            rows = rows * counts[..., None]
        # Ten times as fast as a maximum over two dimensions.
        largest = rows.abs().flatten(-2).amax(-1)[..., None, None]
        before, self._largest = self._largest, torch.maximum(self._largest, largest)
        unit = projection.power_of_two(self._largest)
        # more than 1 only where nothing was added yet
        shrink = (projection.power_of_two(before) / unit).clamp(max=1)
        rows = rows / unit
        self._C = self._C * shrink.square() + rows.mT @ rows

    def normalised(self, *, ridge: float) -> tuple[Tensor, Tensor]:
        return projection.normalised(self._C, projection.power_of_two(self._largest), ridge=ridge)
