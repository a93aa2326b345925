"""Section 4.8: which share of a whole call goes into making the groups.

    python -m benchmarks.paper.grouping_share

d = 128 and one head, as in the paper; there on a GPU, where the launch of kernels counts most. The
two take turns: A and B of the call alone, and the call, which multiplies by them too.
"""

from __future__ import annotations

import statistics
from functools import partial

import torch

from benchmarks.cpu_kernel import measure
from benchmarks.paper.attention_calls import Calls, drawn
from benchmarks.paper.script import NOT_MEASURED, Cells, Script, markdown
from benchmarks.store import Cell
from distr_compile.estimators import arithmetic, auto_grouping_block
from distr_compile.kernels.attention import cpu as kernel
from distr_compile.kernels.roles import Asked
from distr_compile.lowering import cpu as lowering
from distr_compile.lowering.call import call_of

WIDTH = 128
PUBLISHED = {2048: (0.14, 74.8), 4096: (0.14, 37.8), 20480: (0.15, 4.1), 40960: (0.15, 1.3)}
"""N -> milliseconds of grouping, percent of the whole."""
QUICK_LENGTHS = (64, 128)
SETTINGS = (("lsh-sample", 2), ("projection", 2), ("projection", 4))


def cells(quick: bool) -> Cells:
    lengths = QUICK_LENGTHS if quick else tuple(PUBLISHED)
    return {f"N={n}": partial(cell, n) for n in lengths}


@torch.inference_mode()
def cell(tokens: int) -> Cell:
    rounds = 5 if tokens <= 4096 else 3 if tokens <= 20480 else 1
    found: Cell = {"ms": {}, "percent": {}}
    for name, group_size in SETTINGS:
        times = measure(calls(tokens, name, WIDTH // group_size), rounds, 0.02)
        title = f"{name}, G={group_size}"
        found["ms"][title] = {of: [1e3 * s for s in seconds] for of, seconds in times.items()}
        pairs = zip(times["grouping"], times["whole"], strict=True)
        found["percent"][title] = [100 * a / b for a, b in pairs]
    return found


def calls(tokens: int, estimator: str, rank: int) -> Calls:
    """The two arms of one estimator: A and B alone, and the call."""
    q, k, v = drawn(tokens, WIDTH, heads=1)
    out = torch.empty_like(v)
    module = arithmetic(estimator, "cpu", "groups")
    asked = Asked(estimator, rank, auto_grouping_block(tokens, estimator))
    call = call_of(q, k, v, rank=rank, estimator=estimator, scale=WIDTH**-0.5, out=out)
    return {
        "grouping": lambda: list(module.groups(q[:, :, None], k, None, None, asked)),
        "whole": lambda: lowering.run(call, fused=kernel.available(q.dtype)),
    }


def table(found: dict[str, Cell]) -> str:
    rows = []
    for n, (_, percent) in PUBLISHED.items():
        c, row = found.get(f"N={n}"), [n, f"{percent} %"]
        for name, group_size in SETTINGS:
            shares = c["percent"][f"{name}, G={group_size}"] if c else []
            row.append(
                f"{statistics.median(shares):.1f} % ({min(shares):.1f} to {max(shares):.1f})"
                if shares
                else NOT_MEASURED
            )
        rows.append([*row, f"{c['load']:.1f}" if c else NOT_MEASURED])
    header = [f"{name}, G = {g}" for name, g in SETTINGS]
    return markdown(rows, ["N", "paper", *header, "load"])


SCRIPT = Script("grouping_share", "Section 4.8: share of grouping", cells, table)

if __name__ == "__main__":
    SCRIPT.main()
