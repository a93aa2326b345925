"""Time of the fused CPU kernel beside ``F.scaled_dot_product_attention``, whole calls.

    python -m benchmarks.cpu_kernel [--threads 1] [--rounds 7] [--json PATH] [--quick]

The arms of a cell run in turn, a sample of at least 0.2 s each, so that other work on the machine
slows all of them; ratios are taken within a round. A call of ours includes packing and, where it
approximates, the estimator's prologue. Inputs lie in memory as models leave them, tokens before
heads. The machine's peak is that of multiplications and additions in registers, in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

from benchmarks import bars
from distr_compile.kernels.attention import build, cpu
from distr_compile.lowering import cpu as lowering
from distr_compile.lowering import cpu_fused
from distr_compile.lowering.call import call_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

CELLS = [
    # head width, tokens, heads, causal
    (64, 1024, 8, False),
    (64, 4096, 2, False),
    (128, 1024, 4, False),
    (128, 4096, 2, False),
    (128, 4096, 2, True),
    (128, 16384, 1, False),
]
QUICK_CELLS = [cell for cell in CELLS if cell[1] <= 4096]


def arms(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> dict[str, Callable[[], object]]:
    heads, d = q.shape[1], q.shape[3]
    out = torch.empty(q.shape[0], q.shape[2], heads, d, dtype=q.dtype).transpose(1, 2)
    common: dict[str, Any] = {"scale": d**-0.5, "is_causal": causal, "out": out}
    basis = torch.randn(heads, d, d // 2) * d**-0.5

    def approximate(group_size: int, estimator: str, **more: Any) -> Callable[[], object]:
        options = {"rank": d // group_size, "estimator": estimator, **more, **common}
        ready = call_of(q, k, v, **options)
        return lambda: lowering.run(ready, fused=True)

    exact = call_of(q, k, v, **common)
    calls: dict[str, Callable[[], object]] = {
        "SDPA": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal),
        "rank d": lambda: cpu_fused.exact_attention(exact),
        "projection G=2": approximate(2, "projection"),
        "projection G=4": approximate(4, "projection"),
        "calibrated G=2": approximate(2, "calibrated", bases=(basis, basis)),
    }
    if causal:
        calls["strict projection G=2"] = approximate(2, "projection", strict=True)
    return calls


def measure(calls: dict[str, Callable[[], object]], rounds: int, least_s: float) -> dict[str, Any]:
    """Seconds per call of each arm, one per round; arms in turn."""
    repeats = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, round(least_s / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return times


def ratio(times: dict[str, list[float]], arm: str, over: str) -> float:
    return statistics.median(b / a for a, b in zip(times[arm], times[over], strict=True))


def peak(dtype: str, seconds: float = 0.2) -> float:
    """GFLOP/s of one thread on this machine, in the middle of its present load."""
    rounds, run = 1 << 20, cpu.library().handle.distr_peak
    best = 0.0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        done = run(dtype == "bfloat16", rounds)
        best = max(best, done / (time.perf_counter() - start) / 1e9)
    return best


def cell(
    dtype: str, d: int, tokens: int, heads: int, causal: bool, rounds: int, least_s: float
) -> dict[str, Any]:
    shape = (1, tokens, heads, d)
    q, k, v = (torch.randn(shape).to(DTYPES[dtype]).transpose(1, 2) for _ in range(3))
    load = os.getloadavg()[0]
    times = measure(arms(q, k, v, causal=causal), rounds, least_s)
    flops = 4 * heads * tokens**2 * d / (2 if causal else 1)
    return {
        "dtype": dtype, "d": d, "tokens": tokens, "heads": heads, "causal": causal, "load": load,
        "ms": {arm: [round(1e3 * s, 3) for s in seconds] for arm, seconds in times.items()},
        "over SDPA": {arm: round(ratio(times, arm, "SDPA"), 3) for arm in times},
        "over rank d": {arm: round(ratio(times, arm, "rank d"), 3) for arm in times},
        "peak GFLOP/s": round(peak(dtype), 1),
        "rank d GFLOP/s": round(flops / statistics.median(times["rank d"]) / 1e9, 1),
    }  # fmt: skip


def timed(cell: dict[str, Any]) -> bars.Timed:
    """A cell for the bars; other runtimes have no time here."""

    def over(arm: str, other: str) -> float | None:
        ratio: float | None = cell.get(f"over {other}", {}).get(arm)
        return ratio

    kind = "causal" if cell["causal"] else "full"
    return bars.Timed(cell["dtype"], cell["d"], cell["tokens"], kind, over)


def machine(threads: int) -> dict[str, Any]:
    model = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    compiler, version = build.compiler()
    return {
        "cpu": model[0] if model else platform.processor(),
        "features": build.cpu_features(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "compiler": f"{compiler}: {version.splitlines()[0]}",
        "flags": list(build.compiler_flags()),
        "threads": threads,
        "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="The fused CPU kernel beside SDPA")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.2, help="least length of a sample")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--quick", action="store_true", help="without 16384 tokens")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    reason = cpu.unavailable_reason()
    if reason is not None:
        raise SystemExit(f"the CPU kernel is not available: {reason}")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    cells = []
    for dtype in args.dtypes:
        for d, tokens, heads, causal in QUICK_CELLS if args.quick else CELLS:
            cells.append(cell(dtype, d, tokens, heads, causal, args.rounds, args.seconds))
            print(json.dumps({k: v for k, v in cells[-1].items() if k != "ms"}), flush=True)
    print(tabulate(bars.held(map(timed, cells)), bars.HEADER))
    if args.json:
        args.json.write_text(json.dumps({**machine(args.threads), "cells": cells}, indent=1) + "\n")


if __name__ == "__main__":
    main()
