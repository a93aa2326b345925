"""The cheapest policy within a budget: measure every layer, choose, verify, write it down.

1. One pass over the exact model measures the error of every candidate at every attention, and one
   run for each layer its gain: ``sensitivity.py``.
2. Costs come from the device at hand or are counted: ``cost.py``.
3. An integer program gives the frontier, the cheapest choices at rising predicted loss:
   ``search.py``. Prediction only orders the choices.
4. Bisection on the frontier, with the real metric on the tuning half of the data, finds the
   cheapest choice whose loss is within the budget with some confidence: ``bounds.py``.
5. That policy is compiled as users compile it and held against the held-out half. If it is over the
   budget there, a choice whose predicted loss is smaller by that much is tried, and so on,
   ``LOOKS`` times at most.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from distr_compile import underneath
from distr_compile.accuracy import ranks
from distr_compile.accuracy.batch import Batches
from distr_compile.accuracy.checkpoint import write_whole
from distr_compile.accuracy.evaluate import device_of
from distr_compile.accuracy.given import check_compiler, check_folder, check_share
from distr_compile.accuracy.metrics import Metric, Score, as_metric
from distr_compile.accuracy.progress import progress_bar
from distr_compile.policy import Policy
from distr_compile.tuning import cost
from distr_compile.tuning.bounds import Loss
from distr_compile.tuning.candidates import Candidates, candidate_fields
from distr_compile.tuning.halves import Halves
from distr_compile.tuning.measurements import Measurements
from distr_compile.tuning.search import Choice, Option, frontier
from distr_compile.tuning.sensitivity import EXACT, Setting
from distr_compile.tuning.state import State
from distr_compile.tuning.tuned import Point, Tuning
from distr_compile.tuning.written import versions

LOOKS = 4
"""At the held-out half, in one run. Every look spends some of what it is worth."""

MARGIN = 0.9
"""To the predicted loss that would just be within the budget, after a look that was over it."""


def tune(
    model: nn.Module,
    batches: Batches,
    budget: float,
    *,
    metric: Metric | str | Score = "kl",
    path: str | os.PathLike[str] | None = None,
    candidates: Candidates | None = None,
    policy: str | os.PathLike[str] | Policy | Mapping[str, Any] | None = None,
    time: str = "measure",
    held_out: float = 0.5,
    confidence: float = 0.95,
    compiler: str = "eager",
    command: str = "",
    progress: bool = True,
    resume: bool = True,
) -> Tuning:
    """Find the policy of least attention cost whose loss is within a budget, and write it.

    Args:
        model: the module that will be compiled, in eval mode. What it was compiled with already,
            and plans of ``distr_compile.transformers.apply``, are set aside meanwhile.
        batches: data with labels, if the metric needs them; as ``batch.walk`` takes them, two or
            more, and the same ones every time.
        budget: the largest ``Metric.loss`` allowed: for a metric with labels a share of the exact
            value (0.01 is 1 %), for one against the exact model an amount of its own.
        metric: see ``metrics.as_metric``. "kl" needs logits; without them and without labels take
            "cosine" or "sqnr".
        path: of the policy file to write. Beside it, ``PATH.state.json`` keeps what was measured.
            Its folder must be there.
        candidates: plans as fields or ``LayerPlan``; for each layer the best of them is chosen, or
            exact attention. None: ``CANDIDATES``, and ``CALIBRATED`` if the policy has bases.
        policy: what is settled already. Layers that one of its rules gives a ``group_size`` or
            ``rank`` keep their plans; its ``causal``, ``exact`` and ``[bases]`` count everywhere.
        time: how costs are found, see ``cost.clock``.
        held_out: share of the batches that only the final policy sees, spread evenly.
        confidence: with which the loss on the tuning half must be within the budget.
        compiler: of the final policy's graphs; see ``evaluate``.
        command: the command line, to be named in the file.
        progress: show a bar on the terminal's stderr.
        resume: take up what the state file has. Losses in a metric whose code cannot be compared,
            such as a method of an object, are measured anew.

    Returns:
        The policy and the evidence. If nothing fits, an all-exact policy and a note that says so.

    Raises:
        ValueError: an argument that is not accepted, a metric that does not fit model and data, a
            model in training mode, or one without attention to tune.
        PolicyError: the policy or a candidate is wrong.
    """
    with underneath.plain(model) as own:
        as_of_metric = as_metric(metric)
        _check(own, budget, as_of_metric, held_out, confidence)
        check_compiler(compiler)
        if path is not None:
            check_folder(path)
        base = Policy() if policy is None else Policy.from_any(policy)
        known = Measurements(
            model=own,
            data=Halves(batches, held_out),
            metric=as_of_metric,
            confidence=confidence,
            base=base,
            fields=candidate_fields(base, candidates),
            clock=cost.clock(time, device_of(own)),
            compiler=compiler,
        )
        state_path = None if path is None else Path(f"{os.fspath(path)}.state.json")
        known.state, stale = State.shared(state_path, known.key(time), resume=resume)
        tuner = _Tuner(known, float(budget), [f"Begun anew: {stale}."] if stale else [])
        if known.state.found:
            tuner.taken = [f"Measurements taken from {state_path}; not all were made in this run."]
            if known.metric_identity is None and known.state.forget_losses():
                tuner.taken.append(
                    f"Losses were measured anew: nobody can tell whether {as_of_metric.name} is "
                    "the metric of before. Give a function whose closure holds no objects."
                )
        known.check_metric()
        with progress_bar(progress) as known.bar:
            if progress and ranks.is_first():
                for note in (*tuner.notes, *tuner.taken):
                    known.bar.console.print(note, highlight=False)
            return tuner.run(None if path is None else Path(path), command)


def _check(
    model: object, budget: float, metric: Metric, held_out: float, confidence: float
) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: got {type(model).__name__}; accepted: a torch.nn.Module")
    if model.training:
        raise ValueError("model: got one in training mode; accepted: eval mode; call model.eval()")
    is_number = isinstance(budget, int | float) and not isinstance(budget, bool)
    if not is_number or not 0 <= budget < math.inf:
        raise ValueError(f"budget: got {budget!r}; accepted: a number >= 0, such as 0.01")
    if metric.ideal is None and budget >= 1:
        raise ValueError(
            f"budget: got {budget!r} for {metric.name}; accepted: a share of the exact model's "
            "value, less than 1; write 0.01 for 1 %"
        )
    for name, value in (("held_out", held_out), ("confidence", confidence)):
        check_share(name, value)


@dataclass
class _Tuner:
    """The steps; see ``tune``."""

    known: Measurements
    budget: float
    notes: list[str] = field(default_factory=list)
    taken: list[str] = field(default_factory=list)
    """Notes on this run, of no interest in the file."""

    def run(self, path: Path | None, command: str) -> Tuning:
        """All of them."""
        self.known.measure_errors()
        with self.known.bench.ready():
            self.known.measure_gains()
            choices = self._frontier()
            self.known.verify([self.known.uniform_setting(label) for label in self.known.uniform])
            best = self._bisect(choices)
        chosen, held_out = self._hold_against_held_out(choices, best)
        return self._result(path, command, choices, chosen, held_out)

    def _frontier(self) -> list[Choice]:
        """The choices of the first process, in each of them."""
        layers = self.known.state.found["errors"]
        found = ranks.of_first(
            lambda: [
                vars(choice)
                for choice in frontier({layer: self.known.options(layer) for layer in layers})
            ]
        )
        return [Choice(**each) for each in found]

    def _within(self, setting: Setting) -> bool:
        """Whether the loss on the tuning half is within the budget, with confidence."""
        return self.known.verify([_without_exact(setting)])[0].upper <= self.budget

    def _bisect(self, choices: Sequence[Choice]) -> int | None:
        """The index of the cheapest choice within the budget; None if there is none."""
        if not choices or not self._within(choices[0].labels):
            return None
        within, over = 0, len(choices)
        while over - within > 1:
            middle = (within + over) // 2
            if self._within(choices[middle].labels):
                within = middle
            else:
                over = middle
        return within

    def _hold_against_held_out(
        self, choices: Sequence[Choice], best: int | None
    ) -> tuple[Setting, Loss | None]:
        """The first choice that is within the budget there, too; {} if there is none."""
        seen: Loss | None = None
        for look in range(LOOKS):
            setting = {} if best is None else _without_exact(choices[best].labels)
            if best is None or not setting:
                break
            seen = self.known.look(setting)
            if seen.loss <= self.budget:
                return setting, seen
            self.notes.append(
                f"Look {look + 1} at the held-out half: loss {seen.loss:.3g}, over the budget."
            )
            limit = choices[best].loss * MARGIN * self.budget / seen.loss
            best = self._tighter(choices, best, limit)
        return {}, None

    def _tighter(self, choices: Sequence[Choice], index: int, limit: float) -> int | None:
        """The next choice whose predicted loss is not over ``limit``, within the budget."""
        with self.known.bench.ready():
            for tighter in range(index - 1, -1, -1):
                if choices[tighter].loss <= limit and self._within(choices[tighter].labels):
                    return tighter
        return None

    def _points(self, choices: Sequence[Choice], chosen: Setting) -> tuple[Point, ...]:
        points = [self.known.point("exact", "exact", {})]
        for label in self.known.uniform:
            points.append(
                self.known.point("uniform", f"uniform {label}", self.known.uniform_setting(label))
            )
        for choice in choices:
            setting = _without_exact(choice.labels)
            if setting and setting != chosen:
                points.append(self.known.point("frontier", "frontier", setting))
        points.append(self.known.point("chosen", "chosen", chosen))
        return tuple(points)

    def _result(
        self,
        path: Path | None,
        command: str,
        choices: Sequence[Choice],
        chosen: Setting,
        held_out: Loss | None,
    ) -> Tuning:
        tuning = self.known.verify([chosen])[0]
        costs = self.known.state.found["costs"].values()
        if not chosen:
            self.notes.append(self._why_exact(choices))
        elif tuning.upper == tuning.loss:
            self.notes.append(self._unmoved(tuning.examples))
        if chosen and (others := self.known.not_as_given(chosen)):
            self.notes.append(
                "Exact instead of what the given policy says, because it could not be measured "
                f"there: {', '.join(layer or '(root)' for layer in others)}."
            )
        result = Tuning(
            policy=Policy(),
            text="",
            path=path,
            metric=self.known.metric,
            smooth=self.known.smooth.name,
            budget=self.budget,
            confidence=self.known.confidence,
            tuning=tuning,
            held_out=held_out,
            looks=self.known.state.looks,
            clock=self.known.clock.about,
            exact_cost=math.fsum(of_layer[EXACT] for of_layer in costs),
            unit=self.known.clock.unit,
            points=self._points(choices, chosen),
            refused=self.known.state.found["refused"],
            notes=(*self.taken, *self.notes),
        )
        about = [
            f"Tuned by {versions()}." + (f"\n{command}" if command else ""),
            "\n".join([*result.summary(), *self.notes]),
            "The lines above a rule: relative error of the attention's output; gain (what its "
            "square costs the model's output); the two multiplied; the cost of exact attention "
            "that is left.",
        ]
        text = self.known.text(chosen, about, path.parent if path is not None else os.curdir)
        is_written = path is not None and ranks.is_first()
        if path is not None and is_written:
            write_whole(path, text.encode())
        found = Policy.load(path) if path is not None and is_written else self.known.policy(chosen)
        return replace(result, text=text, policy=found)

    def _unmoved(self, examples: int) -> str:
        """No loss in any half of the examples: what that does not rule out (rule of three)."""
        confidence = self.known.confidence
        share = min(1.0, -math.log(1 - confidence) / examples)
        return (
            f"Of {examples} examples none moved the metric down; that rules out with "
            f"{confidence:.0%} confidence only that it happens to more than {share:.2g} of all."
        )

    def _why_exact(self, choices: Sequence[Choice]) -> str:
        layers = self.known.state.found["errors"]
        options = {layer: self.known.options(layer) for layer in layers}
        if stuck := [x for x, of_layer in options.items() if not any(map(_is_finite, of_layer))]:
            return (
                "All layers stay exact: with the plan that the given policy has for "
                f"{', '.join(layer or '(root)' for layer in stuck)}, the output is not finite."
            )
        others = [o for of_layer in options.values() for o in of_layer if o.label != EXACT]
        if not others:
            return (
                "All layers stay exact: no candidate costs less than exact attention at these "
                f"shapes ({self.known.clock.about})."
            )
        if not any(map(_is_finite, others)):
            return (
                "All layers stay exact: with each of the candidates that cost less the output is "
                "not finite."
            )
        return f"All layers stay exact: nothing cheaper is within the budget of {self.budget:g}."


def _is_finite(option: Option) -> bool:
    return math.isfinite(option.loss)


def _without_exact(labels: Mapping[str, str]) -> dict[str, str]:
    return {layer: label for layer, label in labels.items() if label != EXACT}
