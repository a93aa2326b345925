"""What the kernels compile to, for every supported architecture, on a machine without any GPU.

    python -m tests.kernels.compiling [--only sm_90 ...] [--jobs 2] [--write]

compiles every case below with the tile that ``lowering/tiles.py`` has for it and prints registers,
spills, shared memory and instructions; ``--write`` puts the rows into ``compiled.csv``, in place of
those of the same Triton version and architectures. Another Triton: the same in its environment.

``benchmarks/compile_only.py`` says how that is done.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks.compile_only import compiling

COMPILED = Path(__file__).with_name("compiled.csv")
ROOT = Path(__file__).parents[2]

# Bytes of shared memory one thread block can have. NVIDIA: CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability"; AMD: LDS of a workgroup, CDNA 3 instruction set guide.
SHARED_LIMIT = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
}

# Matrix instructions of the 16-bit kernels: the fastest the architecture has, not an older one.
MATRIX = {
    "sm_80": "HMMA",
    "sm_86": "HMMA",
    "sm_89": "HMMA",
    "sm_90": "HGMMA",
    "sm_100": "UTCHMMA",
    "gfx942": "v_mfma",
}

# Bytes a thread may spill where there is no better tile; by kernel, dtype, d_v and rank.
SPILLS = {
    ("_attention_fwd", "float32", 256, 256): 300,  # on NVIDIA: every tile we tried
    ("_group_kernel", "float16", 256, 128): 120,  # on gfx942 with Triton 3.6
    # On sm_86 and sm_89 with Triton 3.8; a tile without executes 15 % more with Triton 3.6.
    ("_attention_fwd", "float32", 128, 128): 8,
    # Two programs share a multiprocessor of sm_90, which leaves 255 registers to each of 128
    # threads, for tiles of 128 rows.
    ("_solve_kernel", "float32", 64, 32): 8,
    ("_solve_kernel", "float16", 128, 64): 120,
    ("_solve_kernel", "bfloat16", 128, 64): 120,
    ("_solve_kernel", "float32", 128, 64): 80,
    ("_solve_kernel", "float16", 128, 96): 104,
    ("_solve_kernel", "float16", 256, 128): 528,
    ("_solve_kernel", "float32", 256, 128): 312,
    ("_multiply_kernel", "float32", 256, 128): 300,
}


@dataclass(frozen=True)
class Case:
    """One call of a host function.

    Attributes:
        function: "attention_fwd", "lsh_factors" or "projection_factors".
        dtype: of the inputs, a name in torch.
        value_dim: d_v, the width of V, here also the d of Q and K.
        rank: r, the width of Qhat and Khat.
        variant: "plain", "causal", "mask", "bias", "softcap", "sinks", "dropout" or "odd": lengths
            that no power of two divides. With lsh_factors an estimator, with projection_factors
            "plain", "causal", "mask" or "strict".
    """

    function: str
    dtype: str
    value_dim: int
    rank: int
    variant: str


@dataclass(frozen=True, order=True)
class Row:
    """One compiled kernel.

    Attributes:
        triton: version, major.minor.
        architecture: such as "sm_90".
        kernel: name of the Triton function.
        dtype: of the inputs.
        value_dim: d_v.
        rank: d_qk.
        variant: see ``Case``.
        tile: block_m x block_n / warps / stages and switches; empty where the kernel has none.
        registers: of one thread.
        spill_bytes: of local memory a thread has, which is where spilled registers go.
        shared_bytes: of one thread block.
        loop: instructions of the main loop, one pass.
        per_64: instructions a thread executes for 64 of its score elements; 0 where not attention.
        matrix: kind and number of matrix instructions in the main loop.
    """

    triton: str
    architecture: str
    kernel: str
    dtype: str
    value_dim: int
    rank: int
    variant: str
    tile: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    loop: int
    per_64: int
    matrix: str

    @property
    def key(self) -> tuple[object, ...]:
        """What was compiled: all before the tile, which is looked up."""
        return astuple(self)[:7]


# --- compile, in a process of its own -----------------------------------------------------------


def compile_case(architecture: str, case: Case, tile: Any = None) -> list[Row]:
    """One row for every kernel of the call; not in a process with TRITON_INTERPRET set.

    Args:
        architecture: a key of ``SHARED_LIMIT``.
        case: what to call.
        tile: of attention_fwd, None for the one in the table.
    """
    compiled: list[Any] = []
    with compiling(architecture, compiled.append):
        tile = CALLS[case.function](architecture, case, tile)
    return [_row(architecture, case, tile, kernel) for kernel in compiled]


def _attention(architecture: str, case: Case, tile: Any) -> Any:
    import torch

    from distr_compile.kernels.attention.dropout import Dropout
    from distr_compile.kernels.attention.triton_fwd import attention_fwd
    from distr_compile.lowering.tiles import tile_for

    dtype = getattr(torch, case.dtype)
    N = 4001 if case.variant == "odd" else 4096

    def meta(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    mask = None
    if case.variant == "mask":
        mask = meta(2, 1, 1, N, dtype=torch.bool)
    elif case.variant == "bias":
        mask = meta(1, 8, N, N)
    is_causal = case.variant == "causal"
    tile = tile or tile_for(
        architecture,
        value_dim=case.value_dim,
        rank=case.rank,
        is_causal=is_causal,
        dtype=dtype,
        has_mask=mask is not None or case.variant == "dropout",
    )
    attention_fwd(
        meta(2, 8, N, case.rank),
        meta(2, 8, 2, N, case.rank),
        meta(2, 8, N, case.value_dim),
        mask,
        meta(8, dtype=torch.float32) if case.variant == "sinks" else None,
        scale=0.125,
        is_causal=is_causal,
        grouping_block=2048,
        softcap=30.0 if case.variant == "softcap" else 0.0,
        dropout=Dropout(0.1, meta(dtype=torch.int64), heads=8)
        if case.variant == "dropout"
        else None,
        tile=tile,
        out=meta(2, 8, N, case.value_dim),
    )
    return tile


def _lsh(architecture: str, case: Case, tile: Any) -> Any:
    import torch

    from distr_compile.kernels.lsh.launch import lsh_factors

    Q = torch.empty(2, 8, 4096, case.value_dim, dtype=getattr(torch, case.dtype), device="meta")
    lsh_factors(
        Q,
        torch.empty_like(Q),
        rank=case.rank,
        estimator=case.variant,
        grouping_block=2048,
        seed=0,
    )


def _projection(architecture: str, case: Case, tile: Any) -> Any:
    import torch

    from distr_compile.kernels.projection.launch import projection_factors

    dtype = getattr(torch, case.dtype)
    Q = torch.empty(2, 8, 4096, case.value_dim, dtype=dtype, device="meta")
    keys = queries = None
    if case.variant == "mask":
        keys = torch.empty(2, 1, 4096, dtype=torch.bool, device="meta")
        queries = keys[:, None]
    projection_factors(
        Q,
        torch.empty_like(Q),
        queries,
        keys,
        rank=case.rank,
        grouping_block=1024,
        seed=0,
        is_causal=case.variant == "causal",
        earlier=1 if case.variant == "strict" else 0,
    )


CALLS: dict[str, Callable[[str, Case, Any], Any]] = {
    "attention_fwd": _attention,
    "lsh_factors": _lsh,
    "projection_factors": _projection,
}


# --- read what came out -------------------------------------------------------------------------


def _row(architecture: str, case: Case, tile: Any, kernel: Any) -> Row:
    import triton

    read = _read_amd if architecture.startswith("gfx") else _read_nvidia
    registers, spills, code = read(kernel.asm)
    loop = _main_loop(code, MATRIX[architecture])
    matrices = [op for op in loop if op.startswith(MATRIX[architecture])]
    per_64 = 0
    if tile is not None:
        threads = kernel.metadata.num_warps * kernel.metadata.warp_size
        per_64 = round(64 * len(loop) * threads / (tile.block_m * tile.block_n))
    return Row(
        triton=version(triton.__version__),
        architecture=architecture,
        kernel=kernel.metadata.name,
        dtype=case.dtype,
        value_dim=case.value_dim,
        rank=case.rank,
        variant=case.variant,
        tile="" if tile is None else spell(tile),
        registers=registers,
        spill_bytes=spills,
        shared_bytes=kernel.metadata.shared,
        loop=len(loop),
        per_64=per_64,
        matrix=f"{len(matrices)} {MATRIX[architecture]}" if matrices else "",
    )


def version(full: str) -> str:
    """Major and minor of a version."""
    return ".".join(full.split(".")[:2])


def spell(tile: Any) -> str:
    """A tile in the form 128x64/4/2, then the names of what is switched on."""
    names = [name for name, value in vars(tile).items() if value is True]
    sizes = f"{tile.block_m}x{tile.block_n}/{tile.num_warps}/{tile.num_stages}"
    return " ".join([sizes, *names])


_Code = list[tuple[str, str, str]]  # label or address, opcode, label or address jumped to


def _read_nvidia(asm: dict[str, Any]) -> tuple[int, int, _Code]:
    """Registers and local bytes of a thread, and the code, by the tools in Triton's wheel."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        tool = [knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", file.name]
        text = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert usage is not None, text[:1000]
    code = re.findall(
        r"/\*([0-9a-f]{4,})\*/ +(?:@!?U?P\w+ )?([A-Z][A-Z0-9]*)[^;\n]*?(?:0x([0-9a-f]+))? *;", text
    )
    return (
        int(usage[1]),
        int(usage[2]),
        [(at, op, to.zfill(len(at)) if op == "BRA" else "") for at, op, to in code],
    )


