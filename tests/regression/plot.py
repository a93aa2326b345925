"""A picture of the gate's numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distr_compile.accuracy.baseline import ModelResult

SMALLEST = 1e-5
"""Of the logarithmic axis; smaller losses, and gains, are drawn there."""


def plot(results: Sequence[ModelResult], path: Path) -> None:
    """Draw the loss of the first metric, of every model and policy, to ``path``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    policies = list(dict.fromkeys(name for result in results for name in result.policies))
    for place, policy in enumerate(policies):
        points = [
            (x + (place - len(policies) / 2) * 0.08, next(iter(found.metrics.values())).loss)
            for x, result in enumerate(results)
            if (found := result.policies.get(policy))
        ]
        axes.plot([x for x, _ in points], [max(y, SMALLEST) for _, y in points], "o", label=policy)
    axes.set_yscale("log")
    axes.set_ylabel("loss of the task metric, share of the exact one")
    names = [
        f"{result.name}\n{next(iter(next(iter(result.policies.values())).metrics))}"
        for result in results
    ]
    axes.set_xticks(range(len(results)), names)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(path)
    pyplot.close(figure)
