"""Draws Figure 9 as measured: speed over SDPA by N, a panel for each d.

python -m benchmarks.paper.figures [FOLDER]    # docs by default
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.paper.attention_time import ARMS, LENGTHS, SCRIPT, WIDTHS
from benchmarks.paper.rivals import RIVALS
from benchmarks.store import ROOT, Cell, Store

NAME = "paper_time.png"


def draw_times(found: dict[str, Cell], folder: Path) -> Path:
    """The medians of what was measured, with the least and greatest ratio of the rounds."""
    figure, axes = plt.subplots(
        1, len(WIDTHS), figsize=(4.2 * len(WIDTHS), 4), sharey=True, layout="constrained"
    )
    for ax, d in zip(axes, WIDTHS, strict=True):
        for number, arm in enumerate(ARMS[1:]):
            points = [(n, ratios) for n in LENGTHS if (ratios := _ratios(found, d, n, arm))]
            if points:
                style = "o--" if arm in RIVALS else "s-"
                color = matplotlib.colormaps["tab20"](number)
                bars(ax, points, statistics.median, style, markersize=3, label=arm, color=color)
        ax.axhline(1, color="k", linewidth=0.8)
        ax.set(xscale="log", yscale="log", title=f"d = {d}", xlabel="N")
        ax.set_xticks(LENGTHS, map(str, LENGTHS))
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("speed over SDPA")
    handles, labels = axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / NAME, dpi=110)
    plt.close(figure)
    return folder / NAME


def bars(
    ax: Axes,
    points: Sequence[tuple[float, Sequence[float]]],
    middle: Callable[[Sequence[float]], float],
    style: str,
    **options: Any,
) -> None:
    """A marker at the middle of each point's values, with bars to the least and the greatest."""
    at, found = [x for x, _ in points], [middle(values) for _, values in points]
    spread = [
        [m - min(values) for m, (_, values) in zip(found, points, strict=True)],
        [max(values) - m for m, (_, values) in zip(found, points, strict=True)],
    ]
    ax.errorbar(at, found, spread, fmt=style, capsize=2, **options)


def _ratios(found: dict[str, Cell], d: int, n: int, arm: str) -> list[float]:
    ratios: list[float] = found.get(f"d={d}, N={n}", {}).get("over SDPA", {}).get(arm, [])
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description="the paper's Figure 9 as measured here")
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "docs")
    print(draw_times(Store(SCRIPT.results, {}).cells, parser.parse_args().folder))


if __name__ == "__main__":
    main()
