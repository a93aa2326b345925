"""How much of the model's output an error of one attention spoils: the model of loss.

The squared relative error e^2 of an attention's output, for every candidate, comes from one pass
over the exact model. What such an error does to the output of the whole model, the gain g, comes
from one run for each layer in which only that layer is approximated, with a candidate of middling
error. Then

    predicted loss of a choice = sum over the layers of g_l e_l^2,

in a smooth measure of the output that needs no labels. It takes errors of layers to be small and
independent: squares add up, products of different layers' errors do not.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distr_compile.accuracy import ranks
from distr_compile.accuracy.batch import Batch
from distr_compile.accuracy.evaluate import device_of, exactly
from distr_compile.accuracy.instrument import Call, Instrument, SiteErrors
from distr_compile.accuracy.metrics import METRICS, Metric, has_logits
from distr_compile.policy import Policy
from distr_compile.restoring import Repeatable
from distr_compile.tuning.search import Option, undominated

Setting = Mapping[str, str]
"""Layer -> candidate; layers that are left out are exact."""

EXACT = "exact"
"""Stands for exact attention among the labels of candidates."""


def _noise_to_signal(rows: Tensor) -> float:
    signal, noise = rows.sum(0).tolist()
    return float(noise / signal) if signal else math.inf * noise


NOISE = Metric("noise", "lower", 0.0, METRICS["sqnr"].statistic, _noise_to_signal)
"""Squared relative error of the main output."""


def smooth_metric(output: Any, batch: Batch) -> Metric:
    """What the model of loss predicts: KL divergence of logits, else the noise of the output."""
    return METRICS["kl"] if has_logits(output, batch) else NOISE


@dataclass
class Bench:
    """A model that runs with any choice of candidates without being compiled again.

    Attributes:
        model: the module that will be compiled.
        policies: the candidates, each as a policy.
    """

    model: Callable[..., Any]
    policies: Mapping[str, Policy]
    _setting: Setting = field(default_factory=dict)
    _run: Callable[..., Any] | None = None
    _again: Repeatable | None = None

    @contextlib.contextmanager
    def ready(self) -> Iterator[Callable[[Batch, Setting], Any]]:
        """Give, in this context, a function (batch on the model's device, setting) -> output.

        A context within it compiles nothing anew.
        """
        if self._run is not None:
            yield self._output
            return
        with Instrument(self._answer, policies=self.policies).on(self.model) as run:
            self._run, self._again = run, Repeatable(self.model)
            try:
                yield self._output
            finally:
                self._run = self._again = None

    def _output(self, batch: Batch, setting: Setting) -> Any:
        assert self._run is not None
        assert self._again is not None
        self._setting = setting
        return self._again.call(self._run, batch.args, batch.kwargs)

    def _answer(self, call: Call) -> Tensor:
        label = self._setting.get(call.site.layer, EXACT)
        return call.approximate(label) if label in call.candidates else call.exact()

    @torch.no_grad()
    def rows(
        self,
        batches: Iterable[Batch],
        settings: Sequence[Setting],
        metrics: Iterable[Metric],
    ) -> list[dict[Metric, Tensor]]:
        """The rows of every metric for the exact model, then for every setting.

        By the metric itself, not its name: one that is asked for twice has its rows once, and two
        of the same name have their own.

        Args:
            batches: walked once; nothing of a batch but its rows is kept.
            settings: what to measure.
            metrics: see ``Metric``.
        """
        once = dict.fromkeys(metrics)
        parts: list[dict[Metric, list[Tensor]]] = [
            {metric: [] for metric in once} for _ in range(len(settings) + 1)
        ]
        with self.ready() as output:

            def rows_of(given: Batch) -> list[Tensor]:
                assert self._again is not None
                batch = given.to(device_of(self.model))
                self._again.begin()
                exact = exactly(self.model, batch, self._again)
                outputs = (s if s is None else output(batch, s) for s in (None, *settings))
                return [
                    metric.statistic(exact if out is None else out, exact, batch)
                    for out in outputs
                    for metric in once
                ]

            for _, found in ranks.dealt(batches, rows_of):
                for place, rows in zip((of[m] for of in parts for m in once), found, strict=True):
                    place.append(rows)
        return [{metric: torch.cat(rows) for metric, rows in part.items()} for part in parts]


@dataclass(frozen=True)
class Sensitivity:
    """The model of loss.

    Attributes:
        errors: layer -> candidate -> squared relative error of its attention's output, summed over
            the attentions of the layer.
        gains: layer -> g; 0 for layers that were not looked at.
    """

    errors: Mapping[str, Mapping[str, float]]
    gains: Mapping[str, float] = field(default_factory=dict)

    def loss(self, layer: str, label: str) -> float:
        """What one layer adds to the predicted loss."""
        if label == EXACT:
            return 0.0
        error = self.errors[layer][label]
        gain = self.gains.get(layer, 0.0)
        return gain * error if math.isfinite(gain * error) else math.inf

    def predicted(self, setting: Setting) -> float:
        """The loss that is predicted for a choice."""
        return math.fsum(self.loss(layer, label) for layer, label in setting.items())


def squared_errors(measured: SiteErrors) -> dict[str, dict[str, float]]:
    """Layer -> candidate -> sum of the squares of what ``measured`` has for its attentions.

    A layer one of whose calls cannot be told from another's is left out.
    """
    mixed = {measured.layers[name] for name in measured.mixed}
    squares: dict[str, dict[str, float]] = {}
    for name, errors in measured.errors.items():
        layer = measured.layers[name]
        if layer in mixed:
            continue
        of_layer = squares.setdefault(layer, {})
        for label, error in errors.items():
            if label in measured.sites[name].possible:
                of_layer[label] = of_layer.get(label, 0.0) + error**2
    return squares


def probe(options: Iterable[Option]) -> str | None:
    """The candidate to measure a layer's gain with, of middling error.

    Args:
        options: of the layer, whose losses are errors. Only those count that no other beats: they
            may be chosen, and errors of different kinds do different harm.
    """
    usable = undominated([o for o in options if math.isfinite(o.loss) and o.loss > 0])
    return usable[len(usable) // 2].label if usable else None
