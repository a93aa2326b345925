"""The accuracy gate: what a policy costs a model on data, held against what it cost before."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from safetensors.torch import load, save
from tabulate import tabulate
from torch import Tensor, nn

from distr_compile import underneath
from distr_compile.accuracy import baseline as baselines
from distr_compile.accuracy import ranks, sameness
from distr_compile.accuracy.baseline import (
    OTHER,
    SAME,
    Failure,
    ModelResult,
    PolicyResult,
    Tolerance,
    Value,
)
from distr_compile.accuracy.batch import Batch, Batches, add_to_digest, walk
from distr_compile.accuracy.checkpoint import Checkpoint, key_of, write_whole
from distr_compile.accuracy.evaluate import Compiled, compiled, device_of
from distr_compile.accuracy.given import check_compiler, check_folder, check_limit
from distr_compile.accuracy.instrument import layer_errors
from distr_compile.accuracy.metrics import METRICS, Metric, Score, as_metrics, has_logits
from distr_compile.accuracy.progress import progress_bar, total
from distr_compile.bases import fingerprint
from distr_compile.policy import Policy
from distr_compile.policy.errors import check_callable, check_type, sentence

Policies = str | os.PathLike[str] | Policy | Mapping[str, Any]

LAYER_BATCHES = 4

_EXACT = ""
"""Stands for the model itself among the names of policies."""


@dataclass(frozen=True)
class Regression:
    """What was measured, and what is not as in the baseline.

    Attributes:
        result: of the model under every policy.
        failures: what worsened, or improved so that the baseline should say so; empty without a
            baseline.
        notes: remarks, such as the tolerance that was used.
    """

    result: ModelResult
    failures: tuple[Failure, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    def table(self) -> str:
        """Write a line for each policy; the exact model's value of a metric is in brackets."""
        names = list(dict.fromkeys(m for p in self.result.policies.values() for m in p.metrics))
        lines = [
            [self.result.name, policy, f"{item.approximated}/{item.attentions}"]
            + [_cell(name, item.metrics.get(name)) for name in names]
            + [f"{max(item.layers.values()):.3g}" if item.layers else "-"]
            for policy, item in self.result.policies.items()
        ]
        headers = ["model", "policy", "approximated", *names, "worst layer"]
        return tabulate(lines, headers, disable_numparse=True)

    def failure_table(self) -> str:
        """Write a line for each failure: model, policy, layer, metric, baseline, now, tolerance."""
        return baselines.failure_table(self.failures)

    def __str__(self) -> str:
        parts = [self.table(), *self.notes]
        if self.failures:
            parts += ["", self.failure_table()]
        return "\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as JSON has it."""
        failures = [baselines.strict_json(failure._asdict()) for failure in self.failures]
        return {
            **self.result.to_dict(),
            "passed": self.passed,
            "failures": failures,
            "notes": list(self.notes),
        }


def _cell(name: str, value: Value | None) -> str:
    if value is None:
        return "-"
    ideal = METRICS[name].ideal if name in METRICS else None
    return f"{value.value:.4g}" if ideal is not None else f"{value.value:.4g} ({value.exact:.4g})"


FORCED = 'min_seq_len = "auto" counts as 0 here, so that no loss hangs on what is faster'
"""Said where a policy leaves lengths to the machine."""

SET_ASIDE = (
    "the plans that distr_compile.transformers.apply gave the model were set aside: what was "
    "measured is the policy given here, in the exact model's place"
)
"""Said of a model that has such plans."""


