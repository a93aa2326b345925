"""What was measured, held against what was hoped for: the tables of docs/benchmarks.md, README.

    python -m benchmarks.targets DIR

prints them for a folder of results. What nobody has measured says so.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import both_ways, cells
from benchmarks.arms import EXACT
from benchmarks.rows import FLASH, GROUP_SIZES, TABLED, Row, is_attention
from benchmarks.store import Store
from benchmarks.timing import WHOLE

NOTHING = "not measured"
MEASURED_IN = ("first", "second", "attention", "prologue", "training", "tiles")
"""Files of results that are read."""

LEAST_TOKENS = 8192
MOST_LINES = 20
CUDNN = "sdpa cudnn"


@dataclass(frozen=True)
class Target:
    """A line of the table of targets: a speedup.

    Attributes:
        over: "flash", or "best" for the fastest exact kernel.
        head_dim: d.
        group_size: G.
        target: what it should be.
        stretch: what it may become.
    """

    over: str
    head_dim: int
    group_size: int
    target: str
    stretch: str = "-"

    @property
    def text(self) -> str:
        """The first column."""
        over = {"flash": "SDPA flash", "best": "the best exact kernel"}[self.over]
        return f"over {over}, d = {self.head_dim}, G = {self.group_size}"


TARGETS = (
    Target("flash", 64, 2, "1.37"),
    Target("flash", 64, 4, "1.37", "1.5"),
    Target("flash", 128, 2, "1.37"),
    Target("flash", 128, 4, "1.5", "1.8"),
    Target("best", 128, 2, "1.0"),
    Target("best", 128, 4, "1.1"),
)
SHARES = {4096: ("N = 4k", "<= 10 %"), 8192: ("N = 8k", "<= 5 %")}
PAPER = {2048: "74.8 %", 4096: "37.8 %", 20480: "4.1 %", 40960: "1.3 %"}

README = {
    "On a GPU: not measured.": "On a GPU: {}.",
    "no GPU has run them yet. Speed there: not measured.": "speed on a GPU: {}.",
}
"""Words of README.md that change with the first results -> what they become."""


@dataclass(frozen=True)
class Found:
    """What the files of a folder hold for one environment."""

    cells: list[dict[str, Any]]

    @classmethod
    def read(cls, results: Path, environment: dict[str, str]) -> Found:
        """All of ``MEASURED_IN``."""
        found = []
        for name in MEASURED_IN:
            current = Store(results / f"{name}.json", environment).current()
            found += [{"kind": name, **cell} for cell in current.values() if "run" in cell]
        return cls(found)

    def rows(self) -> list[Row]:
        """Shapes of attention, with the time of each arm that was right."""
        return [_row(cell) for cell in self.cells if is_attention(cell)]

    def prologues(self, group_size: int) -> Iterator[dict[str, Any]]:
        """Cells of the share of what comes before attention."""
        for cell in self.cells:
            if "prologue_percent" in cell and cell["head_dim"] // cell["rank"] == group_size:
                yield cell


def _row(cell: dict[str, Any]) -> Row:
    times = {
        name: arm["median_ms"]
        for name, arm in cell["arms"].items()
        if arm.get("is_right") and "median_ms" in arm
    }
    return Row({k: v for k, v in cell.items() if k != "arms"}, times)


def speedups(rows: Iterable[Row], target: Target, estimator: str) -> list[float]:
    """By which ``estimator`` is faster, in every shape that the target is about."""
    found = []
    for row in rows:
        cell = row.cell
        plain = cell["dtype"] == "float16" and cell["mask"] == "none" and not cell["is_causal"]
        if not plain or cell["heads"] != cell["key_heads"]:
            continue
        if cell["head_dim"] != target.head_dim or cell["tokens"] < LEAST_TOKENS:
            continue
        best = row.best_exact()
        other = row.times.get(FLASH) if target.over == "flash" else best and best[1]
        ms = row.ours(target.group_size, estimator)
        if ms is not None and other is not None:
            found.append(other / ms)
    return found


def _told(values: Callable[[str], list[float]], spell: Callable[[float], str]) -> str:
    """Least and largest of each estimator's, as one column."""
    parts = []
    for estimator in TABLED:
        some = values(estimator)
        if some:
            ends = dict.fromkeys((spell(min(some)), spell(max(some))))
            parts.append(f"{estimator} {' to '.join(ends)}")
    return ", ".join(parts) or NOTHING


