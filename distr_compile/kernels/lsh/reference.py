"""The LSH estimators of ``reference.py``: columns of Q that are alike, grouped (eq. 2)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from distr_compile.kernels.attention.reference import Asked, Block, group_columns


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
        mask: not looked at.
        asked: of it the estimator, rank, block and seed.
    """
    variant, blocks = variant_of(asked.estimator), []
    for start in range(0, Q.shape[3], asked.block):
        rows = Q[..., start : start + asked.block, :]
        Qhat, Khat = _group_factors(rows, K, asked.rank, variant, asked.seed)
        blocks.append(Block(start, start + rows.shape[3], Qhat.flatten(1, 2), Khat))
    return blocks


def _group_factors(
    Q: Tensor, K: Tensor, rank: int, variant: Variant, seed: int
) -> tuple[Tensor, Tensor]:
    """Qhat ``(B, H_k, rep, l, r)`` and Khat ``(B, H_k, M, r)`` of one grouping block."""
    order, sign = group_columns(Q, seed=seed, signed=variant.signed)
    K = (K * sign[:, :, None].to(K.dtype)).expand(Q.shape[0], -1, -1, -1)
    Q = Q * sign[:, :, None, None].to(Q.dtype)
    group_size = Q.shape[-1] // rank
    Q_groups = Q.gather(-1, order[:, :, None, None, :].expand_as(Q))
    Q_groups = Q_groups.unflatten(-1, (rank, group_size))
    K_groups = K.gather(-1, order[:, :, None, :].expand_as(K)).unflatten(-1, (rank, group_size))
    Qhat = Q_groups[..., 0] if variant.sample else Q_groups.mean(-1)
    return Qhat, K_groups.sum(-1)
