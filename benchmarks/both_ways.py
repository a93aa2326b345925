"""Forward and backward of one attention, as training runs them: ours beside SDPA's backends.

The backward is five products over the scores, Q K^T again, dP, dV, dQ and dK; at width d / G three
of them are G times cheaper. So with G = 2 the backward alone can be 1.43 times as fast as the exact
one and with G = 4 1.82 times, if products are all that costs time (:func:`limits`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from benchmarks import arms
from benchmarks.cells import Cell
from benchmarks.session import Measured, Session
from distr_compile.estimators import ESTIMATORS, auto_grouping_block
from distr_compile.lowering import op
from distr_compile.lowering.call import Approximation, Scores, op_arguments
from distr_compile.lowering.measure import random_bases

GROUP_SIZES = (2, 4)
ESTIMATED = ("calibrated", "lsh-mean", "projection")


def limits(group_size: int) -> dict[str, float]:
    """How much faster the backward, and both ways together, can be at most."""
    return {
        "backward": 5 / (3 / group_size + 2),
        "forward and backward": 7 / (4 / group_size + 3),
    }


@dataclass(frozen=True)
class Arm:
    """One way to train a cell.

    Attributes:
        call: computes output and gradients and returns the gradients of Q, K and V.
        how: the approximation.
        bases: A and B ``(H_k, d, r)`` where it needs them.
    """

    call: Callable[[], tuple[Tensor, ...]]
    how: Approximation
    bases: tuple[Tensor, Tensor] | None = None


def make_arms(cell: Cell, inputs: arms.Inputs) -> dict[str, Arm]:
    """SDPA by each backend, ours at the full width, and approximated."""
    leaves = [t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
    grad = _grad(cell, inputs)
    exact = Approximation.none(cell.head_dim)
    made: dict[str, Arm] = {}

    def both(run: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            with torch.enable_grad():
                return torch.autograd.grad(run(), leaves, grad)

        return call

    for name, backend in arms.SDPA.items():

        def by_sdpa(backend: Any = backend) -> Tensor:
            gqa = cell.heads != cell.key_heads
            options = {"is_causal": cell.is_causal, "scale": cell.scale, "enable_gqa": gqa}
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*leaves, **options)

        made[name] = Arm(both(by_sdpa), exact)
    hows = {arms.EXACT: exact}
    for estimator in ESTIMATED:
        for size in GROUP_SIZES:
            if cell.head_dim // size >= 16:
                how = Approximation(estimator, cell.head_dim // size)
                hows[f"{estimator} G={size}"] = how
    scores = Scores(cell.scale, cell.is_causal)
    for name, how in hows.items():
        bases = None
        if ESTIMATORS[how.estimator].needs == "bases":
            drawn = random_bases(cell.key_heads, cell.head_dim, how.rank, torch.device("cpu"))
            bases = (drawn[0].to(inputs.q.device), drawn[1].to(inputs.q.device))

        def by_us(how: Approximation = how, bases: Any = bases) -> Tensor:
            out: Tensor = op.call(*leaves, None, *(bases or ()), **op_arguments(how, scores))
            return out

        made[name] = Arm(both(by_us), how, bases)
    return made


def _grad(cell: Cell, inputs: arms.Inputs) -> Tensor:
    generator = torch.Generator(inputs.q.device).manual_seed(1)
    shape, device = inputs.q.shape, inputs.q.device
    return torch.randn(shape, generator=generator, device=device, dtype=inputs.q.dtype)


def errors(cell: Cell, inputs: arms.Inputs, arm: Arm, found: tuple[Tensor, ...]) -> Measured:
    """Error of the gradients of the first key head, and what it may be: see ``arms.errors``.

    Both measures are autograd through the formula with A and B as they were saved, in fp64 and in
    the dtype of the call.
    """
    key_heads = cell.heads // cell.key_heads
    heads = slice(0, key_heads)
    A = B = None
    if arm.how.rank < cell.head_dim:
        A, B = _bases(cell, inputs, arm)
    grads = []
    for dtype in (torch.float64, inputs.q.dtype):
        q, k, v = (
            t.detach()[:1, some].to(dtype).requires_grad_()
            for t, some in ((inputs.q, heads), (inputs.k, slice(0, 1)), (inputs.v, slice(0, 1)))
        )
        out = torch.cat(list(_blocks(cell, q, k, v, A, B, arm.how)), 2)
        grad = _grad(cell, inputs)[:1, heads].to(dtype)
        with torch.enable_grad():
            grads.append(torch.autograd.grad(out, (q, k, v), grad))
    worst: Measured = {"max_error": 0.0, "allowed_error": 0.0, "is_right": True}
    for got, wanted, same in zip(found, *grads, strict=True):
        mine = got[:1, : wanted.shape[1]].double()
        size = wanted.norm().item()
        error, low = ((t.double() - wanted).norm().item() / size for t in (mine, same))
        allowed = arms.FACTOR * low + 4 * torch.finfo(got.dtype).eps
        if error / allowed >= worst["max_error"] / (worst["allowed_error"] or 1.0):
            worst |= {"max_error": error, "allowed_error": allowed}
        worst["is_right"] &= error <= allowed
    return worst


def _bases(cell: Cell, inputs: arms.Inputs, arm: Arm) -> tuple[Tensor, Tensor]:
    """A and B of the first key head ``(blocks, d, r)`` fp64."""
    if arm.bases is not None:
        A, B = (t[:1] for t in arm.bases)
    else:
        given = op_arguments(arm.how, Scores(cell.scale, cell.is_causal))
        tensors = (inputs.q, inputs.k, inputs.v, *[None] * 5)
        A, B = torch.ops.distr.attention_recorded.default(*tensors, **given)[2:4]
        A, B = A[0, 0], B[0, 0]
    return A.double(), B.double()


def _blocks(
    cell: Cell, q: Tensor, k: Tensor, v: Tensor, A: Any, B: Any, how: Approximation
) -> Iterator[Tensor]:
    """The output of each grouping block, by the formula."""
    tokens = cell.tokens
    block = tokens
    if A is not None and len(A) > 1:
        block = auto_grouping_block(tokens, how.estimator)
    with torch.enable_grad():
        for number, start in enumerate(range(0, tokens, block)):
            Q, K = q[:, :, start : start + block], k
            if A is not None:
                Q, K = Q @ A[number].to(q.dtype), K @ B[number].to(q.dtype)
            S = Q @ K.mT * cell.scale
            if cell.is_causal:
                seen = torch.ones(S.shape[2:], dtype=torch.bool, device=q.device).tril(start)
                S = S.masked_fill(~seen, -torch.inf)
            yield S.softmax(-1) @ v


def measure(session: Session, cell: Cell, file: str, key: str, *, seconds: float) -> Measured:
    """All arms of one shape, against each other."""
    inputs = arms.make_inputs(cell, session.device)
    table = make_arms(cell, inputs)
    calls = {name: arm.call for name, arm in table.items()}

    def check(name: str, found: Any) -> Measured:
        return errors(cell, inputs, table[name], found)

    found = session.compare(file, key, calls, seconds=seconds, check=check)
    told = {"limits": {str(size): limits(size) for size in GROUP_SIZES}, "run": session.run}
    return {"kind": "training", **asdict(cell), **told, "arms": found}


def table(cells: list[dict[str, Any]]) -> list[str]:
    """Speedups over the fastest backend of SDPA, with the limits beside."""
    heads = [f"{name} G={size}" for name in ESTIMATED for size in GROUP_SIZES]
    lines = [
        "Forward and backward, over the fastest backend of SDPA; the backward alone can be at most "
        + ", ".join(f"{limits(size)['backward']:.2f} (G = {size})" for size in GROUP_SIZES)
        + ", both together "
        + ", ".join(f"{limits(size)['forward and backward']:.2f}" for size in GROUP_SIZES),
        f"| shape | fastest | {arms.EXACT} | {' | '.join(heads)} |",
        "|---" * (len(heads) + 3) + "|",
    ]
    for cell in cells:
        times = {
            name: arm["median_ms"]
            for name, arm in cell["arms"].items()
            if arm.get("is_right") and "median_ms" in arm
        }
        backends = {name: times[name] for name in arms.SDPA if name in times}
        best = min(backends, key=lambda name: backends[name], default="")
        row = [
            f"{backends[best] / times[name]:.2f}" if best and name in times else "not measured"
            for name in (arms.EXACT, *heads)
        ]
        fastest = f"{best} {backends[best]:.3f} ms" if best else "not measured"
        shape = f"B{cell['batch']} H{cell['heads']} N{cell['tokens']} d{cell['head_dim']}"
        shape += " causal" * cell["is_causal"]
        lines.append(f"| {shape} | {fastest} | {' | '.join(row)} |")
    return lines if cells else [f"{lines[0]}: not measured"]
