"""Tuning: the model of loss, the budget on both halves, what is written, and going on later."""

from __future__ import annotations

import functools
import itertools
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distr_compile.accuracy.batch import Batch
from distr_compile.accuracy.evaluate import evaluate
from distr_compile.accuracy.instrument import site_errors
from distr_compile.accuracy.metrics import as_metric
from distr_compile.cli import OK, USAGE, main
from distr_compile.lowering import cpu
from distr_compile.lowering.call import Call
from distr_compile.policy import Policy, PolicyError
from distr_compile.tuning import measurements
from distr_compile.tuning.bounds import loss_with_bound
from distr_compile.tuning.calibrate import calibrate
from distr_compile.tuning.sensitivity import NOISE, Bench, Sensitivity, squared_errors
from distr_compile.tuning.tuned import _refused_lines
from tests.tiny_models import noise, stack
from tests.tuning.classifier import classifier, task, tuned


def inputs() -> list[Tensor]:
    """For the command line."""
    return [noise(seed, 2, 48) for seed in range(4)]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.compiler.reset()


# --- the model of loss --------------------------------------------------------------------------


def test_losses_of_layers_add_up() -> None:
    """Of all 16 choices of two plans for four layers the sum is right to a tenth."""
    model = classifier()
    plan = Policy({"estimator": "projection", "rank": 24, "min_seq_len": 0})
    batches = [Batch((noise(seed, 2, 64),)) for seed in range(3)]
    measured = site_errors(model, batches, {"p": plan})
    errors = squared_errors(measured)
    layers = list(errors)
    bench = Bench(model, {"p": plan})
    choices = [
        {layer: "p" for layer, on in zip(layers, choice, strict=True) if on}
        for choice in itertools.product((False, True), repeat=4)
    ]
    _, *rows = bench.rows(batches, choices, [NOISE])
    noises = {tuple(c): NOISE.result(r[NOISE]) for c, r in zip(choices, rows, strict=True)}
    gains = {layer: noises[layer,] / errors[layer]["p"] for layer in layers}
    model_of_loss = Sensitivity(errors, gains)
    for choice in choices:
        predicted = model_of_loss.predicted(choice)
        assert predicted == pytest.approx(noises[tuple(choice)], rel=0.1, abs=1e-12)
    assert noises[tuple(layers)] > 1e-5


# --- the budget ---------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0.001, 0.01, 0.05])
def test_the_budget_holds_on_data_that_were_held_out(budget: float, tmp_path: Path) -> None:
    model = classifier()
    batches = task(model)
    path = tmp_path / "p.toml"
    result = tuned(model, batches, budget, metric="top1", path=path)
    assert result.tuning.upper <= budget
    policies = {"exact": None, "tuned": Policy.load(path)}
    for half, loss in ((batches[0::2], result.tuning), (batches[1::2], result.held_out)):
        if loss is None:
            assert not result.fits
            continue
        both = evaluate(model, half, ["top1"], policies)
        exact, value = (both[name].values["top1"] for name in policies)
        assert (exact, value) == pytest.approx((loss.exact, loss.value), rel=1e-9)
        assert (exact - value) / exact <= budget
        assert loss.loss == pytest.approx((exact - value) / exact)
    assert result.looks <= 4


def test_a_larger_budget_buys_a_cheaper_policy(tmp_path: Path) -> None:
    model = classifier()
    batches = [b.args[0] for b in task(model, 6)]
    path = tmp_path / "p.toml"
    costs = []
    for budget in (0.0, 3e-4, 1e-3, 1.0):
        # one state file for all
        result = tuned(model, batches, budget, metric="cosine", path=path)
        assert result.smooth == "noise"
        costs.append(result.chosen.cost)
    assert costs == sorted(costs, reverse=True)
    assert costs[0] == 1
    assert costs[0] > costs[1] > costs[2] > costs[3]


