"""The table of estimators: what every entry has to say, and what it costs by hand."""

from __future__ import annotations

import json

import pytest

from distr_compile.estimators import (
    DEFAULT_ESTIMATOR,
    ESTIMATORS,
    auto_grouping_block,
)


def test_every_entry_is_whole() -> None:
    assert DEFAULT_ESTIMATOR in ESTIMATORS
    for name, entry in ESTIMATORS.items():
        assert entry.name == name
        for text in (entry.summary, entry.sees, entry.source, entry.adjoint):
            assert text
            assert "\n" not in text
            assert not text.endswith(".")
        assert entry.rounds[0] == 1
        assert entry.needs in ("nothing", "bases")
        assert entry.strict in ("always", "prefix", "never")
        assert bool(entry.prefix_sees) == bool(entry.prefix_cost) == (entry.strict == "prefix")
        json.dumps([entry.rounds, entry.strict, entry.divides])


def test_what_the_estimators_take() -> None:
    taken = {name: (e.divides, e.rounds, e.strict) for name, e in ESTIMATORS.items()}
    lsh = [taken[name] for name in ("lsh-sample", "lsh-mean", "lsh-signed")]
    assert lsh == 3 * [(True, (1,), "never")]
    assert taken["projection"] == (False, (1, 2), "prefix")
    assert taken["calibrated"] == (False, (1,), "always")
    assert [e.name for e in ESTIMATORS.values() if e.needs == "bases"] == ["calibrated"]


def test_calibrated_costs_two_products_whatever_the_block() -> None:
    sizes = {"num_queries": 100, "num_keys": 70, "head_dim": 64, "rank": 20}
    for block in (10, 100):
        cost = ESTIMATORS["calibrated"].cost(**sizes, block=block, rep=2, element_bytes=4)
        assert cost.flops == 2 * (200 + 70) * 64 * 20
        assert cost.bytes == 4 * (200 + 70) * (64 + 20) + 4 * 2 * 64 * 20


@pytest.mark.parametrize("name", ["lsh-sample", "lsh-mean", "lsh-signed"])
def test_auto_block_of_lsh(name: str) -> None:
    blocks = {0: 1, 1: 1, 200: 200, 4096: 4096, 4097: 2048, 16384: 2048, 20000: 2560, 32768: 4096}
    assert {n: auto_grouping_block(n, name) for n in blocks} == blocks


def test_auto_block_of_projection() -> None:
    short = {0: 1, 1: 1, 100: 100, 200: 128, 256: 128, 512: 128, 513: 256, 1024: 256}
    blocks = {**short, 4096: 1024, 8192: 2048, 16384: 2048, 20000: 2560, 32768: 4096}
    assert {n: auto_grouping_block(n, "projection") for n in blocks} == blocks


def test_auto_block_of_the_strict_form_does_not_depend_on_the_length() -> None:
    assert {auto_grouping_block(n, "projection", strict=True) for n in (0, 1, 600, 10**6)} == {512}
    assert auto_grouping_block(600, "calibrated", strict=True) == 600


SIZES = {"num_queries": 100, "num_keys": 70, "head_dim": 64, "rank": 16}


@pytest.mark.parametrize("name", ["lsh-sample", "lsh-mean", "lsh-signed"])
def test_cost_of_lsh(name: str) -> None:
    cost = ESTIMATORS[name].cost(**SIZES, block=100, element_bytes=4)
    assert cost.flops == 2 * 16 * 100 * 64 + 2 * (100 + 70) * 64 * 16
    assert cost.bytes == 4 * ((100 + 70) * 64 + (100 + 70) * 16)
    # Two query heads share a key head; the last of four grouping blocks is short.
    cost = ESTIMATORS[name].cost(**SIZES, block=30, rep=2)
    assert cost.flops == 2 * 16 * 200 * 64 + 2 * (200 + 4 * 70) * 64 * 16
    assert cost.bytes == 2 * ((200 + 70) * 64 + (200 + 4 * 70) * 16)


def test_cost_of_projection() -> None:
    cost = ESTIMATORS["projection"].cost
    d, r = 64, 16
    gram, factors = 2 * d * d * (100 + 70), 2 * (100 + 70) * d * r
    solve = 6 * d * d * r + 4 * d * r * r + r**3
    assert cost(**SIZES, block=100).flops == gram + factors + solve
    further = 4 * d * d * r + 4 * d * r * r + r**3
    assert cost(**SIZES, block=100, rounds=2).flops == gram + factors + solve + further
    gram, factors = 2 * d * d * (200 + 70), 2 * (200 + 4 * 70) * d * r
    assert cost(**SIZES, block=30, rep=2).flops == gram + factors + 4 * solve
    moved = 2 * (200 + 70) * d + (200 + 4 * 70) * r
    assert cost(**SIZES, block=30, rep=2).bytes == 2 * moved + 5 * 2 * 4 * d * d
    assert cost(**SIZES, block=30, rep=2, element_bytes=4).bytes == 4 * moved + 5 * 2 * 4 * d * d


def test_cost_of_the_prefix_form() -> None:
    """Blocks of 30, 30, 30, 10 rows; keys before them 0, 30, 60, 70 and their own 30, 30, 10, 0."""
    cost = ESTIMATORS["projection"].prefix_cost
    assert cost is not None
    d, r, rep = 64, 16, 2
    exact = 2 * rep * (30 * 30 + 30 * 30 + 30 * 10) * (d - r)
    gram, solve = 2 * d * d * (rep * 90 + 70), 6 * d * d * r + 4 * d * r * r + r**3
    rows, keys = rep * (30 + 30 + 10), 30 + 60 + 70
    got = cost(**SIZES, block=30, rep=2)
    assert got.flops == exact + gram + 3 * solve + 2 * (rows + keys) * d * r
    moved = (rep * 90 + 70) * d + (rows + 70) * d + (rows + keys) * r
    assert got.bytes == 2 * moved + 6 * 2 * 4 * d * d
    further = 4 * d * d * r + 4 * d * r * r + r**3
    assert cost(**SIZES, block=30, rep=2, rounds=2).flops == got.flops + 3 * further
    assert cost(**SIZES, block=100).flops == 2 * 100 * 70 * (d - r)  # all of it is exact


@pytest.mark.parametrize(("block", "percent"), [(64, 60), (256, 18), (1024, 7.4), (4096, 4.8)])
def test_projection_beside_exact_attention(block: int, percent: float) -> None:
    """At N = 4096, d = 128, G = 2, as a share of the 4 N^2 d of exact attention."""
    cost = ESTIMATORS["projection"].cost(4096, 4096, 128, 64, block=block)
    assert 100 * cost.flops / (4 * 4096**2 * 128) == pytest.approx(percent, rel=0.02)
