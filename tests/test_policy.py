"""The policy: what is accepted, what every error says, how rules combine, what survives a save."""

from __future__ import annotations

import copy
import fnmatch
import hashlib
import json
import os
import pickle
import re
import stat
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distr_compile.estimators import ESTIMATORS
from distr_compile.policy import ENV_VAR, LayerPlan, Policy, PolicyError, Rule

PLAIN: dict[str, Any] = {
    "group_size": 2,
    "rank": None,
    "estimator": "projection",
    "rounds": 1,
    "grouping_block": "auto",
    "min_seq_len": "auto",
    "causal": "block",
    "exact": "sdpa",
}
"""The fields in their order, with their defaults."""
FIELDS = tuple(PLAIN)
PROJECTION = {"estimator": "projection", "rounds": 2}
MEAN = {"estimator": "lsh-mean"}

COMMENTED = """\
# tuned on Monday
[default]  # everywhere
group_size = 4      # fast
# a remark at the end of the table

# the first block is sensitive
[[rule]]
layers = "blocks.0.attn"  # here
group_size = 1

[[rule]]   # the rest
layers = 're:blocks\\.[1-3]\\..*'
exact = 'keep'
"""


@pytest.fixture(autouse=True)
def _no_policy_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENV_VAR, raising=False)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "p.toml"
    path.write_bytes(text.encode())
    return path


def error_of(source: Any) -> str:
    with pytest.raises(PolicyError) as raised:
        Policy.from_any(source)
    return str(raised.value)


# --- accepted ---


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
PATTERNS = st.lists(st.sampled_from(list("ab01.*?")), min_size=1, max_size=5).map("".join)
VALUES = {
    "group_size": st.integers(1, 9),
    "rank": st.integers(16, 99),
    "estimator": st.sampled_from(sorted(ESTIMATORS)),
    "rounds": st.integers(1, 1),
    "grouping_block": st.integers(1, 9) | st.just("auto"),
    "min_seq_len": st.integers(0, 9) | st.just("auto"),
    "causal": st.sampled_from(["block", "strict"]),
    "exact": st.sampled_from(["sdpa", "keep"]),
}
DEFAULTS = st.fixed_dictionaries({}, optional=VALUES).filter(
    lambda fields: not {"group_size", "rank"} <= fields.keys()
)
RULES = st.lists(
    st.tuples(PATTERNS, DEFAULTS.filter(bool)).map(lambda r: {"layers": r[0], **r[1]}), max_size=4
)


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


# --- a value ---


def test_equality_and_hash_by_content(tmp_path: Path) -> None:
    content = {
        "default": {"group_size": 4},
        "rule": [
            {"layers": "blocks.0.attn", "group_size": 1},
            {"exact": "keep", "layers": r"re:blocks\.[1-3]\..*"},
        ],
    }
    loaded, built = Policy.load(write(tmp_path, COMMENTED)), Policy.from_any(content)
    assert loaded == built
    assert hash(loaded) == hash(built)
    assert loaded.digest == built.digest
    assert repr(loaded) == repr(built)
    assert len({loaded, built, Policy(content["default"], content["rule"])}) == 1
    assert Policy() == Policy({"group_size": 2}) == Policy(LayerPlan())


def test_another_order_or_value_is_another_policy() -> None:
    one, two = {"layers": "a", "group_size": 1}, {"layers": "*", "group_size": 4}
    policies = [
        Policy(),
        Policy({"group_size": 3}),
        Policy(rule=[one, two]),
        Policy(rule=[two, one]),
    ]
    assert len(set(policies)) == len({p.digest for p in policies}) == 4
    assert Policy() != "policy"


def test_digest_is_of_canonical_json() -> None:
    policy = Policy({"exact": "keep"}, [{"layers": "é", "group_size": 1}])
    content = (
        '{"default":{"causal":"block","estimator":"projection","exact":"keep","group_size":2,'
        '"grouping_block":"auto","min_seq_len":"auto","rounds":1},'
        '"rule":[{"group_size":1,"layers":"\\u00e9"}]}'
    )
    assert policy.digest == hashlib.sha256(content.encode()).hexdigest()


