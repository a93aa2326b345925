"""The table ``[bases]`` of a policy: where the file is, what it must be, and keeping comments."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from distr_compile.cli import FOUND_ERROR, OK, main
from distr_compile.policy import BasesFile, Policy, PolicyError

DATA = b"some bases"
SHA256 = hashlib.sha256(DATA).hexdigest()
TEXT = f"""# a policy
[default]
estimator = "calibrated"  # strictly causal

[bases]  # made on Monday
file = "data/b.safetensors"
sha256 = "{SHA256}"

[[rule]]
layers = "a"
group_size = 1
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/b.safetensors").write_bytes(DATA)
    (tmp_path / "p.toml").write_text(TEXT)
    return tmp_path / "p.toml"


def test_the_file_is_found_beside_the_policy(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    policy = Policy.load(path)
    assert policy.bases == BasesFile("data/b.safetensors", SHA256)
    assert policy.read_bases() == DATA
    edited = policy.with_default(rank=16).with_rule("b", exact="keep")
    assert edited.bases == policy.bases
    assert edited.read_bases() == DATA


def test_a_policy_of_a_relative_path_keeps_its_folder(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parent)
    policy = Policy.load(path.name)
    monkeypatch.chdir("/")
    assert policy.read_bases() == DATA
    assert policy.without_timing().read_bases() == DATA
    assert policy.bases_path == path.parent / "data/b.safetensors"


def test_a_policy_in_no_file_looks_in_the_working_directory(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parent)
    policy = Policy.from_any({"bases": {"file": "data/b.safetensors", "sha256": SHA256}})
    assert policy.read_bases() == DATA
    assert Policy(bases=policy.bases) == policy
    assert Policy.from_any(policy.to_dict()) == policy
    assert policy != Policy()
    assert policy.digest != Policy().digest
    assert "bases" not in Policy().to_dict()
    policy.save("q.toml")
    assert Policy.load("q.toml") == policy


def test_bases_are_replaced_in_place(path: Path) -> None:
    policy = Policy.load(path).with_bases(path.parent / "data" / "c", "0" * 64)
    policy.save(path)
    assert path.read_text() == TEXT.replace("b.safetensors", "c").replace(SHA256, "0" * 64)


def test_bases_are_added_at_the_end(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = '# mine\n[default] # d\nestimator = "calibrated"\n'
    path.write_text(text)
    monkeypatch.chdir(path.parent / "data")
    policy = Policy.load("../p.toml").with_bases("b.safetensors", SHA256)
    assert policy.read_bases() == DATA
    policy.save("../p.toml")
    added = f'\n[bases]\nfile = "data/b.safetensors"\nsha256 = "{SHA256}"\n'
    assert path.read_text() == text + added
    assert Policy.load("../p.toml").read_bases() == DATA


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ('file = "a"', ["sha256: got nothing; accepted: 64 hexadecimal digits"]),
        ('sha256 = "00"\nfile = "a"', ["p.toml:2 (bases): sha256: got '00' (str)"]),
        (f'sha256 = "{SHA256}"\nfile = 3', ["p.toml:3 (bases): file: got 3 (int)"]),
        (
            f'sha256 = "{SHA256}"\nflie = "a"',
            ["file: got nothing", "flie: got an unknown key; accepted: file, sha256; did you mean"],
        ),
    ],
)
def test_wrong_tables(table: str, words: list[str], path: Path) -> None:
    path.write_text(f"[bases]\n{table}\n")
    with pytest.raises(PolicyError) as caught:
        Policy.load(os.path.relpath(path))
    for word in words:
        assert word in str(caught.value)


def test_something_else_than_a_table() -> None:
    with pytest.raises(PolicyError, match=r"bases: got 'b.safetensors' .*a table with file and"):
        Policy.from_any({"bases": "b.safetensors"})


@pytest.mark.parametrize("content", [None, b"other"])
def test_a_file_that_is_not_the_one(
    content: bytes | None, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["policy", "check", str(path)]) == OK
    bases = path.parent / "data/b.safetensors"
    if content is None:
        bases.unlink()
        message = r"p\.toml:6 \(bases\): file: got .*b.safetensors: No such file"
    else:
        bases.write_bytes(content)
        message = f"accepted: the file of SHA-256 {SHA256}; it was changed or replaced: restore it"
    with pytest.raises(PolicyError, match=message):
        Policy.load(path).read_bases()
    assert main(["policy", "check", str(path)]) == FOUND_ERROR
    assert "(bases): file: got" in capsys.readouterr().err
