"""Every error of a policy says where, the key, what was got, what is accepted, what to do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from distr_compile.policy import ENV_VAR, Policy, PolicyError

from .common import FIELDS, error_of, write

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
    (
        "rank",
        "15",
        "15 (int)",
        "an integer >= 16 and < 2**63 (columns",
        "leave it out for the default",
    ),
    ("rank", '"32"', "'32' (str)", "an integer >= 16", "without quotes"),
    ("rounds", "0", "0 (int)", "1 or 2", "write 1"),
    ("rounds", "3", "3 (int)", "1 or 2", "write 1"),
    ("rounds", "true", "True (bool)", "1 or 2", "write 1"),
    ("causal", '"strictly"', "'strictly' (str)", '"block" or "strict"', 'did you mean "strict"?'),
    ("causal", "true", "True (bool)", '"block" or "strict"', 'write "block"'),
    ("estimator", '"lsh_mean"', "'lsh_mean' (str)", '"lsh-sample" or "lsh-mean"', "lsh-mean"),
    ("estimator", '"zebra"', "'zebra' (str)", '"lsh-sample" or "lsh-mean"', 'write "projection"'),
    ("estimator", "1", "1 (int)", '"lsh-sample" or "lsh-mean"', 'write "projection"'),
    ("grouping_block", "0", "0 (int)", 'an integer >= 1 and < 2**63 or "auto"', 'write "auto"'),
    (
        "grouping_block",
        '"Auto"',
        "'Auto' (str)",
        'an integer >= 1 and < 2**63 or "auto"',
        'mean "auto"?',
    ),
    (
        "grouping_block",
        "false",
        "False (bool)",
        'an integer >= 1 and < 2**63 or "auto"',
        'write "auto"',
    ),
    ("min_seq_len", "-1", "-1 (int)", 'an integer >= 0 and < 2**63 or "auto"', 'write "auto"'),
    (
        "min_seq_len",
        '"128"',
        "'128' (str)",
        'an integer >= 0 and < 2**63 or "auto"',
        "without quotes",
    ),
    ("group_size", str(2**63), f"{2**63} (int)", "an integer >= 1 and < 2**63", "write 2"),
    ("grouping_block", str(2**70), f"{2**70} (int)", "an integer >= 1 and < 2**63", "write"),
    ("min_seq_len", str(2**63), f"{2**63} (int)", "an integer >= 0 and < 2**63", "write"),
    ("exact", '"spda"', "'spda' (str)", '"auto" or "sdpa" or "keep"', 'did you mean "sdpa"?'),
    ("exact", "true", "True (bool)", '"auto" or "sdpa" or "keep"', 'write "auto"'),
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