def targets_table(found: Found) -> list[str]:
    """The table of targets, filled in."""
    rows = found.rows()
    lines = ["| | target | stretch | measured |", "|---|---|---|---|"]
    for target in TARGETS:
        told = _told(lambda name, t=target: speedups(rows, t, name), "{:.2f}".format)
        lines.append(f"| {target.text} | {target.target} | {target.stretch} | {told} |")
    for tokens, (name, most) in SHARES.items():
        told = _shares(found, lambda cell, n=tokens: cell["tokens"] == n)
        lines.append(f"| share of grouping, {name} | {most} | - | {told} |")
    return lines


def paper_table(found: Found) -> list[str]:
    """The share of grouping beside the paper's."""
    lines = ["| N | paper | measured |", "|---|---|---|"]
    for tokens, percent in PAPER.items():
        told = _shares(
            found, lambda cell, n=tokens: (cell["tokens"], cell["heads"]) == (n, cells.HEADS[1][1])
        )
        lines.append(f"| {tokens} | {percent} | {told} |")
    return lines


def _shares(found: Found, is_asked: Callable[[dict[str, Any]], bool]) -> str:
    asked = [
        cell
        for cell in found.prologues(GROUP_SIZES[0])
        if is_asked(cell) and cell["head_dim"] == 128
    ]
    return _told(
        lambda name: [c["prologue_percent"][name] for c in asked if name in c["prologue_percent"]],
        "{:.1f} %".format,
    )


def readme_lines(found: Found, device: str) -> list[str]:
    """What would change in README.md: each line of words, and the one in its place."""
    rows = found.rows()
    flash, best = (t for t in TARGETS if t.head_dim == 128 and t.group_size == 2)
    over_flash, over_best = (
        _told(lambda name, t=target: speedups(rows, t, name), "{:.2f}".format)
        for target in (flash, best)
    )
    if over_flash == NOTHING:
        return ["README.md: nothing changes, " + NOTHING]
    told = (
        f"on an {device} (fp16, d = 128, N >= 8k, G = 2, `make gpu`) {over_flash} times SDPA's "
        f"FlashAttention, {over_best} times the best exact kernel"
    )
    lines = []
    for old, new in README.items():
        lines += [f"README.md: - {old}", f"README.md: + {new.format(told)}"]
    return lines


def page(results: Path, environment: dict[str, str]) -> list[str]:
    """Both tables and the lines of README."""
    found = Found.read(results, environment)
    device = environment.get("device", "unknown device")
    trained = [cell for cell in found.cells if cell["kind"] == "training" and "arms" in cell]
    tables = [*targets_table(found), "", *paper_table(found), "", *both_ways.table(trained), ""]
    return [*tables, *readme_lines(found, device), ""]


# --- the last lines of the first stage ------------------------------------------------------------


def deciding_lines(results: Path, environment: dict[str, str]) -> list[str]:
    """What the stage ``first`` found, in at most ``MOST_LINES`` lines; none if it did not run."""
    current = Store(results / "first.json", environment).current()
    if not current:
        return []
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for key, cell in current.items():
        kind = cell.get("kind") or key.partition(":")[0]
        by_kind.setdefault(kind, []).append(cell)
    names = ("device", "driver", "cuda", "torch", "triton", "python", "commit")
    versions = ", ".join(f"{name} {environment.get(name, 'unknown')}" for name in names)
    lines = [f"--- first: {versions}"]
    lines += [_compiled(by_kind.get("compiling", [])), _ceilings(by_kind.get("ceilings", []))]
    lines.append(_smoke(by_kind.get("smoke", [])))
    for cell in by_kind.get("attention", []):
        lines += _attention(cell)
    tiles = [_tiles(cell) for cell in by_kind.get("tiles", [])]
    shares = [line for cell in by_kind.get("prologue", [])[:1] for line in _prologue(cell)]
    lines += tiles or [f"tiles: {NOTHING}"]
    lines += shares or [f"kernels before attention: {NOTHING}"]
    failed = [cell["error"] for some in by_kind.values() for cell in some if "error" in cell]
    lines += [f"cells without a result: {len(failed)}: {failed[0][:120]}"] if failed else []
    return lines[:MOST_LINES]


