"""Intervals of a difference from exact attention, by the bootstrap over what was drawn.

The same units are drawn for both arms, so that what is hard for both cancels. Percentile intervals
(Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

DRAWS, COVERED = 2000, 0.95

Statistic = Callable[[Tensor], float]
"""Rows of units, ``(n, width)`` -> the value of a metric."""


@dataclass(frozen=True)
class Interval:
    """A difference, and where it lies with 95 % confidence."""

    difference: float
    low: float
    high: float


def paired(statistic: Statistic, ours: Tensor, exact: Tensor, draws: int = DRAWS) -> Interval:
    """The value of our rows less that of the exact rows.

    Args:
        statistic: what makes a value of rows.
        ours: ``(n, width)``, a row for each unit.
        exact: the same units, in the same order.
        draws: how often n of the n units are drawn with replacement.

    Raises:
        ValueError: other units, or none.
    """
    if len(ours) != len(exact) or not len(ours):
        raise ValueError(
            f"rows: got {len(ours)} and {len(exact)}; accepted: as many, one or more; measure both "
            "on the same data"
        )
    g = torch.Generator().manual_seed(0)
    found = []
    for _ in range(draws):
        drawn = torch.randint(len(ours), (len(ours),), generator=g)
        found.append(statistic(ours[drawn]) - statistic(exact[drawn]))
    found.sort()
    tail = (1 - COVERED) / 2
    low, high = (found[round(q * (draws - 1))] for q in (tail, 1 - tail))
    return Interval(statistic(ours) - statistic(exact), low, high)
