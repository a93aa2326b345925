"""Who computes a call whose gradients are recorded, and who its backward.

The forward fills, beside the output, what the backward needs (:class:`Saved`). One of three
implementations does that: the fused CPU kernel, the Triton kernels (``cuda_training.py``), or
PyTorch's products on any device; what they save means the same. So it is with the backward, where
PyTorch's is in ``cpu_backward.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distr_compile.lowering import choose, cpu, cpu_backward, cpu_fused, cuda_training
from distr_compile.lowering.call import Approximation, Call, Shape
from distr_compile.lowering.choose import Done
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
    refused: dict[str, str] = {}
    kernels = _kernels(shape)
    forward = backward = kernels.name
    if why := kernels.refuses(shape, approximation):
        refused[kernels.name], forward = why, cpu_backward.NAME
    if why := kernels.refuses_backward(shape, approximation, mask_grad):
        refused[f"{kernels.name}, backward"], backward = why, cpu_backward.NAME
    return Names(forward, backward, refused)


def who_computes(
    shape: Shape, approximation: Approximation, *, mask_grad: bool = False
) -> tuple[str, str | None, Mapping[str, str]]:
    """Forward, backward and refusals of a call; no backward where it records no gradients."""
    if shape.trained:
        return names(shape, approximation, mask_grad=mask_grad)
    return choose.name_of(shape, approximation), None, choose.refusals(shape, approximation)


class _Kernels(NamedTuple):
    """Kernels of ours for a device.

    Attributes:
        name: as the report names them.
        refuses: says why they do not compute the forward of a call.
        refuses_backward: likewise of the backward; told whether the mask gets a gradient.
        forward: by its names, in the order in which to try it.
        backward: fills gradients.
    """

    name: str
    refuses: Callable[[Shape, Approximation], str | None]
    refuses_backward: Callable[[Shape, Approximation, bool], str | None]
    forward: Mapping[str, Callable[..., None]]
    backward: Callable[..., None]


def _kernels(shape: Shape) -> _Kernels:
    """The ones for the device of a call."""
    if cuda_training.is_for(shape):
        return _Kernels(
            cuda_training.NAME,
            cuda_training.refuses,
            cuda_training.refuses_backward,
            cuda_training.FORMS,
            cuda_training.backward,
        )

    def run_fused(call: Call, saved: Saved) -> None:
        cpu.run(call, fused=True, keep=saved.bases)

    fused = cpu_fused.IMPLEMENTATION
    return _Kernels(
        fused.name,
        fused.refuses,
        cpu_fused.refuses_backward,
        {fused.name: run_fused},
        cpu_fused.backward,
    )


def forward(call: Call, saved: Saved) -> Done:
    """Fill ``call.out`` and ``saved``; returns what did."""
    call = replace(call, lse=saved.lse)
    if not call.out.numel() or call.scores.dropout_p == 1:
        call.out.zero_()
        saved.lse.fill_(-torch.inf)
        return Done(cpu_backward.NAME, [])
    kernels = _kernels(call.shape)
    runs = []
    if kernels.refuses(call.shape, call.approximation) is None:
        runs = [(name, _given(run, saved)) for name, run in kernels.forward.items()]

    def by_products(call: Call) -> None:
        cpu.run(call, fused=False, keep=saved.bases)

    return choose.attempt(call, runs, (cpu_backward.NAME, by_products))


def _given(run: Callable[..., None], *more: Any) -> Callable[[Call], None]:
    return lambda call: run(call, *more)


def backward(call: Call, saved: Saved, grad: Tensor, wanted: Gradients) -> Done:
    """Fill ``wanted`` with the gradients of a call, of which ``grad`` is that of ``call.out``.

    Args:
        call: as the forward had it; ``out`` is its result.
        saved: as the forward filled it, with the bases that the call was given in their place.
        grad: ``(B, H, N, d_v)``, any strides.
        wanted: is filled.

    Returns:
        What filled it.
    """
    if not call.out.numel() or call.scores.dropout_p == 1:
        for t in (wanted.q, wanted.k, wanted.v, wanted.mask, wanted.sinks):
            if t is not None:
                t.zero_()
        return Done(cpu_backward.NAME, [])

    kernels, mask_grad = _kernels(call.shape), wanted.mask is not None
    runs = []
    if kernels.refuses_backward(call.shape, call.approximation, mask_grad) is None:
        runs = [(f"{kernels.name}, backward", _given(kernels.backward, saved, grad, wanted))]
    last = _given(cpu_backward.run, saved, grad, wanted)
    return choose.attempt(call, runs, (cpu_backward.NAME, last))