def _read_amd(asm: dict[str, Any]) -> tuple[int, int, _Code]:
    """The same from the assembly text; scratch is counted, which spilled registers live in."""
    text = asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}: +(\d+)", text)
        assert found is not None, name
        return int(found[1])

    label, code = "", []
    for line in text.splitlines():
        if at := re.match(r"(\.LBB\w+):", line):
            label = at[1]
        elif instruction := re.match(r"\t([a-z]\w+) *(\.LBB\w+)?", line):
            code.append((label, instruction[1], instruction[2] or ""))
    return number("vgpr_count"), number("private_segment_fixed_size"), code


def _main_loop(code: _Code, matrix: str) -> list[str]:
    """Opcodes of the first innermost loop that multiplies matrices, else of the longest one."""
    first = {}
    for place, (at, _, _) in enumerate(code):
        first.setdefault(at, place)
    loops = [
        (first[to], place)
        for place, (_, _, to) in enumerate(code)
        if to and first.get(to, place) < place
    ]
    busy = [(s, e) for s, e in loops if any(op.startswith(matrix) for _, op, _ in code[s : e + 1])]
    inner = [
        (start, end)
        for start, end in busy
        if not any((s, e) != (start, end) and start <= s and e <= end for s, e in busy)
    ]
    longest = max(loops, key=lambda loop: loop[1] - loop[0], default=(0, -1))
    start, end = min(inner, default=longest)
    return [op for _, op, _ in code[start : end + 1]]


