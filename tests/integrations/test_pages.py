"""The code of the pages "Using it with ..." runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGES = sorted((Path(__file__).parents[2] / "docs" / "using").glob("[!A-Z]*.md"))


def snippets(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_the_code_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISTR_POLICY", raising=False)
    found = snippets(page.read_text(encoding="utf-8"))
    assert found
    names = {"__name__": page.stem}
    for number, code in enumerate(found, 1):
        exec(compile(code, f"{page.name}, snippet {number}", "exec"), names)


def test_the_table_names_tests_that_there_are() -> None:
    root = Path(__file__).parents[2]
    text = (root / "docs" / "using" / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(tests/[^`]+)`", text))
    assert named
    assert [name for name in named if not (root / name).is_file()] == []
    assert all(f"({page.name})" in text for page in PAGES)
