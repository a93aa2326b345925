"""Rows of Q and K, and of their masks: stacked, sliced, in a working dtype, rounded."""

from __future__ import annotations

import torch
from torch import Tensor


def stack(Q: Tensor) -> Tensor:
    """``(b, h, rep, l, d)`` to ``(b h, l rep, d)``, rows token by token, in the working dtype."""
    return working(Q.transpose(2, 3)).reshape(-1, Q.shape[2] * Q.shape[3], Q.shape[4])


def sliced(mask: Tensor, *ranges: slice) -> Tensor:
    """The mask in ranges of its leading dimensions, all of those that it is broadcast over."""
    whole = slice(None)
    return mask[tuple(r if n > 1 else whole for r, n in zip(ranges, mask.shape, strict=False))]


def four_dimensions(mask: Tensor) -> Tensor:
    """A mask with axes of size 1 in front, where it has fewer than four."""
    return mask.reshape((1,) * (4 - mask.dim()) + mask.shape)


def working(t: Tensor) -> Tensor:
    """Cast to the dtype of all arithmetic: fp64 stays, and what is narrower becomes fp32."""
    return t if t.dtype == torch.float64 else t.float()


def saturate(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to ``dtype``; what is finite stays finite (fp16: scores of 4e9 and more lose size)."""
    largest = torch.finfo(dtype).max
    return t.clamp(-largest, largest).to(dtype)
