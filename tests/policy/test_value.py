"""A policy is a value, made from anything, and its module and reference page are right."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from distr_compile.policy import ENV_VAR, LayerPlan, Policy

from .common import COMMENTED, error_of, write

ROOT = Path(__file__).parents[2]


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
        '"grouping_block":"auto","min_seq_len":"auto","rounds":1,"training":"exact"},'
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


# --- the module and its reference page ---


def test_the_module_loads_without_torch() -> None:
    # The package's own face may import torch; this module, loaded beside it, must not need it.
    package = ROOT / "distr_compile"
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
    page = (ROOT / "docs" / "policy.md").read_text()
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