# --- what is compiled ---------------------------------------------------------------------------

PLAN = [
    ("attention_fwd float16", "plain causal", "32/32 72/36 256/64"),
    ("attention_fwd float16", "plain causal bias", "32/16 64/32 64/64 128/64 128/128"),
    ("attention_fwd float16", "plain causal bias", "256/128 256/256"),
    ("attention_fwd float16", "softcap", "64/64 128/128"),
    ("attention_fwd float16", "mask sinks odd", "128/64"),
    ("attention_fwd float16", "dropout", "64/32 128/64"),
    ("attention_fwd float32", "dropout", "128/64"),
    ("attention_fwd bfloat16", "plain", "128/64"),
    ("attention_fwd float32", "causal bias", "64/32 64/64 128/64 128/128 256/256"),
    ("lsh_factors float16", "lsh-mean", "32/16 64/32 128/64 256/128"),
    ("lsh_factors float16", "lsh-sample", "128/64"),
    ("lsh_factors float16", "lsh-signed", "64/32 128/64"),
    ("lsh_factors float32", "lsh-mean lsh-signed", "128/64"),
    ("lsh_factors float32", "lsh-mean", "256/128"),
    ("projection_factors float16", "plain", "32/16 64/32 128/64 256/128"),
    ("projection_factors bfloat16", "causal strict", "128/64"),
    ("projection_factors float16", "mask", "128/96"),
    ("projection_factors float32", "plain", "64/32 128/64 256/128"),
]
"""Host function and dtype, variants, widths d_v/r: every entry of the tables of tiles is in it."""


def all_cases() -> list[Case]:
    """What the command compiles for each architecture."""
    return [
        Case(*call.split(), *map(int, width.split("/")), variant)
        for call, variants, widths in PLAN
        for width in widths.split()
        for variant in variants.split()
    ]


SLICE = [
    Case("attention_fwd", "float16", 64, 32, "plain"),
    Case("attention_fwd", "float16", 128, 64, "causal"),
    Case("attention_fwd", "float16", 128, 128, "bias"),
    Case("attention_fwd", "float32", 64, 32, "causal"),
    Case("lsh_factors", "float16", 128, 64, "lsh-mean"),
    Case("projection_factors", "float16", 64, 32, "plain"),
]
"""What ``make test`` compiles for each architecture, all of it in ``PLAN``."""


