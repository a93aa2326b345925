"""What every measurement shares: where results go, how failures are noted, when to stop.

Before anything is tried that could hang or take the process down, its name goes into a marker file.
The process that comes next finds the failure noted in the cell and leaves it out.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
from benchmarks.store import Store, describe

DEVICE_LOST = 3  # exit status: an error after which this process can use the device no more

Measured = dict[str, Any]
Job = tuple[str, str, Callable[[str, str], Measured]]
"""(file, key, what measures the cell, given both)"""

Check = Callable[[str, Any], Measured]
"""Is given the name of a call and what it returned; what it finds is kept beside the times."""


class Session:
    """One process that measures.

    Args:
        results: folder of the files of results.
        marker: file that says what is being done.
        run: names the call of ``gpu.py`` that this process belongs to.
        until: when to have ended, in seconds since the epoch.

    Attributes:
        once: keys of cells from whose time nothing follows for the next ones.
        by_pointers: whether our kernels run in the form that the op falls back to.
    """

    def __init__(self, results: Path, marker: Path, run: str, until: float) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.results, self.marker, self.run, self.until = results, marker, run, until
        self.parent = os.getppid()
        self.environment = describe(self.device)
        self.stores: dict[str, Store] = {}
        self.ceilings: dict[str, float] = {}
        self.longest_s = 0.0
        self.once: set[str] = set()
        self.by_pointers = False

    def store(self, file: str) -> Store:
        """Results of one kind."""
        if file not in self.stores:
            self.stores[file] = Store(self.results / f"{file}.json", self.environment)
        return self.stores[file]

    def mark(self, file: str, key: str, arm: str | None) -> None:
        """Say what is being done now."""
        part = self.marker.with_suffix(".part")
        part.write_text(json.dumps({"file": file, "key": key, "arm": arm}))
        part.replace(self.marker)

    def has_time(self) -> bool:
        """Whether another cell as long as the longest so far fits in, and somebody waits for it."""
        return os.getppid() == self.parent and time.time() + 1.2 * self.longest_s < self.until

    def synchronize(self) -> None:
        """Wait for the device; raises what failed on it."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def first_calls(
        self,
        file: str,
        key: str,
        calls: timing.Calls,
        check: Check = lambda name, out: {},
    ) -> dict[str, Measured]:
        """Call each once and check what it gives; what fails is noted with its error."""
        found: dict[str, Measured] = {}
        earlier = self.store(file).current().get(key, {}).get("arms", {})
        for name, call in calls.items():
            if "error" in earlier.get(name, {}):
                found[name] = earlier[name]  # it killed the process before
                continue
            self.mark(file, key, name)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                try:
                    found[name] = check(name, call())
                    self.synchronize()
                    continue
                except Exception as error:
                    found[name] = {"error": _text(error, said)}
            try:
                self.synchronize()
            except Exception:  # the context is gone, with all that could still be measured in it
                failed = {arm: what for arm, what in found.items() if "error" in what}
                self.store(file).put(key, {"unfinished": True, "arms": failed})
                sys.exit(DEVICE_LOST)
        self.mark(file, key, None)
        return found

    def compare(
        self,
        file: str,
        key: str,
        calls: timing.Calls,
        *,
        seconds: float = 3.0,
        check: Check = lambda name, out: {},
    ) -> dict[str, Measured]:
        """Device times of all that can be called, in turn."""
        found = self.first_calls(file, key, calls, check)
        alive = {name: calls[name] for name, what in found.items() if "error" not in what}
        times = timing.time_calls(
            self.device,
            alive,
            seconds=seconds if self.device == "cuda" else 0.0,
            tick=lambda: self.mark(file, key, None),
        )
        for name, ms in times.items():
            found[name] = {**timing.summary(ms), **found[name]}
        return found

    def work_through(self, jobs: Iterable[Job]) -> bool:
        """Measure what is not finished yet; False if the time was over first."""
        for file, key, measure in jobs:
            if self.store(file).is_finished(key):
                continue
            if not self.has_time():
                return False
            start = time.time()
            self.mark(file, key, None)
            try:
                self.store(file).put(key, measure(file, key))
            except Exception as error:  # one cell less, and on to the next
                self.store(file).put(key, {"error": _text(error, []), "arms": {}})
                self.synchronize()  # raises if nothing can be measured any more
            took = time.time() - start
            if key not in self.once:
                self.longest_s = max(self.longest_s, took)
            cell = self.store(file).cells[key]
            print(f"{file}: {key} ({took:.1f} s) {cell.get('error', '')}".rstrip(), flush=True)
            for name, what in cell["arms"].items():
                print(f"    {name:24} {_line(what)}", flush=True)
            if self.device == "cuda":
                torch.cuda.empty_cache()
        return True


def _text(error: Exception, said: list[warnings.WarningMessage]) -> str:
    """What failed; SDPA says in warnings why it refuses."""
    lines = [f"{type(error).__name__}: {error}", *(str(w.message) for w in said)]
    return " | ".join(dict.fromkeys(" ".join(line.split())[:300] for line in lines))[:900]


def _line(what: Measured) -> str:
    if "error" in what:
        return f"error: {what['error'][:100]}"
    unit = next((unit for unit in ("ms", "us", "s") if f"median_{unit}" in what), None)
    text = "" if unit is None else f"{what[f'median_{unit}']:10.3f} {unit}"
    if unit is None and "max_error" in what:
        text = f"error {what['max_error']:.1e}, allowed {what['allowed_error']:.1e}"
    if "percent_of_peak" in what:
        text += f" {what['percent_of_peak']:6.1f} % of peak"
    return text + ("" if what.get("is_right", True) else "  WRONG RESULT")
