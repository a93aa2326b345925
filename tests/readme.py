"""What the README shows, to be run as it stands."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def _after(mark: str) -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8").partition(f"<!-- {mark} -->")[2]


def _first(language: str, text: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def tour() -> str:
    """The first example."""
    return _first("python", _after("tour"))


def tuning() -> tuple[str, list[str]]:
    """The file ``mine.py``, and the commands that take it."""
    text = _after("tune")
    return _first("python", text), _first("sh", text).splitlines()
