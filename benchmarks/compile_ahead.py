"""Compiles the kernels of the short runs in several processes, before they are called.

    python -m benchmarks.compile_ahead [--stages first second] [--architecture sm_90] [--pack DIR]

makes Triton's cache for such a device on any machine that has the same Triton. What a stage
calls is called here on tensors without storage (``compile_only.py``), so that no kernel is named
twice. Processes claim kernels by files in a folder: none is compiled by two of them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import arms, cells, smoke, triton_cache
from benchmarks.compile_only import compiling
from benchmarks.measure import candidates, current_tile, tile_calls
from benchmarks.session import Measured, Session
from benchmarks.store import ROOT
from distr_compile.lowering import cuda

MAX_PROCESSES = 12
WAIT_S = 90.0
"""Longest that a stage waits for the processes; what they have not compiled is compiled when it is
called."""

Thunk = Callable[[], object]


def calls(stages: list[str], architecture: str) -> Iterator[tuple[str, Thunk]]:
    """What the stages call of our kernels, on tensors without storage; the slow ones first."""
    shapes = {"first": cells.FIRST[:1], "second": cells.SECOND}
    for stage in stages:
        for cell in shapes[stage]:
            ours = arms.make_ours(cell, arms.make_inputs(cell, "meta"))
            order = sorted(ours, key=lambda name: not name.startswith("projection"))
            yield from ((f"{cell.key}, {name}", ours[name].call) for name in order)
    if "first" not in stages:
        return
    for case in smoke.cases("cuda"):
        yield case.name, smoke.run(case, "meta")[2]
    for cell, rank in cells.FIRST_TILES:
        tile = current_tile(architecture, cell, rank)
        tried = [tile, *candidates(tile, cell.head_dim)]
        for name, call in tile_calls(cell, rank, tried, "meta")[0].items():
            yield f"{cell.key} r{rank}, {name}", call


# --- one process --------------------------------------------------------------------------------


def work(stages: list[str], architecture: str, claims: Path, begin: float) -> None:
    """Compile what nobody has claimed yet; a line of JSON on stdout for each kernel.

    Args:
        stages: see ``calls``.
        architecture: to compile for.
        claims: folder of the claims.
        begin: where in the list of calls to start, from 0 to 1.
    """
    started, names = time.perf_counter(), []

    def is_wanted(kernel: Any, arguments: dict[str, Any]) -> bool:
        nonlocal started
        name = f"{kernel.__name__}-{_digest(kernel, arguments)}"
        try:
            (claims / name).touch(exist_ok=False)
        except FileExistsError:
            return False
        started = time.perf_counter()
        names.append(name)
        return True

    def tell(compiled: Any) -> None:
        _make_launcher(compiled)
        print(json.dumps({"kernel": names[-1], "s": time.perf_counter() - started}), flush=True)

    listed = list(calls(stages, architecture))
    first = int(begin * len(listed))
    with (
        mock.patch.object(cuda, "architecture", return_value=architecture),
        compiling(architecture, tell, is_wanted),
    ):
        for name, call in listed[first:] + listed[:first]:
            try:
                call()
            except Exception as error:  # what compilers raise has no common base class
                why = f"{type(error).__name__}: {error}".partition("\n")[0][:300]
                kernel = names[-1] if names else "no kernel"
                print(json.dumps({"kernel": f"{name}: {kernel}", "error": why}), flush=True)


def _digest(kernel: Any, arguments: dict[str, Any]) -> str:
    """Of all that a kernel may be compiled for; at worst more than that."""
    constant = {p.name for p in kernel.params if p.is_constexpr}
    parts = []
    for name, value in sorted(arguments.items()):
        if isinstance(value, torch.Tensor):
            parts.append((name, str(value.dtype)))
        elif isinstance(value, int) and name not in constant and name in kernel.arg_names:
            parts.append((name, value == 1, value % 16 == 0))
        elif hasattr(value, "block_shape"):
            parts.append((name, str(value.base.dtype), tuple(value.block_shape)))
        else:
            parts.append((name, repr(value)))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def _make_launcher(compiled: Any) -> None:
    """Older Tritons compile C code for each signature, at the first launch: now, if it can be."""
    try:
        from triton.backends.nvidia.driver import CudaLauncher

        CudaLauncher(compiled.src, compiled.metadata)
    except Exception:  # no driver here, or another Triton: the first launch makes it
        return


# --- all of them --------------------------------------------------------------------------------


class Pool:
    """The processes, started; of one session or of the command."""

    def __init__(self, stages: list[str], architecture: str, processes: int) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="distr-claims-")
        self.begin = time.perf_counter()
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": _path()}
        self.outputs = [Path(self.folder.name) / f"said-{i}.txt" for i in range(processes)]
        claims = Path(self.folder.name) / "claims"
        claims.mkdir()
        self.processes = []
        for i, path in enumerate(self.outputs):
            command = [sys.executable, "-m", "benchmarks.compile_ahead", "--worker", str(claims)]
            command += ["--begin", str(i / processes), "--architecture", architecture]
            with path.open("wb") as output:
                self.processes.append(
                    subprocess.Popen(
                        [*command, "--stages", *stages],
                        cwd=ROOT,
                        env=environment,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )

    def wait(self, seconds: float, tick: Callable[[], None]) -> dict[str, Measured]:
        """What the processes said until they ended, or until the time was over."""
        until = time.perf_counter() + seconds
        while any(p.poll() is None for p in self.processes) and time.perf_counter() < until:
            tick()
            time.sleep(0.2)
        late = [p for p in self.processes if p.poll() is None]
        for process in late:
            process.kill()
            process.wait()
        found: dict[str, Measured] = {}
        for process, path in zip(self.processes, self.outputs, strict=True):
            lines = path.read_text(errors="replace").splitlines()
            told = [json.loads(line) for line in lines if line.startswith("{")]
            for line in told:
                what = {"error": line["error"]} if "error" in line else {"median_s": line["s"]}
                found[line["kernel"]] = what
            if process.returncode and process not in late:
                found[f"process {process.pid}"] = {"error": " ".join(lines[-3:])[-300:]}
        self.folder.cleanup()
        return found


def cell(session: Session, pool: Pool, file: str, key: str) -> Measured:
    """Wait for the pool; seconds of each kernel."""
    found = pool.wait(WAIT_S, lambda: session.mark(file, key, None))
    waited = time.perf_counter() - pool.begin
    told = {"processes": len(pool.processes), "seconds": waited, "kernels": len(found)}
    return {"kind": "compiling", "run": session.run, **told, "arms": found}


def _path() -> str:
    return os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--stages", nargs="+", choices=["first", "second"], default=["first"])
    parser.add_argument("--architecture", default="sm_90")
    parser.add_argument("--processes", type=int, default=min(MAX_PROCESSES, os.cpu_count() or 1))
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--begin", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--pack", type=Path, help=f"folder for the cache, as {triton_cache.NAME}")
    options = parser.parse_args(argv)
    if options.worker:
        work(options.stages, options.architecture, options.worker, options.begin)
        return 0
    if options.pack:
        triton_cache.use(options.pack / triton_cache.NAME)
    pool = Pool(options.stages, options.architecture, options.processes)
    found = pool.wait(float("inf"), lambda: None)
    failed = {name: what["error"] for name, what in found.items() if "error" in what}
    seconds = [what["median_s"] for what in found.values() if "error" not in what]
    took = time.perf_counter() - pool.begin
    print(f"{len(seconds)} kernels, {sum(seconds):.0f} s of compiling in {took:.0f} s")
    for name, why in failed.items():
        print(f"{name}: {why}")
    if options.pack and (path := triton_cache.pack(options.pack)):
        print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
