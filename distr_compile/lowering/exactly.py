"""Exact attention in the place of the estimate: what a rewritten graph is checked with.

Inside :func:`computing_exactly` the op evaluates the formula of attention in fp64 from its own
arguments, whatever its rank and estimator. A graph in which it stands must then give what the
model gives, up to the model's own rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from distr_compile.kernels.attention import reference
from distr_compile.kernels.attention.dropout import Dropout

CHUNK_BYTES = 256 * 2**20
"""Scores held at one time."""

_WIDEST = {"mps": torch.float32}
"""Dtype of the arithmetic on devices without fp64."""

_is_exact: ContextVar[bool] = ContextVar("distr_is_exact", default=False)

_was_entered = False
"""Whether any thread ever entered the context."""


@contextmanager
def computing_exactly() -> Iterator[None]:
    """Let every ``distr.attention`` that is called inside compute exact attention.

    The checks of the op are as always. Graphs that are compiled inside or before obey alike, with
    any compiler; a CUDA graph that was recorded before does not. Only the thread or task that
    entered the context is affected. A backward computes what its forward did, wherever it runs.
    """
    global _was_entered
    _was_entered = True
    token = _is_exact.set(True)
    try:
        yield
    finally:
        _is_exact.reset(token)


def is_computing_exactly() -> bool:
    """Whether this thread or task is inside :func:`computing_exactly`."""
    return _is_exact.get()


def was_entered() -> bool:
    """Whether any thread of this process ever entered :func:`computing_exactly`."""
    return _was_entered


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    causal_offset: int,
    dropout: Dropout | None,
    **softmax: Any,
) -> Tensor:
    """Attention by its formula, ``CHUNK_BYTES`` of scores at a time.

    Args:
        q: ``(B, H, N, d)``.
        k: ``(B or 1, H_k, M, d)``.
        v: ``(B or 1, H_k, M, d_v)``.
        mask: broadcastable to ``(B, H, N, M)``, bool or floating, or None.
        causal_offset: as in the op.
        dropout: says which weights are dropped.
        **softmax: ``scale``, ``is_causal``, ``softcap`` and ``sinks`` of the op.

    Returns:
        ``(B, H, N, d_v)`` in the dtype of q.
    """
    dtype = _WIDEST.get(q.device.type, torch.float64)
    batch, heads, num_queries, head_dim = q.shape
    row_bytes = batch * heads * k.shape[2] * dtype.itemsize
    step = max(1, CHUNK_BYTES // max(1, row_bytes))
    # Converted once, Q chunk by chunk.
    wide_k, wide_v = k.to(dtype), v.to(dtype)
    has_rows = mask is not None and mask.dim() > 1 and mask.shape[-2] != 1
    parts = [
        reference.attention(
            q[:, :, start : start + step].to(dtype),
            wide_k,
            wide_v,
            mask[..., start : start + step, :] if mask is not None and has_rows else mask,
            causal_offset=causal_offset + start,
            rank=head_dim,
            dropout=None if dropout is None else dropout.part(row=start),
            **softmax,
        ).to(q.dtype)
        for start in range(0, max(1, num_queries), step)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)
