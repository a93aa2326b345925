"""The fields of a plan, how rules combine, and the names of a model."""

from __future__ import annotations

import fnmatch
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distr_compile.estimators import ESTIMATORS
from distr_compile.policy import LayerPlan, Policy, PolicyError, Rule

from .common import COMMENTED, DEFAULTS, FIELDS, MEAN, PLAIN, PROJECTION, RULES, error_of, write


def test_defaults() -> None:
    plan = Policy().resolve("blocks.0.attn")
    assert plan == LayerPlan(**PLAIN, rule=())
    assert not plan.is_exact
    assert Policy.from_any(None) == Policy() == Policy.from_any({})


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_is_accepted(name: str) -> None:
    assert Policy({"estimator": name}).resolve("x").estimator == name


def test_all_fields_from_a_file(tmp_path: Path) -> None:
    text = """
        [default]
        group_size = 1
        estimator = "projection"
        rounds = 2
        grouping_block = 64
        min_seq_len = 0
        causal = "strict"
        exact = "keep"
    """
    plan = Policy.load(write(tmp_path, text)).resolve("")
    assert plan == LayerPlan(1, None, "projection", 2, 64, 0, "strict", "keep")
    assert plan.is_exact
    plan = Policy.load(write(tmp_path, text.replace("group_size = 1", "rank = 40"))).resolve("")
    assert plan == LayerPlan(None, 40, "projection", 2, 64, 0, "strict", "keep")
    assert not plan.is_exact


def test_later_rules_override_field_by_field() -> None:
    policy = Policy(
        {"group_size": 4},
        [
            {"layers": "blocks.*", "estimator": "lsh-sample", "grouping_block": 64},
            {"layers": "head", "group_size": 1},
            {"layers": "blocks.1.*", "grouping_block": "auto", "min_seq_len": 7},
        ],
    )
    sample = LayerPlan(4, estimator="lsh-sample")
    assert policy.resolve("blocks.1.attn") == replace(sample, min_seq_len=7, rule=(0, 2))
    assert policy.resolve("blocks.2.attn") == replace(sample, grouping_block=64, rule=(0,))
    assert policy.resolve("head") == LayerPlan(1, rule=(1,))
    assert policy.resolve("Head") == LayerPlan(4)
    assert policy.rules_matching("blocks.1.attn") == (0, 2)


def test_rank_and_group_size_replace_each_other() -> None:
    policy = Policy(
        {"rank": 48},
        [
            {"layers": "exact", "group_size": 1},
            {"layers": "*.a", "group_size": 4},
            {"layers": "x.a", "rank": 16},
        ],
    )
    plans = [policy.resolve(name) for name in ("other", "exact", "y.a", "x.a")]
    assert [(p.group_size, p.rank) for p in plans] == [(None, 48), (1, None), (4, None), (None, 16)]
    assert [p.is_exact for p in plans] == [False, True, False, False]
    assert policy.to_dict()["default"].keys() == set(FIELDS) - {"group_size"}
    assert Policy().to_dict()["default"].keys() == set(FIELDS) - {"rank"}
    assert policy.with_default(group_size=2).default == LayerPlan()
    assert Policy().with_default(rank=48).default == policy.default == LayerPlan(rank=48)
    assert (
        Policy({"group_size": 4, "exact": "keep"}).with_default(rank=48).to_dict()["default"]
        == (Policy({"rank": 48, "exact": "keep"}).to_dict()["default"])
    )
    assert Policy(policy.default) == Policy({"rank": 48}) != Policy({"rank": 64})


@pytest.mark.parametrize(
    ("default", "rules", "message"),
    [
        (MEAN | {"rounds": 2}, [], "default: rounds: got 2 with"),
        (
            MEAN | {"rounds": 2},
            [{"layers": "*", "estimator": "projection"}],
            "default: rounds: got",
        ),
        ({"estimator": "lsh-sample", "rounds": 2}, [], 'got 2 with estimator = "lsh-sample"'),
        (MEAN, [{"layers": "a", "rounds": 2}], "rule 1: rounds: got 2 with"),
        (
            PROJECTION,
            [{"layers": "a", "exact": "keep"}, {"layers": "b", "estimator": "lsh-mean"}],
            "rule 2: rounds: got 2 with",
        ),
        (
            {"estimator": "projection"},
            [{"layers": "a", "estimator": "lsh-mean", "rounds": 2}],
            "rule 1: rounds: got 2 with",
        ),
    ],
)
def test_rounds_that_no_estimator_there_takes(
    default: dict[str, Any], rules: list[dict[str, Any]], message: str
) -> None:
    """Found when the policy is made, where no rule could make it right."""
    error = error_of({"default": default, "rule": rules})
    assert message in error
    assert error.endswith('; accepted: 1; write rounds = 1, or estimator = "projection"')


