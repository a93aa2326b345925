"""The pictures of the first page show what was measured and computed, nothing else."""

from __future__ import annotations

import json
import statistics
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch

from benchmarks import first_page
from benchmarks.store import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "paper"


def committed(name: str) -> dict[str, Any]:
    cells: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())["cells"]
    return cells


@pytest.mark.parametrize("model", first_page.MODELS)
def test_points_are_those_of_the_committed_results(model: str) -> None:
    times, metrics = committed("attention_time"), committed("without_tuning")
    found = {p.name: p for p in first_page.points(times, metrics, model)}
    assert len(found) == 8
    for name in ("projection, G=2", "lsh-sample, G=4", "Hydra"):
        cell = metrics[f"{model}: {name}" if "=" in name else f"{model}: {name}, all layers"]
        over = times["d=64, N=8192"]["over SDPA"][name]
        assert found[name].metric == cell["value"]
        assert found[name].exact == cell["exact"]
        assert found[name].interval[0] == pytest.approx(cell["exact"] + cell["interval"][0])
        assert found[name].speed == (statistics.median(over), min(over), max(over))
    figure = first_page.draw_speed(times, metrics)
    ax = figure.axes[list(first_page.MODELS).index(model)]
    drawn = {
        (line.get_xdata()[0], line.get_ydata()[0])
        for line in ax.lines
        if len(line.get_xdata()) == 1
    }
    assert {(p.speed[0], p.metric) for p in found.values()} <= drawn
    plt.close(figure)


def test_the_idea_is_of_a_real_head() -> None:
    with torch.no_grad():
        head = first_page.head_of()
    assert head.Qhat.shape[1] * first_page.GROUP_SIZE == head.Q.shape[1] == 64
    scores = head.Q @ head.K.mT
    torch.testing.assert_close(head.weights, (scores / 8).softmax(-1))
    # Not nearer than the best scores of this rank, and not far from them.
    left, sizes, right = torch.linalg.svd(scores, full_matrices=False)
    r = head.Qhat.shape[1]
    best = ((left[:, :r] * sizes[:r]) @ right[:r] - scores).norm()
    ours = (head.Qhat @ head.Khat.mT - scores).norm()
    assert best <= ours < 1.5 * best
    figure = first_page.draw_idea(head)
    titles = [ax.get_title() for ax in figure.axes]
    assert titles[:2] == ["Q: 256 x 64", "Kᵀ: 64 x 256"]
    assert f"error of the weights {head.error:.3f}" in figure.get_suptitle()
    plt.close(figure)


def test_the_committed_pictures_are_small() -> None:
    sizes = [(first_page.FOLDER / n).stat().st_size for n in (first_page.IDEA, first_page.SPEED)]
    assert max(sizes) <= 300_000
