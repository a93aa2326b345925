"""Choose one option for every layer: the least cost at a limited sum of losses.

A multiple-choice knapsack, solved by ``scipy.optimize.milp`` (HiGHS, branch and cut).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

POINTS = 48
"""Limits that ``frontier`` tries; most models have fewer choices that differ."""


@dataclass(frozen=True)
class Option:
    """One way to compute a layer.

    Attributes:
        label: its name.
        cost: in any unit, not negative.
        loss: what it adds to the predicted loss, not negative.
    """

    label: str
    cost: float
    loss: float


@dataclass(frozen=True)
class Choice:
    """An option for every layer.

    Attributes:
        labels: layer -> label.
        cost: their sum.
        loss: their sum.
    """

    labels: Mapping[str, str]
    cost: float
    loss: float


def cheapest(options: Mapping[str, Sequence[Option]], limit: float) -> Choice | None:
    """The choice of least cost whose losses sum up to ``limit`` at most; None if there is none.

    Args:
        options: of every layer, at least one each.
        limit: of the sum of losses.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    # What alone is over the limit can go at once; its number could be huge, or infinite.
    kept = {
        layer: undominated([o for o in of_layer if o.loss <= limit])
        for layer, of_layer in options.items()
    }
    if not all(kept.values()) or _sum(min(o.loss for o in k) for k in kept.values()) > limit:
        return None
    flat = [(layer, option) for layer, of_layer in kept.items() for option in of_layer]
    if not flat:
        return Choice({}, 0.0, 0.0)
    layers = list(kept)
    one_each = np.zeros((len(layers), len(flat)))
    for column, (layer, _) in enumerate(flat):
        one_each[layers.index(layer), column] = 1
    costs = np.array([option.cost for _, option in flat])
    losses = np.array([option.loss for _, option in flat])
    scale = limit or 1.0  # numbers near 1, so that the solver's tolerances mean little
    result = milp(
        costs / (costs.max() or 1.0),
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint((losses / scale)[None, :], -np.inf, limit / scale),
        ],
        options={"mip_rel_gap": 0.0},
    )
    if result.x is None:
        raise RuntimeError(f"milp: got no solution: {result.message}")
    chosen = [pair for pair, taken in zip(flat, result.x, strict=True) if taken > 0.5]
    return Choice(
        {layer: option.label for layer, option in chosen},
        _sum(option.cost for _, option in chosen),
        _sum(option.loss for _, option in chosen),
    )


def frontier(options: Mapping[str, Sequence[Option]], points: int = POINTS) -> list[Choice]:
    """The best choices at limits from the least possible loss to no limit, by rising loss.

    Each costs less than all before it. None at all if some layer has no option of a finite loss.
    """
    finite = {
        layer: [o for o in of_layer if math.isfinite(o.loss)] for layer, of_layer in options.items()
    }
    if not all(finite.values()):
        return []
    least = _sum(min(o.loss for o in of_layer) for of_layer in finite.values())
    most = _sum(max(o.loss for o in of_layer) for of_layer in finite.values())
    positive = [o.loss for of_layer in finite.values() for o in of_layer if o.loss > 0]
    limits = [least]
    if positive:
        # Above the least, because some layers may have no option without a loss.
        steps = np.geomspace(min(positive), max(most - least, min(positive)), points)
        limits += [least + float(step) for step in steps]
    limits.append(most * (1 + 1e-9))
    found: list[Choice] = []
    for limit in limits:
        choice = cheapest(finite, limit)
        if choice is not None and (not found or choice.cost < found[-1].cost):
            found.append(choice)
    return found


def undominated(options: Sequence[Option]) -> list[Option]:
    """The options that no other beats or equals in both respects, by rising cost."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.cost, o.loss)):
        if not kept or option.loss < kept[-1].loss:
            kept.append(option)
    return kept


_sum = math.fsum
"""Whatever the order, so that equal choices have equal sums."""
