"""docs/paper.md: its tables are those of the results, between two marks each."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from benchmarks.paper.script import Script
from benchmarks.store import ROOT, Store

PAGE = ROOT / "docs" / "paper.md"


def table_of(script: Script) -> str:
    """The table of the committed results."""
    return script.table(Store(script.results, {}).cells)


def filled(text: str, scripts: Iterable[Script]) -> str:
    """The page with the tables put in anew.

    Raises:
        ValueError: the page has no marks for a table.
    """
    for script in scripts:
        begin, end = (f"<!-- {word}: {script.name} -->" for word in ("table", "end"))
        pattern = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(
                f"docs/paper.md: got no place for {script.name!r}; accepted: the lines {begin} and "
                f"{end}; write them where its table shall stand"
            )
        text = pattern.sub(lambda _, b=begin, e=end, s=script: f"{b}\n\n{table_of(s)}\n\n{e}", text)
    return text


def write(scripts: Iterable[Script], page: Path = PAGE) -> None:
    """Put the tables into the page."""
    page.write_text(filled(page.read_text(encoding="utf-8"), scripts), encoding="utf-8")