def regress(
    model: Callable[..., Any],
    batches: Batches,
    policies: Policies,
    *,
    metrics: Iterable[Metric | str | Score] | Metric | str | Score = (),
    name: str | None = None,
    baseline: str | os.PathLike[str] | None = None,
    update_baseline: bool = False,
    tolerance: Tolerance = SAME,
    other_tolerance: Tolerance = OTHER,
    compiler: str = "eager",
    limit: int | None = None,
    layer_batches: int = LAYER_BATCHES,
    out: str | os.PathLike[str] | None = None,
    resume: bool = True,
    progress: bool = True,
) -> Regression:
    """Measure what policies cost a model on data, and compare with a baseline.

    Per policy: the given metrics of the exact model and of the compiled one; without labels, how
    near their outputs are (KL divergence and top-1 agreement where there are logits, cosine
    similarity, SQNR); and the relative error of the output of every attention, on the exact model's
    inputs. Outputs are dropped batch by batch.

    Args:
        model: a module in eval mode, on its device; batches are moved there. What it was compiled
            with and plans of ``distr_compile.transformers.apply`` are set aside meanwhile: neither
            is part of the exact model.
        batches: a list, a data loader, or a function that returns an iterable: what can be walked
            more than once. An item is a ``Batch``, a dict of keyword arguments, a tuple or
            list of positional ones, or one argument.
        policies: one policy (a path, a :class:`Policy`, or a dict of the shape of the file), or
            a mapping of names to policies.
        metrics: one or several: a name, see ``metrics.METRICS``; a ``Metric``; or a function
            (output, batch) -> one score for each example, higher is better.
        name: of the model, in tables and in the baseline; its class by default.
        baseline: the JSON file to compare with.
        update_baseline: write this model's part of ``baseline`` instead of comparing with it.
        tolerance: how far losses may move, in either direction, where data, weights, device, dtype
            and compiler are those of the baseline.
        other_tolerance: how much they may worsen where one of them is not.
        compiler: of the rewritten graph: "eager", "aot_eager" or "inductor".
        limit: most batches.
        layer_batches: how many of the batches the errors of the attentions are measured on.
        out: JSON file to write the result to. Beside it, ``out`` + ``.progress`` holds what is
            done until all is done.
        resume: go on where an interrupted run with the same ``out`` stopped.
        progress: show a bar on stderr.

    Returns:
        The result; ``passed`` is false and ``failure_table()`` says why where a number moved.

    Raises:
        ValueError: no batch, a model in training mode, a metric that does not fit, two metrics of
            one name, no policy or one without a name, a baseline that is none, an option that is
            not accepted.
        TypeError: a model that cannot be called, a tolerance that is none.
        FileNotFoundError: the baseline does not exist, and is not to be written; or its folder or
            that of ``out`` does not.
        PolicyError: a policy is wrong, for itself or for this model.
    """
    check_callable(model)
    named = _named(policies)
    path = None if baseline is None else Path(baseline)
    for what, file in (("baseline", path), ("out", None if out is None else Path(out))):
        if file is not None and not file.parent.is_dir():
            raise FileNotFoundError(f"{file}: there is no folder {file.parent}; make it first")
        if file is not None:
            check_folder(file, what)
    for what, each in (("tolerance", tolerance), ("other_tolerance", other_tolerance)):
        advice = f"give Tolerance({each!r}, 1e-4)" if isinstance(each, float) else "leave it out"
        check_type(what, each, Tolerance, "a Tolerance(relative, absolute)", advice)
    check_compiler(compiler)
    limit = check_limit(limit)
    check_limit(layer_batches, 0, "layer_batches")
    if update_baseline and path is None:
        raise ValueError("update_baseline: got no baseline; give the path of the file to write")
    if path is not None and not update_baseline and ranks.is_first():
        baselines.read(path)  # to be told now, not when all is measured
    had_plans = underneath.has_plans(model)
    with underneath.plain(model) as own:
        name = name or type(own).__name__
        options = (compiler, limit, layer_batches)
        measuring = _Measuring(own, name, named, as_metrics(metrics), *options)
        result = measuring.run(batches, None if out is None else Path(out), resume, progress)
    regression = Regression(result)
    if path is not None and ranks.is_first():
        regression = held_against(path, result, update_baseline, tolerance, other_tolerance)
    idle = [policy for policy, item in result.policies.items() if not item.approximated]
    notes = tuple(
        f"{name}, {policy}: no attention was approximated; distr explain says why"
        for policy in idle
        if not named[policy].resolve("").is_exact
    )
    timed = ", ".join(label for label, policy in named.items() if policy.asks_for_times)
    if timed:
        notes += (f"{timed}: {FORCED}",)
    if had_plans:
        notes += (f"{name}: {SET_ASIDE}",)
    regression = replace(regression, notes=(*regression.notes, *notes))
    if out is not None and ranks.is_first():
        text = json.dumps(regression.to_dict(), indent=1) + "\n"
        write_whole(Path(out), text.encode())
    return regression


def held_against(
    path: Path,
    result: ModelResult,
    update: bool = False,
    tolerance: Tolerance = SAME,
    other_tolerance: Tolerance = OTHER,
) -> Regression:
    """Compare what was measured with the baseline at ``path``, or write it there; see ``regress``.

    Raises:
        ValueError, FileNotFoundError: as ``regress``.
    """
    if update:
        notes = [f"{result.name}: wrote {path}"]
        if dropped := baselines.update(path, result):
            notes.append(
                f"{result.name}: dropped from it, as they were measured under other conditions: "
                f"{', '.join(dropped)}"
            )
        return Regression(result, notes=tuple(notes))
    models = baselines.read(path)
    if result.name in models:
        return Regression(
            result, *baselines.compare(models[result.name], result, tolerance, other_tolerance)
        )
    note = (
        f"{result.name}: {path} has: {', '.join(models) or 'none'}; --update-baseline "
        "(update_baseline=True) adds it"
    )
    return Regression(result, (Failure(result.name),), (note,))


_TABLES = {"default", "rule", "bases"}