def test_the_policy_says_what_was_chosen_and_does_what_was_measured(tmp_path: Path) -> None:
    model = classifier()
    batches = [b.args[0] for b in task(model, 6)]
    path = tmp_path / "p.toml"
    result = tuned(model, batches, 1e-3, metric="cosine", path=path, command="distr tune x")
    policy = Policy.load(path)
    assert policy == result.policy
    assert policy.default.is_exact
    assert path.read_text() == result.text
    assert "# distr tune x" in result.text
    taken = set()
    for name, _ in model.named_modules():
        plan, label = policy.resolve(name), result.chosen.setting.get(name)
        if label is None:
            assert plan.is_exact
            continue
        taken.add(name)
        width = plan.rank if plan.rank else 32 // (plan.group_size or 1)
        assert label == f"{plan.estimator} r={width}"
        assert plan.min_seq_len == 0
        assert f"# {name}: error" in result.text
    assert taken
    assert taken == result.chosen.setting.keys()
    through = evaluate(model, batches[0::2], ["cosine", NOISE], {"p": policy})["p"].values
    assert through["cosine"] == pytest.approx(result.tuning.value, abs=1e-9)
    assert through["noise"] == pytest.approx(result.chosen.measured, rel=1e-3)


@pytest.mark.parametrize("named", ["kl", "noise", None])
def test_every_example_counts_once(named: str | None) -> None:
    """Also where the metric is the smooth measure itself, or a function of its name."""
    model = classifier()
    batches = [Batch((b.args[0],), labels=b.labels) for b in task(model, 8)]
    metric: Any = "kl"
    if named is not None:

        def metric(output: Tensor, batch: Batch) -> Tensor:
            return output.detach().float().softmax(-1).amax((-1, -2))

        metric.__name__ = named
    result = tuned(model, batches, 0.5, metric=metric)
    as_metrics = as_metric(metric)
    both = evaluate(model, batches[0::2], [as_metrics], {"exact": None, "tuned": result.policy})
    rows = [both[name].rows[as_metrics.name] for name in both]
    direct = loss_with_bound(as_metrics, rows[0], rows[1], 0.95)
    assert result.smooth == "kl"
    assert result.tuning.examples == direct.examples == len(rows[0]) == 8
    assert result.tuning.loss == pytest.approx(direct.loss, rel=1e-4, abs=1e-9)
    assert result.tuning.upper == pytest.approx(direct.upper, rel=1e-4, abs=1e-9)
    assert result.tuning.upper > result.tuning.loss


def test_what_no_loss_in_few_examples_means_is_told() -> None:
    batches = [noise(seed, 2, 64) for seed in range(4)]
    result = tuned(stack(), batches, 0.9, metric=lambda output, batch: torch.ones(2))
    assert result.fits
    assert (result.tuning.loss, result.tuning.upper) == (0, 0)
    assert "Of 4 examples none moved the metric down" in result.notes[-1]
    assert "more than 0.75 of all" in result.notes[-1]


def test_nothing_fits(tmp_path: Path) -> None:
    model, path = stack(), tmp_path / "p.toml"
    batches = [noise(seed, 2, 64) for seed in range(4)]
    result = tuned(model, batches, 1e-12, metric="cosine", path=path)
    assert not result.fits
    assert result.held_out is None
    assert result.looks == 0
    assert any("nothing cheaper is within the budget of 1e-12" in note for note in result.notes)
    assert "All layers stay exact" in path.read_text()
    policy = Policy.load(path)
    assert policy.rule == ()
    assert policy.default.is_exact


def test_nothing_is_cheaper() -> None:
    batches = [noise(seed, 2, 64) for seed in range(2)]
    result = tuned(stack(), batches, 0.5, metric="cosine", time="model")
    assert not result.fits
    assert any("no candidate costs less than exact" in note for note in result.notes)


