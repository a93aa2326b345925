"""A model under several policies over the same data, compiled as users compile it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distr_compile import underneath
from distr_compile.accuracy import ranks
from distr_compile.accuracy.batch import Batch, Batches, walk
from distr_compile.accuracy.metrics import Metric, Score, as_metrics
from distr_compile.explaining import untraced
from distr_compile.policy import Policy, PolicyError
from distr_compile.reporting import Report, report
from distr_compile.restoring import Repeatable

Model = Callable[..., Any]
Rows = dict[str, dict[str, Tensor]]
"""Policy -> metric -> rows of examples; see ``Metric``."""


@dataclass(frozen=True)
class Evaluation:
    """A model under one policy.

    Attributes:
        values: by the name of the metric.
        rows: likewise, ``(examples, width)`` fp64: what the values are made of, so that examples
            can be drawn anew.
    """

    values: Mapping[str, float]
    rows: Mapping[str, Tensor]


def evaluate(
    model: Model,
    batches: Batches,
    metrics: Iterable[Metric | str | Score],
    policies: Mapping[str, Policy | None],
    *,
    compiler: str = "eager",
    limit: int | None = None,
) -> dict[str, Evaluation]:
    """Run ``model`` over ``batches`` under every policy, batch by batch.

    The outputs of one batch are dropped before the next. The model really is compiled with
    ``backend="distr"``, without gradients; what Dynamo learns meanwhile is dropped.

    Args:
        model: a module in eval mode, or a function; compiled or not (``underneath.plain``).
        batches: as ``batch.walk`` takes them.
        metrics: as ``metrics.as_metric`` takes them.
        policies: name -> policy; None is the model itself, not compiled. Where one says "auto",
            ``Policy.without_timing`` counts.
        compiler: of the rewritten graph: "eager", "aot_eager" or "inductor".
        limit: most batches.

    Returns:
        By the names of the policies.

    Raises:
        ValueError: no batch, a model in training mode, a metric that does not fit, or
            two metrics of one name.
        PolicyError: a policy is wrong, for itself or for this model.
    """
    checked = as_metrics(metrics)
    parts: dict[str, dict[str, list[Tensor]]] = {
        policy: {metric.name: [] for metric in checked} for policy in policies
    }
    names = [(policy, metric.name) for policy in policies for metric in checked]
    with compiled(model, policies, compiler) as run:

        def rows_of(batch: Batch) -> list[Tensor]:
            by_policy = run.rows(batch, checked)
            return [by_policy[policy][metric] for policy, metric in names]

        for _, rows in ranks.dealt(walk(batches, limit), rows_of):
            for (policy, metric), of_batch in zip(names, rows, strict=True):
                parts[policy][metric].append(of_batch)
    return {policy: _evaluation(checked, by_metric) for policy, by_metric in parts.items()}


def _evaluation(metrics: list[Metric], parts: Mapping[str, list[Tensor]]) -> Evaluation:
    if not all(parts.values()):
        raise ValueError("batches: got none; give at least one")
    rows = {name: torch.cat(list_of_rows) for name, list_of_rows in parts.items()}
    return Evaluation({metric.name: metric.result(rows[metric.name]) for metric in metrics}, rows)


@dataclass
class Compiled:
    """A model and its compiled selves.

    Attributes:
        model: the model itself, with nothing in it compiled.
        by_policy: the name of a policy -> what to call.
        again: calls them, each from the same state.
        reports: what the pass did with the first batch, by the name of the policy.
    """

    model: Model
    by_policy: Mapping[str, Model]
    again: Repeatable
    reports: dict[str, Report] = field(default_factory=dict)

    def exact(self, batch: Batch) -> Any:
        """The output of the model itself, for a batch that is on its device."""
        return exactly(self.model, batch, self.again)

    def rows(self, batch: Batch, metrics: Iterable[Metric]) -> Rows:
        """The rows of one batch under every policy.

        Raises:
            PolicyError: a policy does not fit the model.
        """
        batch = batch.to(device_of(self.model))
        self.again.begin()
        reference = self.exact(batch)
        rows: Rows = {}
        for name, run in self.by_policy.items():
            output = reference if run is self.model else self._call(name, run, batch)
            rows[name] = {m.name: m.statistic(output, reference, batch) for m in metrics}
        return rows

    def _call(self, name: str, run: Model, batch: Batch) -> Any:
        try:
            output = self.again.call(run, batch.args, batch.kwargs)
        except Exception as error:
            inner = getattr(error, "inner_exception", None)
            if isinstance(inner, PolicyError):
                raise inner from None
            raise
        if name not in self.reports:
            with contextlib.suppress(LookupError):  # nothing was compiled, no report
                self.reports[name] = report(run)
        return output


@contextlib.contextmanager
def compiled(
    model: Model, policies: Mapping[str, Policy | None], compiler: str = "eager"
) -> Iterator[Compiled]:
    """Compile ``model`` once for each policy, for the time of the context, without gradients.

    What it was compiled with before is set aside meanwhile; see ``underneath.plain``.

    Raises:
        ValueError: the model is in training mode, where dropout changes every output.
    """
    if getattr(model, "training", False):
        raise ValueError("model: got one in training mode; accepted: eval mode; call model.eval()")
    with torch.no_grad(), untraced() as options, underneath.plain(model) as own:
        by_policy: dict[str, Model] = {}
        for name, policy in policies.items():
            # A loss must not hang on what is faster here.
            timeless = None if policy is None else policy.without_timing()
            distr: dict[str, Any] = {"policy": timeless, "compiler": compiler}
            by_policy[name] = (
                own
                if policy is None
                else torch.compile(own, backend="distr", options=distr, **options)
            )
        yield Compiled(own, by_policy, Repeatable(own))


def exactly(model: Model, batch: Batch, again: Repeatable) -> Any:
    """The output of a model of ``underneath.plain``, which is compiled in no part."""
    with underneath.eagerly():
        return again.call(model, batch.args, batch.kwargs)


def device_of(model: Model) -> torch.device:
    """Where the parameters of a module are; the CPU for all else."""
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    first = next(parameters, None)
    return torch.device("cpu") if first is None else first.device
