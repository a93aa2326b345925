"""A and B of the estimator ``projection`` in bounded memory; see ``kernels/roles.py``.

The definition is ``kernels/projection/reference.py``. Here the rows of Q and K are read in pieces,
and keys that several grouping blocks count are read once.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from distr_compile.kernels.attention import cpu as attention
from distr_compile.kernels.counted import counted_for
from distr_compile.kernels.projection import library
from distr_compile.kernels.projection import reference as projection
from distr_compile.kernels.random import start_columns
from distr_compile.kernels.roles import Asked, keys_of_block, prefix_edge

COMPUTES = ("projection",)
ONE_BLOCK = False
BY_PLACE = False
READS_PANELS = False

counted = counted_for  # the name that its role has

SUMS = 2 << 20
"""Elements of the Gram matrices that are alive at a time, unless those of one block are more."""


def elements(head_dim: int, rank: int) -> int:
    """What half a dozen matrices of d x d that live at a time come to; see ``kernels/roles.py``."""
    return 4 * head_dim**2


def bases(
    Q: Tensor,
    K: Tensor,
    queries: Tensor | None,
    keys: Tensor | None,
    asked: Asked,
) -> Iterator[tuple[Tensor, Tensor]]:
    """A and B ``(b h, d, r)`` of each grouping block in turn: Qhat = Q A and Khat = K B.

    Args:
        Q: ``(b, h, rep, N, d)``.
        K: ``(b or 1, h, M, d)``.
        queries: ``(b or 1, h or 1, rep, N)``, of ``counted``; or None for all.
        keys: ``(b or 1, h or 1, M)``, likewise.
        asked: with ``strict`` what comes for the first block, which has no rows before it, is of no
            use.
    """
    block, causal_offset, strict = asked.block, asked.causal_offset, asked.strict
    panel, key_rows = asked.panel, asked.key_rows
    rep, num_queries, head_dim = Q.shape[2:]
    num_keys, added = K.shape[2], 0
    begin = start_from(head_dim, asked.rank, asked.seed)
    sum_q, sum_k = _GramSum(Q), _GramSum(K)
    for number, start in enumerate(range(0, num_queries, block)):
        stop = min(start + block, num_queries)
        if strict:  # to the rows of earlier blocks come those of the last one
            new_rows, num_rows = range(max(start - block, 0), start, panel), start
            seen = prefix_edge(start, num_keys, causal_offset or 0)
        else:
            new_rows, num_rows = range(start, stop, panel), stop - start
            sum_q = _GramSum(Q)
            seen = keys_of_block(asked, number, stop, num_keys)
        for first in new_rows:
            rows = slice(first, min(first + panel, new_rows.stop))
            counts = None if queries is None else queries[..., rows].flatten(2, 3)
            sum_q.add(Q[..., rows, :].flatten(2, 3), counts)
        # From one block to the next more keys count, never fewer.
        for first in range(added, seen, key_rows):
            rows = slice(first, min(first + key_rows, seen))
            sum_k.add(K[..., rows, :], None if keys is None else keys[..., rows])
        added = seen
        # (b, h, d, d), and from them A and B (b, h, d, r).
        Cq, Q_exponent = sum_q.normalised(ridge=projection.RIDGE)
        Ck, K_exponent = sum_k.normalised(ridge=0)
        A, B = projection.projection_bases(Cq, Ck, begin, rounds=asked.rounds)
        size = projection.balance(
            Cq,
            Ck,
            Q_exponent,
            K_exponent,
            num_queries=max(num_rows, 1) * rep,
            num_keys=max(seen, 1),
            rank=asked.rank,
        )
        yield (A * size).flatten(0, 1), (B / size).flatten(0, 1)


def groups(
    Q: Tensor, K: Tensor, queries: Tensor | None, keys: Tensor | None, asked: Asked
) -> Iterator[attention.Group]:
    """The same by the fused kernel's own code, some grouping blocks at a time."""
    num_queries, head_dim = Q.shape[3:]
    start, carry = start_from(head_dim, asked.rank, asked.seed), None
    units = Q.shape[0] * Q.shape[1]
    # Blocks a call, by the bounds on Gram matrices and on A and B.
    at_once = max(1, SUMS // (units * library.SUMS * library.matrix_size(head_dim)))
    at_once = min(at_once, max(1, attention.BASES // (2 * units * head_dim * asked.rank)))
    blocks = -(-num_queries // asked.block)
    # The sums of the blocks so far are carried from call to call.
    for first in range(0, blocks, at_once):
        AT, B, carry = library.projection_bases(
            Q, K, queries, keys, start, carry,
            block=asked.block, first_block=first, blocks=min(at_once, blocks - first),
            rounds=asked.rounds, causal_offset=asked.causal_offset, strict=asked.strict,
            seen=asked.seen,
        )  # fmt: skip
        yield AT, B


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
        """Begin with no rows, for rows with the batch size, heads, width and dtype of ``like``."""
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
        unit = projection.power_of_two(self._largest)  # so that scaling is exact
        # more than 1 only where nothing was added yet
        shrink = (projection.power_of_two(before) / unit).clamp(max=1)
        rows = rows / unit
        self._C = self._C * shrink.square() + rows.mT @ rows

    def normalised(self, *, ridge: float) -> tuple[Tensor, Tensor]:
        return projection.normalised(self._C, projection.power_of_two(self._largest), ridge=ridge)