def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Approximate attention gives no numbers."""
    real = cpu.approximate

    def approximate(call: Call, **options: Any) -> None:
        real(call, **options)
        call.out.fill_(math.nan)

    monkeypatch.setattr(cpu, "approximate", approximate)


def test_nothing_is_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch)
    batches = [noise(seed, 2, 64) for seed in range(2)]
    result = tuned(stack(), batches, 0.5, metric="cosine")
    assert not result.fits
    assert "each of the candidates that cost less the output is not finite" in result.notes[-1]
    given = {"rule": [{"layers": "layers.1", "rank": 24, "min_seq_len": 0}]}
    result = tuned(stack(), batches, 0.5, metric="cosine", policy=given)
    assert not result.fits
    assert "the given policy has for layers.1, the output is not finite" in result.notes[-1]
    assert result.policy.resolve("layers.1").is_exact


def test_held_out_data_have_a_veto() -> None:
    """Where all tokens are alike, nothing is lost; the other half is not like that."""
    batches = [noise(seed, 2, 64) * (seed % 2) for seed in range(6)]
    result = tuned(stack(), batches, 1e-5, metric="cosine")
    assert not result.fits
    assert result.looks >= 1
    assert any("Look 1 at the held-out half" in note for note in result.notes)
    assert "over the budget" in result.text
    assert result.policy.default.is_exact


def test_a_tighter_policy_is_tried_and_the_looks_are_counted(tmp_path: Path) -> None:
    """The held-out half is harder: attention is sharper there."""
    model = classifier()
    batches = [noise(seed, 2, 64) * (1 + 0.1 * (seed % 2)) for seed in range(8)]
    path = tmp_path / "p.toml"
    easy = tuned(model, batches[0::2], 1e-3, metric="cosine")
    result = tuned(model, batches, 1e-3, metric="cosine", path=path)
    assert result.looks > 1
    assert result.fits
    assert result.held_out is not None
    assert result.held_out.loss <= 1e-3
    assert easy.chosen.cost < result.chosen.cost < 1
    assert f"looked at {'twice' if result.looks == 2 else f'{result.looks} times'}" in result.text
    again = tuned(model, batches, 1e-3, metric="cosine", path=path)
    assert again.looks == result.looks  # known from the state, not looked at again
    assert again.text == result.text


# --- what is settled already --------------------------------------------------------------------


def test_rules_of_the_given_policy_stay(tmp_path: Path) -> None:
    model = classifier()
    batches = [b.args[0] for b in task(model, 4)]
    kept = {"layers": "body.layers.1", "rank": 24, "min_seq_len": 0}
    exact = {"layers": "body.layers.0", "group_size": 1}
    given = Policy({"causal": "block", "exact": "keep"}, [kept, exact])
    result = tuned(model, batches, 0.5, metric="cosine", policy=given, path=tmp_path / "p.toml")
    policy = Policy.load(tmp_path / "p.toml")
    assert policy.rule[:2] == given.rule
    assert policy.default.exact == "keep"
    assert policy.resolve("body.layers.0").is_exact
    assert policy.resolve("body.layers.1").rank == 24
    assert policy.resolve("body.layers.2").rank == 16
    assert result.chosen.setting["body.layers.1"] == "as given"
    assert "body.layers.0" not in result.chosen.setting
    # And if they alone lose too much, they go.
    nothing = tuned(model, batches, 1e-9, metric="cosine", policy=given)
    assert nothing.policy.rule == ()
    assert nothing.policy.default.is_exact


class Cut(nn.Module):
    """A layer that a graph break cuts in two."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer(x)
        torch._dynamo.graph_break()
        return x + self.layer(x)


def test_no_rule_says_what_was_not_measured(tmp_path: Path) -> None:
    model = classifier()
    model.body.layers[0] = Cut(model.body.layers[0])  # type: ignore[union-attr,operator,index]
    model.body.forward = lambda x: functools.reduce(  # type: ignore[union-attr]
        lambda x, layer: x + layer(x), model.body.layers, x
    )
    batches = [b.args[0] for b in task(model, 4)]
    path = tmp_path / "p.toml"
    given = Policy(rule=[{"layers": "body.layers.[01]*", "rank": 24, "min_seq_len": 0}])
    result = tuned(model, batches, 0.5, metric="cosine", policy=given, path=path)
    cut = "body.layers.0.layer"
    assert "graph break" in result.refused[cut]
    assert result.chosen.setting["body.layers.1"] == "as given"
    assert result.policy.resolve("body.layers.1").rank == 24
    assert result.policy.resolve(cut).is_exact
    assert f"could not be measured there: {cut}." in result.notes[-1]
    assert f"1 attention stays exact: {cut}: a graph break" in str(result)
    assert f"# 1 attention stays exact: {cut}: a graph break" in path.read_text()
    assert "what cannot be approximated" in str(result)
    ours = evaluate(model, batches[0::2], ["cosine"], {"p": result.policy})["p"].values["cosine"]
    assert ours == pytest.approx(result.tuning.value, abs=1e-9)
    # And where all stays exact, all does.
    nothing = tuned(model, batches, 1e-12, metric="cosine", policy=given, path=path)
    assert not nothing.fits
    noises = evaluate(model, batches, [NOISE], {"p": Policy.load(path)})["p"].values
    assert noises["noise"] < 1e-10


