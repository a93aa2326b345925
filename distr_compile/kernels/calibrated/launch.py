"""Qhat and Khat of ``calibrated`` for a device with kernels: two products for the whole call."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from distr_compile.kernels.roles import Asked, Prologue
from distr_compile.kernels.rows import saturate

COMPUTES = ("calibrated",)


def prologue(Q: Tensor, K: Tensor, mask: Tensor | None, asked: Asked) -> Prologue:
    """What makes Qhat and Khat with ``asked.bases``; nothing else is looked at."""
    assert asked.bases is not None
    A, B = asked.bases
    return Prologue(partial(factors, basis_q=A, basis_k=B))


def factors(q: Tensor, k: Tensor, basis_q: Tensor, basis_k: Tensor) -> tuple[Tensor, Tensor]:
    """Qhat = Q A and Khat = K B, ready for exact attention of width r.

    Half types are multiplied as they are, A and B rounded to them, with fp32 sums inside; fp32 as
    ``torch.matmul`` does, which is TF32 only where the user allows that.

    Args:
        q: ``(B, H, N, d)``.
        k: ``(B or 1, H_k, M, d)``, H_k divides H.
        basis_q: A, ``(H_k, d, r)``; the query heads of a key head share theirs.
        basis_k: B, likewise.

    Returns:
        ``(B, H, N, r)`` and ``(B or 1, H_k, M, r)`` in the dtype of q; what is too large for it is
        its largest number, and keeps its sign.
    """
    rep = q.shape[1] // k.shape[1]
    return _product(q, basis_q.repeat_interleave(rep, 0)), _product(k, basis_k)


def _product(rows: Tensor, basis: Tensor) -> Tensor:
    # Head by head over all batch entries: a view of the usual layout, tokens before heads.
    stacked = rows.transpose(0, 1).flatten(1, 2)
    product = saturate(torch.bmm(stacked, saturate(basis, rows.dtype)), rows.dtype)
    split: Tensor = product.unflatten(1, (rows.shape[0], -1))
    return split.transpose(0, 1)
