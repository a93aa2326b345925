"""What "auto" decides, held against the times of a second measurement, over a grid of calls.

    python -m benchmarks.auto [--threads 1] [--seconds 0.1] [--grid full|quick] [--json PATH]

For each call "auto" decides as in a compile, with at most 2 s, in a folder of its own. Then SDPA,
our exact kernel and the approximation (``projection``, G = 2) take turns anew, on the whole call.
A line says what was decided and the speed of that over the better of SDPA and our exact kernel: 1
is as good as knowing. It also says how far the times of the slice, scaled, are from the whole's.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from benchmarks import cpu_kernel
from distr_compile.lowering import measure as measuring
from distr_compile.lowering import stored
from distr_compile.lowering.call import Approximation, Shape
from distr_compile.lowering.judge import Judge
from distr_compile.lowering.measure import DISTR, EXACT, SDPA, Measured

WIDTHS = (32, 64, 80, 128)
LENGTHS = (197, 512, 1024, 4096)
DTYPES = (torch.float32, torch.bfloat16)
KINDS = ("full", "causal", "key padding", "bias")
QUICK = {"widths": (64, 128), "lengths": (197, 1024, 4096), "kinds": ("full", "causal")}

ROUNDS = 7


def shape_of(dtype: torch.dtype, d: int, tokens: int, kind: str) -> Shape:
    """4 heads as a model leaves them in memory, tokens before heads."""
    mask = {
        "key padding": ((1, 1, 1, tokens), torch.bool),
        "bias": ((1, 4, tokens, tokens), dtype),
    }.get(kind)
    return Shape(
        *(1, 4, 4, tokens, tokens, d, d),
        is_causal=kind == "causal",
        mask=mask,
        dtype=dtype,
        device=torch.device("cpu"),
        order=((0, 2, 1, 3),) * 3,
    )


def again(shape: Shape, approximation: Approximation, seconds: float) -> dict[str, list[float]]:
    """Seconds of the whole call by each candidate, in turn."""
    with measuring.undisturbed(shape):
        arms = measuring.arms(shape, approximation, shape.num_key_heads)
        return cpu_kernel.measure(arms, ROUNDS, seconds)


def cell(shape: Shape, kind: str, seconds: float) -> dict[str, Any]:
    """One line of the grid."""
    approximation = Approximation("projection", shape.head_dim // 2)
    found = Judge()(shape, approximation)
    chosen = SDPA
    if isinstance(found, Measured):
        chosen = DISTR if found.prefers_distr else EXACT if found.prefers_ours else SDPA
    else:
        exact = Judge()(shape, None)
        if isinstance(exact, Measured) and exact.prefers_ours:
            chosen = EXACT
    times = again(shape, approximation, seconds)
    best = [min(pair) for pair in zip(times[SDPA], times[EXACT], strict=True)]
    gain = statistics.median(b / c for b, c in zip(best, times[chosen], strict=True))
    line = {
        "dtype": str(shape.dtype)[6:],
        "d": shape.head_dim,
        "tokens": shape.num_queries,
        "kind": kind,
        "chosen": chosen,
        "why": found if isinstance(found, str) else "measured",
        "over the better exact": round(gain, 3),
        "ms": {arm: [round(1e3 * s, 3) for s in each] for arm, each in times.items()},
    }
    if isinstance(found, Measured):
        whole = {arm: statistics.median(each) for arm, each in times.items()}
        line["slice over whole"] = {
            arm: round(found.seconds[arm] / whole[arm], 3) for arm in found.seconds
        }
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.1, help="least length of a sample")
    parser.add_argument("--grid", choices=("full", "quick"), default="full")
    parser.add_argument("--json", type=Path, help="also write it; what is there is kept")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    quick = options.grid == "quick"
    kinds, widths, lengths = (
        QUICK[name] if quick else every
        for name, every in (("kinds", KINDS), ("widths", WIDTHS), ("lengths", LENGTHS))
    )
    folder = Path(tempfile.mkdtemp(prefix="distr_auto_"))
    stored.folder = lambda: folder
    done = _kept(options.json)
    for dtype in DTYPES:
        for kind in kinds:
            for d in widths:
                for tokens in lengths:
                    key = f"{str(dtype)[6:]}, {kind}, d = {d}, {tokens} tokens"
                    if key not in done:
                        done[key] = cell(shape_of(dtype, d, tokens, kind), kind, options.seconds)
                        _keep(options, done)
                    line = done[key]
                    print(f"{key}: {line['chosen']}, {line['over the better exact']}", flush=True)
    print(summary(done))


def summary(cells: dict[str, dict[str, Any]]) -> str:
    """Geometric mean and worst line of each dtype; how far slice and whole are apart."""
    rows = []
    for dtype in dict.fromkeys(line["dtype"] for line in cells.values()):
        lines = [line for line in cells.values() if line["dtype"] == dtype]
        gains = [line["over the better exact"] for line in lines]
        apart = [
            abs(math.log(ratio)) for x in lines for ratio in x.get("slice over whole", {}).values()
        ]
        mean = math.exp(statistics.mean(map(math.log, gains)))
        chosen = [line["chosen"] for line in lines]
        counts = ", ".join(f"{name} {chosen.count(name)}" for name in (SDPA, EXACT, DISTR))
        within = sum(x <= math.log(1.1) for x in apart)
        rows.append([dtype, counts, f"{mean:.3f}", min(gains), f"{within} of {len(apart)}"])
    headers = ["dtype", "chosen", "geometric mean", "worst", "slice within 10 % of whole"]
    return tabulate(rows, headers)


def _kept(path: Path | None) -> dict[str, dict[str, Any]]:
    if path is None or not path.exists():
        return {}
    cells: dict[str, dict[str, Any]] = json.loads(path.read_text("utf-8"))["cells"]
    return cells


def _keep(options: argparse.Namespace, cells: dict[str, dict[str, Any]]) -> None:
    if options.json is not None:
        text = json.dumps({**cpu_kernel.machine(options.threads), "cells": cells}, indent=1)
        options.json.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
