"""What is a regression, and the file of the baseline; no model is run here."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distr_compile.accuracy import baseline
from distr_compile.accuracy.baseline import ModelResult, PolicyResult, Tolerance, Value, compare

SAME, OTHER = Tolerance(0.01, 1e-4), Tolerance(0.5, 0.02)
POLICY = PolicyResult(
    "digest",
    2,
    2,
    {"top1": Value(0.9, 0.81, 0.1), "sqnr": Value(math.inf, 20.0, 0.1)},
    {"blocks.0": 0.2, "blocks.1": 0.3},
)
RESULT = ModelResult("vit", {"data": "a", "weights": "b"}, {"torch": "2"}, {"p": POLICY})


def changed(**fields: Any) -> ModelResult:
    return replace(RESULT, policies={"p": replace(POLICY, **fields)})


def verdicts(now: ModelResult, before: ModelResult = RESULT) -> list[tuple[str, str, str]]:
    failures, _ = compare(before, now, SAME, OTHER)
    return [(failure.layer, failure.metric, failure.verdict) for failure in failures]


def test_what_moved_little_is_no_failure() -> None:
    assert verdicts(RESULT) == []
    # 1 % of 0.2 and 0.0001.
    assert verdicts(changed(layers={"blocks.0": 0.20209, "blocks.1": 0.3})) == []


def test_both_directions_fail() -> None:
    now = changed(layers={"blocks.0": 0.2022, "blocks.1": 0.29})
    assert verdicts(now) == [
        ("blocks.0", "output error", "worse"),
        ("blocks.1", "output error", "better: update the baseline"),
    ]
    failures, _ = compare(RESULT, now, SAME, OTHER)
    first = failures[0]
    assert (first.model, first.policy, first.baseline, first.now) == ("vit", "p", 0.2, 0.2022)
    assert first.moved == pytest.approx(0.0022)
    assert first.allowed == pytest.approx(0.0021)


def test_metrics_are_compared_as_losses_and_shown_as_they_are() -> None:
    worse = {**POLICY.metrics, "sqnr": Value(math.inf, 19.5, 10 ** (-19.5 / 20))}
    failures, _ = compare(RESULT, changed(metrics=worse), SAME, OTHER)
    assert [(f.metric, f.baseline, f.now) for f in failures] == [("sqnr", 20.0, 19.5)]
    assert failures[0].moved == pytest.approx(10**-0.975 - 0.1)


def test_the_exact_model_is_held_too() -> None:
    moved = {**POLICY.metrics, "top1": Value(0.8, 0.72, 0.1)}
    assert verdicts(changed(metrics=moved)) == [("", "top1 of the exact model", "worse")]


def test_other_conditions_widen_the_tolerance_and_allow_what_is_better() -> None:
    now = changed(layers={"blocks.0": 0.31, "blocks.1": 0.01})
    other = replace(now, conditions={"data": "x", "weights": "b"})
    assert verdicts(other) == []
    _, notes = compare(RESULT, other, SAME, OTHER)
    assert notes == (
        "vit: tolerance 50 % of the loss + 0.02; not as in the baseline: data; only worse counts",
    )
    far = changed(layers={"blocks.0": 0.33, "blocks.1": 0.01})
    far = replace(far, conditions={"data": "x", "weights": "b"})
    assert verdicts(far) == [("blocks.0", "output error", "worse")]


def test_nothing_may_vanish_or_appear() -> None:
    assert verdicts(changed(layers={"blocks.0": 0.2})) == [
        ("blocks.1", "output error", "no longer measured")
    ]
    assert verdicts(RESULT, changed(metrics={"top1": POLICY.metrics["top1"]})) == [
        ("", "sqnr", "not in the baseline")
    ]
    assert verdicts(replace(RESULT, policies={"q": POLICY})) == [("", "", "not in the baseline")]
    assert verdicts(changed(approximated=1)) == [("", "attentions approximated", "fewer")]
    # Policies of the baseline that were not asked for are no matter.
    assert verdicts(RESULT, replace(RESULT, policies={"p": POLICY, "q": POLICY})) == []


def test_not_a_number_is_worse() -> None:
    broken = {**POLICY.metrics, "sqnr": Value(math.inf, math.nan, math.nan)}
    assert verdicts(changed(metrics=broken)) == [("", "sqnr", "worse")]


def test_infinities_are_kept_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    infinite = {
        "top1": Value(0.0, 0.1, -math.inf),
        "score": Value(0.0, -0.1, math.inf),
        "perplexity": Value(math.inf, math.inf, math.nan),
        "sqnr": Value(math.inf, math.inf, 0.0),
    }
    now = changed(metrics=infinite)
    baseline.update(path, now)
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    before = baseline.read(path)["vit"]
    assert str(before) == str(now)  # as NaN is not equal to itself
    # Only what is not a number fails against itself.
    assert verdicts(now, before) == [("", "perplexity", "worse")]
    del infinite["perplexity"]
    assert verdicts(changed(metrics=infinite), changed(metrics=infinite)) == []
    finite = {**infinite, "top1": Value(0.0, 0.0, 0.0), "score": Value(0.0, 0.0, 0.0)}
    assert verdicts(changed(metrics=finite), changed(metrics=infinite)) == [
        ("", "top1", "worse"),
        ("", "score", "better: update the baseline"),
    ]
    assert verdicts(changed(metrics=infinite), changed(metrics=finite)) == [
        ("", "top1", "better: update the baseline"),
        ("", "score", "worse"),
    ]


def test_an_infinite_exact_model_is_held_too() -> None:
    def of(exact: float) -> ModelResult:
        return changed(metrics={"perplexity": Value(exact, 2.0, 0.1)})

    assert verdicts(of(math.inf), of(math.inf)) == []
    worse = [("", "perplexity of the exact model", "worse")]
    assert verdicts(of(math.inf), of(2.0)) == verdicts(of(2.0), of(math.inf)) == worse


def test_another_policy_is_a_remark() -> None:
    failures, notes = compare(RESULT, changed(digest="other"), SAME, OTHER)
    assert not failures
    assert notes[1] == "vit, p: the policy is another than the baseline's"


def test_the_table() -> None:
    failures, _ = compare(RESULT, changed(layers={"blocks.0": 0.25}), SAME, OTHER)
    assert baseline.failure_table(failures).splitlines() == [
        "model    policy    layer     metric          baseline    now    moved    allowed  verdict",
        "-------  --------  --------  ------------  ----------  -----  -------  ---------  "
        "------------------",
        "vit      p         blocks.0  output error         0.2   0.25     0.05     0.0021  worse",
        "vit      p         blocks.1  output error         0.3      -        -          -  "
        "no longer measured",
    ]


def test_the_file_keeps_other_models_and_policies(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    baseline.update(path, RESULT)
    baseline.update(path, replace(RESULT, name="swin"))
    assert baseline.update(path, replace(RESULT, policies={"q": POLICY})) == ()
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))  # strict JSON
    models = baseline.read(path)
    assert list(models) == ["swin", "vit"]
    assert list(models["vit"].policies) == ["p", "q"]
    assert compare(models["vit"], RESULT, SAME, OTHER)[0] == ()
    # Under other conditions the numbers before are worth nothing.
    other = replace(RESULT, conditions={}, policies={"q": POLICY})
    assert baseline.update(path, other) == ("p",)
    assert list(baseline.read(path)["vit"].policies) == ["q"]


def test_files_that_are_no_baseline(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    with pytest.raises(FileNotFoundError, match=r"there is no file .*; --update-baseline"):
        baseline.read(path)
    for text in ("{", "[]", '{"format": "distr-baseline 0", "models": {}}', '{"models": {}}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="is not a file of format 'distr-baseline 1'"):
            baseline.read(path)