def test_a_policy_that_says_something_else_is_never_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "distr_compile.tuning.measurements.fields_of", lambda policy, layer: {"rank": 17}
    )
    batches = [noise(seed, 2, 64) for seed in range(2)]
    with pytest.raises(RuntimeError, match=r"the policy says .*rank=17.* of 'layers.0'"):
        tuned(stack(), batches, 0.9, metric="cosine")


def test_attentions_that_stay_exact_are_named_a_few_for_each_reason() -> None:
    lines = _refused_lines({**{f"a.{i}": "too narrow" for i in range(6)}, "": "odd"})
    assert lines == [
        "6 attentions stay exact: a.0, a.1, a.2, a.3 and 2 more: too narrow.",
        "1 attention stays exact: (root): odd.",
    ]


def test_no_look_ahead_where_the_given_policy_forbids_it() -> None:
    batches = [noise(seed, 1, 64) for seed in range(2)]
    strict = Policy({"causal": "strict"})
    candidates = [{"estimator": "lsh-mean", "rank": 16}]
    result = tuned(stack(), batches, 0.9, metric="cosine", policy=strict, candidates=candidates)
    assert not result.fits
    assert result.policy.default.causal == "strict"


def test_calibrated_layers_take_the_bases_of_the_given_policy(tmp_path: Path) -> None:
    model = stack()
    batches = [noise(seed, 2, 64) for seed in range(4)]
    bases = calibrate(model, batches[:1], path=tmp_path / "bases", progress=False)
    given = Policy({"causal": "strict"}).with_bases(bases.path, bases.sha256)
    candidates = [{"estimator": "calibrated", "rank": 16}]
    path = tmp_path / "folder" / "p.toml"
    path.parent.mkdir()
    result = tuned(
        model, batches, 0.5, metric="cosine", policy=given, candidates=candidates, path=path
    )
    assert result.fits
    policy = Policy.load(path)
    assert policy.bases is not None
    assert policy.bases.file == "../bases"
    values = evaluate(model, batches[0::2], ["cosine"], {"p": policy})["p"].values
    assert values["cosine"] == pytest.approx(result.tuning.value, abs=1e-9)


# --- what is told -------------------------------------------------------------------------------


def test_table_and_plot(tmp_path: Path) -> None:
    batches = [noise(seed, 1, 64) for seed in range(4)]
    result = tuned(stack(), batches, 1e-2, metric="cosine")
    table = result.table()
    for name in ("exact", "chosen", "uniform projection G=2", "uniform lsh-sample G=2"):
        assert name in table
    assert "Held-out half, looked at once" in str(result)
    result.plot(tmp_path / "p.svg")
    drawn = (tmp_path / "p.svg").read_text()
    assert drawn.startswith("<?xml")
    content = result.to_dict()
    assert content["fits"] is True
    assert content["points"][0]["kind"] == "exact"
    assert content["held_out"]["examples"] == 2
    assert math.isfinite(json.loads(json.dumps(content["exact_cost"])))


def shuffled() -> Iterator[Tensor]:
    for _ in range(2):
        shuffled.seed += 1  # type: ignore[attr-defined]
        yield noise(shuffled.seed, 1, 32)  # type: ignore[attr-defined]