def test_frozen_copied_and_pickled(tmp_path: Path) -> None:
    policy = Policy.load(write(tmp_path, COMMENTED))
    with pytest.raises(FrozenInstanceError):
        policy.rule = ()  # type: ignore[misc]
    for other in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert other == policy
        assert other.to_toml() == COMMENTED


def test_a_changed_dict_does_not_change_the_policy() -> None:
    rules = [{"layers": "a", "group_size": 1}]
    policy = Policy(rule=rules)
    rules[0]["group_size"] = 8
    assert policy.resolve("a").group_size == 1


def test_parts_of_a_policy_make_a_policy() -> None:
    policy = Policy({"exact": "keep"}, [{"layers": "a", "group_size": 4}])
    assert Policy(policy.default, policy.rule) == policy
    assert Policy(policy.resolve("a")) == Policy({"exact": "keep", "group_size": 4})


# --- from anything ---


def test_from_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "[default]\ngroup_size = 8\n")
    expected = Policy({"group_size": 8})
    assert Policy.from_any(path) == Policy.from_any(str(path)) == expected
    assert Policy.from_any(expected) is expected
    assert Policy.from_any({"default": {"group_size": 8}, "rule": []}) == expected
    monkeypatch.setenv(ENV_VAR, str(path))
    assert Policy.from_any(None) == expected
    assert Policy() == Policy.from_any({}) != expected
    monkeypatch.setenv(ENV_VAR, "")
    assert Policy.from_any(None) == Policy()


def test_an_empty_file_is_the_default(tmp_path: Path) -> None:
    assert Policy.load(write(tmp_path, "# nothing yet\n")) == Policy()


# --- errors: every one says where, the key, got, accepted, what to do ---

BAD_VALUES = [
    ("group_size", "0", "0 (int)", "an integer >= 1", "write 2"),
    ("group_size", "-2", "-2 (int)", "an integer >= 1", "write 2"),
    ("group_size", "true", "True (bool)", "an integer >= 1", "write 2"),
    ("group_size", "2.5", "2.5 (float)", "an integer >= 1", "write 2"),
    ("group_size", "2.0", "2.0 (float)", "an integer >= 1", "write 2"),
    ("group_size", '"2"', "'2' (str)", "an integer >= 1", "without quotes"),
    ("group_size", '"auto"', "'auto' (str)", "an integer >= 1", "write 2"),
    ("group_size", "[2]", "[2] (list)", "an integer >= 1", "write 2"),
    ("group_size", "1979-05-27", "datetime.date(1979, 5, 27)", "an integer >= 1", "write 2"),
    ("rank", "15", "15 (int)", "an integer >= 16 (columns", "leave it out for the default"),
    ("rank", '"32"', "'32' (str)", "an integer >= 16", "without quotes"),
    ("rounds", "0", "0 (int)", "1 or 2", "write 1"),
    ("rounds", "3", "3 (int)", "1 or 2", "write 1"),
    ("rounds", "true", "True (bool)", "1 or 2", "write 1"),
    ("causal", '"strictly"', "'strictly' (str)", '"block" or "strict"', 'did you mean "strict"?'),
    ("causal", "true", "True (bool)", '"block" or "strict"', 'write "block"'),
    ("estimator", '"lsh_mean"', "'lsh_mean' (str)", '"lsh-sample" or "lsh-mean"', "lsh-mean"),
    ("estimator", '"zebra"', "'zebra' (str)", '"lsh-sample" or "lsh-mean"', 'write "projection"'),
    ("estimator", "1", "1 (int)", '"lsh-sample" or "lsh-mean"', 'write "projection"'),
    ("grouping_block", "0", "0 (int)", 'an integer >= 1 or "auto"', 'write "auto"'),
    ("grouping_block", '"Auto"', "'Auto' (str)", 'an integer >= 1 or "auto"', 'mean "auto"?'),
    ("grouping_block", "false", "False (bool)", 'an integer >= 1 or "auto"', 'write "auto"'),
    ("min_seq_len", "-1", "-1 (int)", 'an integer >= 0 or "auto"', 'write "auto"'),
    ("min_seq_len", '"128"', "'128' (str)", 'an integer >= 0 or "auto"', "without quotes"),
    ("exact", '"spda"', "'spda' (str)", '"sdpa" or "keep"', 'did you mean "sdpa"?'),
    ("exact", "true", "True (bool)", '"sdpa" or "keep"', 'write "sdpa"'),
]


