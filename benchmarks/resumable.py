# ruff: noqa: D102 (what the hooks are for, pytest documents)
"""A pytest plugin: every result is written down when it is known, and not asked for again.

    python -m pytest -p benchmarks.resumable --record=tests.json --environment=JSON

A run that was killed goes on with the tests that have no result yet. Of files other than those
below ``SUITES`` only tests marked ``gpu`` are run.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.store import ROOT, Store

SUITES = ("tests/kernels", "tests/lowering")
"""What a GPU can prove; a marked test anywhere else too."""

COMPLETE = "complete"
"""Key of a cell that says that no test is left."""

LONGEST_TEXT = 4000  # characters kept of a failure, from its end


def files_with_marked_tests(outside: tuple[str, ...] = SUITES) -> list[str]:
    """Test files ``outside`` that mention the mark; the others need not be imported."""
    names = (path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py"))
    return sorted(
        name
        for name in names
        if not name.startswith(outside) and re.search(r"mark\.gpu\b", (ROOT / name).read_text())
    )


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, required=True, help="JSON file of the results")
    parser.addoption("--environment", type=json.loads, required=True, help="of store.describe")


def open_store(config: pytest.Config) -> Store:
    return Store(config.getoption("--record"), config.getoption("--environment"))


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # pytest-xdist's workers report to this process
        config.pluginmanager.register(Recorder(open_store(config)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    store = open_store(config)
    left, others = [], []
    for item in items:
        is_asked = item.nodeid.startswith(SUITES) or item.get_closest_marker("gpu")
        (left if is_asked and not store.is_finished(item.nodeid) else others).append(item)
    items[:] = left
    config.hook.pytest_deselected(items=others)


class Recorder:
    """Keeps one cell per test: its outcome, its seconds, and of a failure the end of the text."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        cell = {"unfinished": True, "outcome": "running", "since": int(time.time())}
        self.store.put(nodeid, cell)

    def pytest_runtest_logreport(self, report: Any) -> None:
        # Setup, call and teardown report one after another; the first that did not pass counts.
        earlier = self.store.cells.get(report.nodeid, {}).get("outcome")
        if earlier in ("failed", "skipped") or (report.passed and report.when != "call"):
            return
        cell = {"outcome": report.outcome, "seconds": report.duration}
        if not report.passed:
            cell["text"] = report.longreprtext[-LONGEST_TEXT:]
        self.store.put(report.nodeid, cell)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            text = report.longreprtext[-LONGEST_TEXT:]
            self.store.put(report.nodeid, {"outcome": "failed", "seconds": 0.0, "text": text})


def summarise(store: Store) -> tuple[str, bool]:
    """A line of counts with all failures below it, and whether there are none."""
    tests = {key: cell for key, cell in store.current().items() if key != COMPLETE}
    count = {
        outcome: sum(cell["outcome"] == outcome for cell in tests.values())
        for outcome in ("passed", "failed", "skipped", "running")
    }
    state = "no test is left" if store.is_finished(COMPLETE) else "not finished: goes on next time"
    lines = [
        ", ".join(f"{n} {outcome}" for outcome, n in count.items() if n) + f"; {state}",
        "; ".join(f"{name} {value}" for name, value in store.environment.items()),
    ]
    for key, cell in tests.items():
        if cell["outcome"] in ("failed", "skipped"):
            lines += ["", f"--- {cell['outcome']}: {key}", cell.get("text", "")]
    return "\n".join(lines) + "\n", not count["failed"]
