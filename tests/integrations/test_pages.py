"""The code of the pages "Using it with ..." runs as it stands.

What compiles the rewritten graphs is left out, but on the page that is about it: Inductor would
take most of the time, and ``test_backend.py`` has it.
"""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import torch

from distr_compile import backend

COMPILED = {"export"}
PAGES = sorted((Path(__file__).parents[2] / "docs" / "using").glob("[!A-Z]*.md"))


def snippets(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_the_code_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISTR_POLICY", raising=False)
    own = backend.Options.parse
    if page.stem not in COMPILED:
        monkeypatch.setattr(
            backend.Options,
            "parse",
            lambda options, mode: own({"compiler": "eager", **(options or {})}, mode),
        )
    torch._dynamo.reset()
    found = snippets(page.read_text(encoding="utf-8"))
    assert found
    module = types.ModuleType(f"page_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # Dynamo looks there for its globals
    for number, code in enumerate(found, 1):
        exec(compile(code, f"{page.name}, snippet {number}", "exec"), vars(module))


def test_the_table_names_tests_that_there_are() -> None:
    root = Path(__file__).parents[2]
    text = (root / "docs" / "using" / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(tests/[^`]+)`", text))
    assert named
    assert [name for name in named if not (root / name).is_file()] == []
    assert [page.name for page in PAGES if f"({page.name}" not in text] == []