@pytest.mark.parametrize(("key", "value", "got", "accepted", "advice"), BAD_VALUES)
def test_bad_value(
    tmp_path: Path, key: str, value: str, got: str, accepted: str, advice: str
) -> None:
    in_default = error_of(write(tmp_path, f"# c\n[default]\n\n{key} = {value}\n"))
    assert in_default.startswith(f"{tmp_path}/p.toml:4 (default): {key}: got {got}")
    in_rule = error_of(write(tmp_path, f'[[rule]]\n"{key}" = {value}\nlayers = "a"'))
    assert in_rule.startswith(f"{tmp_path}/p.toml:2 (rule 1): {key}: got {got}")
    for message in (in_default, in_rule):
        assert f"; accepted: {accepted}" in message
        assert message.endswith(advice) or advice in message.rsplit("; ", 1)[1]


@pytest.mark.parametrize(
    ("policy", "pieces"),
    [
        ({"default": {"group_size": 0}}, ["default: group_size: got 0", "an integer >= 1"]),
        (
            {"rule": [{"layers": "a", "exact": "keep"}, {"layers": "b", "group_size": True}]},
            ["rule 2: group_size: got True (bool)", "an integer >= 1"],
        ),
        (
            {"default": {"rank": 32, "group_size": 2}},
            ["default: rank: got 32 beside group_size = 2", "one of the two", "remove one"],
        ),
        (
            {"rule": [{"layers": "a", "group_size": 4, "rank": 16}]},
            ["rule 1: rank: got 16 beside group_size = 4", "one of the two", "remove one"],
        ),
        ({"rules": []}, ["policy: rules: got an unknown key", "default, rule", "mean rule?"]),
        ({"group_size": 2}, ["policy: group_size: got an unknown key", "under [default]"]),
        ({"zzz": 2}, ["policy: zzz: got an unknown key", "default, rule, bases", "remove it"]),
        ({3: 2}, ["policy: 3: got an unknown key", "remove it"]),
        ({"default": {"estimater": 1}}, ["default: estimater: got", "did you mean estimator?"]),
        ({"default": {3: 1}}, ["default: 3: got an unknown key", ", ".join(FIELDS)]),
        (
            {"default": {"layers": "a"}},
            ["default: layers: got", "move the pattern into a [[rule]]"],
        ),
        ({"default": None}, ["policy: default: got None", "a table of fields", "write [default]"]),
        ({"default": [1]}, ["policy: default: got [1] (list)", "a table of fields"]),
        (
            {"rule": {"layers": "a"}},
            ["policy: rule: got {'layers'", "a list of tables", "[[rule]]"],
        ),
        ({"rule": "a"}, ["policy: rule: got 'a' (str)", "a list of tables"]),
        ({"rule": [7]}, ["rule 1: rule: got 7 (int)", "a table with layers and a field"]),
        ({"rule": [{"group_size": 1}]}, ["rule 1: layers: got nothing", "a glob", "add layers"]),
        ({"rule": [{"layers": "a"}]}, ["rule 1: rule: got no field", *FIELDS, "add a field"]),
        ({"rule": [{"layers": "", "exact": "keep"}]}, ["rule 1: layers: got ''", "is empty"]),
        ({"rule": [{"layers": " ", "exact": "keep"}]}, ["rule 1: layers: got ' '", "is empty"]),
        ({"rule": [{"layers": "re:", "exact": "keep"}]}, ["layers: got 're:'", "is empty"]),
        ({"rule": [{"layers": ["a"], "exact": "keep"}]}, ["got ['a'] (list)", "write one string"]),
        (
            {"rule": [{"layers": "re:a(", "exact": "keep"}]},
            ["rule 1: layers: got 're:a('", '"re:" and a', "unterminated subpattern"],
        ),
        (
            {"rule": [{"layers": "a", "layer": "b", "exact": "keep"}]},
            ["rule 1: layer: got an unknown key", "did you mean layers?"],
        ),
        (7, ["policy: got 7 (int)", "a path, a dict, a Policy or None"]),
    ],
)
def test_bad_dict(policy: Any, pieces: list[str]) -> None:
    message = error_of(policy)
    assert message.startswith(pieces[0]) or pieces[0] in message
    for piece in pieces:
        assert piece in message
    assert "\n" not in message


