"""Who computes a call whose gradients are recorded, and who its backward.

The forward fills, beside the output, what the backward needs (:class:`Saved`). Either of two
implementations does that, the fused CPU kernel or PyTorch's products; what they save means the
same. The backward is PyTorch's (``cpu_backward.py``), on any device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from distr_compile.estimators import arithmetic, auto_grouping_block
from distr_compile.lowering import choose, cpu, cpu_backward, cpu_fused
from distr_compile.lowering.call import Approximation, Shape
from distr_compile.lowering.choose import Call


@dataclass(frozen=True)
class Saved:
    """What a backward needs beside inputs and output.

    Attributes:
        lse: ``(B, H, N)``: logarithm of each row's sum of exponentials, sinks included; -inf where
            the row sees nothing.
        bases: A and B ``(B or 1, H_k, blocks or 1, d, r)``; None where the call is exact, and to be
            filled not where it is given them.
    """

    lse: Tensor
    bases: tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class Gradients:
    """Tensors to be filled: gradients in the shapes and dtypes of q, k, v, the mask and the sinks.

    Those of mask and sinks are None where nobody asks for them.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    sinks: Tensor | None


def dtype_of(q: Tensor) -> torch.dtype:
    """The dtype of what is saved: that of the arithmetic, fp64 or fp32."""
    return torch.promote_types(q.dtype, torch.float32)


def number_of_blocks(num_queries: int, how: Approximation) -> int:
    """How many pairs of A and B there are; of a symbolic length guards ask which rule holds."""
    if arithmetic(how.estimator, "cpu", "ONE_BLOCK").ONE_BLOCK:
        return 1
    block = how.block or auto_grouping_block(num_queries, how.estimator, how.strict)
    return 1 if block >= num_queries else -(-num_queries // block)


class Names(NamedTuple):
    """Who computes a call whose gradients are recorded, as the report shows it.

    Attributes:
        forward: what computes the result, and what is saved.
        backward: what computes the gradients.
        refused: why what comes before these does not, by name.
    """

    forward: str
    backward: str
    refused: dict[str, str]


def names(shape: Shape, approximation: Approximation) -> Names:
    """Who would compute a call."""
    fused, refused = cpu_fused.IMPLEMENTATION, {}
    if why := fused.refuses(shape, approximation):
        refused[fused.name] = why
    return Names(cpu_backward.NAME if why else fused.name, cpu_backward.NAME, refused)


def forward(call: Call, saved: Saved) -> None:
    """Fill ``call.out`` and ``saved``."""
    if not call.out.numel():
        saved.lse.fill_(-torch.inf)
        return
    fused = cpu_fused.IMPLEMENTATION

    def run_fused(call: Call) -> None:
        cpu.run(call, fused=True, lse=saved.lse, keep=saved.bases)

    asked = fused.refuses(call.shape, call.approximation) is None
    if choose.attempt(call, [(fused.name, run_fused)] if asked else []) is not None:
        cpu.run(call, fused=False, lse=saved.lse, keep=saved.bases)


def backward(call: Call, saved: Saved, grad: Tensor, wanted: Gradients) -> None:
    """Fill ``wanted`` with the gradients of a call, of which ``grad`` is that of ``call.out``.

    Args:
        call: as the forward had it; ``out`` is its result.
        saved: as the forward filled it, with the bases that the call was given in their place.
        grad: ``(B, H, N, d_v)``, any strides.
        wanted: is filled.
    """
    cpu_backward.run(call, saved, grad, wanted)
