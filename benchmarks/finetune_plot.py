"""Draws what training through each approximation gives, beside the control: a panel for each model.

python -m benchmarks.finetune_plot [FOLDER]    # docs by default
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.finetune import EXACT, MODELS, POLICIES, SCRIPT, SEEDS, key
from benchmarks.paper.figures import bars
from benchmarks.store import ROOT, Cell, Store

NAME = "finetuned.png"
STYLES = {
    "not trained further": ("x", "0.5", -0.2),
    "trained exactly, then approximated (control)": ("o", "tab:orange", 0.0),
    "trained through the approximation": ("s", "tab:blue", 0.2),
}
"""Marker, colour, and how far off the middle of its arm."""


def draw(found: dict[str, Cell], folder: Path) -> Path:
    """Means over the seeds of what was measured, with the least and the greatest of them."""
    figure, axes = plt.subplots(
        1, len(MODELS), figsize=(4.2 * len(MODELS), 4), layout="constrained"
    )
    for ax, (name, title) in zip(axes, MODELS.items(), strict=True):
        for label, (marker, color, shift) in STYLES.items():
            points = [
                (x + shift, values)
                for x, arm in enumerate(POLICIES)
                if (values := differences(found, name, arm, label))
            ]
            if points:
                bars(ax, points, statistics.fmean, marker, label=label, color=color)
        ax.axhline(0, color="k", linewidth=0.8)
        unit = "points"
        if "perplexity" in title:  # less is better: upside down
            unit = "per cent"
            ax.set_yscale("symlog", linthresh=1)
            ax.set_ylim(1000, -1)
            ax.set_yticks([100, 10, 1, 0], ["+100", "+10", "+1", "0"])
        ax.set(title=title, ylabel=f"less exact attention, {unit} (up is better)")
        ax.set_xticks(range(len(POLICIES)), list(POLICIES), rotation=40, ha="right", fontsize=8)
        ax.grid(alpha=0.3, axis="y")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / NAME, dpi=110)
    plt.close(figure)
    return folder / NAME


def differences(found: dict[str, Cell], name: str, arm: str, label: str) -> list[float]:
    """From exact attention of the same training: one number a seed, none where not measured."""
    untouched, control, _ = STYLES
    if label == untouched:
        of = [found.get(f"{name}: untouched", {}).get("less exact", {}).get(arm)]
    elif label == control:
        exact = [found.get(key(name, seed, EXACT), {}) for seed in SEEDS]
        of = [cell.get("less exact", {}).get(arm) for cell in exact]
    else:
        of = [found.get(key(name, seed, arm), {}).get("less exact") for seed in SEEDS]
    return [each["difference"] for each in of if each]


def main() -> None:
    parser = argparse.ArgumentParser(description="training through approximations, as a picture")
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "docs")
    print(draw(Store(SCRIPT.results, {}).cells, parser.parse_args().folder))


if __name__ == "__main__":
    main()
