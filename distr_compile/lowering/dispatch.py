"""Which attention is faster on a device, by data: the approximation, or which exact kernel.

What ``min_seq_len = "auto"`` in a policy stands for. "Faster" is meant against the fastest backend
that ``F.scaled_dot_product_attention`` has on the device, prologue included, at the same shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend

from distr_compile.lowering.architecture import architecture


@dataclass(frozen=True)
class BreakEven:
    """The least min(N_q, N_k) at which the approximation wins; None where it never does.

    Attributes:
        tokens: without a causal mask.
        causal_tokens: with one: half of the scores are left, the prologue stays.
        source: where the figure comes from, a file of results or the word MODELLED.
    """

    tokens: int | None
    causal_tokens: int | None
    source: str


MODELLED = "modelled, not measured"

DTYPES = (torch.float16, torch.bfloat16)
"""fp32 products leave the tensor cores of the exact kernels' class: never "auto"."""

BREAK_EVEN: dict[tuple[str, int, int], BreakEven] = {
    # A roofline model of an RTX 4090 gives 1.25 to 1.57 times exact attention for long sequences.
    ("sm_89", 32, 16): BreakEven(2048, 4096, MODELLED),
    ("sm_89", 64, 32): BreakEven(2048, 4096, MODELLED),
    ("sm_89", 64, 16): BreakEven(1024, 2048, MODELLED),
    ("sm_89", 128, 64): BreakEven(2048, 4096, MODELLED),
    ("sm_89", 128, 32): BreakEven(1024, 2048, MODELLED),
    ("sm_89", 128, 16): BreakEven(1024, 2048, MODELLED),
    # The model of an H200 gives 1.1 over cuDNN at d = 128, G = 4, and no gain at d = 64 or G = 2,
    # where FlashAttention-2 would be beaten and cuDNN not.
    ("sm_90", 128, 32): BreakEven(8192, 16384, MODELLED),
    ("sm_90", 128, 16): BreakEven(8192, 16384, MODELLED),
}
"""(architecture, head width d, rank r) -> break-even; what has no entry is not known to win."""


CUDNN_FIRST = ("sm_90",)
"""Where cuDNN's attention is faster than FlashAttention-2, which SDPA takes first.

Published figures for long sequences in fp16: 497 and 648 TFLOP/s against 324 and 370, at d = 64 and
128. Not measured by us.
"""


def break_even(
    device: torch.device, dtype: torch.dtype, *, head_dim: int, rank: int
) -> BreakEven | None:
    """The entry for this device and these widths; None where exact attention is to be kept.

    Args:
        device: where the attention runs; CPUs have no entry (``benchmarks/cpu_attention.py``).
        dtype: of Q, K and V.
        head_dim: d, the width of Q and K.
        rank: r, the width the estimator leaves.
    """
    if device.type != "cuda" or dtype not in DTYPES:
        return None
    return BREAK_EVEN.get((architecture(device), head_dim, rank))


@contextmanager
def best_sdpa(device: torch.device) -> Iterator[None]:
    """Compile in this context to let exact attention take the device's fastest SDPA backend.

    SDPA settles on a backend while a graph is traced. Only the order of preference changes: what
    is switched off stays so, what cuDNN cannot do goes to the next, and an order that somebody set
    is left alone.
    """
    order = list(torch._C._get_sdp_priority_order())
    cudnn: int = SDPBackend.CUDNN_ATTENTION.value
    flash: int = SDPBackend.FLASH_ATTENTION.value
    if architecture(device) not in CUDNN_FIRST or order[0] != flash:
        yield
        return
    # Not by sdpa_kernel: leaving it changes the place of a backend that is switched off.
    torch._C._set_sdp_priority_order([cudnn, *(b for b in order if b != cudnn)])
    try:
        yield
    finally:
        torch._C._set_sdp_priority_order(order)
