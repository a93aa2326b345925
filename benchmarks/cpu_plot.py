"""Draws what ``benchmarks.cpu_kernel`` measured: what approximating wins on a CPU, over N.

    python -m benchmarks.cpu_plot [RESULTS.json] [PICTURE.png]

A column of panels for every dtype and head width. Above: speed over our own exact kernel (rank d),
with the limit 2d / (d/G + d), which is what is left to win if only the two products cost time.
Below: speed over SDPA. Points are medians over rounds, bars (where longer than the mark) their
quartiles. Cells with causality
are left out. matplotlib is needed (``pip install 'distr-compile[plots]'``).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.cells import speedup_limit
from benchmarks.store import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "cpu_kernel.json"
PICTURE = ROOT / "docs" / "cpu_speed.png"

EXACT, SDPA = "rank d", "SDPA"
STYLES = {
    # arm: colour, marker, and G, whose limit has the same colour
    "projection G=2": ("tab:blue", "o-", 2),
    "projection G=4": ("tab:red", "o-", 4),
    "calibrated G=2": ("tab:cyan", "s--", 2),
    EXACT: ("black", "^-", 1),
}
LABELS = {arm: arm.replace(" G=", ", G = ") for arm in STYLES} | {EXACT: "rank d (exact, ours)"}


def ratios(cell: dict[str, Any], arm: str, over: str) -> list[float]:
    """Quartiles over rounds of how many times as fast ``arm`` is as ``over``."""
    pairs = zip(cell["ms"][arm], cell["ms"][over], strict=True)
    return [float(x) for x in np.percentile([b / a for a, b in pairs], (25, 50, 75))]


def draw(ax: Any, cells: list[dict[str, Any]], over: str) -> None:
    """Speed over one arm of the cells of one panel, which are sorted by their tokens."""
    for arm, (colour, style, group_size) in STYLES.items():
        found = [(c["tokens"], *ratios(c, arm, over)) for c in cells if arm in c["ms"]]
        if arm == over or not found:
            continue
        tokens, lower, middle, upper = np.array(found).T
        ax.errorbar(
            tokens,
            middle,
            yerr=(middle - lower, upper - middle),
            fmt=style,
            color=colour,
            markersize=4,
            linewidth=1.3,
            elinewidth=0.8,
            label=LABELS[arm],
        )
        if over == EXACT and arm.startswith("projection"):
            limit = speedup_limit(cells[0]["d"], group_size)
            label = f"limit 2d / (d/G + d), G = {group_size}"
            ax.axhline(limit, color=colour, linestyle=":", linewidth=1.2, label=label)
    ax.axhline(1, color="grey", linewidth=0.8, zorder=0)
    ax.grid(alpha=0.3)


def figure_of(results: dict[str, Any]) -> Any:
    """The whole figure of one file of results."""
    cells = sorted((c for c in results["cells"] if not c["causal"]), key=lambda c: c["tokens"])
    columns = list(dict.fromkeys((c["dtype"], c["d"]) for c in cells))
    columns.sort(key=lambda column: (column[0] != "float32", column))
    lengths = sorted({c["tokens"] for c in cells})
    size = (2.5 * len(columns) + 0.6, 5.6)
    figure, axes = plt.subplots(
        2,
        len(columns),
        figsize=size,
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for column, (above, below) in zip(columns, axes.T, strict=True):
        panel = [c for c in cells if (c["dtype"], c["d"]) == column]
        draw(above, panel, EXACT)
        draw(below, panel, SDPA)
        above.set_title(f"{column[0]}, d = {column[1]}", fontsize=10)
        below.set_xlabel("N, tokens")
        below.set_xscale("log", base=2)
        below.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths])
        below.minorticks_off()
    axes[0, 0].set_ylabel("speed over rank d")
    axes[1, 0].set_ylabel("speed over SDPA")
    handles = {}
    for ax in axes.flat:
        handles.update(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, fontsize=8)
    plural = "s" if results["threads"] > 1 else ""
    figure.suptitle(
        f"{results['cpu']}, {results['threads']} thread{plural}, torch {results['torch']}, whole"
        " calls",
        fontsize=10,
    )
    return figure


def plot(results: Path, picture: Path) -> None:
    figure = figure_of(json.loads(results.read_text(encoding="utf-8")))
    figure.savefig(picture, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="the plot of speed on a CPU")
    parser.add_argument("results", type=Path, nargs="?", default=RESULTS)
    parser.add_argument("picture", type=Path, nargs="?", default=PICTURE)
    args = parser.parse_args()
    plot(args.results, args.picture)
    print(args.picture)


if __name__ == "__main__":
    main()
