"""What the backward kernels compile to, for every supported architecture, without any GPU.

    python -m tests.kernels.compiling_bwd [--only sm_90 ...] [--write]

prints registers, spills and shared memory of each kernel with the tile that ``lowering/tiles.py``
has for it; ``--write`` puts the rows into ``compiled_bwd.csv``. See ``compiling.py``.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.compile_only import compiling
from tests.kernels.compiling import ROOT, SHARED_LIMIT, _read_amd, _read_nvidia, version

COMPILED = Path(__file__).with_name("compiled_bwd.csv")


class Row(NamedTuple):
    """One compiled kernel: what of, and what came out; see ``compiling.Row``."""

    triton: str
    architecture: str
    kernel: str
    dtype: str
    head_dim: int
    rank: int
    variant: str
    tile: str
    registers: int
    spill_bytes: int
    shared_bytes: int

    @property
    def problems(self) -> list[str]:
        """What is wrong with it; nothing if all is well."""
        found = []
        if self.rank <= 64 and self.spill_bytes:
            found.append(f"spills {self.spill_bytes} bytes a thread")
        if self.shared_bytes > SHARED_LIMIT[self.architecture]:
            found.append(f"takes {self.shared_bytes} bytes of shared memory")
        return found


@dataclass(frozen=True)
class Case:
    """One call of ``attention_bwd``, d = d_v; r = d is exact.

    Attributes:
        dtype: of the inputs, a name in torch.
        head_dim: d.
        rank: r.
        variant: "plain", "causal", "bias", "softcap", "dropout", or "padding", which is a mask of
            keys that says where the grouping blocks lie.
    """

    dtype: str
    head_dim: int
    rank: int
    variant: str


PLAN = (
    ("float16", "plain causal bias softcap dropout padding", "128/64"),
    ("float16", "plain causal dropout padding", "64/32"),
    ("float16", "causal dropout", "128/32"),
    ("float16", "causal", "64/16 64/64 128/128"),
    ("bfloat16", "causal padding", "128/64"),
    ("float32", "plain causal dropout padding", "64/32 128/64"),
    ("float32", "plain", "64/64 128/16 128/32"),
)


def cases() -> list[Case]:
    """All that the command compiles."""
    return [
        Case(dtype, *map(int, width.split("/")), variant)
        for dtype, variants, widths in PLAN
        for width in widths.split()
        for variant in variants.split()
    ]


def compile_case(architecture: str, case: Case) -> Iterator[Row]:
    """A row for each of both kernels; not in a process with TRITON_INTERPRET set."""
    import torch
    import triton

    from distr_compile.kernels.attention.dropout import Dropout
    from distr_compile.kernels.attention.triton_bwd import attention_bwd
    from distr_compile.kernels.blocks import Places
    from distr_compile.lowering.tiles import backward_tile_for

    N, d, r, dtype = 4096, case.head_dim, case.rank, getattr(torch, case.dtype)

    def meta(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    tile = backward_tile_for(architecture, width=d, rank=r, dtype=dtype)
    basis = meta(2, 8, 2, d, r, dtype=torch.float32)
    wide = [meta(2, 8, N, d) for _ in range(6)]
    masks = {"bias": meta(1, 8, N, N), "padding": meta(2, 1, 1, N, dtype=torch.bool)}
    places = Places(meta(2, 5, dtype=torch.int32), None, 2, 2048)
    dropout = Dropout(0.1, meta(dtype=torch.int64), heads=8)
    compiled: list[Any] = []
    with compiling(architecture, compiled.append):
        attention_bwd(
            meta(2, 8, N, r),
            meta(2, 8, 2 if r < d else 1, N, r),
            wide[0],
            masks.get(case.variant),
            wide[1],
            meta(2, 8, N, dtype=torch.float32),
            wide[2],
            scale=0.125,
            is_causal=case.variant == "causal",
            grouping_block=2048,
            softcap=30.0 if case.variant == "softcap" else 0.0,
            bases=(basis, basis) if r < d else None,
            dropout=dropout if case.variant == "dropout" else None,
            tile=tile,
            dq=wide[3],
            dk=wide[4],
            dv=wide[5],
            delta=meta(2, 8, N, dtype=torch.float32),
            places=places if case.variant == "padding" else None,
        )
    of_keys = tile.keys_cut(case.variant == "padding")
    cuts = {"_keys_bwd": of_keys, "_queries_bwd": tile.for_queries}
    read = _read_amd if architecture.startswith("gfx") else _read_nvidia
    for kernel in compiled:
        name = kernel.metadata.name
        if name not in cuts:
            continue
        cut = cuts[name]
        spelled = f"{cut.rows}x{cut.keys}/{cut.num_warps}/{cut.num_stages}"
        registers, spills, _ = read(kernel.asm)
        of = (name, case.dtype, d, r, case.variant, spelled)
        made = (registers, spills, kernel.metadata.shared)
        yield Row(version(triton.__version__), architecture, *of, *made)


def read_compiled() -> list[Row]:
    """The committed rows."""
    with COMPILED.open(newline="") as file:
        _, *lines = csv.reader(file)
    return list(map(_row, lines))


def _row(cells: list[str]) -> Row:
    of, made = cells[:4], cells[8:]
    return Row(*of, int(cells[4]), int(cells[5]), *cells[6:8], *map(int, made))


def write_compiled(rows: list[Row]) -> None:
    """Put rows in the place of those of the same Triton and architectures."""
    new = {row[:2] for row in rows}
    kept = [row for row in read_compiled() if row[:2] not in new] if COMPILED.exists() else []
    with COMPILED.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(sorted([*kept, *rows]))


def in_a_process(architecture: str, few: bool) -> list[Row]:
    """What a new process, where Triton is no interpreter, compiles."""
    command = [sys.executable, "-m", "tests.kernels.compiling_bwd", "--only", architecture]
    command += ["--few"] if few else []
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return [_row(line.split(",")) for line in done.stdout.splitlines() if "_bwd," in line]


FEW = (Case("float16", 128, 64, "causal"), Case("float32", 128, 64, "dropout"))
"""What ``make test`` compiles."""


def main() -> None:
    """The command; see the top of the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=SHARED_LIMIT, default=list(SHARED_LIMIT))
    parser.add_argument("--few", action="store_true", help="only what make test compiles")
    parser.add_argument("--write", action="store_true", help=f"update {COMPILED.name}")
    options = parser.parse_args()
    rows = []
    for architecture in options.only:
        for case in FEW if options.few else cases():
            for row in compile_case(architecture, case):
                rows.append(row)
                print(",".join(map(str, row)), flush=True)
                print(*(f"  {problem}\n" for problem in row.problems), sep="", end="", flush=True)
    if options.write:
        write_compiled(rows)


if __name__ == "__main__":
    main()
