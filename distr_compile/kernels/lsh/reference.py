"""The definition of the LSH estimators: columns of Q that are alike, grouped (eq. 2).

See ``kernels/attention/reference.py``, which calls ``factors``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distr_compile.estimators import NUM_PROJECTIONS
from distr_compile.kernels.counted import counted_rows
from distr_compile.kernels.random import projections
from distr_compile.kernels.roles import Asked, Block


class Variant(NamedTuple):
    """What sets one LSH estimator apart from the others.

    Attributes:
        sample: Qhat takes the first column of each group instead of the group's mean.
        signed: columns whose sum is not positive are turned before they are hashed.
    """

    sample: bool
    signed: bool


COMPUTES = {
    "lsh-sample": Variant(sample=True, signed=False),
    "lsh-mean": Variant(sample=False, signed=False),
    "lsh-signed": Variant(sample=False, signed=True),
}


def variant_of(estimator: str) -> Variant:
    """The variant that a name of ``COMPUTES`` stands for.

    Raises:
        ValueError: another name.
    """
    if estimator not in COMPUTES:
        raise ValueError(
            f"estimator: got {estimator!r}; must be one of {', '.join(COMPUTES)}: add a variant to "
            "COMPUTES of distr_compile/kernels/lsh/reference.py, or call what computes this one"
        )
    return COMPUTES[estimator]


def factors(Q: Tensor, K: Tensor, mask: Tensor | None, asked: Asked) -> list[Block]:
    """Qhat and Khat of each grouping block, from its own query rows.

    Args:
        Q: ``(B, H_k, rep, N, d)``.
        K: ``(B or 1, H_k, M, d)``.
        mask: says which rows count; the others are hashed as if they were 0.
        asked: of it the estimator, rank, blocks and seed.
    """
    variant, blocks = variant_of(asked.estimator), []
    key_heads, rep, num_queries, _ = Q.shape[1:]
    counts, _ = counted_rows(mask, num_queries, K.shape[2], key_heads, rep)
    # Rows that do not count have no part in the hash, but a Qhat like all others.
    hashed = Q if counts is None else Q.where(counts[..., None], 0)
    for counted, rows in asked.blocks(num_queries):
        columns = group_columns(hashed[..., counted, :], seed=asked.seed, signed=variant.signed)
        Qhat, Khat = _group_factors(Q[..., rows, :], K, asked.rank, variant, *columns)
        blocks.append(Block(rows.start, rows.stop, Qhat.flatten(1, 2), Khat))
    return blocks


def _group_factors(
    Q: Tensor, K: Tensor, rank: int, variant: Variant, order: Tensor, sign: Tensor
) -> tuple[Tensor, Tensor]:
    """Qhat ``(B, H_k, rep, l, r)`` and Khat ``(B, H_k, M, r)`` of one grouping block."""
    # Turned in both, a column's product stays what it is.
    K = (K * sign[:, :, None].to(K.dtype)).expand(Q.shape[0], -1, -1, -1)
    Q = Q * sign[:, :, None, None].to(Q.dtype)
    group_size = Q.shape[-1] // rank
    # Columns in their order, (..., r, G).
    Q_groups = Q.gather(-1, order[:, :, None, None, :].expand_as(Q))
    Q_groups = Q_groups.unflatten(-1, (rank, group_size))
    K_groups = K.gather(-1, order[:, :, None, :].expand_as(K)).unflatten(-1, (rank, group_size))
    Qhat = Q_groups[..., 0] if variant.sample else Q_groups.mean(-1)
    return Qhat, K_groups.sum(-1)


def gray_position(code: Tensor) -> Tensor:
    """Position of each 16-bit ``code`` in the sequence of Gray codes (integer tensor, any shape).

    The inverse of ``position ^ (position >> 1)``.
    """
    position = code
    for shift in (8, 4, 2, 1):
        position = position ^ (position >> shift)
    return position


def order_of_projected(projected: Tensor) -> Tensor:
    """Permutation of columns from their N' projected numbers: sign bits, Gray code, stable sort.

    Bit 15 of the code belongs to the first projection. Columns are ordered by the *position* of
    their code along the Gray sequence, where one step changes exactly one sign. The paper's text
    reads the sequence the other way, as a table indexed by the code; sentence embeddings of a
    trained model came out alike. Ties keep the order of the columns.

    Args:
        projected: ``(..., 16, d)``.

    Returns:
        ``(..., d)`` int64: ``result[..., i]`` is the column at place i of the order.
    """
    weights = 1 << torch.arange(NUM_PROJECTIONS - 1, -1, -1, device=projected.device)
    code = ((projected > 0) * weights[:, None]).sum(-2)
    return torch.sort(gray_position(code), dim=-1, stable=True).indices


def group_columns(Q: Tensor, *, seed: int = 0, signed: bool = False) -> tuple[Tensor, Tensor]:
    """Sort the columns of one grouping block of Q, similar ones side by side (section 3.2).

    With ``signed`` the first of the N' projections is the plain sum of a column, and a column whose
    sum is not positive is turned: it is hashed as its negative. Columns that point away from each
    other are far apart by their hash, though one says as much about the other as an equal one.

    Args:
        Q: ``(B, H_k, rep, l, d)``: l query rows of the ``rep`` query heads that share a key head.
            They share one grouping: their rows are stacked token by token, so row ``i`` of head
            ``h`` is multiplied by row ``i * rep + h`` of the projection matrix.
        seed: names the projection matrix.
        signed: see above.

    Returns:
        ``(B, H_k, d)`` int64 permutation, places ``j*G`` to ``j*G + G - 1`` are the group G_j; and
        ``(B, H_k, d)`` the sign of every column, -1 where it is turned, in at least fp32.
    """
    rep, rows = Q.shape[-3:-1]
    # (B, H_k, l rep, d), token by token.
    stacked = Q.transpose(-3, -2).flatten(-3, -2)
    stacked = stacked.to(torch.promote_types(Q.dtype, torch.float32))
    P = projections(0, rows * rep, seed=seed).to(Q.device, stacked.dtype)
    if signed:
        P[:, 0] = 1
    projected = P.T @ stacked
    sign = torch.ones_like(projected[..., 0, :])
    if signed:
        sign = torch.where(projected[..., 0, :] > 0, sign, -sign)
    return order_of_projected(projected * sign[..., None, :]), sign
