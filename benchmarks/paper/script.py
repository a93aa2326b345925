"""What the scripts of the paper's tables share: cells that are kept one by one, and their table.

    python -m benchmarks.paper.NAME [--quick] [--show] [--threads 1] [--results PATH]

A cell that the results have is not measured again. ``--quick`` runs two small cells into a
temporary file, to see that the script works. ``--show`` measures nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tabulate import tabulate

from benchmarks.store import MEASURED, Cell, Store, describe, version
from distr_compile.accuracy.progress import progress_bar

RESULTS = Path(__file__).parents[1] / "results"
NOT_MEASURED = "not measured"
OF_A_MACHINE = frozenset({"cpu", "architecture", "threads"})
TOLD = ("architecture", "torch", "triton", "python", "sources", "commit")

Cells = dict[str, Callable[[], Cell]]


class UnavailableError(Exception):
    """What a cell needs is not here; it is left as it is, and the reason is told."""


@dataclass(frozen=True)
class Script:
    """One table or figure of the paper.

    Attributes:
        name: of the module, and of the file of results.
        title: what it is in the paper.
        cells: whether it is to be quick -> what measures each cell, by its key.
        table: cells by their keys, of which some may be missing -> Markdown.
        sources: files or folders of this repository that the results hang on, beside the script.
        packages: whose versions the results hang on, beside PyTorch.
        folder: of the module below ``benchmarks``, and of the file below ``benchmarks/results``.
    """

    name: str
    title: str
    cells: Callable[[bool], Cells]
    table: Callable[[dict[str, Cell]], str]
    sources: tuple[str, ...] = MEASURED
    packages: tuple[str, ...] = ()
    folder: str = "paper"

    @property
    def results(self) -> Path:
        """The committed results."""
        return RESULTS / self.folder / f"{self.name}.json"

    def environment(self) -> dict[str, str]:
        """What the results hang on."""
        module = (Path("benchmarks") / self.folder / f"{self.name}.py").as_posix()
        found = describe("cpu", (*self.sources, module))
        told = {name: found[name] for name in TOLD}
        told |= {name: version(name) for name in self.packages}
        return {"cpu": cpu_name(), "threads": str(torch.get_num_threads()), **told}

    def run(self, path: Path, *, quick: bool = False) -> Store:
        """Measure the cells that are not in the file yet; the load beside each."""
        store, cells = Store(path, self.environment()), self.cells(quick)
        left = [key for key in cells if not store.is_finished(key, self._whatever)]
        with progress_bar(True) as bar:
            for key in bar.track(left, description=self.name):
                begin, load = time.perf_counter(), os.getloadavg()[0]
                try:
                    found = cells[key]()
                except UnavailableError as error:
                    print(f"{key}: {error}", file=sys.stderr)
                    continue
                seconds = time.perf_counter() - begin
                store.put(key, {**found, "load": load, "seconds": seconds})
        return store

    @property
    def _whatever(self) -> frozenset[str]:
        """What of an environment its cells do not hang on: times hang on all kernels, and on the
        processor; accuracies do not, and half of a table may come from another one."""
        has_times = set(MEASURED) <= set(self.sources)
        return frozenset() if has_times else OF_A_MACHINE

    def main(self, argv: Sequence[str] | None = None) -> None:
        """The command line."""
        parser = argparse.ArgumentParser(description=self.title)
        parser.add_argument("--quick", action="store_true", help="two small cells, kept nowhere")
        parser.add_argument("--show", action="store_true", help="print the results only")
        parser.add_argument("--threads", type=int, default=1, help="of PyTorch (default: 1)")
        parser.add_argument("--results", type=Path, help=f"default: {self.results}")
        options = parser.parse_args(argv)
        torch.set_num_threads(options.threads)
        with tempfile.TemporaryDirectory() as folder:
            quick = Path(folder) / "quick.json"
            path = options.results or (quick if options.quick else self.results)
            if not options.show:
                print(f"{self.title}: {path}", file=sys.stderr)
                self.run(path, quick=options.quick)
            found = Store(path, {}).cells
            print(f"{self.title}\n\n{json.dumps(found) if options.quick else self.table(found)}")


def cpu_name() -> str:
    """What the system calls its processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def markdown(rows: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    """A table."""
    return str(tabulate(rows, header, tablefmt="pipe", disable_numparse=True))
