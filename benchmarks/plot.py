"""Draws what ``make gpu`` measured: time over N, and speedup over N with its limit.

    python -m benchmarks.plot DIR [...]

writes ``time-....png`` and ``speedup-....png`` for every dtype and number of heads into the folders
of results: a row of panels without and one with causality, a column for every head width.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.cells import speedup_limit
from benchmarks.rows import FLASH, GROUP_SIZES, TABLED, Row, is_ours, load

COLOURS = {2: "tab:blue", 4: "tab:red"}
MARKS = dict(zip(TABLED, "osv", strict=True))
Panels = dict[tuple[bool, int], list[Row]]  # (causal, head width) -> rows by length


def plot(folder: Path) -> list[Path]:
    """Draw all plots of one folder of results; the files that were written."""
    environment, rows = load(folder / "attention.json")
    groups: dict[tuple[str, int, int], Panels] = defaultdict(lambda: defaultdict(list))
    for row in sorted(rows, key=lambda row: row.cell["tokens"]):
        cell = row.cell
        if cell["mask"] == "none" and cell["heads"] == cell["key_heads"]:
            group = groups[cell["dtype"], cell["batch"], cell["heads"]]
            group[cell["is_causal"], cell["head_dim"]].append(row)
    written = []
    for (dtype, batch, heads), panels in groups.items():
        if max(len(panel) for panel in panels.values()) < 2:
            continue  # no curve
        title = f"{environment['device']}, {dtype}, B = {batch}, H = {heads}"
        for name, draw in (("time", draw_times), ("speedup", draw_speedups)):
            path = folder / f"{name}-{dtype}-B{batch}-H{heads}.png"
            save(path, panels, title, draw)
            written.append(path)
    return written


def save(path: Path, panels: Panels, title: str, draw: Any) -> None:
    forms = sorted({is_causal for is_causal, _ in panels})
    widths = sorted({head_dim for _, head_dim in panels})
    size = (4.5 * len(widths), 3.6 * len(forms))
    figure, axes = plt.subplots(
        len(forms), len(widths), figsize=size, squeeze=False, layout="constrained"
    )
    for (is_causal, head_dim), rows in panels.items():
        ax = axes[forms.index(is_causal), widths.index(head_dim)]
        draw(ax, rows, head_dim)
        lengths = [row.cell["tokens"] for row in rows]
        ax.set_xscale("log", base=2)
        ax.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths])
        ax.minorticks_off()
        ax.set_title(f"d = {head_dim}" + (", causal" if is_causal else ""))
        ax.set_xlabel("N")
        ax.grid(alpha=0.3)
    lines = {line.get_label(): line for ax in axes.flat for line in ax.lines}
    named = {label: line for label, line in lines.items() if not label.startswith("_")}
    figure.legend(named.values(), named, loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_times(ax: Any, rows: list[Row], head_dim: int) -> None:
    for name in dict.fromkeys(name for row in rows for name in row.times):
        found = [(row.cell["tokens"], row.times[name]) for row in rows if name in row.times]
        style = "o-" if is_ours(name) else "s--"
        ax.plot(*zip(*found, strict=True), style, markersize=3, linewidth=1, label=name)
    ax.set_yscale("log")
    ax.set_ylabel("ms")


def draw_speedups(ax: Any, rows: list[Row], head_dim: int) -> None:
    for group_size in GROUP_SIZES:
        for estimator in TABLED:
            _draw_speedup(ax, rows, estimator, group_size)
        if head_dim // group_size >= 16:
            limit = speedup_limit(head_dim, group_size)
            label = f"limit 2d / (d/G + d), G = {group_size}"
            colour = COLOURS[group_size]
            ax.axhline(limit, color=colour, linestyle=":", linewidth=1, label=label)
    ax.axhline(1, color="black", linewidth=0.8)
    ax.set_ylabel("speedup")


def _draw_speedup(ax: Any, rows: list[Row], estimator: str, group_size: int) -> None:
    for line, name in (("-", "flash"), ("--", "best exact")):
        found = []
        for row in rows:
            ms, best = row.ours(group_size, estimator), row.best_exact()
            other = row.times.get(FLASH) if name == "flash" else best and best[1]
            if ms is not None and other is not None:
                found.append((row.cell["tokens"], other / ms))
        if found:
            label = f"{estimator}, G = {group_size}, over {name}"
            style, colour = MARKS[estimator] + line, COLOURS[group_size]
            ax.plot(*zip(*found, strict=True), style, color=colour, markersize=3, label=label)


def main() -> None:
    parser = argparse.ArgumentParser(description="plots of what was measured")
    parser.add_argument("folders", type=Path, nargs="+")
    for folder in parser.parse_args().folders:
        for path in plot(folder):
            print(path)


if __name__ == "__main__":
    main()
