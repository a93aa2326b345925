"""Draws the two pictures of the documentation's first page.

    python -m benchmarks.first_page [FOLDER]    # docs/pictures by default

``idea.png``: one head of a trained model of ``tests/zoo``, exact and approximated. Nothing is
drawn by hand: Q, K and the rest are that head's, and the error in the title is computed.

``speed_fidelity.png``: speed over SDPA against the metric of two models, from what
``benchmarks.paper.attention_time`` and ``benchmarks.paper.without_tuning`` have measured
(``benchmarks/results/paper``). matplotlib is needed (``pip install 'distr-compile[plots]'``).
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from benchmarks.error_models import layers_of_zoo
from benchmarks.paper import attention_time, without_tuning
from benchmarks.store import ROOT, Cell, Store
from distr_compile.estimators import DEFAULT_ESTIMATOR
from distr_compile.kernels.attention import reference

FOLDER = ROOT / "docs" / "pictures"
IDEA, SPEED = "idea.png", "speed_fidelity.png"

# --- the idea ------------------------------------------------------------------------------------

MODEL, LAYER, HEAD, GROUP_SIZE = "tagger", 1, 0, 4
"""Which head; G = 4, so that the difference in width can be seen."""


@dataclass(frozen=True)
class Head:
    """One head of one input: one grouping block of all its rows.

    Attributes:
        Q, K: ``(N, d)``.
        Qhat, Khat: ``(N, r)``.
        weights, approximate: softmax(scale * Q K^T) and the same of Qhat Khat^T, ``(N, N)``.
    """

    Q: Tensor
    K: Tensor
    Qhat: Tensor
    Khat: Tensor
    weights: Tensor
    approximate: Tensor

    @property
    def error(self) -> float:
        """The relative Frobenius error of the weights."""
        return float((self.approximate - self.weights).norm() / self.weights.norm())


def head_of(name: str = MODEL, layer: int = LAYER, head: int = HEAD) -> Head:
    """A head of a model of the zoo, on the first of its examples, without rows of padding."""
    found = layers_of_zoo(name, 1)[1][layer]
    Q, K = (t[:, head : head + 1] for t in (found.Q, found.K))
    counted = K[0, 0].abs().amax(-1) > 0
    Q, K = Q[:, :, counted], K[:, :, counted]
    rank = Q.shape[3] // GROUP_SIZE
    (block,) = reference.estimate(
        Q, K, rank=rank, estimator=DEFAULT_ESTIMATOR, grouping_block=Q.shape[2]
    )
    scale = found.scale or Q.shape[3] ** -0.5
    exact, ours = (scale * s for s in (Q @ K.mT, block.Qhat @ block.Khat.mT))
    parts = (Q, K, block.Qhat, block.Khat, exact.softmax(-1), ours.softmax(-1))
    return Head(*(part[0, 0] for part in parts))


def draw_idea(head: Head) -> Any:
    """Above, Q K^T and the weights; below, the same of narrow factors, all to one scale."""
    N, d = head.Q.shape
    r = head.Qhat.shape[1]
    unit = 2.3 / N  # inches a row
    gap, top, text = 0.5, 0.75, 0.3
    width = 3 * gap + d * unit + 2 * N * unit + 0.25
    height = top + 2 * (N * unit + text)
    figure = plt.figure(figsize=(width, height))

    def place(left: float, middle: float, matrix: Tensor, title: str, **options: Any) -> float:
        rows, columns = (size * unit for size in matrix.shape)
        where = (left / width, (middle - rows / 2) / height, columns / width, rows / height)
        ax = figure.add_axes(where)
        ax.imshow(matrix, aspect="auto", interpolation="nearest", **options)
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_title(title, fontsize=9, pad=4)
        return left + columns

    def say(left: float, middle: float, what: str) -> None:
        figure.text(left / width, middle / height, what, ha="center", va="center", fontsize=13)

    rows = (
        (head.Q, head.K, head.weights, ("Q", "Kᵀ"), d, "exact"),
        (head.Qhat, head.Khat, head.approximate, ("Q A", "(K B)ᵀ"), r, "approximate"),
    )
    most = max(head.weights.max().item(), head.approximate.max().item()) ** 0.5
    for number, (left_factor, right_factor, weights, names, inner, kind) in enumerate(rows):
        middle = height - top - N * unit / 2 - number * (N * unit + text)
        # The narrow factors stand in the middle of the room that the wide ones take.
        start = gap + (d - inner) * unit / 2
        bound = max(factor.abs().quantile(0.99).item() for factor in (left_factor, right_factor))
        colours = {"cmap": "RdBu_r", "vmin": -bound, "vmax": bound}
        end = place(start, middle, left_factor, f"{names[0]}: {N} x {inner}", **colours)
        say((end + gap + d * unit + gap) / 2, middle, "\u00d7")
        end = place(
            gap + d * unit + gap, middle, right_factor.T, f"{names[1]}: {inner} x {N}", **colours
        )
        say(end + gap / 2, middle, "→")
        # The square root lets small weights be seen.
        shades = {"cmap": "magma", "vmin": 0, "vmax": most}
        place(end + gap, middle, weights.sqrt(), f"softmax, {kind}", **shades)
    figure.suptitle(
        f"One head of a trained BERT tagger, {N} tokens: {r} columns do the work of {d}\n"
        f"(relative error of the weights {head.error:.3f})",
        fontsize=10,
        y=1 - 0.1 / height,
        va="top",
    )
    return figure


# --- speed against fidelity ----------------------------------------------------------------------

WIDTH, TOKENS = 64, 8192
SPEEDS = (1, 2, 5, 10, 20, 50, 100, 200)
MODELS = {"digits-vit": "ViT, top-1", "tagger": "BERT tagger, macro F1"}
"""Those of head width 64 in the paper's Table 8 as measured here -> titles."""

