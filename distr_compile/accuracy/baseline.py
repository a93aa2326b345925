"""What was measured of a model, the file of what is to stay so, and the difference of the two.

Numbers are compared as losses (``Metric.loss``; a layer's relative error is one), so that one
tolerance does for all: a cosine of 0.99 and a KL divergence of 0.01 may move by as much of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate

from distr_compile.accuracy.checkpoint import write_whole
from distr_compile.policy.errors import sentence, shown

FORMAT = "distr-baseline 1"
LAYER_ERROR = "output error"


@dataclass(frozen=True)
class Value:
    """One metric: the exact model's, ours, and the loss between them."""

    exact: float
    value: float
    loss: float


@dataclass(frozen=True)
class PolicyResult:
    """A model under one policy.

    Attributes:
        digest: of the policy without its bases.
        approximated: attentions of which the pass made the approximation.
        attentions: all that it found.
        metrics: by name.
        layers: relative Frobenius error of the output of every attention that can be approximated,
            on the exact model's own inputs.
    """

    digest: str
    approximated: int
    attentions: int
    metrics: Mapping[str, Value]
    layers: Mapping[str, float]


@dataclass(frozen=True)
class ModelResult:
    """A model under every policy.

    Attributes:
        name: of the model.
        conditions: what the numbers depend on besides the code: digests of data and weights,
            device, dtype, compiler. Equal conditions promise equal numbers.
        versions: of Python and torch, and how many examples; for people to read.
        policies: by name.
    """

    name: str
    conditions: Mapping[str, str]
    versions: Mapping[str, str]
    policies: Mapping[str, PolicyResult]

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold: NaN becomes None, the infinities "inf" and "-inf"."""
        content: dict[str, Any] = strict_json(asdict(self))
        return content

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelResult:
        """The inverse of ``to_dict``.

        Raises:
            KeyError, TypeError: not such a dict.
        """
        policies = {}
        for name, item in data["policies"].items():
            metrics = {
                metric: Value(*(_number(value[part]) for part in ("exact", "value", "loss")))
                for metric, value in item["metrics"].items()
            }
            layers = {layer: _number(error) for layer, error in item["layers"].items()}
            policies[name] = PolicyResult(**{**item, "metrics": metrics, "layers": layers})
        return cls(data["name"], data["conditions"], data["versions"], policies)


def strict_json(item: Any) -> Any:
    """``item`` without the numbers that JSON does not have: None for NaN, else "inf" or "-inf"."""
    if isinstance(item, dict):
        return {key: strict_json(value) for key, value in item.items()}
    if not isinstance(item, float) or math.isfinite(item):
        return item
    return None if math.isnan(item) else str(item)


def _number(value: float | str | None) -> float:
    return math.nan if value is None else float(value)


# --- the difference -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Tolerance:
    """How far a loss may move: ``relative`` of what it was, plus ``absolute``."""

    relative: float
    absolute: float

    def __post_init__(self) -> None:
        """Refuse what no loss can be held to.

        Raises:
            ValueError: a part that is no number, not finite, or less than 0.
        """
        for name, value in (("relative", self.relative), ("absolute", self.absolute)):
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not 0 <= value < math.inf:
                accepted, advice = "a number >= 0", "give the share or amount that may move"
                raise ValueError(sentence(f"tolerance: {name}", shown(value), accepted, advice))

    def allows(self, loss: float) -> float:
        """The largest move that is fine; none where the loss is infinite."""
        return 0.0 if math.isinf(loss) else self.relative * abs(loss) + self.absolute

    def __str__(self) -> str:
        return f"{100 * self.relative:g} % of the loss + {self.absolute:g}"


SAME = Tolerance(0.01, 1e-4)
"""Where data, weights, device, dtype and compiler are the baseline's; both directions count."""

OTHER = Tolerance(0.5, 0.02)
"""Where one of them differs; only what is worse counts."""


class Failure(NamedTuple):
    """One line of the table of what is not as it was; a NaN stands for what there is not."""

    model: str
    policy: str = ""
    layer: str = ""
    metric: str = ""
    baseline: float = math.nan
    now: float = math.nan
    moved: float = math.nan
    allowed: float = math.nan
    verdict: str = "not in the baseline"


def failure_table(failures: tuple[Failure, ...]) -> str:
    """The lines as a table; ``moved`` and ``allowed`` are of the loss."""
    lines = [[_shown(cell) for cell in failure] for failure in failures]
    headers = [name.replace("_", " ") for name in Failure._fields]
    right = ("right",) * 4
    return tabulate(
        lines, headers, disable_numparse=True, colalign=("left",) * 4 + right + ("left",)
    )


def _shown(cell: str | float) -> str:
    if isinstance(cell, str):
        return cell
    return "-" if math.isnan(cell) else f"{cell:.5g}"


