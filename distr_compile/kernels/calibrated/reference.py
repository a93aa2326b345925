"""The definition of ``calibrated``: Qhat = Q A and Khat = K B, A and B given."""

from __future__ import annotations

import torch
from torch import Tensor

from distr_compile.kernels.roles import Asked, Block
from distr_compile.kernels.rows import saturate

COMPUTES = ("calibrated",)


def factors(Q: Tensor, K: Tensor, mask: Tensor | None, asked: Asked) -> list[Block]:
    """One block of all query rows, whatever block is asked for: no row depends on another.

    Args:
        Q: ``(B, H_k, rep, N, d)``.
        K: ``(B or 1, H_k, M, d)``.
        mask: not looked at.
        asked: of it ``bases``, A and B ``(H_k, d, r)``, multiplied in at least fp32.
    """
    assert asked.bases is not None
    dtype = torch.promote_types(Q.dtype, torch.float32)
    A, B = (basis.to(dtype) for basis in asked.bases)
    # (B, H_k, rep, N, d) times (H_k, 1, d, r).
    Qhat = saturate((Q.to(dtype) @ A[:, None]).flatten(1, 2), Q.dtype)
    return [Block(0, Q.shape[3], Qhat, saturate(K.to(dtype) @ B, Q.dtype))]