def test_a_long_value_is_cut() -> None:
    message = error_of({"default": {"exact": "x" * 500}})
    assert len(message) < 250
    assert "xxx... (str)" in message


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("[default]\ngroup_size = \n", ["p.toml:2: TOML: got Unexpected", "correct the line"]),
        ("[default\n", ["p.toml:1: TOML: got Unexpected character", "TOML 1.0"]),
        (
            "[default]\ngroup_size = 2\n\n# c\ngroup_size = 3\nexact = 'keep'\n",
            ['p.toml:5: TOML: got Key "group_size" already exists;', "each key once", "keep one"],
        ),
        (
            "[[rule]]\nlayers = 'a'\nexact = 'keep'\nlayers = 'b'\n",
            ['p.toml:4: TOML: got Key "layers" already exists;', "keep one of the two"],
        ),
        (
            "[default]\n[[rule]]\nlayers = 'a'\nexact = 'keep'\n[default]\nexact = 'keep'\n",
            ['p.toml:5: TOML: got Key "default" already exists;'],
        ),
        ("[rule]\nlayers = 'a'\n", ["p.toml:1 (policy): rule: got {'layers': 'a'}", "[[rule]]"]),
        ("# c\ngroup_size = 1\n", ["p.toml:2 (policy): group_size: got an unknown key"]),
        ("default = 3\n", ["p.toml:1 (policy): default: got 3 (int)"]),
        ("default.group_size = 0\n", ["p.toml:1 (default): group_size: got 0 (int)"]),
        (
            "rule = [\n {layers = 'a', exact = 'no'}\n]\n",
            ["p.toml:1 (rule 1): exact: got 'no' (str)"],
        ),
        (
            '[[rule]]\nlayers = """a\n[[rule]]\nexact"""\nexact = "no"\n',
            ["p.toml:5 (rule 1): exact: got 'no' (str)"],
        ),
        (
            "[[rule]]\nlayers = 'a'\nexact = 'keep'\n\n  [[ rule ]] # c\nexact = 'keep'\n",
            ["p.toml:5 (rule 2): layers: got nothing"],
        ),
        (
            "[[rule]]\nlayers = 'a'\nexact = 'keep'\n[default]\n"
            "[[rule]]\nlayers = 're:['\nexact = 'keep'",
            ["p.toml:6 (rule 2): layers: got 're:['", "unterminated character set"],
        ),
        ("[[rule]]\nlayers = 'a'\n", ["p.toml:1 (rule 1): rule: got no field besides layers"]),
        (
            "[default]\nrank = 32\ngroup_size = 2\n",
            ["p.toml:2 (default): rank: got 32 beside group_size = 2"],
        ),
        (
            "[default]\nestimator = 'lsh-mean'\nrounds = 2\n",
            ['p.toml:3 (default): rounds: got 2 with estimator = "lsh-mean"'],
        ),
        (
            "[[rule]]\nlayers = 'a'\nestimator = 'lsh-mean'\n"
            "[default]\nestimator = 'projection'\nrounds = 2",
            ["p.toml:3 (rule 1): rounds: got 2 with"],
        ),
    ],
)
def test_bad_file(tmp_path: Path, text: str, pieces: list[str]) -> None:
    message = error_of(write(tmp_path, text))
    for piece in pieces:
        assert piece in message
    assert message.startswith(str(tmp_path))
    assert error_of(write(tmp_path, text.replace("\n", "\r\n"))).startswith(message[:60])


