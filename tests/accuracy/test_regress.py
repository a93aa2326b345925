"""The accuracy gate on small models: what it measures, how it goes on, what it says."""

from __future__ import annotations

import json
import re
from collections import UserDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import distr_compile
from distr_compile import Batch, Regression, regress
from distr_compile.accuracy import checkpoint, sameness
from distr_compile.accuracy.baseline import Tolerance
from distr_compile.accuracy.evaluate import evaluate
from distr_compile.accuracy.instrument import layer_errors
from distr_compile.accuracy.metrics import METRICS, as_metrics
from distr_compile.accuracy.regress import held_against
from tests.tiny_models import noise, stack

POLICY = {"default": {"estimator": "lsh-mean", "group_size": 2, "min_seq_len": 0}}
NAMES = {"mean": POLICY, "exact": {"default": {"group_size": 1}}}
LABELS = torch.arange(48).expand(2, -1)
BATCHES = [Batch((noise(seed, 2, 48),), labels=LABELS) for seed in range(4)]


def run(batches: object = BATCHES, policies: object = POLICY, **options: object) -> Regression:
    return regress(stack(), batches, policies, progress=False, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def measured() -> Regression:
    return run(policies=NAMES, metrics=["top5"])


def test_what_is_measured(measured: Regression) -> None:
    checked = {name: distr_compile.Policy.from_any(policy) for name, policy in NAMES.items()}
    metrics = ["top5", "kl", "agreement", "cosine", "sqnr"]
    expected = evaluate(stack(), BATCHES, metrics, {"none": None, **checked})
    errors = layer_errors(stack(), BATCHES, checked)
    for name in NAMES:
        found = measured.result.policies[name]
        assert {key: value.value for key, value in found.metrics.items()} == pytest.approx(
            expected[name].values
        )
        assert list(found.metrics) == metrics
        assert found.metrics["top5"].exact == expected["none"].values["top5"]
    mean, exact = (measured.result.policies[name] for name in NAMES)
    assert mean.layers == {name: error["mean"] for name, error in errors.items()}
    assert min(mean.layers.values()) > 0.1
    assert (mean.approximated, mean.attentions) == (2, 2)
    assert (exact.approximated, exact.attentions) == (0, 2)
    assert exact.metrics["sqnr"].loss < 1e-5
    assert measured.passed
    assert measured.result.versions["examples"] == "8"


def test_the_table_and_the_json(measured: Regression) -> None:
    header, _, mean, exact = measured.table().splitlines()
    expected = "model policy approximated top5 kl agreement cosine sqnr worst layer".split()
    assert header.split() == expected
    assert mean.split()[:3] == ["Stack", "mean", "2/2"]
    assert exact.split()[:3] == ["Stack", "exact", "0/2"]
    text = json.dumps(measured.to_dict(), allow_nan=False)
    assert json.loads(text)["policies"]["mean"]["metrics"]["top5"].keys() == {
        "exact",
        "value",
        "loss",
    }


def test_against_a_baseline(measured: Regression, tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    assert held_against(path, measured.result, update=True).passed
    assert held_against(path, measured.result).passed
    assert run(baseline=path, metrics=["top5"], name="Stack", policies={"mean": POLICY}).passed
    sampled = {"default": {**POLICY["default"], "estimator": "lsh-sample"}}
    worse = run(baseline=path, metrics=["top5"], policies={"mean": sampled})
    assert not worse.passed
    assert "Stack  mean" in " ".join(worse.failure_table().split("  "))
    assert "Stack, mean: the policy is another than the baseline's" in str(worse)
    unknown = run(baseline=path, name="other", limit=1)
    assert [failure.verdict for failure in unknown.failures] == ["not in the baseline"]
    assert "has: Stack; --update-baseline" in unknown.notes[0]


def test_an_interrupted_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    out = tmp_path / "result.json"

    def broken() -> Iterator[Batch]:
        yield from BATCHES[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(broken, out=out, layer_batches=2)
    progress = tmp_path / "result.json.progress"
    assert progress.exists()
    assert not out.exists()

    calls = []
    model = stack()
    model.register_forward_pre_hook(lambda module, args: calls.append(args[0]))
    result = regress(model, BATCHES, POLICY, out=out, layer_batches=2, progress=False)
    assert "goes on after 2 batches" in capsys.readouterr().err
    # Of the remaining two batches: exact, and under the policy; not the first two again.
    first_two = [call for call in calls if any(call is batch.args[0] for batch in BATCHES[:2])]
    assert not first_two
    assert not progress.exists()
    whole = run(layer_batches=2)
    assert result.result.policies == whole.result.policies
    assert result.result.conditions == whole.result.conditions
    assert json.loads(out.read_text())["passed"] is True


def test_stale_progress_is_told_and_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"

    def broken() -> Iterator[Batch]:
        yield BATCHES[0]
        raise OSError("the disk is gone")

    def interrupted() -> None:
        with pytest.raises(OSError, match="the disk is gone"):
            run(broken, out=out, layer_batches=1)

    expected = run(BATCHES[1:2], layer_batches=1).result.policies
    interrupted()
    assert run(BATCHES[1:2], out=out, layer_batches=1).result.policies == expected
    assert "starts over: the batches are others than before" in capsys.readouterr().err
    interrupted()
    run(BATCHES[:1], policies=NAMES["exact"], out=out, layer_batches=1)
    assert "progress is of another model, policy, metric or version" in capsys.readouterr().err
    (tmp_path / "result.json.progress").write_bytes(b"nothing")
    run(BATCHES[:1], out=out, layer_batches=1)
    assert "progress cannot be read" in capsys.readouterr().err


def test_a_policy_that_approximates_nothing_is_remarked() -> None:
    short = {"default": {**POLICY["default"], "min_seq_len": 4096}}
    result = run(BATCHES[:1], short)
    assert result.notes == ("Stack, policy: no attention was approximated; distr explain says why",)


def test_a_metric_of_the_user() -> None:
    def brightness(output: Tensor, batch: Batch) -> Tensor:
        return output.mean((1, 2)) + 1

    result = run(BATCHES[:1], metrics=[brightness]).result.policies["policy"]
    with torch.no_grad():
        exact = float((stack()(*BATCHES[0].args).double().mean((1, 2)) + 1).mean())
    assert result.metrics["brightness"].exact == pytest.approx(exact, rel=1e-5)


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="update_baseline: got no baseline"):
        run(update_baseline=True)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        run(baseline=tmp_path / "baseline.json")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        run(out=tmp_path / "folder" / "result.json")
    with pytest.raises(ValueError, match="batches: got none"):
        run([])
    with pytest.raises(ValueError, match="did you mean 'top1'"):
        run(metrics=["top11"])
    with pytest.raises(ValueError, match="metrics: got two called <lambda>"):
        run(metrics=[lambda output, batch: 0, lambda output, batch: 1])
    with pytest.raises(ValueError, match="policies: got one whose name is empty"):
        run(policies={"": POLICY})


@pytest.mark.parametrize(
    ("options", "kind", "told"),
    [
        ({"tolerance": 0.02}, TypeError, "tolerance: got 0.02 (float); accepted: a Tolerance("),
        (
            {"compiler": "indutcor"},
            ValueError,
            "compiler: got 'indutcor' (str); accepted: inductor",
        ),
        ({"out": "."}, ValueError, "out: got '.'; accepted: a file in a folder that exists"),
        ({"baseline": ".", "update_baseline": True}, ValueError, "baseline: got '.'; accepted: a"),
        ({"limit": -1}, ValueError, "limit: got -1; accepted: a number of batches >= 1, or None"),
        ({"layer_batches": -1}, ValueError, "layer_batches: got -1; accepted: a number of"),
        ({"policies": {}}, ValueError, "policies: got an empty mapping; accepted: a policy, or"),
        ({"metrics": 3}, TypeError, "metrics: got 3 (int); accepted: a list of top1"),
        ({"model": None}, TypeError, "model: got None (NoneType); accepted: a module or a"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(
    options: dict[str, object], kind: type[Exception], told: str
) -> None:
    def never() -> Iterator[Batch]:
        raise AssertionError("measured")

    arguments = {"model": stack(), "batches": never, "policies": POLICY, **options}
    with pytest.raises(kind, match=re.escape(told)):
        regress(**arguments)  # type: ignore[arg-type]


def test_one_metric_needs_no_list() -> None:
    by_name = run(BATCHES[:1], metrics="cosine").result.policies["policy"].metrics
    assert list(by_name) == list(
        run(BATCHES[:1], metrics=["cosine"]).result.policies["policy"].metrics
    )
    assert as_metrics(METRICS["kl"]) == [METRICS["kl"]]
    assert [metric.name for metric in as_metrics(len)] == ["len"]  # type: ignore[arg-type]


@pytest.mark.parametrize("part", [-1, float("nan"), float("inf"), "0.1", True])
def test_tolerances_that_are_none(part: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^tolerance: relative: got .*; accepted: a number >= 0; "
    ):
        Tolerance(part, 0.0)


def stopped(out: Path, count: int, **options: object) -> None:
    """A run that stops after so many batches and leaves its progress."""

    def broken() -> Iterator[Batch]:
        yield from BATCHES[:count]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        run(broken, out=out, layer_batches=1, **options)


def always(score: float) -> Callable[[Tensor, Batch], Tensor]:
    return lambda output, batch: torch.full((2,), score)


@pytest.mark.parametrize("what", ["metrics", "torch", "sources", "lambda", "object"])
def test_progress_of_another_measurement_is_not_gone_on_with(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Score:
        def __call__(self, output: Tensor, batch: Batch) -> Tensor:
            return torch.ones(2)

    one = Score()
    before: list[object] = {"lambda": [always(1.0)], "object": [one]}.get(what, ["top5"])
    now: list[object] = {"lambda": [always(0.0)], "object": [one], "metrics": ["top1"]}.get(
        what, before
    )
    out = tmp_path / "result.json"
    stopped(out, 2, metrics=before)
    if what == "torch":
        monkeypatch.setattr(torch, "__version__", "2.99.0")
    if what == "sources":
        monkeypatch.setattr(sameness, "of_sources", lambda: "others")
    found = run(out=out, layer_batches=1, metrics=now).result.policies
    err = capsys.readouterr().err
    assert "starts over" in err
    assert "goes on" not in err
    assert ("nobody can tell whether Score is the metric" in err) == (what == "object")
    assert found == run(layer_batches=1, metrics=now).result.policies


def test_progress_of_the_same_function_is_gone_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    stopped(out, 2, metrics=[always(1.0)])
    run(out=out, layer_batches=1, metrics=[always(1.0)])
    assert "goes on after 2 batches" in capsys.readouterr().err


def test_fewer_batches_than_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result.json"
    stopped(out, 2)
    fewer = run(BATCHES[:1], out=out, layer_batches=1).result
    assert "starts over: the batches are others than before" in capsys.readouterr().err
    assert fewer.policies == run(BATCHES[:1], layer_batches=1).result.policies
    assert fewer.versions["examples"] == "2"


@pytest.mark.parametrize("layer_batches", [0, 1])
def test_what_was_noted_of_other_data_is_dropped(layer_batches: int, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    unlabelled = [Batch((5 * noise(9, 2, 48),)), *BATCHES[1:]]
    with pytest.raises(ValueError, match="top5: got labels of NoneType"):
        run(unlabelled, out=out, layer_batches=layer_batches, metrics=["top5"])
    assert (tmp_path / "result.json.progress").exists()
    found = run(out=out, layer_batches=layer_batches, metrics=["top5"]).result.policies
    assert found == run(layer_batches=layer_batches, metrics=["top5"]).result.policies


def test_an_interrupt_leaves_all_of_a_batch_or_nothing(tmp_path: Path) -> None:
    class Interrupted(UserDict[str, Tensor]):
        def __iter__(self) -> Iterator[str]:
            yield "a"
            raise KeyboardInterrupt

    path = tmp_path / "progress"
    begun = checkpoint.Checkpoint(path, "key")
    rows = {"a": torch.zeros(2, 1), "b": torch.zeros(2, 1)}
    begun.add("one", rows)
    with pytest.raises(KeyboardInterrupt):
        begun.add("two", Interrupted(rows))
    begun.write()
    again, why = checkpoint.Checkpoint.open(path, "key")
    assert (again.batches, why) == (["one"], "")
    again.add("two", rows)
    again.write()
    again, _ = checkpoint.Checkpoint.open(path, "key")
    assert again.batches == ["one", "two"]
    assert [len(again.together(name)) for name in ("a", "b")] == [4, 4]


def test_an_update_says_what_it_drops(measured: Regression, tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    held_against(path, measured.result, update=True)
    result = run(BATCHES[:1], {"mean": POLICY}, baseline=path, update_baseline=True)
    assert result.notes[1:] == (
        "Stack: dropped from it, as they were measured under other conditions: exact",
    )
