"""Measures one cell: what ``stages.py`` gives the sessions as jobs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import arms, smoke, timing
from benchmarks.cells import Cell
from benchmarks.session import Measured, Session
from distr_compile.estimators import ESTIMATORS, auto_grouping_block
from distr_compile.kernels.attention.triton_fwd import Tile, attention_fwd
from distr_compile.lowering import op
from distr_compile.lowering.architecture import architecture
from distr_compile.lowering.call import Approximation, Scores, op_arguments
from distr_compile.lowering.tiles import tile_for

ATTENTION_KERNEL = "_attention_fwd"


def ceilings(session: Session, file: str, key: str) -> Measured:
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
    found = session.compare(file, key, calls, seconds=2.0)
    for name, what in found.items():
        if "error" not in what:
            what["gb_per_s" if name == "copy" else "tflops"] = work[name] / what["median_ms"]
    told = {"matmul_size": size, "copy_bytes": source.numel()}
    return {"kind": "ceilings", "run": session.run, **told, "arms": found}


def rates(session: Session, cell: Cell, flops: float, ms: float) -> Measured:
    """A time, beside the work done and the ceilings measured in this run."""
    done = flops / (1e9 * ms)
    told = {"exact_tflops": cell.exact_flops / (1e9 * ms), "done_tflops": done}
    peak, bandwidth = (session.ceilings.get(name) for name in (f"matmul {cell.dtype}", "copy"))
    if peak is None or bandwidth is None:
        return told
    floor_ms = max(flops / (1e9 * peak), cell.bytes / (1e6 * bandwidth))
    return {
        **told,
        "percent_of_peak": 100 * done / peak,
        "floor_ms": floor_ms,
        "fraction_of_floor": floor_ms / ms,
    }


def small_calls(session: Session, case: smoke.Case, file: str, key: str) -> Measured:
    """One call of ``smoke.py``, held against fp64."""
    arm, inputs, call = smoke.run(case, session.device)
    check = partial(smoke.check, case, arm, inputs)
    found = session.first_calls(file, key, {case.name: call}, lambda _, out: check(out))
    return {"kind": "smoke", "run": session.run, "arms": found}


def attention(
    session: Session,
    cell: Cell,
    file: str,
    key: str,
    *,
    seconds: float,
    with_flex: bool = False,
    only: Collection[str] = (),
    sustained: Collection[str] = (),
) -> Measured:
    """All ways to compute one shape, against each other.

    Args:
        session: which measures.
        cell: the shape.
        file: of the results.
        key: of the cell.
        seconds: for all rounds together.
        with_flex: FlexAttention too, which takes long to compile.
        only: names of arms; empty for all of them.
        sustained: those of them that also run for a second without a pause.
    """
    inputs = arms.make_inputs(cell, session.device)
    form = {"by_pointers": session.by_pointers}
    table = arms.make_arms(cell, inputs, with_flex=with_flex, **form)
    table = {name: arm for name, arm in table.items() if not only or name in only}

    def check(name: str, out: Tensor) -> Measured:
        told = {"picked": arms.picked(cell, inputs)} if name == arms.DEFAULT else {}
        arm = table[name]
        sampled = arms.samples(cell, inputs, arm.rank, arm.estimator, arm.bases)
        return {**told, **arms.errors(sampled, out, scale=cell.scale)}

    calls = {name: arm.call for name, arm in table.items()}
    found = session.compare(file, key, calls, seconds=seconds, check=check)
    for name, what in found.items():
        if "error" in what:
            continue
        flops = cell.flops(table[name].rank, table[name].estimator)
        what.update(rates(session, cell, flops, what["median_ms"]))
        if name in sustained and session.device == "cuda":
            session.mark(file, key, name)
            what["sustained_ms"] = timing.sustained_ms(calls[name], seconds=1.0)
    return {"kind": "attention", **asdict(cell), **form, "run": session.run, "arms": found}


def launches(
    session: Session, cell: Cell, group_size: int, estimators: Sequence[str], file: str, key: str
) -> Measured:
    """Each kernel of the whole call, and the share of what comes before attention, in percent.

    Of ``calibrated``, whose products are PyTorch's, only the whole call and attention are told.
    """
    inputs, rank = arms.make_inputs(cell, session.device), cell.head_dim // group_size
    made = {
        name: arms.our_arm(cell, inputs, Approximation(name, rank), session.by_pointers)
        for name in estimators
    }

    def check(name: str, out: Tensor) -> Measured:
        sampled = arms.samples(cell, inputs, rank, name, made[name].bases)
        return arms.errors(sampled, out, scale=cell.scale)

    calls = {name: arm.call for name, arm in made.items()}
    tried = session.first_calls(file, key, calls, check)
    found: dict[str, Measured] = {}
    shares = {}
    for name, what in tried.items():
        found[f"{name}: {timing.WHOLE}"] = what
        if "error" in what:
            continue
        times = timing.time_launches(
            session.device,
            calls[name],
            rounds=20 if session.device == "cuda" else 2,
            tick=lambda name=name: session.mark(file, key, name),
        )
        for kernel, ms in times.items():
            told = what if kernel == timing.WHOLE else {}
            found[f"{name}: {kernel}"] = {**timing.summary(ms), **told}
        attention_ms, whole_ms = (
            statistics.median(times[kernel]) for kernel in (ATTENTION_KERNEL, timing.WHOLE)
        )
        shares[name] = 100 * (1 - attention_ms / whole_ms)
    told = {"rank": rank, "prologue_percent": shares, "run": session.run}
    return {"kind": "prologue", **asdict(cell), **told, "arms": found}


def host(session: Session, file: str, key: str) -> Measured:
    """Time of the host per call, on a shape that takes the device almost no time."""
    cell = Cell(1, 2, 2, 64, 64 if session.device == "cuda" else 32)
    inputs = arms.make_inputs(cell, session.device)
    q, k, v = inputs.q, inputs.k, inputs.v

    def through_op(how: Approximation, *bases: Tensor) -> Callable[[], Tensor]:
        arguments = op_arguments(how, Scores(cell.scale))
        return lambda: op.call(q, k, v, None, *bases, **arguments)

    calls: dict[str, Callable[[], Any]] = {
        "sdpa": lambda: F.scaled_dot_product_attention(q, k, v),
        "op, exact": through_op(Approximation.none(cell.head_dim)),
    }
    for name in ESTIMATORS:
        how = Approximation(name, cell.head_dim // 2)
        arm = arms.our_arm(cell, inputs, how, session.by_pointers)
        calls[f"op, {name} G=2"] = through_op(how, *(arm.bases or ()))
        calls[f"kernels, {name} G=2"] = arm.call
    exact = Approximation.none(cell.head_dim)
    calls["kernels, rank d"] = arms.our_arm(cell, inputs, exact, session.by_pointers).call
    found = session.first_calls(file, key, calls)
    alive = {name: calls[name] for name, what in found.items() if "error" not in what}
    repeats, rounds = (100, 20) if session.device == "cuda" else (1, 3)
    times = timing.time_host(session.device, alive, repeats=repeats, rounds=rounds)
    for name, us in times.items():
        found[name].update(timing.summary(us, "us"))
    return {"kind": "host", **asdict(cell), "run": session.run, "arms": found}


def tiles(
    session: Session, cell: Cell, rank: int, tried: Sequence[Tile], file: str, key: str
) -> Measured:
    """The attention kernel alone, with the tile of the table and with those that are tried."""
    current = current_tile(architecture(torch.device(session.device)), cell, rank)
    if session.by_pointers:
        current, *tried = dict.fromkeys(tile.by_pointers() for tile in (current, *tried))
    calls, check = tile_calls(cell, rank, [current, *tried], session.device)
    found = session.compare(file, key, calls, seconds=2.0, check=check)
    flops = cell.flops(rank) - cell.prologue_flops(rank)
    for what in found.values():
        if "error" not in what:
            what.update(rates(session, cell, flops, what["median_ms"]))
    names = {"kind": "tiles", "rank": rank, "tile": spell(current)}
    return {**asdict(cell), **names, "run": session.run, "arms": found}


def tile_calls(
    cell: Cell, rank: int, tried: Sequence[Tile], device: str
) -> tuple[dict[str, Callable[[], Tensor]], Callable[[str, Tensor], Measured]]:
    """The attention kernel with each tile, and what checks what it gives."""
    inputs = arms.make_inputs(cell, device)
    block = cell.tokens
    if rank < cell.head_dim:
        block = auto_grouping_block(cell.tokens, "lsh-mean")
    blocks = -(-cell.tokens // block)
    Qhat = inputs.q[..., :rank].contiguous()
    shape = (cell.batch, cell.key_heads, blocks, cell.tokens, rank)
    make = torch.empty if device == "meta" else torch.randn
    Khat = make(shape, dtype=Qhat.dtype, device=device)
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
        rep = cell.heads // cell.key_heads
        for row in torch.linspace(0, cell.tokens - 1, 4).long():
            seen = int(row) + 1 if cell.is_causal else cell.tokens
            yield arms.Sample(
                -1,
                cell.heads - 1,
                row[None],
                Qhat[-1, -1, int(row)][None, None, None].cpu().double(),
                Khat[-1, (cell.heads - 1) // rep, int(row) // block][None, None].cpu().double(),
                inputs.v[-1, -1][None, None].cpu().double(),
                torch.arange(cell.tokens)[None] < seen,
            )

    def check(name: str, got: Tensor) -> Measured:
        found = arms.errors(samples(), got, scale=cell.scale)
        got.fill_(torch.nan)  # so that what the next tile leaves unwritten is seen
        return found

    return {spell(tile): call(tile) for tile in tried}, check


def current_tile(architecture: str, cell: Cell, rank: int) -> Tile:
    """The one that ``lowering/tiles.py`` has."""
    return tile_for(
        architecture,
        value_dim=cell.head_dim,
        rank=rank,
        is_causal=cell.is_causal,
        dtype=getattr(torch, cell.dtype),
        has_mask=cell.mask != "none",
    )


CANDIDATES = {
    64: ("128x128/4/2", "128x128/4/3", "128x64/4/3", "128x64/4/2", "128x128/8/2"),
    128: ("128x128/8/2", "128x64/4/2", "128x64/4/3", "128x128/8/3", "64x64/4/3"),
}
"""Tiles to try, by the width of V: what a model of one multiprocessor ranks highest on Hopper, what
was in the table before, and one that is smaller. Warp specialisation comes last: it may hang."""


def candidates(tile: Tile, value_dim: int) -> list[Tile]:
    """At most six tiles to try beside the one in the table, in the order of their promise."""
    sizes = (map(int, text.replace("x", "/").split("/")) for text in CANDIDATES[_wide(value_dim)])
    names = ("block_m", "block_n", "num_warps", "num_stages")
    found = [replace(tile, **dict(zip(names, size, strict=True))) for size in sizes]
    if tile.use_tma:
        found.append(replace(found[1], num_warps=4, block_m=128, warp_specialize=True))
    return list(dict.fromkeys(found))


def _wide(value_dim: int) -> int:
    return 64 if value_dim <= 64 else 128


def spell(tile: Tile) -> str:
    """A tile in the form 128x64/4/2; switches come after, where they are on."""
    text = f"{tile.block_m}x{tile.block_n}/{tile.num_warps}/{tile.num_stages}"
    return "/".join([text, *(f.name for f in fields(tile) if getattr(tile, f.name) is True)])
