"""What is measured in which order, in a process that ``gpu.py`` starts, watches and may kill."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks import arms, both_ways, cells, compile_ahead, measure, smoke, triton_cache
from benchmarks.cells import Cell
from benchmarks.compile_ahead import Pool
from benchmarks.session import Job, Measured, Session
from distr_compile.lowering.architecture import architecture

SHORT = {"first": 200.0, "second": 380.0}
"""Stages that have all of their results in one file, and the seconds that each takes at most."""

FIRST_ARMS = (
    "sdpa flash",
    "sdpa cudnn",
    arms.EXACT,
    *(name for name in arms.ESTIMATED if not name.startswith("lsh")),
    "lsh-mean G=2",
)
FINALISTS = ("sdpa flash", "sdpa cudnn", "calibrated G=2", "projection G=2")
ESTIMATORS = ("projection", "calibrated", "lsh-mean")


def first(session: Session) -> Iterator[Job]:
    """What decides how to go on: does it run, is it right, how fast is it, which tile, and why."""
    yield from _small_calls(session)
    big, *others = cells.short_run(session.device, cells.FIRST)
    yield from _attention(session, "first", [big], FIRST_ARMS, sustained=FINALISTS)
    narrower, *more = cells.first_tiles(session.device)
    yield from _tiles(session, "first", [narrower])
    yield from _launches(session, "first", [big, *others])
    yield from _attention(session, "first", others, FIRST_ARMS)
    yield from _tiles(session, "first", more)


def _small_calls(session: Session) -> Iterator[Job]:
    """Every small call; what fails, by pointers once more; if that helps, all that follows too."""
    cases = smoke.cases(session.device)
    for case in cases:
        yield "first", f"smoke: {case.name}", partial(measure.small_calls, session, case)
    failed = [case for case in cases if not _is_right(session, case)]
    again = [replace(c, name=f"{c.name}, by pointers", by_pointers=True) for c in failed]
    for case in again:
        yield "first", f"smoke: {case.name}", partial(measure.small_calls, session, case)
    session.by_pointers |= any(_is_right(session, case) for case in again)


def _is_right(session: Session, case: smoke.Case) -> bool:
    cell = session.store("first").current().get(f"smoke: {case.name}", {})
    return bool(cell.get("arms", {}).get(case.name, {}).get("is_right"))


def second(session: Session) -> Iterator[Job]:
    """Everything else that one wants to know before a third run."""
    shapes = cells.short_run(session.device, cells.SECOND)
    yield from _attention(session, "second", shapes, (*FIRST_ARMS, arms.DEFAULT))
    yield from _launches(session, "second", cells.short_run(session.device, cells.PAPER))
    yield "second", "host", partial(measure.host, session)
    (flexible,) = cells.short_run(session.device, cells.FIRST[:1])
    names = ("sdpa flash", "calibrated G=2", "projection G=2", arms.FLEX)
    job = partial(measure.attention, session, flexible, seconds=2.0, with_flex=True, only=names)
    yield "second", f"attention: {flexible.key}, FlexAttention", job


def _attention(
    session: Session,
    file: str,
    shapes: list[Cell],
    only: tuple[str, ...],
    sustained: tuple[str, ...] = (),
) -> Iterator[Job]:
    for cell in shapes:
        options = {"seconds": 3.0, "only": only, "sustained": sustained}
        yield file, f"attention: {cell.key}", partial(measure.attention, session, cell, **options)


def _tiles(session: Session, file: str, tried: list[tuple[Cell, int]]) -> Iterator[Job]:
    name = architecture(torch.device(session.device))
    for cell, rank in tried:
        others = measure.candidates(measure.current_tile(name, cell, rank), cell.head_dim)
        key = f"{cell.key} r{rank}" if file == "tiles" else f"tiles: {cell.key} r{rank}"
        few = others if session.device == "cuda" else others[:2]
        yield file, key, partial(measure.tiles, session, cell, rank, few)


def _launches(
    session: Session, file: str, shapes: list[Cell], sizes: tuple[int, ...] = (2,)
) -> Iterator[Job]:
    for cell in shapes:
        for size in sizes:
            key = f"{cell.key} G={size}" if file == "prologue" else f"prologue: {cell.key} G={size}"
            yield file, key, partial(measure.launches, session, cell, size, ESTIMATORS)


# --- the long ones: a file for each kind of result ------------------------------------------------


def attention(
    session: Session, shapes: list[Cell], seconds: float, with_flex: bool
) -> Iterator[Job]:
    for cell in shapes:
        options = {"seconds": seconds, "with_flex": with_flex and not cell.is_causal}
        yield "attention", cell.key, partial(measure.attention, session, cell, **options)


def prologue(session: Session) -> Iterator[Job]:
    sizes = (2, 4) if session.device == "cuda" else (2,)
    yield from _launches(session, "prologue", cells.prologue(session.device), sizes)


def host(session: Session) -> Iterator[Job]:
    yield "host", "host time of a call", partial(measure.host, session)


def training(session: Session) -> Iterator[Job]:
    for cell in cells.training(session.device):
        job = partial(both_ways.measure, session, cell, seconds=4.0)
        yield "training", f"training: {cell.key}", job


def tiles(session: Session) -> Iterator[Job]:
    shapes = cells.tiles(session.device)
    tried = [(cell, cell.head_dim // size) for cell in shapes for size in (2, 4, 1)]
    yield from _tiles(session, "tiles", tried)


STAGES: dict[str, Callable[[Session], Iterator[Job]]] = {
    "first": first,
    "second": second,
    "deciding": lambda s: attention(s, cells.deciding(s.device), seconds=6.0, with_flex=True),
    "prologue": prologue,
    "host": host,
    "variants": lambda s: attention(s, cells.variants(s.device), seconds=3.0, with_flex=False),
    "training": training,
    "tiles": tiles,
    "sweep": lambda s: attention(s, cells.sweep(s.device), seconds=1.5, with_flex=False),
}
"""In the order in which they run; the ceilings come before all of them, in every run."""


# --- the process ----------------------------------------------------------------------------------


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="started by gpu.py; see session.Session")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--marker", type=Path, required=True)
    parser.add_argument("--run", required=True)
    parser.add_argument("--until", type=float, required=True)
    parser.add_argument("--stages", nargs="*", choices=list(STAGES), required=True)
    parser.add_argument("--by-pointers", action="store_true")
    options = parser.parse_args(argv)
    session = Session(options.results, options.marker, options.run, options.until)
    session.by_pointers = options.by_pointers
    short = [stage for stage in options.stages if stage in SHORT]
    file = short[0] if short else "ceilings"
    key = f"ceilings, {session.run}" if short else session.run
    compiled = f"compiling, {session.run}"
    pool = None
    if short and session.device == "cuda" and not session.store(file).is_finished(compiled):
        processes = max(1, min(compile_ahead.MAX_PROCESSES, (os.cpu_count() or 1) - 2))
        pool = Pool(short, architecture(torch.device("cuda")), processes)
    session.once |= {key, compiled}
    jobs: list[Job] = [(file, key, partial(measure.ceilings, session))]
    if pool is not None:
        jobs.append((file, compiled, partial(wait_for, session, pool)))
    if not session.work_through(jobs):
        return 0
    for name, what in session.store(file).current()[key]["arms"].items():
        if "error" not in what:
            session.ceilings[name] = what["gb_per_s" if name == "copy" else "tflops"]
    for stage in options.stages:
        if not session.work_through(STAGES[stage](session)):
            break
    return 0


def wait_for(session: Session, pool: Pool, file: str, key: str) -> Measured:
    """Wait for what is compiled ahead, and keep it for the next machine."""
    found = compile_ahead.cell(session, pool, file, key)
    triton_cache.pack(session.results)
    return found


if __name__ == "__main__":
    sys.exit(main())
