"""Whether Inductor could launch our kernels itself: one of them through ``wrap_triton``.

    python -m benchmarks.wrap_triton

An op of ``torch.library.triton_op`` is no black box to Inductor, which then launches its kernels
without Python's work for a call. Its tests here, without a GPU, would be Triton's interpreter and
``opcheck``; what they say of the smallest kernel of the backward is printed.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch
from torch import Tensor
from torch.library import opcheck, triton_op, wrap_triton

from distr_compile.kernels.attention.triton_bwd_kernels import _delta
from distr_compile.kernels.padding import cdiv

ROWS = 32


@triton_op("distr_probe::delta", mutates_args=())
def delta(out: Tensor, grad: Tensor) -> Tensor:
    """Sums of ``grad`` times ``out``, ``(B, H, N)`` fp32, as the backward begins with."""
    batch, heads, num_queries, d_v = out.shape
    sums = out.new_empty(batch, heads, num_queries, dtype=torch.float32)
    wrap_triton(_delta)[(cdiv(sums.numel(), ROWS),)](
        out, grad, sums, sums.numel(), heads, num_queries, *out.stride()[:3], *grad.stride()[:3],
        D_V=d_v, BLOCK_M=ROWS, BLOCK_V=d_v, num_warps=4,
    )  # fmt: skip
    return sums


def main() -> None:
    """The command; see the top of the file."""
    out, grad = torch.randn(2, 1, 2, 40, 16)
    print(f"torch {torch.__version__}")
    try:
        wrong = (delta(out, grad) - (out * grad).sum(-1)).abs().max().item()
        print(f"interpreted: right up to {wrong:.1e}")
        opcheck(delta, (out, grad))
        print("opcheck passes")
    except Exception as reason:  # opcheck's errors have no common base class
        print(f"{type(reason).__name__}: {reason}")


if __name__ == "__main__":
    main()
