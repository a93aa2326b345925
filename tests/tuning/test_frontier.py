"""The picture of a tuning: names that can be read, marks that are explained, a fitting range."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from distr_compile.tuning.frontier import APART, drawn, spread, value_range


def point(kind: str, name: str, cost: float, value: float) -> Any:
    return SimpleNamespace(kind=kind, name=name, cost=cost, loss=SimpleNamespace(value=value))


POINTS = [
    point("exact", "exact", 1.0, 0.900),
    point("frontier", "frontier 1", 0.9, 0.899),
    point("frontier", "frontier 2", 0.8, 0.890),
    point("chosen", "chosen", 0.8, 0.890),
    *(point("uniform", f"uniform projection G={g}", 0.8, 0.89 + g / 1e5) for g in range(2, 12)),
    point("uniform", "uniform lsh-sample G=2", 0.8, 0.1),
]


def tuning(points: list[Any]) -> Any:
    return SimpleNamespace(
        points=points, budget=0.01, unit="s", metric=SimpleNamespace(name="top1")
    )


@pytest.mark.parametrize("points", [POINTS, POINTS[:1] + POINTS[4:]], ids=["tuned", "exact only"])
@pytest.mark.parametrize("limit", [0.891, 0.2, None])
def test_the_picture_can_be_read(points: list[Any], limit: float | None) -> None:
    figure = drawn(tuning(points), limit)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (axes,) = figure.axes
    # Of the text alone: an annotation's own extent has its line to the point.
    boxes = [Text.get_window_extent(text, canvas.get_renderer()) for text in axes.texts]
    assert len(boxes) == sum(p.kind != "frontier" for p in points)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert all(figure.bbox.contains(box.x1, box.y1) for box in boxes)
    assert all(box.x0 > axes.get_window_extent().x1 for box in boxes), "beside the axes"
    explained = {text.get_text() for text in axes.get_legend().get_texts()}
    marks = {line.get_label() for line in axes.lines}
    assert marks == explained
    kinds = {p.kind for p in points}
    words = {"exact": "exact", "chosen": "chosen", "uniform": "one plan for all layers"}
    assert {words[kind] for kind in kinds & words.keys()} <= explained
    assert any("budget 0.01" in each for each in explained) == (limit is not None)


def test_the_range_is_that_of_the_points() -> None:
    low, high = value_range([0.89, 0.9], [0.9, 0.895, 0.1])
    assert 0.88 < low < 0.89
    assert 0.9 < high < 0.91
    low, high = value_range([0.9], [0.9, 0.1])
    assert low < 0.1 < 0.9 < high
    low, high = value_range([0.5], [0.5])
    assert low < 0.5 < high


@pytest.mark.parametrize(
    "shares", [[0.5] * 10, [0.0, 0.01, 0.99, 1.0, 1.0], [0.0] * 18, [0.3], []], ids=str
)
def test_names_keep_apart(shares: list[float]) -> None:
    places = spread(shares)
    assert all(b - a >= APART - 1e-9 for a, b in itertools.pairwise(places))
    assert all(-1e-9 <= place <= 1 for place in places)
    if len(shares) == 1:
        assert places == shares