def test_all_errors_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = """\
group_size = 4
[default]
estimater = "lsh-mean"
exact = 1
[[rule]]
layers = "re:("
group_size = 2.5
[[rule]]
layers = "a"
"""
    head, *lines = error_of(write(tmp_path, text)).split("\n  ")
    assert head == "6 errors in the policy:"
    places = [re.sub(r"^.*p\.toml:", "", line).split(": got")[0] for line in lines]
    assert places == [
        "1 (policy): group_size",
        "3 (default): estimater",
        "4 (default): exact",
        "6 (rule 1): layers",
        "7 (rule 1): group_size",
        "8 (rule 2): rule",
    ]


def test_unreadable_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = tmp_path / "gone.toml"
    message = error_of(missing)
    assert message.startswith(f"{missing}: file: got No such file")
    assert ENV_VAR not in message
    assert "accepted: a TOML file in UTF-8; check the path" in message
    assert "Is a directory" in error_of(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"# \xe9\n")
    assert "can't decode byte 0xe9" in error_of(tmp_path / "latin.toml")
    monkeypatch.setenv(ENV_VAR, str(missing))
    message = error_of(None)
    assert message.startswith(f"{missing} (named by the environment variable DISTR_POLICY): file:")


def test_errors_of_the_constructor_and_the_copies() -> None:
    with pytest.raises(PolicyError, match="rule 1: layers: got nothing"):
        Policy(rule=[{"exact": "keep"}])
    with pytest.raises(PolicyError, match="default: width: got an unknown key"):
        Policy().with_default(width=16)
    with pytest.raises(PolicyError, match="default: rank: got 16 beside group_size = 2"):
        Policy().with_default(rank=16, group_size=2)
    with pytest.raises(PolicyError, match="rule 2: group_size: got 0"):
        Policy().with_rule("a", group_size=1).with_rule("b", group_size=0)
    with pytest.raises(PolicyError, match="rule 1: rule: got no field"):
        Policy().with_rule("a")
    assert issubclass(PolicyError, ValueError)


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


# --- saving ---


@pytest.mark.parametrize("text", [COMMENTED, COMMENTED.replace("\n", "\r\n"), "", "default = {}"])
def test_save_gives_the_loaded_file_back(tmp_path: Path, text: str) -> None:
    policy = Policy.load(write(tmp_path, text))
    policy.save(tmp_path / "copy.toml")
    assert (tmp_path / "copy.toml").read_bytes() == text.encode()


def test_changed_copies_keep_comments(tmp_path: Path) -> None:
    policy = Policy.load(write(tmp_path, COMMENTED))
    changed = policy.with_default(group_size=8, min_seq_len=0).with_rule("head", group_size=1)
    changed.save(tmp_path / "p.toml")
    expected = COMMENTED.replace(
        "group_size = 4      # fast", "min_seq_len = 0\ngroup_size = 8      # fast"
    )
    expected += '\n[[rule]]\nlayers = "head"\ngroup_size = 1\n'
    assert (tmp_path / "p.toml").read_text() == expected
    assert Policy.load(tmp_path / "p.toml") == changed
    assert policy == Policy.load(write(tmp_path, COMMENTED))
    by_rank = policy.with_default(rank=24)
    assert by_rank.to_toml() == COMMENTED.replace("group_size = 4 ", "rank = 24 ")
    assert by_rank.with_default(group_size=4).to_toml() == COMMENTED
    both = policy.with_default(**PROJECTION).with_rule("head", rank=40, causal="strict")
    both.save(tmp_path / "p.toml")
    assert Policy.load(tmp_path / "p.toml") == both
    assert both.resolve("head") == LayerPlan(
        **PLAIN | PROJECTION | {"rank": 40, "causal": "strict"}, rule=(2,)
    )