def _compiled(cells: list[dict[str, Any]]) -> str:
    if not cells or "seconds" not in cells[-1]:
        return f"compiling ahead: {NOTHING}"
    cell = cells[-1]
    failed = [name for name, arm in cell["arms"].items() if "error" in arm]
    text = f"compiling ahead: {cell['kernels']} kernels in {cell['seconds']:.0f} s"
    return text + (f"; failed: {', '.join(failed)[:200]}" if failed else "")


def _ceilings(cells: list[dict[str, Any]]) -> str:
    parts = []
    for name, arm in cells[-1]["arms"].items() if cells else ():
        value, unit = arm.get("gb_per_s"), "GB/s"
        if value is None:
            value, unit = arm.get("tflops"), "TFLOP/s"
        if value is not None:
            parts.append(f"{name} {value:.0f} {unit}")
    return f"ceilings: {', '.join(parts) or NOTHING}"


def _smoke(cells: list[dict[str, Any]]) -> str:
    arms = {name: arm for cell in cells for name, arm in cell["arms"].items()}
    if not cells:
        return f"small calls against fp64: {NOTHING}"
    wrong = [
        f"{name} ({arm['error'][:60] if 'error' in arm else arm['max_error']})"
        for name, arm in arms.items()
        if not arm.get("is_right")
    ]
    text = f"small calls against fp64: {len(arms) - len(wrong)} of {len(cells)} right"
    return text + (f"; not: {'; '.join(wrong)[:400]}" if wrong else "")


def _attention(cell: dict[str, Any]) -> list[str]:
    if "arms" not in cell or "head_dim" not in cell:
        return [f"attention: {NOTHING}"]
    row = _row(cell)
    name = f"B{cell['batch']} H{cell['heads']} N{cell['tokens']} d{cell['head_dim']}"
    exact = ", ".join(
        f"{arm} {row.times[arm]:.3f} ms" if arm in row.times else f"{arm} {NOTHING}"
        for arm in (FLASH, CUDNN, EXACT)
    )
    lines = [f"{name}: {exact}" + (", all of ours by pointers" * bool(cell.get("by_pointers")))]
    best = row.best_exact()
    for estimator in TABLED:
        parts = []
        for size in GROUP_SIZES:
            ms, flash = row.ours(size, estimator), row.times.get(FLASH)
            if ms is None:
                continue
            over_flash = NOTHING if flash is None else f"{flash / ms:.2f} x flash"
            over_best = NOTHING if best is None else f"{best[1] / ms:.2f} x best"
            part = f"G={size} {ms:.3f} ms, {over_flash}, {over_best}"
            hot = cell["arms"][f"{estimator} G={size}"].get("sustained_ms")
            parts.append(part + (f", {hot:.3f} ms without a pause" if hot is not None else ""))
        lines.append(f"  {estimator}: {'; '.join(parts) or NOTHING}")
    return lines


def _tiles(cell: dict[str, Any]) -> str:
    if "tile" not in cell:
        return f"tiles: {NOTHING}"
    times = sorted(
        (arm["median_ms"], name)
        for name, arm in cell["arms"].items()
        if arm.get("is_right") and "median_ms" in arm
    )
    told = ", ".join(f"{name.replace('/use_tma', '')} {ms:.3f}" for ms, name in times)
    failed = [name for name, arm in cell["arms"].items() if not arm.get("is_right")]
    text = (
        f"tiles d{cell['head_dim']} r{cell['rank']} (table {cell['tile']}), ms: {told or NOTHING}"
    )
    return text + (f"; failed: {', '.join(failed)}" if failed else "")


def _prologue(cell: dict[str, Any]) -> list[str]:
    lines = []
    for name, percent in cell.get("prologue_percent", {}).items():
        kernels = ", ".join(
            f"{arm.partition(': ')[2]} {what['median_ms']:.3f}"
            for arm, what in cell["arms"].items()
            if arm.startswith(f"{name}: ") and "median_ms" in what and not arm.endswith(WHOLE)
        )
        lines.append(f"{name} G=2 N{cell['tokens']}: {percent:.1f} % before attention; {kernels}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    seen: dict[str, dict[str, str]] = {}
    for name in MEASURED_IN:
        path = folder / f"{name}.json"
        if path.exists():
            seen |= json.loads(path.read_text(encoding="utf-8"))["environments"]
    for environment in seen.values():
        lines = [*page(folder, environment), *deciding_lines(folder, environment)]
        print("\n".join(lines))


if __name__ == "__main__":
    main()
