"""The table of estimators: what each one is, what it looks at, where it comes from.

This module imports no torch, so that a policy can be checked without loading it. The arithmetic
that the names stand for is in ``kernels/reference.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

MIN_RANK = 16
"""Fewest columns an estimator may leave: the least inner width of a tensor-core product."""

MIN_QUERIES = 16
"""Calls with fewer query rows (decode steps) are always exact: there is nothing to group over."""

AUTO_BLOCK_LIMIT = 4096
AUTO_BLOCK_MIN = 2048
AUTO_BLOCK_TILE = 128


@dataclass(frozen=True)
class Estimator:
    """One way to turn (Q, K) of width d into (Qhat, Khat) of width r = d / group_size.

    Attributes:
        name: the name used in a policy.
        summary: how Qhat and Khat come from Q and K, in one line.
        sees: which tokens the approximation of one row depends on.
        source: where the method is described.
    """

    name: str
    summary: str
    sees: str
    source: str


ESTIMATORS: dict[str, Estimator] = {
    e.name: e
    for e in (
        Estimator(
            name="lsh-sample",
            summary="Qhat takes the first column of each group of Q, Khat sums the group's columns",
            sees="all query rows of the grouping block",
            source="arXiv 2507.17245, eq. 2 and section 3.2",
        ),
        Estimator(
            name="lsh-mean",
            summary="Qhat averages the columns of each group of Q, Khat sums the group's columns",
            sees="all query rows of the grouping block",
            source="arXiv 2507.17245, eq. 2 with the group's mean as the estimate",
        ),
    )
}

DEFAULT_ESTIMATOR = "lsh-mean"


def auto_grouping_block(num_queries: int) -> int:
    """Query rows that share one grouping when the policy says ``grouping_block = "auto"``.

    A function of the sequence length only, so that a policy means the same on every device: all
    rows up to 4096, then ``max(2048, N / 8)`` rounded up to a multiple of 128 rows.
    """
    if num_queries <= AUTO_BLOCK_LIMIT:
        return max(num_queries, 1)
    eighth = -(-num_queries // 8)
    return max(AUTO_BLOCK_MIN, -(-eighth // AUTO_BLOCK_TILE) * AUTO_BLOCK_TILE)


def possible_group_sizes(head_dim: int) -> tuple[int, ...]:
    """Group sizes that divide ``head_dim`` and leave ``MIN_RANK`` columns or more; 1 is exact."""
    return (1, *(g for g in range(2, head_dim // MIN_RANK + 1) if head_dim % g == 0))
