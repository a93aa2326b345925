"""What ``tune`` found: the policy, what it costs and loses, and what else there was to choose."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tabulate import tabulate

from distr_compile.accuracy.metrics import Metric
from distr_compile.policy import Policy
from distr_compile.tuning.bounds import Loss
from distr_compile.tuning.frontier import drawn

NAMED = 4
"""Attentions that a sentence names."""

Kind = Literal["exact", "uniform", "frontier", "chosen"]


@dataclass(frozen=True)
class Point:
    """One choice for all layers.

    Attributes:
        kind: where it comes from.
        name: in tables and plots.
        setting: layer -> candidate, of the layers that are not exact.
        cost: of attention, as a share of exact attention's.
        predicted: the loss that the additive model expects, in the smooth measure; None where it
            knows no gain, of layers that have no candidate that is cheaper.
        measured: the smooth measure itself on the tuning half, where it was measured.
        loss: in the metric of the budget on the tuning half, likewise.
    """

    kind: Kind
    name: str
    setting: Mapping[str, str]
    cost: float
    predicted: float | None
    measured: float | None = None
    loss: Loss | None = None


@dataclass(frozen=True)
class Tuning:
    """What ``tune`` found: a policy, what it costs and loses, and the points beside it.

    Attributes:
        policy: the policy.
        text: of its file, with the evidence as comments.
        path: where that was written, if anywhere.
        metric: of the budget.
        smooth: name of the smooth measure.
        budget: the largest loss allowed.
        confidence: of the bounds.
        tuning: the loss on the tuning half.
        held_out: on the held-out half, of the policy compiled with ``backend="distr"``; None if
            nothing was approximated, so that nothing was looked at.
        looks: how often the held-out half was looked at, over all runs that the state has.
        clock: what costs are, in words.
        exact_cost: of exact attention over the tuning half, in ``unit``.
        unit: "s" or "FLOP".
        points: the exact model, uniform policies, the frontier, and what was chosen.
        refused: the attentions that had to stay exact -> why.
        notes: what else there is to say.
    """

    policy: Policy
    text: str
    path: Path | None
    metric: Metric
    smooth: str
    budget: float
    confidence: float
    tuning: Loss
    held_out: Loss | None
    looks: int
    clock: str
    exact_cost: float
    unit: str
    points: tuple[Point, ...]
    refused: Mapping[str, str]
    notes: tuple[str, ...] = ()

    @property
    def chosen(self) -> Point:
        """The choice that the policy says."""
        return next(point for point in self.points if point.kind == "chosen")

    @property
    def fits(self) -> bool:
        """Whether anything is approximated: within the budget, or the policy would be exact."""
        return bool(self.chosen.setting)

    def table(self) -> str:
        """Write the frontier: a line for each point, by falling cost."""
        rows = [
            [
                point.name,
                f"{len(point.setting)}",
                f"{100 * point.cost:.1f} %",
                _number(point.predicted),
                _number(point.measured),
                *_loss_cells(point.loss),
            ]
            for point in sorted(self.points, key=lambda p: (-p.cost, p.predicted or 0.0))
        ]
        headers = ["policy", "layers", "attention", f"{self.smooth} (predicted)"]
        headers += [self.smooth, self.metric.name, "loss", f"at most ({self.confidence:.0%})"]
        return tabulate(rows, headers, disable_numparse=True, stralign="right")

    def __str__(self) -> str:
        return "\n".join([self.table(), "", *self.summary(), *self.notes])

    def summary(self) -> list[str]:
        """Say in sentences the losses on both halves and the cost."""
        found = [
            f"Metric {self.metric.name}, budget {self.budget:g}"
            f"{' of its exact value' if self.metric.ideal is None else ''}.",
            f"Tuning half: {_loss_text(self.tuning, self.confidence)}.",
        ]
        if self.held_out is not None:
            found.append(
                f"Held-out half, looked at {_times(self.looks)}: "
                f"{_loss_text(self.held_out, self.confidence)}."
            )
        found.append(
            f"Attention takes {100 * self.chosen.cost:.1f} % of exact attention's "
            f"{self.exact_cost:.4g} {self.unit} ({self.clock})"
            f"{', not counting what cannot be approximated' if self.refused else ''}."
        )
        return [*found, *_refused_lines(self.refused)]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as JSON has it."""
        return {
            "policy": self.policy.to_dict(),
            "metric": self.metric.name,
            "smooth": self.smooth,
            "budget": self.budget,
            "confidence": self.confidence,
            "fits": self.fits,
            "tuning": dataclasses.asdict(self.tuning),
            "held_out": None if self.held_out is None else dataclasses.asdict(self.held_out),
            "looks": self.looks,
            "clock": self.clock,
            "exact_cost": self.exact_cost,
            "unit": self.unit,
            "points": [dataclasses.asdict(point) for point in self.points],
            "refused": dict(self.refused),
            "notes": list(self.notes),
        }

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the metric over the cost of attention; the format is the file's suffix.

        What is far from the frontier stands at the edge, with its value.

        Raises:
            ImportError: matplotlib is missing.
        """
        drawn(self, self._value_at_budget()).savefig(path)

    def _value_at_budget(self) -> float | None:
        exact = self.tuning.exact
        worse = -1 if self.metric.better == "higher" else 1
        if self.metric.ideal is None:
            return exact + worse * self.budget * abs(exact)
        return self.metric.ideal + worse * self.budget if math.isfinite(exact) else None


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:.3g}"


def _loss_cells(loss: Loss | None) -> list[str]:
    found = (None, None, None) if loss is None else (loss.value, loss.loss, loss.upper)
    return [_number(x) for x in found]


def _loss_text(loss: Loss, confidence: float) -> str:
    return (
        f"{loss.value:.5g} (exact {loss.exact:.5g}), loss {loss.loss:.3g}, at most "
        f"{loss.upper:.3g} with {confidence:.0%} confidence, {loss.examples} examples"
    )


def _refused_lines(refused: Mapping[str, str]) -> list[str]:
    """A sentence for each reason, with a few of the attentions."""
    by_reason: dict[str, list[str]] = {}
    for name, why in refused.items():
        by_reason.setdefault(why, []).append(name or "(root)")
    lines = []
    for why, names in by_reason.items():
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        stay = "attention stays" if len(names) == 1 else "attentions stay"
        lines.append(f"{len(names)} {stay} exact: {', '.join(names[:NAMED])}{more}: {why}.")
    return lines


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")
