"""The small parts of tuning: bounds of losses, halves of the data, patterns of layers."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch

from distr_compile.accuracy import sameness
from distr_compile.accuracy.batch import Batch
from distr_compile.accuracy.metrics import METRICS, Metric, as_metric
from distr_compile.policy import LayerPlan, Policy
from distr_compile.policy.plan import DEFAULTS, OPTIONS, Option
from distr_compile.tuning import halves as halves_module
from distr_compile.tuning.bounds import loss_with_bound
from distr_compile.tuning.candidates import name_of, spelled_out
from distr_compile.tuning.halves import Halves
from distr_compile.tuning.written import AS_GIVEN, pattern, policy_text

MEAN = as_metric(lambda output, batch: output)


def normal(seed: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, generator=generator, dtype=torch.float64)


def test_the_bound_of_a_mean_is_that_of_theory() -> None:
    """Loss = mean of the differences over a mean of 1; 95 % is 1.645 standard errors above it."""
    exact = torch.ones(400, 1, dtype=torch.float64)
    rows = exact - 0.1 - 0.2 * normal(1, 400)
    found = loss_with_bound(MEAN, exact, rows, 0.95)
    differences = exact - rows
    assert found.loss == pytest.approx(differences.mean().item())
    error = differences.std().item() / 20
    assert found.upper == pytest.approx(found.loss + 1.645 * error, abs=0.15 * error)
    assert loss_with_bound(MEAN, exact, rows, 0.5).upper < found.upper


def test_examples_are_paired() -> None:
    """What both models find hard does not count."""
    exact = 5 + normal(2, 200)
    found = loss_with_bound(MEAN, exact, exact - 0.01, 0.95)
    assert found.upper - found.loss < 1e-3
    same = loss_with_bound(MEAN, exact, exact.clone(), 0.95)
    assert (same.loss, same.upper) == (0, 0)


def test_no_example_comes_twice() -> None:
    """A metric that compares examples could take a double for an answer."""

    def without_doubles(rows: torch.Tensor) -> float:
        assert len(rows.unique(dim=0)) == len(rows)
        return float(rows.mean())

    metric = Metric("m", "higher", None, MEAN.statistic, without_doubles)
    loss_with_bound(metric, normal(3, 50), normal(4, 50), 0.9)


def test_what_is_not_a_number_has_no_bound() -> None:
    exact = normal(1, 20)
    broken = exact.clone()
    broken[3] = torch.nan
    assert loss_with_bound(MEAN, exact, broken, 0.95).upper == torch.inf


def test_fidelity_has_bounds_too() -> None:
    rows = torch.tensor([[0.1, 10.0]] * 30 + [[0.3, 10.0]] * 30, dtype=torch.float64)
    found = loss_with_bound(METRICS["kl"], torch.tensor([[0.0, 10.0]] * 60).double(), rows, 0.95)
    assert found.exact == 0
    assert found.loss == pytest.approx(0.02)
    assert 0.02 < found.upper < 0.03


@pytest.mark.parametrize(
    ("share", "held"), [(0.5, [1, 3, 5, 7]), (0.25, [3, 7]), (0.75, [1, 2, 3, 5, 6, 7])]
)
def test_held_out_batches_are_spread(share: float, held: list[int]) -> None:
    halves = Halves([torch.full((2,), float(i)) for i in range(8)], share)
    for is_held, wanted in ((True, held), (False, sorted(set(range(8)) - set(held)))):
        found = [int(batch.args[0][0]) for batch in halves.half(held=is_held)]
        assert found == wanted
    assert halves.tuning_count == 8 - len(held)
    other = Halves([Batch((torch.full((2,), float(i)),), labels=i) for i in range(8)], share)
    assert other.digest != halves.digest


def test_other_data_are_noticed_in_either_half(monkeypatch: pytest.MonkeyPatch) -> None:
    data = [torch.full((2,), float(i)) for i in range(4)]
    halves = Halves(lambda: iter(data), 0.5)
    digested: list[float] = []
    digest = halves_module._digest

    def counting(batch: Batch) -> str:
        digested.append(float(batch.args[0][0]))
        return digest(batch)

    monkeypatch.setattr(halves_module, "_digest", counting)
    assert len(list(halves.half(held=True))) == 2
    assert digested == [1, 3]  # those of the other half cost nothing
    data[2] = torch.zeros(2)
    assert len(list(halves.half(held=True))) == 2
    with pytest.raises(ValueError, match="got another batch 2 than there was"):
        list(halves.half(held=False))
    del data[3]
    with pytest.raises(ValueError, match="got 3 batches instead of 4"):
        list(halves.half(held=True))
    data += [data[1], data[0]]
    data[2:4] = [torch.full((2,), float(i)) for i in (2, 3)]
    with pytest.raises(ValueError, match="got more batches than the 4 there were"):
        list(halves.half(held=True))


# --- what a metric and a model are --------------------------------------------------------------

FACTOR = 2.0


def scaled(output: Any, batch: Batch) -> Any:
    return FACTOR * helper(output)


def helper(output: Any) -> Any:
    return output + 1


def of_threshold(threshold: Any) -> Any:
    return lambda output, batch: output > threshold


class Scorer:
    factor = 1.0

    def __call__(self, output: Any, batch: Batch) -> Any:
        return self.factor * output

    def method(self, output: Any, batch: Batch) -> Any:
        return self.factor * output


def identity(score: Any) -> str | None:
    return sameness.of_metric(as_metric(score))


def test_metrics_are_known_by_what_they_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    assert identity("kl") == "kl"
    assert identity(lambda o, b: o) != identity(lambda o, b: -o)
    assert identity(of_threshold(1)) == identity(of_threshold(1)) != identity(of_threshold(2))
    ours = of_threshold(1)
    ours.__name__ = "kl"
    assert identity(ours) not in ("kl", None)
    before = identity(scaled)
    assert before == identity(scaled)
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "FACTOR", 3.0)
        assert identity(scaled) != before
    with monkeypatch.context() as patch:
        patch.setattr(helper, "__code__", (lambda output: output + 2).__code__)
        assert identity(scaled) != before
    assert identity(scaled) == before
    one, two = (functools.partial(lambda k, o, b: k * o, k) for k in (1, 2))
    assert identity(one) != identity(two)
    for unknown in (Scorer(), Scorer().method, of_threshold(Scorer())):
        assert identity(unknown) is None


def test_models_of_equal_weights_differ_in_what_else_they_have() -> None:
    class Config:
        heads = 2

        def to_json_string(self) -> str:
            return str(self.heads)

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    model.config = Config()  # type: ignore[assignment]
    model.heads = 2  # type: ignore[assignment]
    seen = [sameness.of_model(model)]
    assert sameness.of_model(model) == seen[0]
    model.heads = 4  # type: ignore[assignment]
    seen.append(sameness.of_model(model))
    model.config.heads = 4  # type: ignore[union-attr]
    seen.append(sameness.of_model(model))
    model[1].running_mean.fill_(1)  # type: ignore[union-attr,operator]
    seen.append(sameness.of_model(model))
    model[0].weight.data.mul_(2)  # type: ignore[operator,union-attr]
    seen.append(sameness.of_model(model))
    assert len(set(seen)) == 5


def _another(option: Option, default: object) -> object:
    """A value that a field accepts besides its default."""
    least = () if option.at_least is None else (option.at_least, option.at_least + 1)
    return next(value for value in (*least, *option.choices) if value != default)


def test_every_field_that_is_tuned_is_in_the_label_and_in_the_rule() -> None:
    assert name_of(LayerPlan()) == "projection G=2"
    assert (
        name_of(LayerPlan(rank=24, rounds=2, grouping_block=8))
        == "projection r=24 rounds=2 block=8"
    )
    others = {
        name: _another(option, DEFAULTS[name])
        for name, option in OPTIONS.items()
        if name not in (*AS_GIVEN, "min_seq_len")
    }
    plans = [LayerPlan(**{name: value}) for name, value in others.items()]  # type: ignore[arg-type]
    assert len({name_of(plan) for plan in (*plans, LayerPlan())}) == len(plans) + 1
    for (name, value), plan in zip(others.items(), plans, strict=True):
        assert spelled_out(plan)[name] == value
        assert spelled_out(plan)["min_seq_len"] == 0


@pytest.mark.parametrize(
    ("layers", "wanted"),
    [
        (["blocks.0.attn"], "blocks.0.attn"),
        (["blocks.0.attn", "blocks.11.attn"], r"re:blocks\.(0|11)\.attn"),
        (["0", "3"], "re:(0|3)"),
        (["h.3"], "h.3"),
        ([""], "re:()"),
        (["odd[name"], r"re:odd\[name"),
        (["block1.attn"], "block1.attn"),
    ],
)
def test_a_pattern_names_its_layers_only(layers: list[str], wanted: str) -> None:
    found = pattern(layers)
    assert found == wanted
    rule = Policy(rule=[{"layers": found, "group_size": 2}]).rule[0]
    others = [
        "blocks.1.attn",
        "blocks.0.attn.proj",
        "1",
        "0.attn",
        "h.30",
        "odd",
        "x",
        "block2.attn",
    ]
    assert all(map(rule.matches, layers))
    assert not any(map(rule.matches, others))


@pytest.mark.parametrize(
    ("layers", "wanted"),
    [
        (["0.layers.0", "0.layers.1", "0.layers.2"], [r"re:0\.layers\.(0|1|2)"]),
        (["a.0.b.1.c", "a.1.b.1.c", "a.2.b.1.c"], [r"re:a\.(0|1|2)\.b\.1\.c"]),
        (["a.0.b.0", "a.0.b.1", "a.1.b.0"], [r"re:a\.(0|1)\.b\.0", "a.0.b.1"]),
        (["a.0.b.0", "a.1.b.0", "a.2.b.1"], [r"re:a\.(0|1)\.b\.0", "a.2.b.1"]),
        (["a", "b", "0", "1"], ["a", "b", "re:(0|1)"]),
    ],
)
def test_layers_that_differ_in_one_number_share_a_rule(
    layers: list[str], wanted: list[str]
) -> None:
    chosen = {layer: {"group_size": 2} for layer in layers}
    text = policy_text(Policy(), chosen, [], dict.fromkeys(layers, ""))
    assert [rule.layers for rule in Policy.from_any(_parsed(text)).rule] == wanted


def test_layers_of_one_plan_and_one_kind_share_a_rule() -> None:
    half, quarter = {"group_size": 2, "rounds": 1}, {"group_size": 4, "rounds": 1}
    names = [f"{part}.{i}.attn" for part in ("encoder", "decoder") for i in range(3)]
    chosen = {name: quarter if name == "encoder.1.attn" else half for name in names}
    text = policy_text(Policy(), chosen, ["What it is."], {name: f"about {name}" for name in names})
    policy = Policy.from_any(_parsed(text))
    assert [rule.layers for rule in policy.rule] == [
        r"re:encoder\.(0|2)\.attn",
        "encoder.1.attn",
        r"re:decoder\.(0|1|2)\.attn",
    ]
    assert all(policy.resolve(name).group_size == chosen[name]["group_size"] for name in names)
    assert policy.resolve("head").is_exact
    assert text.startswith("# What it is.\n")
    assert re.findall(r"^# about (.*)$", text, re.M) == [
        "encoder.0.attn",
        "encoder.2.attn",
        "encoder.1.attn",
        *names[3:],
    ]


def _parsed(text: str) -> dict[str, object]:
    import tomlkit

    return tomlkit.parse(text).unwrap()


def test_the_benchmark_says_so_where_all_stays_exact() -> None:
    from benchmarks.tuning import held_out_cells

    nothing = {"layers": 0, "held_out_loss": None, "held_out_at_most": None, "within": True}
    assert held_out_cells(nothing) == ["all exact", "-", "-"]
    some = {"layers": 1, "held_out_loss": 0.01, "held_out_at_most": 0.02, "within": False}
    assert held_out_cells(some) == ["1.00%", "2.00%", "**no**"]
