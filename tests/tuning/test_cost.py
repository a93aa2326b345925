"""What attention costs: counted by hand, and measured."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from distr_compile.accuracy.instrument import Site
from distr_compile.estimators import ESTIMATORS
from distr_compile.lowering.call import Shape
from distr_compile.policy import LayerPlan
from distr_compile.tuning.cost import clock, flops, products, seconds

SHAPE = Shape(2, 4, 2, 100, 60, 64, 32, False, None, torch.float32, torch.device("cpu"))
CAUSAL = SHAPE._replace(is_causal=True)
PLAN = LayerPlan(group_size=2, estimator="projection", min_seq_len=0)


def seen_pairs(queries: int, keys: int) -> int:
    return sum(min(i + 1, keys) for i in range(queries))


def test_products_are_two_for_every_pair_that_is_seen() -> None:
    assert products(SHAPE, None) == 2 * 8 * 100 * 60 * (64 + 32)
    assert products(SHAPE, PLAN) == 2 * 8 * 100 * 60 * (32 + 32)
    assert products(CAUSAL, PLAN) == 2 * 8 * seen_pairs(100, 60) * (32 + 32)
    long = CAUSAL._replace(num_keys=130)
    assert products(long, None) == 2 * 8 * seen_pairs(100, 130) * (64 + 32)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_model_adds_what_the_estimator_takes(name: str) -> None:
    plan = dataclasses.replace(PLAN, estimator=name, grouping_block=50)
    sizes = {"num_queries": 100, "num_keys": 60, "head_dim": 64, "rank": 32, "block": 50}
    made = ESTIMATORS[name].cost(**sizes, rounds=1, rep=2).flops
    assert flops(SHAPE, plan) - products(SHAPE, plan) == 2 * 2 * made
    assert flops(SHAPE, None) == products(SHAPE, None)


def test_the_form_that_looks_at_no_later_row_has_a_cost_of_its_own() -> None:
    plan = dataclasses.replace(PLAN, grouping_block=50, causal="strict")
    square = CAUSAL._replace(num_keys=100)
    sizes = {"num_queries": 100, "num_keys": 100, "head_dim": 64, "rank": 32, "block": 50}
    prefix_cost = ESTIMATORS["projection"].prefix_cost
    assert prefix_cost is not None
    made = prefix_cost(**sizes, rounds=1, rep=2).flops
    assert flops(square, plan) - products(square, plan) == 2 * 2 * made
    open_to_all = square._replace(is_causal=False)
    free = dataclasses.replace(plan, causal="block")
    assert flops(open_to_all, plan) == flops(open_to_all, free)


def test_decode_steps_are_exact() -> None:
    step = SHAPE._replace(num_queries=15)
    assert flops(step, PLAN) == flops(step, None)


def test_where_a_plan_does_not_count_it_costs_what_exact_attention_does() -> None:
    for length, is_short in ((60, False), (61, True), ("auto", False)):  # which counts as 0
        plan = dataclasses.replace(PLAN, min_seq_len=length)
        for cost in (flops, products):
            assert (cost(SHAPE, plan) == cost(SHAPE, None)) == is_short


def test_the_block_of_the_strict_form_is_its_own() -> None:
    long = CAUSAL._replace(num_queries=4096, num_keys=4096)
    strict = dataclasses.replace(PLAN, causal="strict")
    spelled_out = dataclasses.replace(strict, grouping_block=512)
    assert flops(long, strict) == flops(long, spelled_out)
    assert flops(long, strict) != flops(long, dataclasses.replace(strict, grouping_block=1024))


def test_calls_are_added_up_and_exact_where_a_site_refused() -> None:
    counted = clock("model", torch.device("cpu"))
    takes, refuses = Site("a", "a"), Site("b", "a")
    takes.possible.add("half")
    for site in (takes, refuses):
        site.calls.update({SHAPE: 3, CAUSAL: 1})
    exact = 3 * flops(SHAPE, None) + flops(CAUSAL, None)
    ours = 3 * flops(SHAPE, PLAN) + flops(CAUSAL, PLAN)
    assert counted.of_sites([takes, refuses], None) == 2 * exact
    assert counted.of_sites([takes, refuses], PLAN, "half") == exact + ours


@pytest.mark.parametrize(
    "mask", [None, ((2, 1, 1, 60), torch.bool), ((1, 1, 100, 60), torch.float32)]
)
@pytest.mark.usefixtures("may_measure")
def test_every_estimator_can_be_measured(mask: object) -> None:
    shape = SHAPE._replace(mask=mask)
    for name in ESTIMATORS:
        assert 0 < seconds(shape, dataclasses.replace(PLAN, estimator=name)) < 1
    assert 0 < seconds(shape, None) < 1


@pytest.mark.usefixtures("may_measure")
def test_more_work_takes_more_time() -> None:
    small, large = (seconds(SHAPE._replace(num_queries=n), None) for n in (64, 2048))
    assert large > 4 * small


def test_each_shape_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(
        "distr_compile.tuning.cost.seconds", lambda *args: calls.append(args) or 2.0
    )
    timed = clock("measure", torch.device("cpu"))
    site = Site("a", "a")
    site.calls.update({SHAPE: 3})
    assert timed.of_sites([site, site], None) == 12
    assert len(calls) == 1
    assert (timed.unit, timed.about) == ("s", "measured on cpu")


def test_a_time_that_is_none() -> None:
    with pytest.raises(ValueError, match="time: got 'fast'; accepted: 'measure', 'model', 'prod"):
        clock("fast", torch.device("cpu"))


def test_what_cannot_be_measured_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTR_MEASURE", "0")
    with pytest.raises(RuntimeError, match=r'switched off \(q=2x4x100x64.*take "model"'):
        seconds(SHAPE, None)
