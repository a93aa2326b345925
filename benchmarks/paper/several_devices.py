"""Table 9: one attention scattered over several processes, as section 4.7 scatters it over GPUs.

    python -m benchmarks.paper.several_devices

Heads are dealt out by ``distr_compile.parallel.scatter_heads`` on gloo, one thread a process. The
paper has H = 480, N = 20480 and 20 heads a round; here a tenth of each, so that one process goes
through 24 rounds as one GPU of theirs does. The arms of a cell take turns. Processes that outnumber
the cores are compared with one process only, not timed.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import distr_compile
from benchmarks.paper.script import NOT_MEASURED, Cells, Script, markdown
from benchmarks.store import MEASURED, Cell
from distr_compile.parallel import scatter_heads

HEADS, TOKENS, WIDTH, HEADS_PER_ROUND = 48, 2048, 128, 2
QUICK = (6, 64, 64, 2)
PROCESSES, QUICK_PROCESSES, REPEATS = (1, 2, 4), (1, 2), 5
BLOCK = 128
PUBLISHED = {1: (1299, 846), 2: (1768, 1361), 4: (1471, 1359)}
"""GPUs -> milliseconds of FlashAttention-2 and of the paper's method."""

ARMS: dict[str, dict[str, Any]] = {
    "exact": {"group_size": 1},
    "lsh-sample": {"group_size": 2, "estimator": "lsh-sample", "grouping_block": BLOCK},
    "projection": {"group_size": 2, "estimator": "projection"},
}


def cells(quick: bool) -> Cells:
    counts = QUICK_PROCESSES if quick else PROCESSES
    sizes = QUICK if quick else (HEADS, TOKENS, WIDTH, HEADS_PER_ROUND)
    return {f"processes={n}": partial(cell, n, sizes, 1 if quick else REPEATS) for n in counts}


def cell(processes: int, sizes: tuple[int, int, int, int], repeats: int) -> Cell:
    """What the first process of so many measures."""
    if processes > (os.cpu_count() or 1):
        repeats = 0
    with tempfile.TemporaryDirectory() as folder:
        given = (processes, sizes, repeats, folder)
        if processes == 1:
            _measure(0, *given)
        else:
            mp.spawn(_measure, given, nprocs=processes)
        found: Cell = json.loads(Path(folder, "found.json").read_text())
    return found


def _measure(
    rank: int, processes: int, sizes: tuple[int, int, int, int], repeats: int, folder: str
) -> None:
    torch.set_num_threads(1)
    place = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=processes)
    heads, tokens, width, per_round = sizes
    tensors: tuple[Tensor | None, ...] = (None,) * 3
    if rank == 0:
        g = torch.Generator().manual_seed(0)
        tensors = tuple(torch.rand(1, heads, tokens, width, generator=g) for _ in range(3))

    def run(arm: str) -> Tensor | None:
        return scatter_heads(*tensors, heads_per_round=per_round, **ARMS[arm])

    off: dict[str, float] = {}
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for arm, options in ARMS.items():  # warms up, too
        out = run(arm)
        if out is not None:
            wanted = distr_compile.attention(*tensors, **options)
            off[arm] = ((out - wanted).norm() / wanted.norm()).item()
    for repeat in range(repeats):
        order = list(ARMS)[repeat % len(ARMS) :] + list(ARMS)[: repeat % len(ARMS)]
        for arm in order:
            dist.barrier()
            begin = time.perf_counter()
            run(arm)
            times[arm].append(1e3 * (time.perf_counter() - begin))
    if rank == 0:
        text = json.dumps({"off one process": off, "ms": times if repeats else {}})
        Path(folder, "found.json").write_text(text)
    dist.barrier()
    dist.destroy_process_group()


def table(found: dict[str, Cell]) -> str:
    rows = []
    for count in PROCESSES:
        flash, ours = PUBLISHED[count]
        row: list[object] = [count, flash, ours, f"{flash / ours:.2f}"]
        c = found.get(f"processes={count}")
        times = c["ms"] if c else {}
        for arm in ARMS:
            row.append(f"{statistics.median(times[arm]):.0f}" if times else NOT_MEASURED)
        for arm in list(ARMS)[1:]:
            row.append(_ratios(times["exact"], times[arm]) if times else NOT_MEASURED)
        row.append(f"{max(c['off one process'].values()):.1g}" if c else NOT_MEASURED)
        rows.append([*row, f"{c['load']:.1f}" if c else NOT_MEASURED])
    header = ["devices", "paper, Flash2, ms", "ours, ms", "ratio"]
    header += [f"here, {arm}, ms" for arm in ARMS]
    header += [f"{arm} over exact" for arm in list(ARMS)[1:]]
    return markdown(rows, [*header, "off one process", "load"])


def _ratios(exact: list[float], other: list[float]) -> str:
    ratios = [a / b for a, b in zip(exact, other, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


SCRIPT = Script(
    "several_devices",
    "Table 9: heads scattered over several processes",
    cells,
    table,
    (*MEASURED, "distr_compile/parallel.py"),
)

if __name__ == "__main__":
    SCRIPT.main()