LAYOUTS = [
    "",
    "# only a comment",
    COMMENTED,
    COMMENTED.replace("\n", "\r\n"),
    "default.group_size = 4  # c\ndefault.exact = 'keep'\n",
    "default = {group_size = 4}  # c\nrule = []\n",
    "[default] # rank\nestimator = 'projection'\n'rank' = 40 # rank, not group_size\n",
    "rule = [\n  {layers = 'a', exact = 'keep'},  # c\n]",
    "[[rule]]\nlayers = 'a' # c\nexact = 'keep'\n[default]\nexact = 'keep'\n"
    "[[rule]]\nlayers = 'b'\ngroup_size = 1",
]


@pytest.mark.parametrize("text", LAYOUTS)
@settings(deadline=None)
@given(fields=DEFAULTS.filter(bool), rules=RULES)
def test_changed_copies_of_any_layout(
    tmp_path_factory: pytest.TempPathFactory,
    text: str,
    fields: dict[str, Any],
    rules: list[dict[str, Any]],
) -> None:
    path = tmp_path_factory.mktemp("policy") / "p.toml"
    path.write_bytes(text.encode())
    policy = Policy.load(path)
    kept = policy.to_dict()["default"]
    if {"group_size", "rank"} & fields.keys():
        kept.pop("group_size", kept.pop("rank", None))
    expected = Policy({**kept, **fields}, [*policy.rule, *rules])
    changed = policy.with_default(**fields)
    for rule in rules:
        changed = changed.with_rule(**rule)
    assert changed == expected
    changed.save(path)
    assert Policy.load(path) == expected
    assert sorted(re.findall("#.*", path.read_text())) == sorted(re.findall("#[^\r\n]*", text))


@settings(deadline=None)
@given(default=DEFAULTS, rules=RULES)
def test_round_trips_of_a_built_policy(
    tmp_path_factory: pytest.TempPathFactory, default: dict[str, Any], rules: list[dict[str, Any]]
) -> None:
    path = tmp_path_factory.mktemp("policy") / "p.toml"
    policy = Policy(default, rules)
    policy.save(path)
    assert Policy.load(path) == policy
    assert Policy.from_any(json.loads(json.dumps(policy.to_dict()))) == policy
    assert Policy.load(path).digest == policy.digest


def test_save_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, COMMENTED)
    path.chmod(0o640)
    link = tmp_path / "link.toml"
    link.symlink_to(path)

    def full(*_: object) -> None:
        raise OSError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="no space"):
            Policy().save(path)
    assert path.read_text() == COMMENTED
    Policy().save(link)
    assert Policy.load(path) == Policy()
    assert link.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link.toml", "p.toml"]


# --- the schema ---