def test_rounds_that_only_some_rules_that_meet_refuse(tmp_path: Path) -> None:
    text = """default.estimator = "lsh-mean"
[[rule]]
layers = "a.*"
estimator = "projection"
[[rule]]
layers = "*.b"
rounds = 2
"""
    policy = Policy.load(write(tmp_path, text))
    assert policy.resolve("a.b") == LayerPlan(**PLAIN | PROJECTION, rule=(0, 1))
    assert policy.resolve("a").rounds == 1
    with pytest.raises(PolicyError) as raised:
        policy.resolve("c.b")
    assert str(raised.value).startswith(
        f"{tmp_path}/p.toml:7 (rule 2): layer 'c.b': rounds: got 2 with estimator = \"lsh-mean\"; "
    )
    with pytest.raises(PolicyError, match=r"rule 3: layer 'a\.b': rounds: got 2 with"):
        policy.with_rule("a.b", estimator="lsh-mean").resolve("a.b")
    policy.with_rule("a.b", estimator="lsh-mean", rounds=1).resolve("a.b")


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("blocks.*.attn", ["blocks.0.attn", "blocks.0.a.b.attn"], ["Blocks.0.attn", "blocks.0"]),
        ("blocks.?", ["blocks.1"], ["blocks.11", "x.blocks.1"]),
        ("blocks.[02]", ["blocks.0", "blocks.2"], ["blocks.1"]),
        ("blocks.[!0]", ["blocks.1"], ["blocks.0"]),
        ("a.b", ["a.b"], ["axb", "a.b.c"]),
        ("*", ["", "a", "a.b"], []),
        ("re:blocks\\.\\d+", ["blocks.0", "blocks.12"], ["blocks.1.attn", "xblocks.1"]),
        ("re:a|b", ["a", "b"], ["ab", "a.x"]),
    ],
)
def test_patterns(pattern: str, yes: list[str], no: list[str]) -> None:
    rule = Rule(pattern, (("group_size", 1),))
    assert [name for name in yes + no if rule.matches(name)] == yes


NAMES = st.lists(st.sampled_from(["a", "b", "ab", "0", "1"]), max_size=4).map(".".join)


@settings(deadline=None)  # the machine may be busy
@given(default=DEFAULTS, rules=RULES, name=NAMES)
def test_resolve_equals_a_naive_reading(
    default: dict[str, Any], rules: list[dict[str, Any]], name: str
) -> None:
    plan = Policy(default, rules).resolve(name)
    expected = dict(PLAIN)
    for table in [default, *(r for r in rules if fnmatch.fnmatchcase(name, r["layers"]))]:
        for field in FIELDS:
            if field in table:
                expected[field] = table[field]
        if "rank" in table:
            expected["group_size"] = None
        if "group_size" in table:
            expected["rank"] = None
    assert {field: getattr(plan, field) for field in FIELDS} == expected
    assert [rules[i] for i in plan.rule] == [
        r for r in rules if fnmatch.fnmatchcase(name, r["layers"])
    ]


# --- against the names of a model ---

MODULES = ["", "blocks", "blocks.0", "blocks.0.attn", "blocks.1", "blocks.1.attn", "head"]


def test_check_layers(tmp_path: Path) -> None:
    good = Policy(rule=[{"layers": p, "group_size": 1} for p in ("blocks.*.attn", "re:head", "*")])
    good.check_layers(iter(MODULES))
    Policy().check_layers([])

    text = COMMENTED + '\n[[rule]]\nlayers = "block.*.attn"\ngroup_size = 4\n'
    policy = Policy.load(write(tmp_path, text))
    with pytest.raises(PolicyError) as raised:
        policy.check_layers(m for m in MODULES if m != "blocks.0.attn")
    head, first, second = str(raised.value).split("\n  ")
    assert head == "2 errors in the policy:"
    assert first.startswith(
        f'{tmp_path}/p.toml:7 (rule 1): layers: got "blocks.0.attn", which names'
    )
    assert "nearest modules: blocks.1.attn, " in first
    assert second.startswith(f'{tmp_path}/p.toml:15 (rule 3): layers: got "block.*.attn", which')
    assert len(second.split("nearest modules: ")[1].split(", ")) == 3
    assert policy.where(1) == f"{tmp_path}/p.toml:11 (rule 2)"

    edited = policy.with_rule("tail", group_size=1)  # not in the file: its line would be a lie
    assert edited.where(3) == "rule 4"
    with pytest.raises(PolicyError, match=r"nearest modules: blocks\.1\.attn, blocks\.0\.attn"):
        Policy(rule=[{"layers": r"re:blocks\.7\.attn", "group_size": 1}]).check_layers(MODULES)
    with pytest.raises(PolicyError, match="the model has no submodules"):
        Policy(rule=[{"layers": "a", "group_size": 1}]).check_layers([""])


def test_without_timing_nothing_is_auto() -> None:
    policy = Policy(
        {"grouping_block": "auto", "group_size": 4},
        [
            {"layers": "a", "min_seq_len": "auto", "exact": "keep"},
            {"layers": "b", "min_seq_len": 100, "exact": "auto", "grouping_block": "auto"},
        ],
    )
    assert policy.asks_for_times
    timeless = policy.without_timing()
    assert not timeless.asks_for_times
    found = {name: timeless.resolve(name) for name in "abc"}
    assert {name: (p.min_seq_len, p.exact) for name, p in found.items()} == {
        "a": (0, "keep"),
        "b": (100, "sdpa"),
        "c": (0, "sdpa"),
    }
    assert all(p.grouping_block == "auto" and p.group_size == 4 for p in found.values())
