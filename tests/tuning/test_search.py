"""The knapsack against all choices, one by one."""

from __future__ import annotations

import itertools
import random

import pytest

from distr_compile.tuning.search import Choice, Option, cheapest, frontier


def drawn(seed: int, layers: int, count: int, scale: float = 1.0) -> dict[str, list[Option]]:
    """``exact`` costs 1 and loses nothing; the others are anywhere."""
    rng = random.Random(seed)
    return {
        f"layer{i}": [Option("exact", 1.0, 0.0)]
        + [
            Option(str(k), rng.uniform(0, 1.2), scale * 10 ** rng.uniform(-6, 0))
            for k in range(count)
        ]
        for i in range(layers)
    }


def by_trying_all(options: dict[str, list[Option]], limit: float) -> float:
    choices = itertools.product(*options.values())
    return min(sum(o.cost for o in c) for c in choices if sum(o.loss for o in c) <= limit)


def total(options: dict[str, list[Option]], choice: Choice) -> tuple[float, float]:
    taken = [next(o for o in options[name] if o.label == choice.labels[name]) for name in options]
    return sum(o.cost for o in taken), sum(o.loss for o in taken)


@pytest.mark.parametrize("seed", range(12))
def test_no_choice_is_cheaper(seed: int) -> None:
    options = drawn(seed, layers=4, count=4, scale=10.0 ** (seed - 6))
    largest = sum(max(o.loss for o in of_layer) for of_layer in options.values())
    for share in (0.0, 1e-4, 1e-2, 0.1, 0.5, 1.0):
        limit = share * largest
        choice = cheapest(options, limit)
        assert choice is not None
        assert choice.labels.keys() == options.keys()
        assert total(options, choice) == pytest.approx((choice.cost, choice.loss))
        assert choice.loss <= limit * (1 + 1e-6)
        assert choice.cost == pytest.approx(by_trying_all(options, limit), rel=1e-9)


def test_no_loss_is_allowed() -> None:
    options = drawn(1, layers=3, count=3)
    choice = cheapest(options, 0.0)
    assert choice is not None
    assert set(choice.labels.values()) == {"exact"}
    fixed = {"layer": [Option("only", 0.5, 0.2)]}
    assert cheapest(fixed, 0.1) is None
    assert cheapest(fixed, 0.2) == Choice({"layer": "only"}, 0.5, 0.2)
    assert cheapest({}, 0.0) == Choice({}, 0.0, 0.0)


def test_an_error_that_is_not_finite_is_never_chosen() -> None:
    options = {"a": [Option("exact", 1, 0), Option("broken", 0, float("inf"))]}
    assert [choice.labels for choice in frontier(options)] == [{"a": "exact"}]


def test_no_frontier_where_a_layer_has_nothing_finite() -> None:
    free = drawn(2, 1, 3)["layer0"]
    assert frontier({"free": free, "fixed": [Option("as given", 0.5, float("nan"))]}) == []
    assert frontier({"fixed": [Option("as given", 0.5, float("inf"))]}) == []


def test_the_frontier_falls_in_cost_as_the_loss_rises() -> None:
    options = drawn(5, layers=6, count=4)
    points = frontier(options)
    assert set(points[0].labels.values()) == {"exact"}
    assert points[-1].cost == pytest.approx(
        sum(min(o.cost for o in of_layer) for of_layer in options.values())
    )
    assert all(a.cost > b.cost and a.loss < b.loss for a, b in itertools.pairwise(points))
    for point in points:
        best = cheapest(options, point.loss * (1 + 1e-9))
        assert best is not None
        assert best.cost == pytest.approx(point.cost)


def test_a_layer_without_an_option_that_loses_nothing() -> None:
    options = {"fixed": [Option("only", 0.5, 0.2)], "free": drawn(2, 1, 3)["layer0"]}
    points = frontier(options)
    assert all(point.labels["fixed"] == "only" for point in points)
    assert points[0].labels["free"] == "exact"
    assert len(points) > 1
