"""The picture of what ``tune`` found: the metric over the cost of attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distr_compile.tuning.tuned import Point, Tuning

STYLES = {
    "exact": ("k*", 13, "exact"),
    "chosen": ("C3s", 10, "chosen"),
    "uniform": ("C1^", 8, "one plan for all layers"),
}
"""Mark, size and words of each kind of point that has a name."""

APART = 0.055
"""Between two names, as a share of the height of the axes."""

FAR = 4.0
"""What is so many times the frontier's height away from it stands at the edge."""


def drawn(tuning: Tuning, limit: float | None) -> Any:
    """Draw it.

    The names stand beside the axes, each with a line to its point. What is far from the frontier
    stands at the edge, with its value behind its name.

    Args:
        tuning: what was found.
        limit: the value of the metric at the budget; drawn where it is among the points.

    Returns:
        A figure of matplotlib, of which no backend is loaded.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plot: got no matplotlib; install it: pip install 'distr-compile[plots]'"
        ) from error
    line = [p for p in tuning.points if p.kind in ("exact", "frontier", "chosen") and p.loss]
    line.sort(key=lambda p: p.cost)
    marked = [p for p in tuning.points if p.kind in STYLES and p.loss]
    low, high = value_range([_value(p) for p in line], [_value(p) for p in marked])
    figure = Figure(figsize=(8, max(4.5, 0.28 * len(marked))), layout="constrained")
    axes = figure.add_subplot()
    axes.set_ylim(low, high)
    axes.plot([100 * p.cost for p in line], [_value(p) for p in line], "o-", label="tuned")
    if limit is not None and low <= limit <= high:
        axes.axhline(limit, color="0.6", linestyle=":", label=f"budget {tuning.budget:g}")
    elif limit is not None:
        axes.plot([], [], ":", color="0.6", label=f"budget {tuning.budget:g}, at {limit:.3g}")
    for kind, (mark, size, words) in STYLES.items():
        of_kind = [p for p in marked if p.kind == kind]
        x = [100 * p.cost for p in of_kind]
        y = [min(max(_value(p), low), high) for p in of_kind]
        if of_kind:
            axes.plot(x, y, mark, markersize=size, zorder=3, clip_on=False, label=words)
    marked.sort(key=_value)
    shares = [(min(max(_value(p), low), high) - low) / (high - low) for p in marked]
    for point, place in zip(marked, spread(shares), strict=True):
        inside = low <= _value(point) <= high
        name = point.name if inside else f"{point.name}: {_value(point):.3g}"
        axes.annotate(
            name,
            (100 * point.cost, min(max(_value(point), low), high)),
            xytext=(1.04, place),
            textcoords="axes fraction",
            fontsize=8,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": "0.7", "linewidth": 0.6, "relpos": (0, 0.5)},
        )
    axes.set_xlabel(f"attention, % of exact ({tuning.unit})")
    axes.set_ylabel(f"{tuning.metric.name} on the tuning half")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def value_range(frontier: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """The lowest and the highest value to show: those of the points, but for what is far away.

    Args:
        frontier: values of the tuned points.
        others: values of all points with a name.
    """
    low, high = min(frontier), max(frontier)
    reach = FAR * (high - low)
    near = [v for v in others if reach == 0 or low - reach <= v <= high + reach]
    low, high = min([low, *near]), max([high, *near])
    room = 0.08 * (high - low) or 0.01
    return low - room, high + room


def spread(shares: Sequence[float]) -> list[float]:
    """Places for names that want to stand at ``shares``, rising, ``APART`` from one another."""
    places: list[float] = []
    for share in shares:
        places.append(max(share, places[-1] + APART) if places else share)
    top = 1.0
    for index in range(len(places) - 1, -1, -1):  # what was pushed out comes back from the top
        places[index] = min(places[index], top)
        top = places[index] - APART
    return places


def _value(point: Point) -> float:
    assert point.loss is not None
    return point.loss.value
