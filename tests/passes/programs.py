"""Random programs around attention: views, in-place writes, casts, masks built and then written.

    python -m tests.passes.programs --count 2000 --compiler eager --seed 0

A :class:`Program` is the source of a function, so that a failure prints as code that runs. Every
line works on the same few names and keeps their shapes, so that a failing program shrinks by
leaving lines out. What must hold: where eager runs and PyTorch alone compiles it to the same, the
rewritten program runs and is within the bounds of ``distr_compile.verify``; with static and with
symbolic sizes.
"""

from __future__ import annotations

import argparse
import collections
import logging
import random
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import distr_compile
from distr_compile.comparing import bound_of, named_tensors, relative_error
from distr_compile.lowering.exactly import computing_exactly
from tests.passes.program_lines import (
    BIAS_WRITES,
    BIASES,
    ENDS,
    FUSED,
    MASK_WRITES,
    MASKS,
    OUTPUTS,
    PRODUCTS,
    SCORES,
    SECOND,
    SOFTMAX,
    START,
    VIEWS,
    WEIGHTS,
    WRITES,
)

BATCH, HEADS, WIDTH = 2, 4, 32
COMPILERS = ("eager", "inductor")

# --- what programs may call ---------------------------------------------------------------------


@torch.library.custom_op("distr_programs::rotate", mutates_args=("t",))
def rotate(t: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotary embedding, in place."""
    half = t.shape[-1] // 2
    t.copy_(t * cos + torch.cat((-t[..., half:], t[..., :half]), -1) * sin)


@torch.library.custom_op("distr_programs::show", mutates_args=("mask",))
def show(mask: Tensor, count: int) -> None:
    """Let every row of a boolean mask see the first ``count`` keys, in place."""
    mask[..., :count] = True


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / WIDTH**0.5).softmax(-1) @ v


WEIGHT = torch.ones(WIDTH, requires_grad=True)


def recorded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.enable_grad():
        return plain(q * WEIGHT, k, v)


NAMES: dict[str, Any] = {
    "torch": torch,
    "F": F,
    "B": BATCH,
    "H": HEADS,
    "d": WIDTH,
    "inf": float("inf"),
    "plain": plain,
    "recorded": recorded,
    "checkpoint": checkpoint,
    "ops": torch.ops.distr_programs,
}
ARGUMENTS = ("x", "q", "k", "v", "bias", "keep", "keys", "cos", "sin", "turn", "warm")


def inputs(dtype: torch.dtype, rows: int, keys: int) -> list[Tensor]:
    """The arguments, in the order of ``ARGUMENTS``."""
    generator = torch.Generator().manual_seed(rows * 100 + keys)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    keep = normal(rows, keys) > -0.5
    keep[:, 0] = True
    angles = normal(rows, WIDTH)
    return [
        normal(BATCH, rows, 3 * HEADS * WIDTH).to(dtype),
        normal(BATCH, HEADS, rows, WIDTH).to(dtype),
        normal(BATCH, HEADS, keys, WIDTH).to(dtype),
        normal(BATCH, HEADS, keys, WIDTH).to(dtype),
        normal(rows, keys).to(dtype),
        keep,
        normal(keys).to(dtype),
        angles.cos(),
        angles.sin(),
        torch.polar(torch.ones(rows, WIDTH // 2), normal(rows, WIDTH // 2)),
        normal(HEADS, 1, 1).abs() + 0.5,
    ]


# --- a program ----------------------------------------------------------------------------------

Choose = Callable[[Sequence[Any]], Any]


@dataclass(frozen=True)
class Program:
    """The lines of a function of ``ARGUMENTS`` and how it is compiled; prints as code."""

    lines: tuple[str, ...]
    dtype: str = "float32"
    rows: int = 20
    keys: int = 20
    group_size: int = 2

    def __str__(self) -> str:
        head = f"def program({', '.join(ARGUMENTS)}):"
        told = f"# {self.dtype}, {self.rows} rows, {self.keys} keys, group_size {self.group_size}"
        return "\n    ".join((head, told, *self.lines))

    __repr__ = __str__

    def function(self) -> Callable[..., Any]:
        """A fresh function, which Dynamo has not seen."""
        names = dict(NAMES)
        exec(compile(str(self), "<program>", "exec"), names)
        function: Callable[..., Any] = names["program"]
        return function

    def inputs(self) -> list[Tensor]:
        """Its arguments."""
        return inputs(getattr(torch, self.dtype), self.rows, self.keys)

    @property
    def policy(self) -> dict[str, Any]:
        """Approximates, or leaves exact, every attention."""
        return {"default": {"group_size": self.group_size, "min_seq_len": 0}}

    def runs(self) -> bool:
        """Whether eager can run it at all."""
        try:
            with torch.no_grad():
                self.function()(*self.inputs())
        except Exception:  # shapes, strides or dtypes that do not fit: no program
            return False
        return True


def written(choose: Choose) -> Program:
    """A program, drawn line by line."""

    def some(lines: Sequence[str], *counts: int) -> list[str]:
        return [choose(lines) for _ in range(choose(counts))]

    def operands(*counts: int) -> list[str]:
        kinds = [choose((VIEWS, *WRITES.values())) for _ in range(choose(counts))]
        return [choose(kind).format(t=choose(("q", "q", "k", "k", "v"))) for kind in kinds]

    def attention() -> list[str]:
        if choose((True, False, False)):
            return [choose(FUSED)]
        return [
            choose(PRODUCTS),
            *some([line for line in SCORES if "(~mask" in line or "(mask" in line], 0, 1),
            *some(SCORES, 0, 0, 1, 2),
            choose(SOFTMAX),
            *some(WEIGHTS, 0, 0, 0, 1, 2),
            "out = weights @ v",
        ]

    lines = [choose(START), "n, m = q.shape[-2], k.shape[-2]", *operands(0, 0, 1, 2)]
    lines += [choose(MASKS), *some(MASK_WRITES, 0, 1, 1, 2)]
    lines += [choose(BIASES), *some(BIAS_WRITES, 0, 0, 1)] if choose((True, False)) else []
    lines += [choose((*("",) * 9, "q = q[:, :, :1]"))]
    lines += [*operands(0, 0, 1), *attention(), *some(OUTPUTS, 0, 0, 1, 2)]
    if choose((True, False, False)):
        lines += [choose(SECOND), *operands(0, 1), *attention(), *some(OUTPUTS, 0, 1)]
    rows = choose((20, 20, 17, 24))
    return Program(
        tuple(line for line in (*lines, choose(ENDS)) if line),
        dtype=choose(("float32", "float32", "float32", "bfloat16", "float16")),
        rows=rows,
        keys=choose((rows, rows, rows, 33)),
        group_size=choose((2, 2, 1)),
    )


# --- what must hold -----------------------------------------------------------------------------


def failure(program: Program, compiler: str, dynamic: bool) -> str:
    """What is wrong with the rewritten program, in a line; empty if nothing is.

    Empty too where PyTorch alone does no better: then nobody is owed a result.
    """
    found, excuse = judged(program, compiler, dynamic)
    return "" if excuse else found


def judged(program: Program, compiler: str, dynamic: bool) -> tuple[str, str]:
    """What is wrong with the rewritten program, and what PyTorch alone does wrong with it, too."""
    warnings.filterwarnings("ignore")
    check = _verified if compiler == "eager" else _compiled
    try:
        with torch.no_grad():
            found, raises = check(program, dynamic), False
    except Exception as error:
        cause = getattr(error, "inner_exception", None) or error
        text = (str(cause).strip() or "no message").splitlines()[0]
        found, raises = f"raises {type(cause).__name__}: {text[:120]}", True
    finally:
        torch._dynamo.reset()
    return found, _excuse(program, compiler, dynamic, raises) if found else ""


def _symbolic(dynamic: bool) -> Any:
    return torch._dynamo.config.patch(assume_static_by_default=not dynamic)


def _verified(program: Program, dynamic: bool) -> str:
    with _symbolic(dynamic):
        found = distr_compile.verify(program.function(), *program.inputs(), policy=program.policy)
    told = [(f"attention {row.site}, {row.decision}", row) for row in found.rows]
    told += [(out.name, out) for out in found.outputs]
    return "; ".join(
        f"{name}: error {check.error:.1e} {check.why}".strip()
        for name, check in told
        if check.status == "wrong"
    )


def _compiled(program: Program, dynamic: bool) -> str:
    options = {"policy": program.policy, "compiler": "inductor"}
    compiled = torch.compile(
        program.function(), backend="distr", dynamic=dynamic or None, options=options
    )
    with computing_exactly():
        return _differs(program, compiled)


def _differs(program: Program, compiled: Callable[..., Any]) -> str:
    """How far the compiled program's outputs are from eager's, where that is beyond the bound."""
    expected, got = program.function()(*program.inputs()), compiled(*program.inputs())
    bound = bound_of({getattr(torch, program.dtype), torch.float32})
    errors = [
        relative_error(a, b.masked_fill(a.isnan(), torch.nan) if a.shape == b.shape else b)
        for (_, a), (_, b) in zip(named_tensors(expected), named_tensors(got), strict=True)
    ]
    return "" if max(errors, default=0.0) <= bound else f"outputs: error {max(errors):.1e}"


def _excuse(program: Program, compiler: str, dynamic: bool, raises: bool) -> str:
    """What PyTorch alone does wrong with the program, of the same kind: it raises, or it errs.

    Inductor's attention patterns are off: that they go wrong is no excuse, the backend reports such
    attention as exact. What is left are faults that have nothing to do with attention, such as
    ``q.copy_(q.flip(1))`` on a view of an input, which torch 2.14 reads while it writes.
    """
    torch._dynamo.reset()
    try:
        with (
            _symbolic(dynamic),
            torch.no_grad(),
            torch._inductor.config.patch(pattern_matcher=False),
        ):
            compiled = torch.compile(program.function(), backend=compiler, dynamic=dynamic or None)
            found = _differs(program, compiled)
    except Exception as error:
        return f"raises {type(error).__name__}"
    finally:
        torch._dynamo.reset()
    return "" if raises else found


def shrunk(program: Program, compiler: str, dynamic: bool) -> Program:
    """The program with every line left out that its failure does not need."""
    is_crash = failure(program, compiler, dynamic).startswith("raises")

    def fails(other: Program) -> bool:
        found = other.runs() and failure(other, compiler, dynamic)
        return bool(found) and found.startswith("raises") == is_crash

    before = None
    while program != before:
        before, i = program, 0
        while i < len(program.lines) - 1:
            without = replace(program, lines=(*program.lines[:i], *program.lines[i + 1 :]))
            program, i = (without, i) if fails(without) else (program, i + 1)
    simpler = replace(program, dtype="float32")
    return simpler if fails(simpler) else program


def drawn(seed: int) -> Program:
    """The program of a seed that eager can run."""
    numbers = random.Random(seed)
    while True:
        program = written(numbers.choice)
        if program.runs():
            return program


# --- the command --------------------------------------------------------------------------------


def main() -> None:
    """The command line."""
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000, metavar="N")
    parser.add_argument("--compiler", choices=COMPILERS, default="eager")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-shrink", action="store_true", help="print failures as drawn")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the failures there")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    counts: collections.Counter[str] = collections.Counter()
    progress = tqdm(range(options.count), unit="program", smoothing=0)
    for index in progress:
        seed = options.seed * 10**6 + index
        program = drawn(seed)
        for dynamic in (False, True):
            found, excuse = judged(program, options.compiler, dynamic)
            if found and excuse:
                counts["PyTorch alone fails, too"] += 1
                progress.write(f"seed {seed}: {found}; PyTorch alone: {excuse}\n{program}\n")
                continue
            counts["failed" if found else "held"] += 1
            if not found:
                continue
            kind = re.sub(r"\d.*", "", found)[:60]
            counts[kind] += 1
            small = program
            if not options.no_shrink and not (counts[kind] > 3 and kind.startswith("raises")):
                small = shrunk(program, options.compiler, dynamic)
                found = failure(small, options.compiler, dynamic) or found
            text = f"seed {seed}, {'dynamic' if dynamic else 'static'}: {found}\n{small}\n"
            progress.write(text)
            if options.out:
                with options.out.open("a") as file:
                    file.write(text + "\n")
            break
        progress.set_postfix(failed=counts["failed"])
    progress.close()
    for text, count in counts.most_common():
        print(f"{count:6d}  {text}")


if __name__ == "__main__":
    main()
