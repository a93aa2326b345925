"""Attention on a CPU by what people turn to for it, beside ours: whole calls, in turn in one run.

    python -m benchmarks.peers [--grid full|quick] [--threads 1] [--rounds 7] [--seconds 0.2]
        [--json PATH] [--dtypes ...] [--kinds ...] [--widths ...] [--tokens ...]

Who is compared stands in ``peer_calls.py``. A peer that is not there, refuses, or errs too much is
written down with the reason. With ``--json`` a cell that the file has of the same machine, versions
and settings is not measured again: a grid that was cut short goes on.

The output of an arm is checked before it is timed, on eight rows against the definition in fp64: it
may err by ``FACTOR`` times what the same formula errs in the dtype of the inputs, and a
rounding (``arms.errors``).
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from tabulate import tabulate
from tqdm import tqdm

from benchmarks import bars, cpu_kernel
from benchmarks.arms import Inputs, errors, make_inputs
from benchmarks.cells import Cell
from benchmarks.peer_calls import ARMS, RANK_D, RUNTIMES, SDPA, Arm, Call
from benchmarks.store import MEASURED, ROOT, Store, describe, version
from distr_compile.kernels.attention import cpu

HEADS = {197: 16, 512: 8, 1024: 8, 4096: 2, 16384: 1}
"""Query heads by tokens, so that no call takes much longer than a sample should."""

KINDS = {
    "full": {},
    "causal": {"is_causal": True},
    "padding": {"mask": "padding"},
    "bias": {"mask": "bias"},
}
"""Fields of a cell."""

WIDTHS = (32, 64, 80, 128)

QUICK = {"kinds": ("full", "causal"), "widths": (64, 128), "tokens": (1024, 4096)}
"""Ten minutes on one core that is not asked for anything else."""

OURS = (RANK_D, "projection G=2")
"""Held against the better of the other runtimes in the table."""

DTYPES = list(cpu_kernel.DTYPES)

PACKAGES = ("torch", "onnx", "onnxruntime", "openvino", "numpy")

FACTOR = 8
"""An arm may err by this times the error of the same formula in the dtype of the inputs.

