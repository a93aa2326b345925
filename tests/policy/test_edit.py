"""What survives a save: comments, layout, line ends, and the whole policy."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from distr_compile.policy import LayerPlan, Policy

from .common import COMMENTED, DEFAULTS, PLAIN, PROJECTION, RULES, write


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


LONG = (
    '# it is said in """ and in [default]\n'
    + '''
[[rule]]
layers = """re:\\
[default]
\\"""
[default]
"""
group_size = 1

[default]  # here
min_seq_len = 0
'''
)


def test_a_header_within_a_string_is_none(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text(LONG)
    policy = Policy.load(tmp_path / "p.toml")
    changed = policy.with_default(group_size=4)
    assert changed.to_toml() == LONG.replace("# here\n", "# here\ngroup_size = 4\n")
    assert changed.default.group_size == 4
    assert changed.rule == policy.rule


def test_a_mark_of_utf_8_is_read_over(tmp_path: Path) -> None:
    text = "[default]\ngroup_size = 4\n"
    (tmp_path / "p.toml").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert Policy.load(tmp_path / "p.toml").to_toml() == text
