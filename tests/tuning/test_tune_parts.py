"""The small parts of tuning: bounds of losses, halves of the data, patterns of layers."""

from __future__ import annotations

import re

import pytest
import torch

from distr_compile.accuracy.batch import Batch
from distr_compile.accuracy.metrics import METRICS, Metric, as_metric
from distr_compile.policy import Policy
from distr_compile.tuning.bounds import loss_with_bound
from distr_compile.tuning.halves import Halves
from distr_compile.tuning.written import pattern, policy_text

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
