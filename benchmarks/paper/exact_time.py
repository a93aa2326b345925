"""Table 1: the time of exact attention over N and d.

    python -m benchmarks.paper.exact_time

The paper runs FlashAttention-2 on an RTX 4090; here PyTorch's CPU kernel and ours, two heads. The
widths take turns in one run, so that the ratio of their times is free of the load.
"""

from __future__ import annotations

import statistics
from functools import partial

import torch

from benchmarks.cpu_kernel import measure, ratio
from benchmarks.paper.attention_calls import exact_calls
from benchmarks.paper.script import NOT_MEASURED, Cells, Script, markdown
from benchmarks.store import Cell

LENGTHS, WIDTHS = (1024, 2048, 4096, 8192), (128, 64)
QUICK_LENGTHS = (64, 128)
PUBLISHED = {
    128: {1024: 0.86, 2048: 3.19, 4096: 12.27, 8192: 49.46},
    64: {1024: 0.76, 2048: 2.66, 4096: 10.25, 8192: 40.06},
}
"""d -> N -> what Table 1 says, in microseconds by its caption and milliseconds by the text."""


def cells(quick: bool) -> Cells:
    lengths = QUICK_LENGTHS if quick else LENGTHS
    return {f"N={n}": partial(cell, n, 2 if quick else 5) for n in lengths}


@torch.inference_mode()
def cell(tokens: int, rounds: int) -> Cell:
    calls = {
        f"{name}, d={d}": call
        for d in WIDTHS
        for name, call in exact_calls(tokens, d, heads=2).items()
    }
    times = measure(calls, rounds, 0.02)
    return {
        "ms": {name: [1e3 * s for s in seconds] for name, seconds in times.items()},
        "d=128 over d=64": {
            name: ratio(times, f"{name}, d=64", f"{name}, d=128") for name in ("SDPA", "exact")
        },
    }


def table(found: dict[str, Cell]) -> str:
    rows = []
    for n in LENGTHS:
        wide, narrow = (PUBLISHED[d][n] for d in WIDTHS)
        row: list[object] = [n, wide, narrow, f"{wide / narrow:.2f}"]
        c = found.get(f"N={n}")
        for name in ("SDPA", "exact"):
            if c is None:
                row += [NOT_MEASURED] * 3
                continue
            for d in WIDTHS:
                row.append(f"{statistics.median(c['ms'][f'{name}, d={d}']):.1f}")
            row.append(f"{c['d=128 over d=64'][name]:.2f}")
        rows.append([*row, f"{c['load']:.1f}" if c else NOT_MEASURED])
    header = ["N", "paper, d = 128", "d = 64", "ratio"]
    for name in ("SDPA", "our exact kernel"):
        header += [f"{name}, d = 128, ms", "d = 64, ms", "ratio"]
    return markdown(rows, [*header, "load"])


SCRIPT = Script("exact_time", "Table 1: exact attention over d", cells, table)

if __name__ == "__main__":
    SCRIPT.main()