def compile_all(
    architecture: str, cases: Sequence[Case], *, quiet: bool = True
) -> tuple[list[Row], dict[str, str]]:
    """Rows, and for the cases that do not compile the error; in a new process.

    Args:
        architecture: a key of ``SHARED_LIMIT``.
        cases: what to compile.
        quiet: print no line per case.

    Raises:
        RuntimeError: the process died.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment.update(OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")
    rows, failed = [], {}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.kernels.compiling", "--worker", architecture],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps([astuple(case) for case in cases]))
        process.stdin.close()
        for line in process.stdout:
            made = json.loads(line)
            rows += [Row(*row) for row in made["rows"]]
            if made["error"]:
                failed[made["case"]] = made["error"]
            if not quiet:
                print(architecture, made["case"], made["error"], flush=True)
    if process.returncode:
        raise RuntimeError(
            f"{architecture}: the compiling process ended with {process.returncode} after "
            f"{len(rows)} kernels; its stderr says why"
        )
    return rows, failed


def _worker(architecture: str) -> None:
    """Cases come as JSON on stdin; a line of JSON for each goes to stdout."""
    for fields_of_case in json.load(sys.stdin):
        case = Case(*fields_of_case)
        rows, error = [], ""
        try:
            rows = compile_case(architecture, case)
        except Exception as reason:  # Triton's errors have no common base class
            error = f"{type(reason).__name__}: {reason}"
        name = " ".join(map(str, fields_of_case))
        print(json.dumps({"case": name, "rows": [astuple(r) for r in rows], "error": error}))
        sys.stdout.flush()


def problems(row: Row) -> list[str]:
    """What is wrong with a kernel whatever was committed; nothing if all is well."""
    found = []
    if row.spill_bytes > SPILLS.get((row.kernel, row.dtype, row.value_dim, row.rank), 0):
        found.append(f"spills {row.spill_bytes} bytes a thread")
    if row.shared_bytes > SHARED_LIMIT[row.architecture]:
        limit = SHARED_LIMIT[row.architecture]
        found.append(f"{row.shared_bytes} bytes of shared memory, the architecture has {limit}")
    if row.tile and row.dtype != "float32" and not row.matrix:
        found.append(f"no {MATRIX[row.architecture]} in the main loop")
    return found


def read_compiled(path: Path = COMPILED) -> list[Row]:
    """The committed rows of all Triton versions."""
    with path.open(newline="") as file:
        numbers = {field.name for field in fields(Row) if field.type == "int"}
        return [
            Row(**{k: int(v) if k in numbers else v for k, v in line.items()})
            for line in csv.DictReader(file)
        ]


def write_compiled(rows: Iterable[Row], path: Path = COMPILED) -> None:
    """Put ``rows`` in place of those of the same Triton version and architecture."""
    new = {(row.triton, row.architecture) for row in rows}
    kept = [r for r in read_compiled(path) if (r.triton, r.architecture) not in new]
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in fields(Row)])
        writer.writerows(astuple(row) for row in sorted([*kept, *rows]))


def main() -> None:
    """The command; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=SHARED_LIMIT, default=list(SHARED_LIMIT))
    parser.add_argument("--jobs", type=int, default=2, help="compiling processes at a time")
    parser.add_argument("--slice", action="store_true", help="only what make test compiles")
    parser.add_argument("--write", action="store_true", help=f"update {COMPILED.name}")
    parser.add_argument("--worker", choices=SHARED_LIMIT, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        _worker(args.worker)
        return
    if args.write and args.slice:
        parser.error("--slice: got it with --write; the table is written whole")
    cases = SLICE if args.slice else all_cases()
    with ThreadPoolExecutor(args.jobs) as pool:
        results = list(pool.map(lambda a: compile_all(a, cases, quiet=False), args.only))
    rows = sorted(row for some, _ in results for row in some)
    print(tabulate([astuple(row)[1:] for row in rows], [f.name for f in fields(Row)][1:]))
    for architecture, (_, failed) in zip(args.only, results, strict=True):
        for case, error in failed.items():
            print(f"{architecture} {case}: does not compile: {error}")
    for row in rows:
        for problem in problems(row):
            print(f"{' '.join(map(str, row.key[1:]))} {row.tile}: {problem}")
    if args.write:
        write_compiled(rows)


if __name__ == "__main__":
    main()
