"""The documents and the code name the same things."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
README_LINES, COLUMNS = 150, 120
WRAPPED = """
index backend numbers tuning training faq estimators estimator-tables matching kernels extending
using/README using/data-parallel using/export using/packed using/peft using/profilers
using/sentence-transformers using/training-loops using/parallel using/transformers
"""
NARROW = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in WRAPPED.split())]
"""No line of these is wider than ``COLUMNS``; tables and code outside of the README may be."""


NO_SUBJECT = "As At By For From In Into Of On Those To With Without".split()
"""How a docstring begins that says of what, and not what."""


def summaries() -> Iterator[tuple[str, str]]:
    """First lines of the package's docstrings, and where they stand."""
    for path in (ROOT / "distr_compile").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and (
                text := ast.get_docstring(node)
            ):
                yield f"{path.name}: {node.name}", text.partition("\n")[0]


def codes_raised() -> Iterator[str]:
    """First argument of every ``Reason("...")`` and ``RefusedError("...")`` in the package."""
    for path in (ROOT / "distr_compile").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                not isinstance(node, ast.Call)
                or not isinstance(node.func, ast.Name)
                or not node.args
            ):
                continue
            first = node.args[0]
            if node.func.id in {"Reason", "RefusedError"} and isinstance(first, ast.Constant):
                yield str(first.value)


def test_docstrings_say_what() -> None:
    found = {place: line for place, line in summaries() if line.split()[0] in NO_SUBJECT}
    assert found == {}


def test_every_reason_is_documented_and_no_other() -> None:
    text = (ROOT / "docs" / "matching.md").read_text(encoding="utf-8")
    reasons = text.partition("## Reasons")[2].partition("## Layers")[0]
    assert set(re.findall(r"^\| `([a-z0-9-]+)` \|", reasons, re.MULTILINE)) == set(codes_raised())


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files_of_the_repository(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    targets = [t.partition("#")[0] for t in re.findall(r"\]\(([^)]+)\)", text) if "://" not in t]
    missing = [t for t in targets if t and not (document.parent / t).exists()]
    assert not missing


def test_recipes_name_what_there_is() -> None:
    """Every step begins with a file and names to find there, up to a colon."""
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    steps = re.findall(r"^\d+\. (`.+?`): ", text, re.MULTILINE)
    assert len(steps) == len(re.findall(r"^\d+\. ", text, re.MULTILINE)) > 0
    for step in steps:
        file, *names = re.findall(r"`([^`]+)`", step)
        content = (ROOT / file).read_text(encoding="utf-8")
        assert [name for name in names if not re.search(rf"\b{name}\b", content)] == [], file
    named = re.findall(r"`((?:distr_compile|lowering|tests|docs)/[^`]+)`", text)
    assert all(any((ROOT / top / n).exists() for top in ("", "distr_compile")) for n in named)
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    assert [n for n in re.findall(r"`(test_\w+)`", text) if f"def {n}(" not in tests] == []


def test_the_readme_is_short_and_narrow() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= README_LINES, "tell it on a page of docs/, and lead there"
    assert [line for line in lines if len(line) > COLUMNS] == []


@pytest.mark.parametrize("document", NARROW, ids=lambda path: path.name)
def test_prose_is_narrow(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    wide = [n for n in prose.splitlines() if len(n) > COLUMNS and not n.startswith("|")]
    assert wide == []