def conforms(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    """The part of JSON schema that the policy's schema uses; anything else fails the test."""
    annotations = {"$schema", "$defs", "title", "description", "default"}
    if "$ref" in schema:
        return conforms(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root)
    for keyword, wanted in schema.items():
        if keyword == "type":
            kinds = {"object": dict, "array": list, "string": str, "integer": int}
            ok = isinstance(value, kinds[wanted]) and not isinstance(value, bool)
        elif keyword == "anyOf":
            ok = any(conforms(value, option, root) for option in wanted)
        elif keyword == "allOf":
            ok = all(conforms(value, part, root) for part in wanted)
        elif keyword == "enum":
            ok = value in wanted
        elif keyword == "minimum":
            ok = isinstance(value, int) and value >= wanted
        elif keyword == "maximum":
            ok = isinstance(value, int) and value <= wanted
        elif keyword == "not":
            ok = not conforms(value, wanted, root)
        elif keyword == "minLength":
            ok = isinstance(value, str) and len(value) >= wanted
        elif keyword == "minProperties":
            ok = isinstance(value, dict) and len(value) >= wanted
        elif keyword == "required":
            ok = isinstance(value, dict) and set(wanted) <= set(value)
        elif keyword == "additionalProperties":
            ok = isinstance(value, dict) and set(value) <= set(schema["properties"])
        elif keyword == "properties":
            ok = isinstance(value, dict) and all(
                conforms(value[key], part, root) for key, part in wanted.items() if key in value
            )
        elif keyword == "items":
            ok = isinstance(value, list) and all(conforms(item, wanted, root) for item in value)
        else:
            assert keyword in annotations, keyword
            ok = True
        if not ok:
            return False
    return True


@settings(deadline=None)
@given(default=DEFAULTS, rules=RULES)
def test_schema_accepts_what_the_policy_accepts(
    default: dict[str, Any], rules: list[dict[str, Any]]
) -> None:
    schema = Policy.json_schema()
    assert conforms({"default": default, "rule": rules}, schema, schema)
    assert conforms(Policy(default, rules).to_dict(), schema, schema)


@pytest.mark.parametrize(
    "document",
    [
        {"rules": []},
        {"default": {"group_sise": 2}},
        {"default": {"layers": "a"}},
        {"default": 1},
        {"rule": {"layers": "a", "exact": "keep"}},
        {"rule": [{"layers": "a"}]},
        {"rule": [{"exact": "keep", "group_size": 1}]},
        {"rule": [{"layers": "", "exact": "keep"}]},
        {"default": {"group_size": 2, "rank": 16}},
        {"rule": [{"layers": "a", "group_size": 2, "rank": 16}]},
        *(
            {"default": {key: value}}
            for key, value in [
                ("group_size", 0),
                ("group_size", True),
                ("group_size", 2.5),
                ("group_size", "2"),
                ("rank", 15),
                ("rounds", 0),
                ("rounds", 3),
                ("causal", "no"),
                ("estimator", "mean"),
                ("grouping_block", 0),
                ("grouping_block", "all"),
                ("min_seq_len", -1),
                ("exact", "no"),
                ("exact", None),
            ]
        ),
    ],
)
def test_schema_rejects_what_the_policy_rejects(document: dict[str, Any]) -> None:
    schema = Policy.json_schema()
    assert not conforms(document, schema, schema)
    error_of(document)


def test_schema_tells_an_editor_what_it_needs() -> None:
    schema = Policy.json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    tables = schema["$defs"]
    assert tuple(tables["Default"]["properties"]) == FIELDS
    assert tuple(tables["Rule"]["properties"]) == ("layers", *FIELDS)
    for table, has_defaults in (("Default", True), ("Rule", False)):
        for name, part in tables[table]["properties"].items():
            assert len(part["description"]) > 40, name
            assert ("default" in part) == (has_defaults and PLAIN[name] is not None), name
    assert tables["Default"]["properties"]["estimator"]["enum"] == list(ESTIMATORS)
    assert "const" not in json.dumps(schema)  # draft 4, which editors read, has no such keyword


# --- the module and its reference page ---


def test_the_module_loads_without_torch() -> None:
    # The package's own face may import torch; this module, loaded beside it, must not need it.
    package = Path(__file__).parents[1] / "distr_compile"
    program = (
        "import sys, types\n"
        "sys.modules['torch'] = None\n"
        "package = types.ModuleType('distr_compile')\n"
        f"package.__path__ = [{str(package)!r}]\n"
        "sys.modules['distr_compile'] = package\n"
        "from distr_compile.policy import Policy\n"
        "print(Policy().digest)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == Policy().digest


def test_the_reference_page_is_right(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "policy.md").read_text()
    default = Policy().to_dict()["default"]
    for name, value in default.items():
        assert re.search(rf"^\| `{name}` \|.*\| `{re.escape(json.dumps(value))}` \|", page, re.M), (
            name
        )
    blocks = re.findall(r"```toml\n(.*?)```", page, re.S)
    assert len(blocks) >= 3
    for block in blocks:
        if not block.startswith("# .taplo.toml"):
            Policy.load(write(tmp_path, block))
    for document, message in re.findall(
        r"```toml-error\n(.*?)```\s*```text\n(.*?)\n```", page, re.S
    ):
        assert (
            error_of(write(tmp_path, document)).replace(f"{tmp_path}/p.toml", "distr.toml")
            == message
        )
