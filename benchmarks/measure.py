"""Measures cell by cell, in a process of its own that ``gpu.py`` starts, watches and may kill."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import arms, cells, timing
from benchmarks.cells import Cell
from benchmarks.session import Job, Measured, Session
from distr_compile.estimators import auto_grouping_block
from distr_compile.kernels.attention.triton_fwd import Tile, attention_fwd
from distr_compile.kernels.lsh.launch import lsh_factors
from distr_compile.kernels.projection.launch import projection_factors
from distr_compile.lowering import cuda, op  # noqa: F401  (op registers itself)
from distr_compile.lowering.architecture import architecture
from distr_compile.lowering.tiles import tile_for

# --- ceilings -----------------------------------------------------------------------------------


def ceilings(session: Session) -> Iterator[Job]:
    yield "ceilings", session.run, partial(measure_ceilings, session)


def measure_ceilings(session: Session, key: str) -> Measured:
    """What the device can do: copy memory, multiply matrices of random numbers."""
    is_cuda = session.device == "cuda"
    size = 8192 if is_cuda else 256
    source = torch.empty(
        (4 << 30) if is_cuda else (4 << 20), dtype=torch.int8, device=session.device
    )
    source.random_()
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], Any]] = {"copy": lambda: target.copy_(source)}
    work = {"copy": 2 * source.numel() / 1e6}
    for dtype in ("float16", "bfloat16") if is_cuda else ("float16", "float32"):
        shape = (2, size, size)
        a, b = torch.randn(shape, device=session.device, dtype=getattr(torch, dtype))
        calls[f"matmul {dtype}"] = partial(torch.matmul, a, b)
        work[f"matmul {dtype}"] = 2 * size**3 / 1e9
    found = session.compare("ceilings", key, calls, seconds=2.0)
    for name, what in found.items():
        what["gb_per_s" if name == "copy" else "tflops"] = work[name] / what["median_ms"]
    return {"matmul_size": size, "copy_bytes": source.numel(), "arms": found}


def rates(session: Session, cell: Cell, flops: float, ms: float) -> Measured:
    """A time, beside the work done and the ceilings measured in this run."""
    peak, bandwidth = session.ceilings[f"matmul {cell.dtype}"], session.ceilings["copy"]
    floor_ms = max(flops / (1e9 * peak), cell.bytes / (1e6 * bandwidth))
    done = flops / (1e9 * ms)
    return {
        "exact_tflops": cell.exact_flops / (1e9 * ms),
        "done_tflops": done,
        "percent_of_peak": 100 * done / peak,
        "floor_ms": floor_ms,
        "fraction_of_floor": floor_ms / ms,
    }


# --- attention ----------------------------------------------------------------------------------


def attention(
    session: Session, shapes: list[Cell], seconds: float, with_flex: bool
) -> Iterator[Job]:
    for cell in shapes:
        yield "attention", cell.key, partial(measure_attention, session, cell, seconds, with_flex)


def measure_attention(
    session: Session, cell: Cell, seconds: float, with_flex: bool, key: str
) -> Measured:
    """All ways to compute one shape, against each other."""
    inputs = arms.make_inputs(cell, session.device)
    table = arms.make_arms(cell, inputs, with_flex=with_flex)

    def check(name: str, out: Tensor) -> Measured:
        arm = table[name]
        told = {"picked": arms.picked(cell, inputs)} if name == arms.DEFAULT else {}
        sampled = arms.samples(cell, inputs, arm.rank, arm.estimator)
        return {**told, **arms.errors(sampled, out, scale=cell.scale)}

    calls = {name: arm.call for name, arm in table.items()}
    found = session.compare("attention", key, calls, seconds=seconds, check=check)
    for name, what in found.items():
        if "error" not in what:
            what.update(
                rates(
                    session,
                    cell,
                    cell.flops(table[name].rank, table[name].estimator),
                    what["median_ms"],
                )
            )
    return {**asdict(cell), "run": session.run, "arms": found}


# --- prologue and host --------------------------------------------------------------------------


def prologue(session: Session) -> Iterator[Job]:
    for cell in cells.prologue(session.device):
        for group_size in (2, 4):
            measure = partial(measure_prologue, session, cell, cell.head_dim // group_size)
            yield "prologue", f"{cell.key} G={group_size}", measure


def measure_prologue(session: Session, cell: Cell, rank: int, key: str) -> Measured:
    """Making Qhat and Khat alone, the attention after it alone, and the whole call.

    For the default estimator, and for ``projection`` beside it.
    """
    inputs = arms.make_inputs(cell, session.device)
    q, k, v = inputs.q, inputs.k, inputs.v
    out = torch.empty_like(q)
    calls: dict[str, Callable[[], Any]] = {}
    makers = {
        "lsh-mean": partial(lsh_factors, estimator="lsh-mean"),
        "projection": projection_factors,
    }
    suffixes = {"lsh-mean": "", "projection": ", projection"}
    for estimator, suffix in suffixes.items():
        block = auto_grouping_block(cell.tokens, estimator)
        size: dict[str, Any] = {"rank": rank, "grouping_block": block}
        make = partial(makers[estimator], q, k, **size, seed=0)
        calls[f"prologue{suffix}"] = make
        calls[f"attention{suffix}"] = partial(
            attention_fwd,
            *make(),
            v,
            scale=cell.scale,
            grouping_block=block,
            tile=current_tile(session, cell, rank),
            out=out,
        )
        calls[f"whole{suffix}"] = partial(
            cuda.attention, q, k, v, scale=cell.scale, estimator=estimator, **size, out=out
        )
    found = session.compare("prologue", key, calls)
    measured = {**asdict(cell), "rank": rank, "run": session.run, "arms": found}
    for suffix in suffixes.values():
        part, whole = found[f"prologue{suffix}"], found[f"whole{suffix}"]
        if "error" not in part and "error" not in whole:
            measured[f"prologue_percent{suffix}"] = 100 * part["median_ms"] / whole["median_ms"]
    return measured


def host(session: Session) -> Iterator[Job]:
    yield "host", "host time of a call", partial(measure_host, session)


def measure_host(session: Session, key: str) -> Measured:
    """Time of the host per call, on a shape that takes the device almost no time."""
    cell = Cell(1, 2, 2, 64, 64)
    inputs = arms.make_inputs(cell, session.device)
    q, k, v = inputs.q, inputs.k, inputs.v
    table = arms.make_arms(cell, inputs, with_flex=False)
    options = {"scale": cell.scale, "estimator": "lsh-mean", "grouping_block": 0}
    calls: dict[str, Callable[[], Any]] = {
        "sdpa": lambda: F.scaled_dot_product_attention(q, k, v),
        "op, exact": lambda: torch.ops.distr.attention(q, k, v, rank=64, **options),
        "op, G=2": lambda: torch.ops.distr.attention(q, k, v, rank=32, **options),
        "kernels, rank d": table[arms.EXACT].call,
        "kernels, G=2": table["lsh-mean G=2"].call,
    }
    found = session.first_calls("host", key, calls)
    alive = {name: calls[name] for name, what in found.items() if "error" not in what}
    repeats, rounds = (100, 20) if session.device == "cuda" else (1, 3)
    times = timing.time_host(session.device, alive, repeats=repeats, rounds=rounds)
    for name, us in times.items():
        found[name].update(timing.summary(us, "us"))
    return {**asdict(cell), "run": session.run, "arms": found}


# --- tiles --------------------------------------------------------------------------------------


def tiles(session: Session) -> Iterator[Job]:
    for cell in cells.tiles(session.device):
        for group_size in (2, 4, 1):
            rank = cell.head_dim // group_size
            yield "tiles", f"{cell.key} r{rank}", partial(measure_tiles, session, cell, rank)


def measure_tiles(session: Session, cell: Cell, rank: int, key: str) -> Measured:
    """The attention kernel alone, with the tile of the table and with others."""
    inputs = arms.make_inputs(cell, session.device)
    block = cell.tokens
    if rank < cell.head_dim:
        block = auto_grouping_block(cell.tokens, "lsh-mean")
    blocks = -(-cell.tokens // block)
    Qhat = inputs.q[..., :rank].contiguous()
    Khat = torch.randn(
        (cell.batch, cell.heads, blocks, cell.tokens, rank), dtype=Qhat.dtype, device=session.device
    )
    out = torch.empty_like(inputs.q)

    def call(tile: Tile) -> Callable[[], Tensor]:
        def run() -> Tensor:
            attention_fwd(
                Qhat,
                Khat,
                inputs.v,
                scale=cell.scale,
                is_causal=cell.is_causal,
                grouping_block=block,
                tile=tile,
                out=out,
            )
            return out

        return run

    def samples() -> Iterator[arms.Sample]:
        for row in torch.linspace(0, cell.tokens - 1, 4).long():
            seen = int(row) + 1 if cell.is_causal else cell.tokens
            yield arms.Sample(
                -1,
                cell.heads - 1,
                row[None],
                Qhat[-1, -1, row][None, None, None].double(),
                Khat[-1, -1, int(row) // block][None, None].double(),
                inputs.v[-1, -1][None, None].double(),
                torch.arange(cell.tokens)[None] < seen,
            )

    def check(name: str, got: Tensor) -> Measured:
        found = arms.errors(samples(), got, scale=cell.scale)
        got.fill_(torch.nan)  # so that what the next tile leaves unwritten is seen
        return found

    current = current_tile(session, cell, rank)
    tried = neighbours(current) if session.device == "cuda" else neighbours(current)[:2]
    calls = {spell(tile): call(tile) for tile in tried}
    found = session.compare("tiles", key, calls, seconds=2.0, check=check)
    flops = cell.flops(rank) - cell.prologue_flops(rank)
    for what in found.values():
        if "error" not in what:
            what.update(rates(session, cell, flops, what["median_ms"]))
    names = {"rank": rank, "tile": spell(current)}
    return {**asdict(cell), **names, "run": session.run, "arms": found}


def current_tile(session: Session, cell: Cell, rank: int) -> Tile:
    return tile_for(
        architecture(torch.device(session.device)),
        value_dim=cell.head_dim,
        rank=rank,
        is_causal=cell.is_causal,
        dtype=getattr(torch, cell.dtype),
        has_mask=cell.mask != "none",
    )


def neighbours(tile: Tile) -> list[Tile]:
    """The tile itself, then others: some in one field only, some usual ones, each switch."""
    steps: dict[str, list[Any]] = {
        "block_m": [64, 128],
        "block_n": [32, 64, 128],
        "num_warps": [4, 8],
        "num_stages": [tile.num_stages - 1, tile.num_stages + 1],
    }
    found = [tile]
    for name, values in steps.items():
        found += [replace(tile, **{name: value}) for value in values]
    usual = [
        replace(tile, block_m=m, block_n=n, num_warps=warps)
        for m, n, warps in ((64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 4), (128, 128, 8))
    ]
    for field in fields(tile):
        if isinstance(getattr(tile, field.name), bool):
            usual += [replace(t, **{field.name: not getattr(t, field.name)}) for t in usual]
    return [t for t in dict.fromkeys(found + usual) if t.num_stages >= 1]


def spell(tile: Tile) -> str:
    """A tile in the form 128x64/4/2; switches come after, where they are on."""
    text = f"{tile.block_m}x{tile.block_n}/{tile.num_warps}/{tile.num_stages}"
    return "/".join([text, *(f.name for f in fields(tile) if getattr(tile, f.name) is True)])


# --- all of it ----------------------------------------------------------------------------------

STAGES: dict[str, Callable[[Session], Iterator[Job]]] = {
    "deciding": lambda s: attention(s, cells.deciding(s.device), seconds=6.0, with_flex=True),
    "prologue": prologue,
    "host": host,
    "variants": lambda s: attention(s, cells.variants(s.device), seconds=3.0, with_flex=False),
    "tiles": tiles,
    "sweep": lambda s: attention(s, cells.sweep(s.device), seconds=1.5, with_flex=False),
}
"""In the order in which they run; the ceilings come before all of them, in every run."""


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="started by gpu.py; see session.Session")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--marker", type=Path, required=True)
    parser.add_argument("--run", required=True)
    parser.add_argument("--until", type=float, required=True)
    parser.add_argument("--stages", nargs="*", choices=list(STAGES), required=True)
    options = parser.parse_args(argv)
    session = Session(options.results, options.marker, options.run, options.until)
    if not session.work_through(ceilings(session)):
        return 0
    for name, what in session.store("ceilings").current()[session.run]["arms"].items():
        session.ceilings[name] = what["gb_per_s" if name == "copy" else "tflops"]
    for stage in options.stages:
        if not session.work_through(STAGES[stage](session)):
            break
    return 0


if __name__ == "__main__":
    sys.exit(main())
