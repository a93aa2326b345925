"""Figure 9: the time of attention over N, d and G, and that of the rivals.

    python -m benchmarks.paper.attention_time

On the CPU, fp32, one head; the paper has ten on an RTX 4090 and an L40 and prints no number but
"up to 37 % faster". Arms of a cell take turns. "make gpu" measures the same on a GPU.
"""

from __future__ import annotations

import statistics
from functools import partial

import torch

from benchmarks.cpu_kernel import measure
from benchmarks.paper.attention_calls import ESTIMATORS, exact_calls, our_calls, rival_calls
from benchmarks.paper.rivals import RIVALS
from benchmarks.paper.rivals.hyper import pairs, sizes_for
from benchmarks.paper.script import NOT_MEASURED, Cells, Script, markdown
from benchmarks.store import MEASURED, Cell

WIDTHS, LENGTHS, GROUP_SIZES = (32, 64, 128), (1024, 2048, 4096, 8192), (2, 4)
QUICK = ((32, 64), (64, 128))
ARMS = (
    "SDPA",
    "exact",
    *(f"{name}, G={g}" for name in ESTIMATORS for g in GROUP_SIZES),
    *RIVALS,
)
SHARE = "Hyper's share of the scores"


def cells(quick: bool) -> Cells:
    shapes = QUICK if quick else [(d, n) for d in WIDTHS for n in LENGTHS]
    return {f"d={d}, N={n}": partial(cell, d, n, 2 if quick else 3) for d, n in shapes}


@torch.inference_mode()
def cell(d: int, tokens: int, rounds: int) -> Cell:
    calls = {
        **exact_calls(tokens, d, heads=1),
        **our_calls(tokens, d, 1, GROUP_SIZES),
        **rival_calls(tokens, d, heads=1),
    }
    times = measure(calls, rounds, 0.02)
    return {
        SHARE: pairs(tokens, sizes_for(tokens)) / tokens**2,
        "ms": {arm: [1e3 * s for s in seconds] for arm, seconds in times.items()},
        "over SDPA": {
            arm: [b / a for a, b in zip(seconds, times["SDPA"], strict=True)]
            for arm, seconds in times.items()
        },
    }


def table(found: dict[str, Cell]) -> str:
    """How many times as fast as SDPA: median, and least and greatest of the rounds."""
    rows = []
    for d, n in ((d, n) for d in WIDTHS for n in LENGTHS):
        c = found.get(f"d={d}, N={n}")
        row: list[object] = [
            d,
            n,
            f"{statistics.median(c['ms']['SDPA']):.1f}" if c else NOT_MEASURED,
        ]
        for arm in ARMS[1:]:
            ratios = c["over SDPA"].get(arm) if c else None
            row.append(_spread(ratios) if ratios else "-" if c else NOT_MEASURED)
        share = f"{c[SHARE]:.1%}" if c else NOT_MEASURED
        rows.append([*row, share, f"{c['load']:.1f}" if c else NOT_MEASURED])
    return markdown(rows, ["d", "N", "SDPA, ms", *ARMS[1:], SHARE, "load"])


def _spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


SCRIPT = Script(
    "attention_time",
    "Figure 9: speed over SDPA on this CPU",
    cells,
    table,
    (*MEASURED, "benchmarks/paper/rivals", "benchmarks/paper/attention_calls.py"),
)

if __name__ == "__main__":
    SCRIPT.main()
