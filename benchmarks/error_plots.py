"""Draws the accuracy of the estimators: error over G, and heat maps as in the paper's Figure 7."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from torch import Tensor

from benchmarks.error_inputs import draw
from benchmarks.error_metrics import SVD_LIMIT, methods, scores

FIGURE_7 = {"tokens": 64, "head_dim": 32}
CURVES = tuple((metric, block) for metric in ("scores", "output") for block in (64, "all"))
HEAT_MAPS = ("uniform(0, 1)", "sliding window", "one-hot rows")
SETTINGS = (((2, 1), (2, 2), (2, 4), (2, 8)), ((2, 2), (4, 2), (8, 2), (16, 2)))  # (G, l)


def plot(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draw everything; the files that were written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [draw_curves(results, metric, block, folder) for metric, block in CURVES]
    written += [draw_figure_7(name, folder) for name in methods() if name.startswith("lsh")]
    return written + [draw_heat_maps(name, folder) for name in HEAT_MAPS]


def draw_curves(results: dict[str, Any], metric: str, block: int | str, folder: Path) -> Path:
    """A panel for each set of inputs: relative error over G."""
    which = results["errors are"].index(metric)
    rows = [row for row in results["errors"] if row["block"] == block]
    sets = list(dict.fromkeys(row["set"] for row in rows))
    across = 4
    down = -(-len(sets) // across)
    figure, axes = plt.subplots(
        down, across, figsize=(3.2 * across, 2.5 * down), squeeze=False, layout="constrained"
    )
    for ax in axes.flat[len(sets) :]:
        ax.axis("off")
    for ax, name in zip(axes.flat, sets, strict=False):
        own = [row for row in rows if row["set"] == name]
        for method in own[0]["errors"]:
            style = "k--" if method == SVD_LIMIT else "o-"
            found = [max(row["errors"][method][which], 1e-4) for row in own]
            ax.plot([row["G"] for row in own], found, style, markersize=3, label=method)
        ax.set_xscale("log", base=2)
        ax.set_xticks([2, 4, 8], ["2", "4", "8"])
        ax.set_yscale("log")
        ax.set_title(name, fontsize=9)
        ax.grid(alpha=0.3)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
    figure.suptitle(f"relative error of the {metric} over G, grouping block {block}")
    return _save(figure, folder / f"{metric}-over-G-block-{block}.png")


def draw_figure_7(method: str, folder: Path) -> Path:
    """S and Shat (G = l = 2) at the left; then |Shat - S| / S, l varied above, G varied below."""
    i = draw("uniform(0, 1)", trials=1, **FIGURE_7)
    S = i.Q @ i.K.mT

    def estimated(group_size: int, block: int) -> Tensor:
        rank = FIGURE_7["head_dim"] // group_size
        return scores(i, methods()[method](i.Q, i.K, rank=rank, grouping_block=block))

    figure, axes = plt.subplots(2, 5, figsize=(15, 6), layout="constrained")
    limits = {"vmin": S.min().item(), "vmax": S.max().item()}
    for ax, matrix, title in ((axes[0, 0], S, "S"), (axes[1, 0], estimated(2, 2), "Shat")):
        image = _show(ax, matrix, title, **limits)
    figure.colorbar(image, ax=axes[:, 0])
    for line, settings in zip(axes[:, 1:], SETTINGS, strict=True):
        for ax, (group_size, block) in zip(line, settings, strict=True):
            error = (estimated(group_size, block) - S).abs() / S
            title = f"G = {group_size}, l = {block}: mean {100 * error.mean().item():.1f} %"
            image = _show(ax, error, title, cmap="magma", vmin=0, vmax=0.5)
    figure.colorbar(image, ax=axes[:, 1:])
    figure.suptitle(f"{method}: error of every score, N = 64, d = 32, uniform(0, 1)")
    return _save(figure, folder / f"figure-7-{method}.png")


def draw_heat_maps(name: str, folder: Path) -> Path:
    """What each method makes of S with four columns for 32 (G = 8), and how far it is off."""
    i = draw(name, trials=1, **FIGURE_7)
    S = i.Q @ i.K.mT
    limits = {"vmin": S.min().item(), "vmax": S.max().item()}
    figure, axes = plt.subplots(2, len(methods()) + 1, figsize=(18, 6), layout="constrained")
    _show(axes[0, 0], S, "S", **limits)
    axes[1, 0].axis("off")
    found = {
        title: scores(i, method(i.Q, i.K, rank=4, grouping_block=64))
        for title, method in methods().items()
    }
    most = max((Shat - S).abs().max().item() for Shat in found.values())
    for (above, below), (title, Shat) in zip(axes.T[1:], found.items(), strict=True):
        image = _show(above, Shat, title, **limits)
        error = f"relative error {((Shat - S).norm() / S.norm()).item():.3f}"
        wrong = _show(below, (Shat - S).abs(), error, cmap="magma", vmin=0, vmax=most)
    figure.colorbar(image, ax=axes[0])
    figure.colorbar(wrong, ax=axes[1])
    figure.suptitle(f"{name}, N = 64, d = 32, G = 8, one grouping block: Shat, |Shat - S|")
    kind = name.partition("(")[0].replace(" ", "-")
    return _save(figure, folder / f"heat-maps-{kind}.png")


def _show(ax: Any, matrix: Tensor, title: str, **options: Any) -> Any:
    ax.set_title(title, fontsize=9)
    ax.set_xticks([])
    ax.set_yticks([])
    return ax.imshow(matrix[0, 0], **options)


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
