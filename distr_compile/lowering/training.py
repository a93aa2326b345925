"""Who computes a call whose gradients are recorded, and who its backward.

The forward fills, beside the output, what the backward needs (:class:`Saved`). Either of two
implementations does that, the fused CPU kernel or PyTorch's products; what they save means the
same. The backward is the fused kernel's too, or PyTorch's (``cpu_backward.py``), on any device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distr_compile.lowering import choose, cpu, cpu_backward, cpu_fused
from distr_compile.lowering.call import Approximation, Shape
from distr_compile.lowering.choose import Call
from distr_compile.lowering.saved import Gradients, Saved


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


def names(shape: Shape, approximation: Approximation, *, mask_grad: bool = False) -> Names:
    """Who would compute a call; ``mask_grad`` says whether its mask gets a gradient."""
    fused, refused = cpu_fused.IMPLEMENTATION, {}
    forward = backward = fused.name
    if why := fused.refuses(shape, approximation):
        refused[fused.name], forward = why, cpu_backward.NAME
    if why := cpu_fused.refuses_backward(shape, approximation, mask_grad):
        refused[f"{fused.name}, backward"], backward = why, cpu_backward.NAME
    return Names(forward, backward, refused)


def forward(call: Call, saved: Saved) -> None:
    """Fill ``call.out`` and ``saved``."""
    if not call.out.numel() or call.scores.dropout_p == 1:
        call.out.zero_()
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
    if not call.out.numel() or call.scores.dropout_p == 1:
        for t in (wanted.q, wanted.k, wanted.v, wanted.mask, wanted.sinks):
            if t is not None:
                t.zero_()
        return

    def run_fused(call: Call) -> None:
        cpu_fused.backward(call, saved, grad, wanted)

    mask_grad = wanted.mask is not None
    asked = cpu_fused.refuses_backward(call.shape, call.approximation, mask_grad) is None
    runs = [(f"{cpu_fused.IMPLEMENTATION.name}, backward", run_fused)] if asked else []
    if choose.attempt(call, runs) is not None:
        cpu_backward.run(call, saved, grad, wanted)