More than ``arms.FACTOR``, since libraries differ in how many numbers they add up one after another:
FlexAttention's fp32 sums erred by six times as much at 4096 tokens.
"""

SOURCES = (
    *MEASURED,
    *sorted(
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "distr_compile/kernels/attention").iterdir()
        if path.suffix in (".cpp", ".h")
    ),
)
"""What a result of ours depends on."""


# --- measuring ------------------------------------------------------------------------------------


def checked(arm: Arm, cell: Cell, inputs: Inputs, threads: int) -> tuple[Call | None, Any]:
    """A call whose output is right, with its error; or None, with the reason."""
    try:
        call = arm.make(cell, inputs, threads)
        call.run()
        wanted = arm.wanted(cell, inputs)
        found = errors(wanted, call.output(), scale=cell.scale, factor=FACTOR)
    except ModuleNotFoundError as error:
        return None, {"reason": f"not installed: {error.name}"}
    except Exception as error:
        text = str(error).strip().partition("\n")[0]
        return None, {"reason": f"{type(error).__name__}: {text}"}
    if not found["is_right"]:
        error, allowed = found["max_error"], found["allowed_error"]
        return None, {"reason": f"errs by {error:.2g}, at most {allowed:.2g} is allowed"}
    return call, {name: found[name] for name in ("max_error", "allowed_error")}


def measure(
    cell: Cell, threads: int, rounds: int, least_s: float, arms: dict[str, Arm] = ARMS
) -> dict[str, Any]:
    """All arms of a cell: error and milliseconds of every round, or the reason for none."""
    torch._dynamo.reset()  # after a few shapes it would compile for any, or no more
    inputs = make_inputs(cell, "cpu")
    before = os.getloadavg()[0]
    found = {
        name: checked(arm, cell, inputs, threads) for name, arm in arms.items() if arm.takes(cell)
    }
    calls = {name: call.run for name, (call, _) in found.items() if call is not None}
    told = {name: facts for name, (_, facts) in found.items()}
    for name, seconds in cpu_kernel.measure(calls, rounds, least_s).items():
        told[name]["ms"] = [1e3 * s for s in seconds]
    return {
        "dtype": cell.dtype,
        "head_dim": cell.head_dim,
        "tokens": cell.tokens,
        "heads": cell.heads,
        "kind": kind_of(cell),
        "date": time.strftime("%Y-%m-%d"),
        "load": [before, os.getloadavg()[0]],
        "arms": told,
    }


def kind_of(cell: Cell) -> str:
    """A key of ``KINDS``."""
    return "causal" if cell.is_causal else {"none": "full"}.get(cell.mask, cell.mask)


def environment(threads: int, rounds: int, least_s: float) -> dict[str, str]:
    """What the results depend on: machine, versions, our sources, settings."""
    machine = cpu_kernel.machine(threads)
    del machine["date"]  # a cell has its own
    sources = describe("cpu", SOURCES)
    return {
        **{name: " ".join(v) if isinstance(v, list) else str(v) for name, v in machine.items()},
        **{package: version(package) for package in PACKAGES},
        "kernel": cpu.unavailable_reason() or "available",
        "sampling": f"{rounds} rounds of {least_s} s",
        "sources": sources["sources"],
        "commit": sources["commit"],
    }


# --- what is made of it ---------------------------------------------------------------------------


def times(cell: dict[str, Any]) -> dict[str, list[float]]:
    """The samples of the arms that have any."""
    return {name: arm["ms"] for name, arm in cell["arms"].items() if "ms" in arm}


def better_runtime(cell: dict[str, Any]) -> str | None:
    """Which of ONNX Runtime and OpenVINO has the lower median here."""
    measured = times(cell)
    return min(
        (name for name in RUNTIMES if name in measured),
        key=lambda name: statistics.median(measured[name]),
        default=None,
    )


def speed(cell: dict[str, Any], arm: str, over: str | None) -> float | None:
    """Median over rounds of how many times as fast ``arm`` is; None where one was not measured."""
    measured = times(cell)
    if over is None or not {arm, over} <= measured.keys():
        return None
    return cpu_kernel.ratio(measured, arm, over)


def table(cells: list[dict[str, Any]]) -> str:
    """A row a cell: speed over SDPA, then ours over the better of the two other runtimes."""
    names = [name for name in ARMS if name != SDPA]
    rows = []
    for cell in cells:
        better = better_runtime(cell)
        ratios = [speed(cell, name, SDPA) for name in names]
        ratios += [speed(cell, name, better) for name in OURS]
        shape = [cell["dtype"], cell["head_dim"], cell["tokens"], cell["kind"]]
        rows.append([*shape, *("-" if r is None else f"{r:.2f}" for r in ratios), better or "-"])
    header = ["dtype", "d", "N", "kind", *names, *(f"{name} / runtime" for name in OURS), "runtime"]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)


def refusals(cells: list[dict[str, Any]]) -> list[str]:
    """A line for every reason why an arm has no time, with the cells that it holds for."""
    where: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        for name, arm in cell["arms"].items():
            if "reason" in arm:
                shape = f"{cell['dtype']} d={cell['head_dim']} N={cell['tokens']} {cell['kind']}"
                where.setdefault((name, arm["reason"]), []).append(shape)
    return [f"{name}: {reason} ({', '.join(at)})" for (name, reason), at in where.items()]


def timed(cell: dict[str, Any]) -> bars.Timed:
    """A cell for the bars."""

    def over(arm: str, other: str) -> float | None:
        return speed(cell, arm, better_runtime(cell) if other == bars.RUNTIME else other)

    return bars.Timed(cell["dtype"], cell["head_dim"], cell["tokens"], cell["kind"], over)


def grid(options: argparse.Namespace) -> list[Cell]:
    """The cells that are asked for, the longest ones last."""
    quick = QUICK if options.grid == "quick" else {}
    kinds, widths, tokens = (
        getattr(options, name) or quick.get(name, every)
        for name, every in (("kinds", KINDS), ("widths", WIDTHS), ("tokens", HEADS))
    )
    axes = itertools.product(sorted(tokens), kinds, widths, options.dtypes)
    return [Cell(1, HEADS[n], HEADS[n], n, d, dtype, **KINDS[kind]) for n, kind, d, dtype in axes]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="attention on a CPU: others beside ours")
    parser.add_argument("--grid", choices=("full", "quick"), default="full")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.2, help="least length of a sample")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="instead of the grid's")
    parser.add_argument("--widths", type=int, nargs="+", help="instead of the grid's")
    parser.add_argument("--tokens", type=int, nargs="+", choices=HEADS, help="likewise")
    parser.add_argument("--json", type=Path, help="results, to be written or gone on with")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    told = environment(args.threads, args.rounds, args.seconds)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        store = Store(args.json or Path(folder) / "peers.json", told)
        shown = []
        progress = tqdm(grid(args), unit="cell", smoothing=0)
        for cell in progress:
            progress.set_postfix_str(cell.key)
            if not store.is_finished(cell.key):
                store.put(cell.key, measure(cell, args.threads, args.rounds, args.seconds))
            shown.append(store.cells[cell.key])
    print(table(shown), *refusals(shown), sep="\n")
    print(tabulate(bars.held(map(timed, shown)), bars.HEADER))


if __name__ == "__main__":
    main()
