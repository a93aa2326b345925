"""Everything that wants a GPU, in one unattended run that can be cut short and go on later.

    python -m benchmarks.gpu [--budget-s 560] [--results DIR] [--stages first second ...]

``first`` and ``second`` are for a machine that is there for minutes: each has its results in one
file, and ends with what decides. All others measure at length. Each cell is written as soon as it
is known. What has a result of the same kernels, versions and device is not measured again: call it
until nothing is left, on this machine or, with the folder of results carried along, on another of
its kind.

Without a GPU all of it runs on tiny shapes in Triton's interpreter, into a temporary folder: that
shows that the script works, nothing else. See docs/benchmarks.md for what the files hold.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

import torch

# Without a GPU the kernels run in Triton's interpreter, which is chosen when Triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from benchmarks import resumable, rows, targets, triton_cache
from benchmarks.stages import SHORT, STAGES
from benchmarks.store import ROOT, TESTED, Store, describe

TESTS_SHARE = 0.35
"""Most of the budget that one call gives to the tests."""

HANG_S = 45.0 if torch.cuda.is_available() else 180.0
"""A process that does nothing new for so long is killed; compiling one kernel takes less."""

START_S = 90.0
"""Before its first sign of life, while it imports everything on a machine that was just started."""

TEST_HANG_S = 120.0
"""Likewise for one test, which may compile a whole model."""

TAIL_S = 3.0
"""Kept of the budget, to end a process and write down what it did."""

TEST_PROCESSES = 8
CPU_TESTS = ("tests/lowering/test_cuda.py", "-k", "broadcast or empty or chunks")


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    start = time.time()
    stages = list(dict.fromkeys(options.stages))
    budget = options.budget_s
    if budget is None:
        budget = sum(SHORT.get(stage, float("inf")) for stage in stages)
    until = start + budget - TAIL_S
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = (options.results or default_folder(device)).resolve()
    results.mkdir(parents=True, exist_ok=True)
    if device == "cuda":
        triton_cache.use(options.cache)
    short = [stage for stage in stages if stage in SHORT]
    long = [stage for stage in stages if stage in STAGES and stage not in SHORT]
    is_green = True
    try:
        if short:
            is_green = measure(device, results, short, until, options.by_pointers)
        if "second" in short:
            is_green = run_tests(device, results, until, only_marked=True) and is_green
        if "tests" in stages:
            share = start + TESTS_SHARE * (until - start)
            is_green = run_tests(device, results, share) and is_green
        if long:
            measured = measure(device, results, long, until, options.by_pointers)
            is_green = measured and is_green
    finally:
        if device == "cuda":
            triton_cache.pack(results)
    return 0 if report(device, results) and is_green else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="everything that wants a GPU, resumable")
    parser.add_argument(
        "--budget-s", type=float, help="seconds; of first and second 200 and 380, else no end"
    )
    parser.add_argument(
        "--results", type=Path, help="folder to read earlier results from and add to"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=ROOT / "dist" / "gpu" / triton_cache.NAME,
        help="Triton's cache of another machine, used if it is there",
    )
    parser.add_argument(
        "--by-pointers",
        action="store_true",
        help="our kernels without tensor descriptors; first finds out by itself",
    )
    every = [*SHORT, "tests", *(stage for stage in STAGES if stage not in SHORT)]
    parser.add_argument("--stages", nargs="*", choices=every, default=every)
    return parser


def default_folder(device: str) -> Path:
    """By the name of the GPU, in the repository; numbers of a CPU are worth nothing there."""
    if device == "cpu":
        return Path(tempfile.mkdtemp(prefix="distr-benchmarks-"))
    slug = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return ROOT / "benchmarks" / "results" / slug


# --- tests --------------------------------------------------------------------------------------


def run_tests(device: str, results: Path, until: float, *, only_marked: bool = False) -> bool:
    """Run the tests that have no result yet, and write ``tests.txt``; False if any failed.

    Args:
        device: "cuda" or "cpu".
        results: folder of the results.
        until: when to have ended, in seconds since the epoch.
        only_marked: of all tests those marked ``gpu``, into ``marked-tests.txt``.
    """
    if importlib.util.find_spec("pytest") is None:
        print("tests: pytest is not installed, none was run", flush=True)
        return True
    name = "marked-tests" if only_marked else "tests"
    path, environment = results / f"{name}.json", describe(device, TESTED)
    said, is_green = b"", True
    while not Store(path, environment).is_finished(resumable.COMPLETE) and time.time() < until:
        command = test_command(device, path, environment, only_marked=only_marked)
        with tempfile.TemporaryFile() as output:
            status = watch(start_python(command, output), path, until, TEST_HANG_S)
            output.seek(0)
            said = output.read()[-resumable.LONGEST_TEXT :]
        if status in (0, 1, 5):  # passed, failed, nothing left to run
            Store(path, environment).put(resumable.COMPLETE, {"outcome": "complete"})
        elif not note_running(Store(path, environment), status):
            is_green = status is None  # killed for being late: goes on next time
            break
    text, have_passed = resumable.summarise(Store(path, environment))
    if not is_green:
        text += "\npytest ended early; it said:\n" + said.decode(errors="replace")
    (results / f"{name}.txt").write_text(text, encoding="utf-8")
    print(f"{name}: {text.partition(chr(10))[0]}", flush=True)
    return is_green and have_passed


def test_command(
    device: str, path: Path, environment: dict[str, str], *, only_marked: bool
) -> list[str]:
    # With a space, pytest would take an existing file for a test and look there for its settings.
    command = ["-m", "pytest", "-p", "benchmarks.resumable", "--tb=short"]
    command += [f"--record={path}", f"--environment={json.dumps(environment)}"]
    if device == "cpu" and not only_marked:
        return [*command, *CPU_TESTS]
    if only_marked:
        return [*command, "-m", "gpu", *resumable.files_with_marked_tests(outside=())]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(TEST_PROCESSES, os.cpu_count() or 1))]
    command += ["--continue-on-collection-errors"]
    return [*command, *resumable.SUITES, *resumable.files_with_marked_tests()]


def note_running(store: Store, status: int | None) -> bool:
    """Call failed what hung, or took pytest down with it; False if there is no such test."""
    found = False
    for key, cell in store.current().items():
        seconds = time.time() - cell.get("since", time.time())
        if cell["outcome"] == "running" and (status is not None or seconds > TEST_HANG_S / 2):
            how = f"pytest ended: {status}" if status is not None else "killed"
            text = f"still running after {seconds:.0f} s; {how}"
            store.put(key, {"outcome": "failed", "seconds": seconds, "text": text})
            found = True
    return found


# --- measurements -------------------------------------------------------------------------------


def measure(
    device: str, results: Path, stages: list[str], until: float, by_pointers: bool = False
) -> bool:
    """Let processes measure, one after another, until one of them ends well or the time is over.

    False if one did not even come to its first cell.
    """
    run = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
    with tempfile.TemporaryDirectory() as folder:
        marker = Path(folder) / "doing.json"
        while time.time() < until:
            marker.unlink(missing_ok=True)
            command = ["-m", "benchmarks.stages", "--results", str(results), "--run", run]
            command += ["--marker", str(marker), "--until", str(until), "--stages", *stages]
            command += ["--by-pointers"] * by_pointers
            status = watch(start_python(command), marker, until)
            if status == 0 or time.time() >= until:
                break
            if not marker.exists():
                print(f"measuring failed before its first cell: exit status {status}", flush=True)
                return False
            note_failure(device, results, json.loads(marker.read_text()), status)
    return True


def note_failure(device: str, results: Path, doing: dict[str, Any], status: int | None) -> None:
    """Write down what took the process away, so that the next one leaves it out."""
    why = f"no sign of life for {HANG_S:.0f} s" if status is None else f"process ended: {status}"
    store = Store(results / f"{doing['file']}.json", describe(device))
    cell = store.current().get(doing["key"], {"unfinished": True, "arms": {}})
    if doing["arm"] is None:
        cell = {"error": why, "arms": cell["arms"]}
    elif "error" not in cell["arms"].get(doing["arm"], {}):
        cell["arms"][doing["arm"]] = {"error": why}
    store.put(doing["key"], cell)
    print(f"{doing['key']}, {doing['arm']}: {why}", flush=True)


def start_python(arguments: list[str], output: IO[bytes] | None = None) -> subprocess.Popen[bytes]:
    """This Python, in the repository, as the leader of a group of processes."""
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        stdout=output,
        stderr=output,
        start_new_session=True,
    )


def watch(
    process: subprocess.Popen[bytes], alive: Path, until: float, hang_s: float | None = None
) -> int | None:
    """Wait for the end of a process; None if it was killed, for being late or for hanging.

    Args:
        process: its whole group is killed.
        alive: a file that the process writes anew with whatever it begins.
        until: when to kill it, in seconds since the epoch.
        hang_s: longest without a sign of life; None for ``HANG_S``.
    """
    longest = HANG_S if hang_s is None else hang_s
    first = max(longest, START_S)
    begin = time.time()
    try:
        while process.poll() is None:
            last = alive.stat().st_mtime if alive.exists() else 0.0
            silent = time.time() - max(last, begin)
            if time.time() > until or silent > (longest if last > begin else first):
                return None
            time.sleep(0.2)
        return process.returncode
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


# --- report -------------------------------------------------------------------------------------


def report(device: str, results: Path) -> bool:
    """Say how much is measured, and what follows; False if a kernel of ours failed or erred.

    The same goes into ``report.txt``.
    """
    environment = describe(device)
    counts, wrong, lines = [], [], []
    for path in sorted(results.glob("*.json")):
        if path.stem in ("tests", "marked-tests"):
            continue
        cells = Store(path, environment).current()
        if any(rows.is_attention(cell) for cell in cells.values()):
            lines.append(rows.table(rows.load(path)[1]))
        counts.append(f"{len(cells)} cells in {path.name}")
        for key, cell in cells.items():
            kind = cell.get("kind", path.stem)
            wrong += [f"{path.stem}, {key}: {cell['error']}"] if "error" in cell else []
            for name, arm in cell["arms"].items():
                if "error" in arm and is_needed(kind, cell, name):
                    wrong.append(f"{path.stem}, {key}, {name}: {arm['error']}")
                elif not arm.get("is_right", True):
                    wrong.append(f"{path.stem}, {key}, {name}: error {arm['max_error']}")
    lines += ["", *targets.page(results, environment)]
    lines.append(f"{results}: {', '.join(counts) or 'nothing'}")
    lines += [f"WRONG: {line}" for line in wrong]
    lines += targets.deciding_lines(results, environment)
    (results / "report.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines), flush=True)
    return not wrong


def is_needed(kind: str, cell: dict[str, Any], arm: str) -> bool:
    """Whether it is a fault of ours if this arm has no time."""
    if kind == "attention":
        return rows.is_ours(arm)
    if kind == "compiling":  # what was not compiled ahead is compiled when it is called
        return False
    return kind != "tiles" or arm == cell["tile"]


if __name__ == "__main__":
    # An orderly end, which takes along the processes that were started here.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