MARKS = {
    "projection": ("tab:blue", "o"),
    "lsh-mean": ("tab:orange", "s"),
    "lsh-sample": ("tab:red", "v"),
    "Hyper": ("tab:green", "D"),
    "Hydra": ("tab:purple", "P"),
}
"""Of each method, before its settings: colour and marker."""


@dataclass(frozen=True)
class Point:
    """What was measured of one method on one model.

    Attributes:
        name: with its settings.
        speed: over SDPA, median of the rounds, and the least and greatest.
        metric: of the model with all layers approximated.
        interval: of the metric, 95 %.
        exact: the metric of the exact model.
    """

    name: str
    speed: tuple[float, float, float]
    metric: float
    interval: tuple[float, float]
    exact: float


def points(times: dict[str, Cell], metrics: dict[str, Cell], model: str) -> list[Point]:
    """Everything that has both a speed and a metric."""
    found = []
    ratios = times[f"d={WIDTH}, N={TOKENS}"]["over SDPA"]
    for arm, over in ratios.items():
        cell = metrics.get(f"{model}: {arm}") or metrics.get(f"{model}: {arm}, all layers")
        if cell is None or "value" not in cell:
            continue
        low, high = (cell["exact"] + end for end in cell["interval"])
        speed = (statistics.median(over), min(over), max(over))
        found.append(Point(arm, speed, cell["value"], (low, high), cell["exact"]))
    return found


def draw_speed(times: dict[str, Cell], metrics: dict[str, Cell]) -> Any:
    """A panel for each model; right is faster, up is nearer to the exact model."""
    figure, axes = plt.subplots(1, len(MODELS), figsize=(8.6, 3.7), layout="constrained")
    for ax, (model, title) in zip(axes, MODELS.items(), strict=True):
        found = points(times, metrics, model)
        exact = found[0].exact
        ours = times[f"d={WIDTH}, N={TOKENS}"]["over SDPA"]["exact"]
        for label, speed, marker in (
            ("exact, SDPA", 1.0, "*"),
            ("exact, our kernel", statistics.median(ours), "^"),
        ):
            ax.plot(speed, exact, marker, color="black", markersize=8, label=label)
        for point in found:
            kind, _, setting = point.name.partition(", ")
            colour, marker = MARKS[kind]
            middle, least, most = point.speed
            ax.errorbar(
                middle,
                point.metric,
                yerr=[[point.metric - point.interval[0]], [point.interval[1] - point.metric]],
                xerr=[[middle - least], [most - middle]],
                fmt=marker,
                color=colour,
                markerfacecolor="white" if setting == "G=4" else colour,
                markersize=6,
                elinewidth=0.8,
                label=point.name.replace("=", " = "),
            )
        ax.axhline(exact, color="grey", linewidth=0.8, linestyle=":", zorder=0)
        ax.set(xscale="log", ylim=(0, 1.05), title=title, xlabel="speed over SDPA, times")
        ax.set_xticks(SPEEDS, map(str, SPEEDS))
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("metric, all layers approximated")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    times, metrics = (Store(s.SCRIPT.results, {}).cells for s in (attention_time, without_tuning))
    with torch.no_grad():
        figures = {IDEA: draw_idea(head_of()), SPEED: draw_speed(times, metrics)}
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=110)
        print(folder / name)


if __name__ == "__main__":
    main()
