"""What wants a GPU, in one unattended run: its tests, and the op against SDPA cell by cell.

    python benchmarks/gpu.py [--restart]

Each cell is written to ``benchmarks/results/attention-DEVICE.json`` as soon as it is measured. A
run that was cut short goes on where it stopped; other code, versions or another device start anew.
Without a GPU the same cells run tiny on the CPU: that shows that the script works, nothing else.
Nothing is written that was not measured in this file's own run.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distr_compile.lowering import op  # noqa: F401  (registers the op)

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NO_TESTS_COLLECTED = 5  # pytest's exit status

# batch, heads, tokens; then head widths, dtypes, causality and variants, all against all.
GPU_SIZES = ((4, 16, 1024), (2, 16, 4096), (1, 16, 16384))
CPU_SIZES = ((1, 2, 128), (1, 2, 256))
WIDTHS = (64, 128)
DTYPES = {"cuda": (torch.float16, torch.bfloat16), "cpu": (torch.float32,)}
VARIANTS = (
    ("sdpa", 1, 0),
    ("lsh-mean", 2, 0),
    ("lsh-mean", 2, 64),
    ("lsh-sample", 2, 0),
    ("lsh-sample", 2, 64),
)
"""(estimator, group size, grouping block; 0 is auto)"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="see the module's docstring")
    parser.add_argument("--restart", action="store_true", help="measure every cell again")
    options = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    status = run_tests()
    environment = describe(device)
    slug = re.sub(r"[^a-z0-9]+", "-", environment["device"].lower()).strip("-")
    path = RESULTS / f"attention-{slug}.json"
    cells = {} if options.restart else finished(path, environment)
    wanted = list(grid(device))
    for number, cell in enumerate(wanted, 1):
        key = " ".join(str(value) for value in cell.values())
        if key not in cells:
            cells[key] = {**cell, **measure(device, **cell)}
            write(path, {"environment": environment, "cells": cells})
        line = cells[key]
        print(f"[{number}/{len(wanted)}] {key}: {line['median_ms']:.3f} ms", flush=True)
    print(f"{path.relative_to(ROOT)}: {len(cells)} cells, {environment['device']}")
    return status


def run_tests() -> int:
    """The tests marked ``gpu``; 0 where there are none yet, or no pytest."""
    if importlib.util.find_spec("pytest") is None:
        print("pytest is not installed: no test was run")
        return 0
    done = subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu"], cwd=ROOT, check=False)
    return 0 if done.returncode == NO_TESTS_COLLECTED else done.returncode


def describe(device: str) -> dict[str, str]:
    """What a number depends on. The commit is marked where the working tree differs from it."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "distr_compile")
    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu {platform.machine()}"
    return {
        "device": name,
        "commit": (git("rev-parse", "HEAD") or "unknown") + ("+changes" if changed else ""),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "triton": _version("triton"),
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def finished(path: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Cells of an earlier run of the same code on the same device."""
    if not path.exists():
        return {}
    earlier = json.loads(path.read_text(encoding="utf-8"))
    is_same = earlier["environment"] == environment and "+changes" not in environment["commit"]
    return dict(earlier["cells"]) if is_same else {}


def grid(device: str) -> Any:
    sizes = GPU_SIZES if device == "cuda" else CPU_SIZES
    axes = (sizes, WIDTHS, DTYPES[device], (False, True), VARIANTS)
    for size, width, dtype, is_causal, variant in itertools.product(*axes):
        batch, heads, tokens = size
        estimator, group_size, block = variant
        yield {
            "estimator": estimator,
            "group_size": group_size,
            "grouping_block": block,
            "batch": batch,
            "heads": heads,
            "tokens": tokens,
            "width": width,
            "dtype": str(dtype).removeprefix("torch."),
            "is_causal": is_causal,
        }


@torch.no_grad()
def measure(device: str, **cell: Any) -> dict[str, Any]:
    """Median and spread of the time of one call, in milliseconds."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (cell["batch"], cell["heads"], cell["tokens"], cell["width"])
    dtype = getattr(torch, cell["dtype"])
    q, k, v = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in "qkv")
    times = time_calls(device, call(cell, q, k, v))
    quartiles = statistics.quantiles(times, n=4)
    return {
        "median_ms": statistics.median(times),
        "quartiles_ms": [quartiles[0], quartiles[2]],
        "repeats": len(times),
    }


def call(cell: dict[str, Any], q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    is_causal, scale = cell["is_causal"], cell["width"] ** -0.5
    if cell["estimator"] == "sdpa":
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale)
    return lambda: torch.ops.distr.attention(  # type: ignore[no-any-return]
        q,
        k,
        v,
        scale=scale,
        is_causal=is_causal,
        rank=cell["width"] // cell["group_size"],
        estimator=cell["estimator"],
        grouping_block=cell["grouping_block"],
    )


def time_calls(device: str, run: Callable[[], Tensor], budget_s: float = 1.0) -> list[float]:
    """Milliseconds of single calls: 5 at least, then as many as fit the budget, 100 at most."""

    def once() -> float:
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start)

    for _ in range(3):
        once()
    times: list[float] = []
    while len(times) < 5 or (len(times) < 100 and sum(times) < 1e3 * budget_s):
        times.append(once())
    return times


def write(path: Path, data: dict[str, Any]) -> None:
    """Whole or not at all: a run may be cut short at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


if __name__ == "__main__":
    sys.exit(main())