def compare(
    baseline: ModelResult, now: ModelResult, same: Tolerance, other: Tolerance
) -> tuple[tuple[Failure, ...], tuple[str, ...]]:
    """What is not as it was, and remarks.

    Policies that only the baseline has were not asked for; metrics and layers that only it has are
    failures, as are those that it does not have.
    """
    changed = [
        name for name, value in now.conditions.items() if baseline.conditions.get(name) != value
    ]
    tolerance = other if changed else same
    notes = [f"{now.name}: tolerance {tolerance}"]
    if changed:
        notes[0] += f"; not as in the baseline: {', '.join(changed)}; only worse counts"
    failures: list[Failure] = []
    for name, ours in now.policies.items():
        theirs = baseline.policies.get(name)
        if theirs is None:
            failures.append(Failure(now.name, name))
            continue
        if theirs.digest != ours.digest:
            notes.append(f"{now.name}, {name}: the policy is another than the baseline's")
        if theirs.approximated != ours.approximated:
            verdict = "fewer" if ours.approximated < theirs.approximated else "more"
            count = ("attentions approximated", theirs.approximated, ours.approximated)
            failures.append(Failure(now.name, name, "", *count, math.nan, math.nan, verdict))
        for pair in _pairs(theirs, ours, exact_too=not changed):
            verdict, moved, allowed = _judged(pair, tolerance, both=not changed)
            if verdict:
                shown = (pair.baseline, pair.now, moved, allowed)
                failures.append(Failure(now.name, name, pair.layer, pair.metric, *shown, verdict))
    return tuple(failures), tuple(notes)


class _Pair(NamedTuple):
    layer: str
    metric: str
    baseline: float
    now: float
    loss_then: float | None
    loss_now: float | None


def _pairs(theirs: PolicyResult, ours: PolicyResult, exact_too: bool) -> Iterator[_Pair]:
    for name in dict.fromkeys([*theirs.metrics, *ours.metrics]):
        then, now = theirs.metrics.get(name), ours.metrics.get(name)
        yield _Pair(
            "",
            name,
            then.value if then else math.nan,
            now.value if now else math.nan,
            then.loss if then else None,
            now.loss if now else None,
        )
        if exact_too and then and now and then.exact and not math.isnan(then.exact):
            same = now.exact == then.exact  # also where both are infinite
            move = 0.0 if same else abs(now.exact / then.exact - 1)
            yield _Pair("", f"{name} of the exact model", then.exact, now.exact, 0, move)
    for layer in dict.fromkeys([*theirs.layers, *ours.layers]):
        before, after = theirs.layers.get(layer), ours.layers.get(layer)
        yield _Pair(layer, LAYER_ERROR, _number(before), _number(after), before, after)


def _judged(pair: _Pair, tolerance: Tolerance, both: bool) -> tuple[str, float, float]:
    """Verdict (empty if all is well), how far the loss moved, how far it might."""
    if pair.loss_then is None:
        return "not in the baseline", math.nan, math.nan
    if pair.loss_now is None:
        return "no longer measured", math.nan, math.nan
    moved, allowed = pair.loss_now - pair.loss_then, tolerance.allows(pair.loss_then)
    if abs(moved) <= allowed or pair.loss_now == pair.loss_then:
        return "", moved, allowed
    if moved < 0:
        return ("better: update the baseline" if both else ""), moved, allowed
    return "worse", moved, allowed  # also where it is not a number


# --- the file -----------------------------------------------------------------------------------


def read(path: Path) -> dict[str, ModelResult]:
    """The models of a baseline file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not one.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"baseline: there is no file {path}; --update-baseline (update_baseline=True) writes it"
        )
    try:
        data = json.loads(path.read_text("utf-8"))
        if data.get("format") != FORMAT:
            raise ValueError(f"its format is {data.get('format')!r}")
        return {name: ModelResult.from_dict(item) for name, item in data["models"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"baseline: {path} is not a file of format {FORMAT!r} ({error}); remove it and write "
            "it anew with --update-baseline"
        ) from error


def update(path: Path, now: ModelResult) -> tuple[str, ...]:
    """Put ``now`` in the file: other models stay, and so do policies measured alike.

    Returns:
        Names of the policies that are dropped, as they were measured under other conditions.
    """
    models = read(path) if path.exists() else {}
    before = models.get(now.name)
    kept = before.policies if before and before.conditions == now.conditions else {}
    models[now.name] = ModelResult(now.name, now.conditions, now.versions, {**kept, **now.policies})
    content = {"format": FORMAT, "models": {n: m.to_dict() for n, m in sorted(models.items())}}
    write_whole(path, (json.dumps(_rounded(content), indent=1) + "\n").encode())
    return tuple(
        p for p in (before.policies if before else ()) if p not in models[now.name].policies
    )


def _rounded(item: Any) -> Any:
    """Six digits: more would only make every update a change of every line."""
    if isinstance(item, dict):
        return {key: _rounded(value) for key, value in item.items()}
    return float(f"{item:.6g}") if isinstance(item, float) else item