shuffled.seed = 0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"path": "no/such/folder/p.toml"}, "path: got 'no/such/folder/p.toml'"),
        ({"path": "."}, "accepted: a file in a folder that exists"),
        ({"budget": -1}, "budget: got -1; accepted: a number >= 0"),
        ({"budget": True}, "budget: got True"),
        ({"budget": math.nan}, "budget: got nan"),
        ({"budget": 1, "metric": "top1"}, "less than 1; write 0.01 for 1 %"),
        ({"metric": "tpo1"}, "did you mean 'top1'"),
        ({"held_out": 1}, "held_out: got 1 (int); accepted: a number between 0 and 1"),
        ({"confidence": 0}, "confidence: got 0"),
        ({"held_out": "0.5"}, "held_out: got '0.5' (str); accepted: a number between"),
        ({"compiler": "bogus"}, "compiler: got 'bogus' (str); accepted: inductor"),
        ({"time": "now"}, "time: got 'now'"),
        ({"batches": [noise(1, 1, 32)]}, "batches: got 1, of which 0 would be held out"),
        ({"batches": iter([])}, "can be walked only once"),
        ({"batches": shuffled}, "switch shuffling off"),
        ({"candidates": []}, "candidates: got none"),
        ({"candidates": [{"group_size": 1}]}, "candidates: got none"),
        ({"model": stack().train()}, "call model.eval()"),
        ({"model": torch.relu}, "accepted: a torch.nn.Module"),
        ({"model": nn.Linear(64, 2).eval(), "metric": "cosine"}, "got no attention to tune"),
    ],
)
def test_mistakes_are_told(change: dict[str, Any], told: str) -> None:
    arguments: dict[str, Any] = {
        "model": stack(),
        "batches": [noise(1, 1, 32), noise(2, 1, 32)],
        "budget": 0.1,
        **change,
    }
    with pytest.raises(ValueError, match=told.replace("(", r"\(").replace(")", r"\)")):
        tuned(**arguments)


def test_calibrated_without_bases_is_an_error() -> None:
    batches = [noise(1, 1, 32), noise(2, 1, 32)]
    with pytest.raises(PolicyError, match="no table"):
        tuned(stack(), batches, 0.1, candidates=[{"estimator": "calibrated", "rank": 16}])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "p.toml"
    arguments = ["tune", "tests.tiny_models:stack", "--data", "test_tune:inputs"]
    arguments += ["--metric", "cosine", "--time", "products", "--out", str(out)]
    files = ["--plot", str(tmp_path / "p.png"), "--json", str(tmp_path / "p.json")]
    assert main([*arguments, "--budget", "5%", *files]) == OK
    told = capsys.readouterr()
    assert "uniform projection G=2" in told.out
    assert f"written: {out}" in told.out
    assert Policy.load(out).rule
    assert (tmp_path / "p.png").stat().st_size > 1000
    assert json.loads((tmp_path / "p.json").read_text())["budget"] == 0.05
    assert main([*arguments, "--budget", "some"]) == USAGE
    assert "accepted: a loss such as 0.01 or 1%" in capsys.readouterr().err
    assert main([*arguments, "--budget", "1%", "--metric", "kl"]) == USAGE
    assert "accepted: one, which the budget is of" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["--out", "--plot", "--json"])
def test_the_command_tells_at_once_what_it_could_not_write(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("distr_compile.commands.data.load", pytest.fail)
    files = {"--out": str(tmp_path / "p.toml"), what: str(tmp_path / "none" / "p.svg")}
    arguments = ["tune", "tests.tiny_models:stack", "--data", "test_tune:inputs", "--budget", "1%"]
    assert main([*arguments, *itertools.chain(*files.items())]) == USAGE
    assert f"{what}: got" in capsys.readouterr().err
    if what == "--plot":
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        files[what] = str(tmp_path / "p.svg")
        assert main([*arguments, *itertools.chain(*files.items())]) == USAGE
        assert "pip install 'distr-compile[plots]'" in capsys.readouterr().err


@pytest.mark.parametrize(("metric", "told"), [("top1", "got labels of NoneType"), ("kl", "cosine")])
def test_a_metric_that_does_not_fit_is_told_before_anything_is_measured(
    metric: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(measurements, "site_errors", never)
    with pytest.raises(ValueError, match=told):
        tuned(stack(), [noise(1, 1, 32), noise(2, 1, 32)], 0.1, metric=metric)
