"""Rows of Q and K as the estimators take and give them: stacked, in a working dtype, rounded."""

from __future__ import annotations

import torch
from torch import Tensor


def stack(Q: Tensor) -> Tensor:
    """``(b, h, rep, l, d)`` to ``(b h, l rep, d)``, rows token by token, in the working dtype."""
    return working(Q.transpose(2, 3)).reshape(-1, Q.shape[2] * Q.shape[3], Q.shape[4])


def working(t: Tensor) -> Tensor:
    """In the dtype of all arithmetic: fp64 stays, and what is narrower becomes fp32."""
    return t if t.dtype == torch.float64 else t.float()


def saturate(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to ``dtype``; what is finite stays finite (fp16: scores of 4e9 and more lose size)."""
    largest = torch.finfo(dtype).max
    return t.clamp(-largest, largest).to(dtype)
