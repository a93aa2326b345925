"""A and B of the LSH estimators in plain PyTorch calls; see ``kernels/roles.py``.

The definition is ``kernels/lsh/reference.py``, which gathers columns where this multiplies.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from distr_compile.estimators import NUM_PROJECTIONS
from distr_compile.kernels.attention import cpu as attention
from distr_compile.kernels.counted import counted_rows
from distr_compile.kernels.lsh.reference import COMPUTES as COMPUTES
from distr_compile.kernels.lsh.reference import order_of_projected, variant_of
from distr_compile.kernels.random import projections
from distr_compile.kernels.roles import Asked
from distr_compile.kernels.rows import stack

ONE_BLOCK = False
BY_PLACE = True
READS_PANELS = True


def elements(head_dim: int, rank: int) -> int:
    """A and B; see ``kernels/roles.py``."""
    return 2 * head_dim * rank


def counted(
    mask: Tensor | None, num_queries: int, num_keys: int, key_heads: int, rep: int, asked: Asked
) -> tuple[Tensor | None, Tensor | None]:
    """Rows of Q that a mask hides do not count; K has no part in A and B."""
    return counted_rows(mask, num_queries, num_keys, key_heads, rep)[0], None


def bases(
    Q: Tensor, K: Tensor, queries: Tensor | None, keys: Tensor | None, asked: Asked
) -> Iterator[tuple[Tensor, Tensor]]:
    """A and B of each grouping block in turn; see ``kernels/roles.py``."""
    for start in range(0, max(Q.shape[3], 1), asked.block):
        rows = slice(start, start + asked.block)
        counts = None if queries is None else queries[..., rows]
        yield _group_bases(Q[..., rows, :], counts, asked)


def groups(
    Q: Tensor, K: Tensor, queries: Tensor | None, keys: Tensor | None, asked: Asked
) -> Iterator[attention.Group]:
    """The same for the fused kernel."""
    return attention.stacked(bases(Q, K, queries, keys, asked))


@lru_cache(maxsize=64)
def _projections(start: int, stop: int, seed: int) -> Tensor:
    """One panel of the projection matrix, at most 128 KiB; every head and block uses the same.

    For 2048 rows of width 64, one thread, making the panel takes 0.27 ms and hashing with it 0.06.
    """
    with torch.inference_mode(False):  # a tensor that outlives the call must serve autograd too
        return projections(start, stop, seed=seed)


def _group_bases(Q: Tensor, counts: Tensor | None, asked: Asked) -> tuple[Tensor, Tensor]:
    """Matrices A, B ``(b h, d, r)`` of one grouping block: Qhat = Q A and Khat = K B (eq. 2).

    Column j of B has a one for every member of group j, or a minus one where the column is turned;
    A picks the first member or averages them.
    As products they need no gather, take any strides, and cost d r per row: little next to the
    scores.
    """
    rep, rows, head_dim = Q.shape[2:]
    rank = asked.rank
    sample, signed = variant_of(asked.estimator)
    projected: Tensor | None = None
    # Partial sums of Q^T P over panels of rows.
    for first in range(0, rows, asked.panel):
        some = slice(first, first + asked.panel)
        part = Q[..., some, :]
        if counts is not None:
            part = part.where(counts[..., some, None], 0)
        stacked = stack(part)
        start = first * rep  # rows are stacked token by token
        P = _projections(start, start + stacked.shape[1], asked.seed).to(Q.device, stacked.dtype)
        if signed:  # the first projection is the sum of a column
            P = torch.cat([P.new_ones(len(P), 1), P[:, 1:]], dim=1)
        product = torch.matmul(P.T, stacked)  # (b h, 16, d)
        projected = product if projected is None else projected.add_(product)
    if projected is None:  # no query rows, nothing to compute
        projected = Q.new_zeros(Q.shape[0] * Q.shape[1], NUM_PROJECTIONS, head_dim)
    sign = torch.ones_like(projected[:, 0])
    if signed:
        sign = torch.where(projected[:, 0] > 0, sign, -sign)
        projected *= sign[:, None]
    order = order_of_projected(projected)  # (b h, d): the column at each place

    group_size = head_dim // rank
    unit = torch.arange(order.shape[0], device=Q.device)[:, None]
    group = torch.arange(rank, device=Q.device)
    B = projected.new_zeros(order.shape[0], head_dim, rank)
    # Place i of the order belongs to group i // G.
    B[unit, order, group.repeat_interleave(group_size)] = sign.gather(-1, order)
    if not sample:
        return B / group_size, B  # Qhat has means
    A = torch.zeros_like(B)
    A[unit, order[:, ::group_size], group] = 1  # the first column of each group
    return A, B
