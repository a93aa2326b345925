"""The code of the pages "Using it with ..." runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGES = sorted((Path(__file__).parents[2] / "docs" / "using").glob("*.md"))


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
