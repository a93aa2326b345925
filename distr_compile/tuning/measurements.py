"""What ``tune`` measures of a model, each thing once: kept in the state, taken from there later."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import tomlkit
import torch
from rich.progress import Progress
from torch import Tensor, nn

from distr_compile.accuracy import ranks, sameness
from distr_compile.accuracy.batch import Batch
from distr_compile.accuracy.evaluate import device_of, evaluate, exactly
from distr_compile.accuracy.instrument import SiteErrors, site_errors
from distr_compile.accuracy.metrics import METRICS, Metric
from distr_compile.policy import Policy
from distr_compile.restoring import Repeatable
from distr_compile.tuning.bounds import Loss, loss_with_bound
from distr_compile.tuning.candidates import UNIFORM, name_of, spelled_out
from distr_compile.tuning.cost import Clock
from distr_compile.tuning.halves import Halves
from distr_compile.tuning.search import Option
from distr_compile.tuning.sensitivity import (
    EXACT,
    NOISE,
    Bench,
    Sensitivity,
    Setting,
    probe,
    smooth_metric,
    squared_errors,
)
from distr_compile.tuning.state import State, setting_key
from distr_compile.tuning.tuned import Kind, Point
from distr_compile.tuning.written import fields_of, policy_text, versions

GAINS_AT_ONCE = 4
"""Layers whose gains are measured in one pass, after which they are kept."""

KEPT = "as given"
"""Label of the plan of layers that a rule of the given policy has settled."""


@dataclass
class Measurements:
    """A model, its data and candidates, and what is known of them; see ``tune``.

    Attributes:
        model, metric, confidence, compiler: as ``tune`` takes them.
        data: in halves.
        base: the policy that was given.
        fields: candidate -> what a rule sets.
        clock: how costs are found.
        state: what is known.
        bar: to show progress on.
        policies: candidate, uniform plan or ``KEPT`` -> the policy that gives it to all layers.
        uniform: labels of the plans to compare with.
        bench: runs the model with any choice.
    """

    model: nn.Module
    data: Halves
    metric: Metric
    confidence: float
    base: Policy
    fields: Mapping[str, Mapping[str, Any]]
    clock: Clock
    compiler: str
    state: State = field(init=False)
    bar: Progress = field(init=False)
    _smooth: Metric = field(init=False)

    def __post_init__(self) -> None:
        plans = [Policy(default=fields).default for fields in UNIFORM]
        uniform = {name_of(plan): spelled_out(plan) for plan in plans}
        self.policies = {
            label: self.base.with_rule("*", **fields)
            for label, fields in {**uniform, **self.fields}.items()
        }
        self.policies[KEPT] = self.base
        self.uniform = tuple(uniform)
        self.bench = Bench(self.model, self.policies)

    def key(self, time: str) -> dict[str, Any]:
        """What measurements depend on, for the state; looks have the compiler in their own key."""
        return {
            "model": sameness.of_model(self.model),
            "device": sameness.of_device(self.model),
            "data": self.data.digest,
            "held-out part": self.data.held_out_indices,
            "set of candidates": self.fields,
            "policy": self.base.digest,
            "metric": self.metric_identity,
            "confidence": self.confidence,
            "clock": [time, self.clock.about],
            "version": [versions(), sameness.of_sources()],
        }

    @property
    def metric_identity(self) -> str | None:
        """What the metric computes; None if nobody can tell it from another."""
        return sameness.of_metric(self.metric)

    # --- errors, gains and costs ------------------------------------------------------------------

    def measure_errors(self) -> None:
        """Errors of every candidate at every layer, and what it and exact attention cost there."""
        if "errors" in self.state.found:
            return
        measured = site_errors(self.model, self._told("errors", held=False), self.policies)
        errors = squared_errors(measured)
        if not errors:
            why = "; ".join(f"{name!r}: {text}" for name, text in measured.refused.items())
            raise ValueError(
                f"model: got no attention to tune ({why or 'none was found'}); accepted: a model "
                "with attention that can be approximated; see distr explain"
            )
        refused = dict(measured.refused)
        for name in measured.sites:
            if (layer := measured.layers[name]) not in errors:
                refused[name] = f"another attention of {layer} cannot be told apart"
        self.state.found["refused"] = refused
        self.state.found["layers"] = sorted(set(measured.layers.values()))
        self.state.found["costs"] = ranks.of_first(
            lambda: {layer: self._costs(layer, measured) for layer in errors}
        )
        self.state.found["smooth"] = self._smooth.name
        self.state.keep("errors", errors)

    def _costs(self, layer: str, measured: SiteErrors) -> dict[str, float]:
        sites = [site for name, site in measured.sites.items() if measured.layers[name] == layer]
        possible = set().union(*(site.possible for site in sites))
        costs = {EXACT: self.clock.of_sites(sites, None)}
        for label in sorted(possible):
            plan = self.policies[label].resolve(layer)
            costs[label] = self.clock.of_sites(sites, plan, label)
        return costs

    @torch.no_grad()
    def check_metric(self) -> None:
        """Try the metric on the first batch: that it does not fit is to be told before all else.

        The same output says which smooth measure fits. To be called before ``measure_errors``.

        Raises:
            ValueError: no labels, no logits, or what else it asks for.
        """
        batch = next(self.data.half(held=False)).to(device_of(self.model))
        output = exactly(self.model, batch, Repeatable(self.model))
        self.metric.statistic(output, output, batch)
        self._smooth = smooth_metric(output, batch)

    def measure_gains(self) -> None:
        """The gain of every layer that has a choice."""
        gains: dict[str, float] = dict(self.state.found.get("gains", {}))
        errors = self.state.found["errors"]
        costs = self.state.found["costs"]
        probes = {
            layer: probe(
                Option(label, costs[layer][label], errors[layer][label])
                for label in self._worthwhile(layer)
            )
            for layer in errors
            if layer not in gains
        }
        left = [(layer, label) for layer, label in probes.items() if label is not None]
        smooth = self.smooth
        for start in range(0, len(left), GAINS_AT_ONCE):
            part = left[start : start + GAINS_AT_ONCE]
            name = f"gains {start + len(part)}/{len(left)}"
            _, *found = self._rows([{layer: label} for layer, label in part], [smooth], name)
            for (layer, label), rows in zip(part, found, strict=True):
                loss = smooth.result(rows[smooth])
                gains[layer] = max(loss, 0.0) / errors[layer][label]
            self.state.keep("gains", gains)

    @property
    def smooth(self) -> Metric:
        """What is predicted."""
        return {m.name: m for m in (METRICS["kl"], NOISE)}[self.state.found["smooth"]]

    @property
    def sensitivity(self) -> Sensitivity:
        """The model of loss."""
        return Sensitivity(self.state.found["errors"], self.state.found.get("gains", {}))

    # --- what there is to choose ------------------------------------------------------------------

    def _is_kept(self, layer: str) -> bool:
        rules = (self.base.rule[index] for index in self.base.rules_matching(layer))
        return any({"group_size", "rank"} & dict(rule.fields).keys() for rule in rules)

    def _worthwhile(self, layer: str) -> list[str]:
        """The candidates of a layer that cost less than exact attention; or its plan, if kept."""
        costs, errors = self.state.found["costs"][layer], self.state.found["errors"][layer]
        if self._is_kept(layer):
            return [KEPT] if KEPT in errors else []
        return [label for label in self.fields if label in errors and costs[label] < costs[EXACT]]

    def options(self, layer: str) -> list[Option]:
        """What a layer may become, with costs and predicted losses."""
        costs = self.state.found["costs"][layer]
        labels = self._worthwhile(layer)
        if not self._is_kept(layer) or not labels:
            labels = [EXACT, *labels]
        return [Option(x, costs[x], self.sensitivity.loss(layer, x)) for x in labels]

    def uniform_setting(self, label: str) -> Setting:
        """One plan for all layers that can take it."""
        errors = self.state.found["errors"]
        return {layer: label for layer in errors if label in errors[layer]}

    # --- losses -----------------------------------------------------------------------------------

    def verify(self, settings: Sequence[Setting]) -> list[Loss]:
        """The losses of some choices on the tuning half; what is known is not measured again."""
        unknown = [s for s in (*settings, {}) if self._loss(s) is None]
        if unknown:
            new = {setting_key(s): s for s in unknown if s}
            metrics = [self.metric, self.smooth]
            what = f"checking {len(new)} polic{'y' if len(new) == 1 else 'ies'} on the tuning half"
            exact, *found = self._rows(list(new.values()), metrics, what)
            at_exact = exact[self.metric]
            value = self.metric.result(at_exact)
            losses = {setting_key({}): Loss(value, value, 0.0, 0.0, len(at_exact))}
            smooth = {**self.state.found.get("divergences", {}), setting_key({}): 0.0}
            for key, rows in zip(new, found, strict=True):
                ours = rows[self.metric]
                losses[key] = loss_with_bound(self.metric, at_exact, ours, self.confidence)
                smooth[key] = self.smooth.result(rows[self.smooth])
            self.state.found["divergences"] = ranks.of_first(lambda: smooth)
            self.state.keep_losses("losses", losses)
        return [loss for loss in map(self._loss, settings) if loss is not None]

    def _loss(self, setting: Setting) -> Loss | None:
        return self.state.loss("losses", setting_key(setting))

    def look(self, setting: Setting) -> Loss:
        """The loss on the held-out half, of the policy compiled as users compile it."""
        key = json.dumps([self.compiler, setting_key(setting)])
        known = self.state.loss("looks", key)
        if known is None:
            policies = {EXACT: None, "tuned": self.policy(setting)}
            both = evaluate(
                self.model,
                self._told("held-out half", held=True),
                [self.metric],
                policies,
                compiler=self.compiler,
            )
            rows = [both[name].rows[self.metric.name] for name in policies]
            known = loss_with_bound(self.metric, rows[0], rows[1], self.confidence)
            self.state.keep_losses("looks", {key: known})
        return known

    def _rows(
        self, settings: Sequence[Setting], metrics: Sequence[Metric], name: str
    ) -> list[dict[Metric, Tensor]]:
        batches = self._told(name, held=False)
        return self.bench.rows(batches(), settings, metrics)

    def _told(self, name: str, *, held: bool) -> Callable[[], Iterator[Batch]]:
        """One half, with a bar that says what it is walked for."""

        def told() -> Iterator[Batch]:
            total = self.data.held_out_count if held else self.data.tuning_count
            task = self.bar.add_task(name, total=total)
            for batch in self.data.half(held=held):
                yield batch
                self.bar.advance(task)

        return told

    # --- what is written and shown ----------------------------------------------------------------

    def policy(self, setting: Setting) -> Policy:
        """The policy that says a choice, for the working directory."""
        text = self.text(setting, (), os.curdir)
        return Policy.from_any(tomlkit.parse(text).unwrap())

    def text(self, setting: Setting, about: Sequence[str], folder: str | os.PathLike[str]) -> str:
        """The file that says a choice; see ``policy_text``.

        It gives every attention that was found what was measured, and no more: those that a rule
        of the given policy approximates, but that ran exactly, get a rule that says so.
        """
        tuned = {layer: label for layer, label in setting.items() if label != KEPT}
        chosen = {layer: fields_of(self.policies[label], layer) for layer, label in tuned.items()}
        evidence = {layer: self._evidence(layer, label) for layer, label in tuned.items()}
        # If nothing is approximated, the rules that would must not stand there.
        keep_rules = bool(setting) or all(
            rule.get("group_size", 1) == 1 and "rank" not in rule
            for rule in (dict(rule.fields) for rule in self.base.rule)
        )
        if keep_rules:
            for layer in self.not_as_given(setting):
                chosen[layer] = {"group_size": 1}
                evidence[layer] = f"{layer or '(root)'}: could not be measured with the given plan"
        text = policy_text(self.base, chosen, about, evidence, folder=folder, keep_rules=keep_rules)
        self._check(text, setting)
        return text

    def not_as_given(self, setting: Setting) -> list[str]:
        """Layers that a rule of the given policy approximates and the choice does not."""
        return [
            layer
            for layer in self.state.found["layers"]
            if layer not in setting
            and self._is_kept(layer)
            and not self.base.resolve(layer).is_exact
        ]

    def _check(self, text: str, setting: Setting) -> None:
        """That a policy gives every layer the plan that was measured."""
        written = Policy.from_any(tomlkit.parse(text).unwrap())
        for layer in self.state.found["layers"]:
            plan = written.resolve(layer)
            if layer not in setting:
                is_right = plan.is_exact
            else:
                wanted = self.policies[setting[layer]].resolve(layer)
                is_right = replace(plan, rule=()) == replace(wanted, rule=())
            if not is_right:
                label = setting.get(layer, EXACT)
                raise RuntimeError(
                    f"the policy says {plan} of {layer!r}, not {label}; report this:\n{text}"
                )

    def _evidence(self, layer: str, label: str) -> str:
        costs = self.state.found["costs"][layer]
        model = self.sensitivity
        return (
            f"{layer or '(root)'}: error {model.errors[layer][label] ** 0.5:.3g}, gain "
            f"{model.gains.get(layer, 0.0):.3g}, predicted {self.smooth.name} "
            f"{model.loss(layer, label):.2g}, cost {100 * costs[label] / costs[EXACT]:.0f} %"
        )

    def point(self, kind: Kind, name: str, setting: Setting) -> Point:
        """What is known of a choice."""
        costs = self.state.found["costs"]
        exact = math.fsum(of_layer[EXACT] for of_layer in costs.values())
        spent = math.fsum(of_layer[setting.get(x, EXACT)] for x, of_layer in costs.items())
        losses = self._loss(setting)
        has_gains = setting.keys() <= self.sensitivity.gains.keys()
        return Point(
            kind,
            name,
            setting,
            spent / exact if exact else 1.0,
            self.sensitivity.predicted(setting) if has_gains else None,
            self.state.found.get("divergences", {}).get(setting_key(setting)),
            losses,
        )
