"""What the packages contain and say of themselves; ``make test-wheel`` installs one and uses it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both packages, made with the setuptools that is installed, from a copy."""
    copy, folder = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("dist")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "distr_compile", copy / "distr_compile", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "deprecat" not in (done.stdout + done.stderr).lower()
    return folder


def sources() -> set[str]:
    """Every file of the package, as paths from the root."""
    files = (path for path in (ROOT / "distr_compile").rglob("*") if path.is_file())
    return {f.relative_to(ROOT).as_posix() for f in files if "__pycache__" not in f.parts}


def metadata(built: Path) -> Message:
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
        return HeaderParser().parsestr(wheel.read(name).decode())


def test_both_hold_every_file_of_the_package_and_the_wheel_no_other(built: Path) -> None:
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        extra = {Path(name).name for name in wheel.namelist()} - {Path(n).name for n in names}
    assert names == sources()
    assert {"LICENSE", "METADATA", "entry_points.txt"} <= extra
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert sources() | {"LICENSE", "README.md", "pyproject.toml"} <= inside


def test_what_they_say_of_themselves(built: Path) -> None:
    found = metadata(built)
    assert found["License-Expression"] == "Apache-2.0"
    assert "Apache License" in (ROOT / found["License-File"]).read_text(encoding="utf-8")
    assert found["Requires-Python"] == ">=3.10"
    classifiers = found.get_all("Classifier", [])
    versions = [c.rpartition(" ")[2] for c in classifiers if re.search(r":: 3\.\d+$", c)]
    assert versions == [f"3.{minor}" for minor in range(10, 15)]


def test_every_extra_says_what_it_serves(built: Path) -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = text.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    told = re.findall(r"^# .*\n(?:# .*\n)*(\w+) = \[", table, re.MULTILINE)
    assert told == re.findall(r"^(\w+) = \[", table, re.MULTILINE)
    assert told == metadata(built).get_all("Provides-Extra")


def test_what_the_documents_ask_pip_for_exists(built: Path) -> None:
    """Every ``pip install '...[a,b]'`` of documents, messages and the Makefile names extras."""
    known = set(metadata(built).get_all("Provides-Extra", []))
    files = [ROOT / "Makefile", *ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    files += [ROOT / name for name in sources() if name.endswith(".py")]
    named = set()
    for file in files:
        text = file.read_text(encoding="utf-8")
        for extras in re.findall(r"(?:distr-compile|'\.|e \.)\[([a-z,]+)\]", text):
            named |= set(extras.split(","))
    assert named
    assert named <= known


def hooks() -> list[dict[str, Any]]:
    text = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    found: list[dict[str, Any]] = [h for r in yaml.safe_load(text)["repos"] for h in r["hooks"]]
    return found


def test_pre_commit_runs_what_make_runs() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    rules = makefile.partition("\nlint:")[2].partition("\nsurvey:")[0]
    lines = re.findall(r"^\t\$\(BIN\)/(.*)$", rules, re.MULTILINE)
    assert len(lines) == 4
    assert [hook["entry"] for hook in hooks()] == [f".venv/bin/{line}" for line in lines]
    assert all(hook["pass_filenames"] is False for hook in hooks())


def test_pre_commit_takes_its_configuration() -> None:
    command = [sys.executable, "-m", "pre_commit", "validate-config", ".pre-commit-config.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