def _named(policies: Policies) -> dict[str, Policy]:
    if isinstance(policies, Mapping) and not policies:
        accepted = "a policy, or a mapping of names to policies"
        advice = "give Policy() for the one that says nothing"
        raise ValueError(sentence("policies", "an empty mapping", accepted, advice))
    if isinstance(policies, Mapping) and not policies.keys() <= _TABLES:
        if _EXACT in policies:
            raise ValueError(
                "policies: got one whose name is empty; accepted: any other name; give it one"
            )
        return {name: Policy.from_any(policy) for name, policy in policies.items()}
    is_path = isinstance(policies, str | os.PathLike)
    return {Path(policies).stem if is_path else "policy": Policy.from_any(policies)}  # type: ignore[arg-type]


class _OtherBatchesError(Exception):
    """The batches are not those that the checkpoint has rows of."""


@dataclass
class _Measuring:
    """One call of ``regress``, without the baseline."""

    model: Callable[..., Any]
    name: str
    policies: Mapping[str, Policy]
    metrics: list[Metric]
    compiler: str
    limit: int | None
    layer_batches: int

    def run(self, batches: Batches, out: Path | None, resume: bool, progress: bool) -> ModelResult:
        path = None if out is None else out.with_name(out.name + ".progress")
        conditions = self._conditions()
        identities = {metric.name: sameness.of_metric(metric) for metric in self.metrics}
        key = key_of(
            conditions=conditions,
            model=sameness.of_model(self.model) if isinstance(self.model, nn.Module) else "",
            policies={name: policy.digest for name, policy in self.policies.items()},
            metrics=list(identities.values()),
            limit=self.limit,
            torch=torch.__version__,
            version=metadata.version("distr-compile"),
            sources=sameness.of_sources(),
        )
        ranks.require_same({"model, policies, metrics or options": key})
        path = path if ranks.is_first() else None
        checkpoint, why = Checkpoint(path, key), ""
        unknown = [name for name, identity in identities.items() if identity is None]
        if resume and unknown and path is not None and path.exists():
            why = f"nobody can tell whether {', '.join(unknown)} is the metric of before"
        elif resume:
            checkpoint, why = Checkpoint.open(path, key)
        checkpoint = self._shared(checkpoint)
        if why:
            _say(f"starts over: {why}")
        if checkpoint.batches:
            _say(f"goes on after {len(checkpoint.batches)} batches ({path})")
        try:
            with progress_bar(progress) as bar:
                try:
                    self._stream(batches, checkpoint, bar)
                except _OtherBatchesError:
                    _say("starts over: the batches are others than before")
                    checkpoint = Checkpoint(path, key)
                    self._stream(batches, checkpoint, bar)
        except BaseException:  # also an interrupt: what is done is kept
            if checkpoint.notes:
                checkpoint.write()
            raise
        result = self._result(checkpoint, conditions)
        checkpoint.remove()
        return result

    @staticmethod
    def _shared(checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint of the first process, in each of them."""
        if ranks.world() == 1:
            return checkpoint
        about = ranks.of_first(lambda: {"batches": checkpoint.batches, "notes": checkpoint.notes})
        names = ranks.of_first(lambda: checkpoint.names)
        rows = ranks.exchange(
            lambda: save({name: checkpoint.together(name) for name in checkpoint.names})
        )[0]
        parts = [(about["batches"], load(rows))] if names else []
        return Checkpoint(checkpoint.path, checkpoint.key, parts, about["notes"])

    def _conditions(self) -> dict[str, str]:
        is_module = isinstance(self.model, nn.Module)
        parameters: Iterator[Any] = self.model.parameters() if is_module else iter(())  # type: ignore[union-attr,attr-defined]
        first = next(parameters, None)
        return {
            "weights": fingerprint(self.model) if is_module else "",  # type: ignore[arg-type]
            "device": device_of(self.model).type,
            "dtype": str(first.dtype if first is not None else torch.get_default_dtype()),
            "compiler": self.compiler,
            "layer batches": str(self.layer_batches),
        }

    def _stream(self, batches: Batches, checkpoint: Checkpoint, bar: Progress) -> None:
        """Fill the checkpoint."""
        if "layers" not in checkpoint.notes:
            task = bar.add_task("errors of layers", total=None)
            checkpoint.notes["layers"] = self._layers(batches)
            bar.update(task, total=1, completed=1)
        elif checkpoint.notes["layers"]["batches"] != list(map(_digest, self._first(batches))):
            raise _OtherBatchesError
        known = checkpoint.batches
        if not known:  # what is noted with the first batch may be of another one
            checkpoint.notes.pop("likeness", None)
            checkpoint.notes.pop("counts", None)
        task = bar.add_task("metrics", total=total(batches, self.limit))
        walked = walk(batches, self.limit)
        for digest in known:
            if (batch := next(walked, None)) is None or _digest(batch) != digest:
                raise _OtherBatchesError
        with compiled(self.model, {_EXACT: None, **self.policies}, self.compiler) as run:
            digests: list[str] = []
            walked = self._looked_at(walked, checkpoint, run, digests)

            def rows_of(batch: Batch) -> list[Tensor]:
                rows = run.rows(batch, self._with(checkpoint.notes["likeness"]))
                return [of_batch for by_metric in rows.values() for of_batch in by_metric.values()]

            for _, found in ranks.dealt(walked, rows_of):
                metrics = self._with(checkpoint.notes["likeness"])
                names = [f"{p}/{m.name}" for p in run.by_policy for m in metrics]
                for policy, report in run.reports.items():
                    counts = checkpoint.notes.setdefault("counts", {})
                    counts[policy] = [report.distr, report.found]
                checkpoint.add(digests.pop(0), dict(zip(names, found, strict=True)))
                bar.update(task, completed=len(checkpoint.batches))
        if not checkpoint.batches:
            raise ValueError("batches: got none; give at least one")
        # Another process may have had no batch, and compiled nothing.
        counts = ranks.of_first(lambda: checkpoint.notes.get("counts", {}))
        checkpoint.notes["counts"] = counts

    def _looked_at(
        self, walked: Iterator[Batch], checkpoint: Checkpoint, run: Compiled, digests: list[str]
    ) -> Iterator[Batch]:
        """The batches, and their digests before the model has seen them.

        The first output of all tells which metrics without labels fit.
        """
        for batch in walked:
            digests.append(_digest(batch))
            if "likeness" not in checkpoint.notes:
                here = functools.partial(self._likeness, run.exact, batch)
                checkpoint.notes["likeness"] = ranks.of_first(here)
            yield batch

    def _likeness(self, exact: Callable[[Batch], Any], batch: Batch) -> list[str]:
        """Names of the label-free metrics that fit the model's output."""
        is_of_classes = has_logits(exact(batch.to(device_of(self.model))), batch)
        return [*(("kl", "agreement") if is_of_classes else ()), "cosine", "sqnr"]

    def _with(self, likeness: list[str]) -> list[Metric]:
        """The metrics that were asked for, then those."""
        asked = {metric.name: metric for metric in self.metrics}
        return [*asked.values(), *(METRICS[name] for name in likeness if name not in asked)]

    def _first(self, batches: Batches) -> Iterator[Batch]:
        """The batches that the errors of layers are measured on."""
        count = self.layer_batches if self.limit is None else min(self.limit, self.layer_batches)
        return walk(batches, count)

    def _layers(self, batches: Batches) -> dict[str, Any]:
        device = device_of(self.model)
        digests: list[str] = []

        def first() -> Iterator[Batch]:
            digests.clear()
            for batch in self._first(batches):
                digests.append(_digest(batch))
                yield batch.to(device)

        errors = layer_errors(self.model, first, self.policies)
        return {"errors": errors, "batches": digests}

    def _result(self, checkpoint: Checkpoint, conditions: Mapping[str, str]) -> ModelResult:
        data = key_of(batches=[digest.partition(" ")[2] for digest in checkpoint.batches])
        metrics = self._with(checkpoint.notes["likeness"])
        policies = {}
        for name, policy in self.policies.items():
            values = {
                metric.name: _value(
                    metric,
                    metric.result(checkpoint.together(f"{_EXACT}/{metric.name}"))
                    if metric.ideal is None
                    else metric.ideal,
                    metric.result(checkpoint.together(f"{name}/{metric.name}")),
                )
                for metric in metrics
            }
            layers = {
                site: errors[name]
                for site, errors in checkpoint.notes["layers"]["errors"].items()
                if name in errors
            }
            distr, found = checkpoint.notes.get("counts", {}).get(name, (0, 0))
            policies[name] = PolicyResult(_digest_of(policy), distr, found, values, layers)
        examples = len(checkpoint.together(checkpoint.names[0]))
        versions = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "examples": str(examples),
        }
        return ModelResult(self.name, {"data": data, **conditions}, versions, policies)


def _digest_of(policy: Policy) -> str:
    """That of the policy without its bases, which are made anew with every model."""
    content = {name: part for name, part in policy.to_dict().items() if name != "bases"}
    return Policy.from_any(content).digest


def _value(metric: Metric, exact: float, value: float) -> Value:
    return Value(exact, value, metric.loss(exact, value))


def _digest(batch: Batch) -> str:
    """The exact one, to go on with the same batches; a space; the tolerant one, for baselines."""
    exact, tolerant = hashlib.sha256(), hashlib.sha256()
    add_to_digest(exact, batch)
    add_to_digest(tolerant, batch, tolerant=True)
    return f"{exact.hexdigest()} {tolerant.hexdigest()}"


def _say(text: str) -> None:
    if ranks.is_first():
        print(f"distr: {text}", file=sys.stderr)
