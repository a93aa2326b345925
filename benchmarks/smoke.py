"""A look at every kernel before anything is timed: about twenty small calls against fp64.

They are drawn on the CPU, so that each device sees the same numbers, and all rows of the first and
of the last key head are checked there. One that fails says which kernel to distrust in what comes
after.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import arms
from benchmarks.cells import Cell
from distr_compile.kernels.attention import reference
from distr_compile.lowering.call import Approximation

PLAIN = Cell(1, 32, 32, 512, 128)
"""32 heads side by side: the row strides, which kernels are compiled for, of what is timed."""

TINY_HEADS, TINY_TOKENS = 2, 33
"""In their place in the interpreter, with a quarter of the width, but 32 columns at least."""


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        name: of the call.
        cell: its shape.
        how: the approximation.
        is_recorded: as a CUDA graph, replayed on other numbers.
        by_pointers: in the form that the op falls back to.
    """

    name: str
    cell: Cell
    how: Approximation
    is_recorded: bool = False
    by_pointers: bool = False


def cases(device: str) -> list[Case]:
    """All of them; tiny ones without a GPU."""
    odd = replace(PLAIN, tokens=499)
    causal, shared = replace(odd, is_causal=True), replace(odd, key_heads=8)
    narrow = replace(odd, head_dim=64)
    exact = Approximation.none
    half, quarter = (partial_of(PLAIN.head_dim // g) for g in (2, 4))
    found = [
        Case("exact", PLAIN, exact(128)),
        Case("exact, odd N", odd, exact(128)),
        Case("exact, causal", causal, exact(128)),
        Case("exact, shared heads", shared, exact(128)),
        Case("exact, d = 64", narrow, exact(64)),
        Case("exact, d = 80", replace(odd, head_dim=80), exact(80)),
        Case("exact, bf16", replace(odd, dtype="bfloat16"), exact(128)),
        Case("exact, fp32", replace(odd, dtype="float32"), exact(128)),
        Case("exact, padding", replace(odd, batch=2, mask="padding"), exact(128)),
        Case("exact, bias", replace(odd, mask="bias"), exact(128)),
        Case("calibrated G=2", PLAIN, half("calibrated")),
        Case("calibrated G=4, odd N", odd, quarter("calibrated")),
        Case("calibrated G=2, causal", causal, half("calibrated")),
        Case("lsh-mean G=2", PLAIN, half("lsh-mean")),
        Case("lsh-mean G=4, odd N", odd, quarter("lsh-mean")),
        Case("lsh-sample G=2, shared heads", shared, half("lsh-sample")),
        Case("projection G=2", PLAIN, half("projection")),
        Case("projection G=4, odd N", odd, quarter("projection")),
        Case("projection G=2, causal", causal, half("projection")),
        Case("projection G=2, d = 64", narrow, partial_of(32)("projection")),
        Case("projection G=2, strict", causal, replace(half("projection"), block=128, strict=True)),
        Case("projection G=2, recorded", PLAIN, half("projection"), is_recorded=True),
    ]
    return found if device != "cpu" else [_tiny(case) for case in found]


def partial_of(rank: int) -> Callable[[str], Approximation]:
    """Estimator -> the approximation of this rank."""
    return lambda estimator: Approximation(estimator, rank)


def _tiny(case: Case) -> Case:
    shared = case.cell.heads // case.cell.key_heads > 1
    width, rank = max(32, case.cell.head_dim // 4), case.how.rank
    cell = replace(
        case.cell,
        heads=TINY_HEADS,
        key_heads=1 if shared else TINY_HEADS,
        tokens=TINY_TOKENS,
        head_dim=width,
        dtype="float32" if case.cell.dtype == "bfloat16" else case.cell.dtype,
    )
    rank = width if rank == case.cell.head_dim else 16
    how = replace(case.how, rank=rank, block=min(case.how.block, 16))
    return replace(case, cell=cell, how=how)


def run(case: Case, device: str) -> tuple[arms.Arm, arms.Inputs, Callable[[], Tensor]]:
    """What a case calls, on which inputs, and the call itself, which is recorded if it asks."""
    inputs = arms.make_inputs(case.cell, device, drawn_on="meta" if device == "meta" else "cpu")
    arm = arms.our_arm(case.cell, inputs, case.how, case.by_pointers)
    if not case.is_recorded or device != "cuda":
        return arm, inputs, arm.call

    def replayed() -> Tensor:
        arm.call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        kept = inputs.q.clone()
        inputs.q.zero_()
        with torch.cuda.graph(graph):
            out = arm.call()
        inputs.q.copy_(kept)
        graph.replay()
        torch.cuda.synchronize()
        return out.clone()

    return arm, inputs, replayed


def check(case: Case, arm: arms.Arm, inputs: arms.Inputs, out: Tensor) -> dict[str, Any]:
    """Error of all rows of two key heads, and the most it may be, relative to the largest value.

    It may be what ``arms.errors`` allows, with the same formula in the kernel's precision as the
    measure; both are computed on the CPU.
    """
    keys = sorted({0, case.cell.key_heads - 1})
    rep = case.cell.heads // case.cell.key_heads
    queries = [key * rep + i for key in keys for i in range(rep)]
    q, out = (t[:, queries].cpu() for t in (inputs.q, out))
    k, v = (t[:, keys].cpu() for t in (inputs.k, inputs.v))
    mask = inputs.mask
    if mask is not None:
        mask = (mask[:, queries] if mask.shape[1] > 1 else mask).cpu()
    bases = None
    if arm.bases is not None:
        A, B = (t[keys].to(q.dtype).cpu().double() for t in arm.bases)
        bases = (A, B)
    options: dict[str, Any] = {
        "scale": case.cell.scale,
        "is_causal": case.cell.is_causal,
        "rank": case.how.rank,
        "estimator": case.how.estimator,
        "grouping_block": case.how.block,
        "strict": case.how.strict,
        "bases": bases if case.how.rank < case.cell.head_dim else None,
    }
    wanted = reference.attention(q.double(), k.double(), v.double(), mask, **options)
    same = reference.attention(q, k, v, mask, **options).double()
    largest = wanted.abs().max()
    is_single = out.dtype == torch.float32 and inputs.q.is_cuda
    factor = arms.SINGLE if is_single else arms.FACTOR
    error = ((out.double() - wanted).abs().max() / largest).item()
    allowed = factor * ((same - wanted).abs().max() / largest).item()
    allowed += torch.finfo(out.dtype).eps + arms.algebra(
        case.how.estimator, case.how.rank, case.cell.head_dim
    )
    return {"max_error": error, "allowed_error": allowed, "is_right": error <= allowed}
