"""Qhat and Khat of ``calibrated`` for a device with kernels: two products for the whole call."""

from __future__ import annotations

import sys
import weakref
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
    return _product(q, prepared(basis_q, q.dtype, rep)), _product(k, prepared(basis_k, k.dtype, 1))


_prepared: dict[int, tuple[weakref.ref[Tensor], tuple[object, ...], Tensor]] = {}
"""Number of a basis -> itself; its version, dtype, heads, stream; what was made of it for them."""


def prepared(basis: Tensor, dtype: torch.dtype, rep: int) -> Tensor:
    """A basis in the dtype of its products, a copy for each query head; made once, not per call.

    It is made anew where the basis was written to, and on another stream, which would have to wait.
    Nothing is kept of tensors that do not count their writes. While a CUDA graph is recorded
    nothing is looked up either, as it shall see later writes; nor is anything kept where Inductor's
    CUDA graphs are in use, in whose memory it might lie.

    Args:
        basis: ``(H_k, d, r)``.
        dtype: of the result.
        rep: query heads per key head.

    Returns:
        ``(H_k rep, d, r)``.
    """
    stream = torch.cuda.current_stream(basis.device).cuda_stream if basis.is_cuda else 0
    # Tensors of inference mode do not count their writes.
    is_kept = not basis.is_inference()
    if is_kept and basis.is_cuda:
        is_kept = not torch.cuda.is_current_stream_capturing()
    name, what = id(basis), (basis._version if is_kept else None, dtype, rep, stream)
    known = _prepared.get(name) if is_kept else None
    if known is not None and known[0]() is basis and known[1] == what:
        return known[2]
    made = saturate(basis if rep == 1 else basis.repeat_interleave(rep, 0), dtype)
    if is_kept and not (basis.is_cuda and _has_graphs(basis.device)):
        # Goes when the basis does: another tensor may get its number.
        _prepared[name] = weakref.ref(basis, lambda _: _prepared.pop(name, None)), what, made
    return made


def _has_graphs(device: torch.device) -> bool:
    """Whether Inductor records CUDA graphs on a device, in this thread."""
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is None:
        return False
    try:
        return trees.get_manager(device.index, create_if_none_exists=False) is not None
    except Exception:  # it is none of PyTorch's public functions
        return True


def _product(rows: Tensor, basis: Tensor) -> Tensor:
    # Head by head over all batch entries: a view of the usual layout, tokens before heads.
    stacked = rows.transpose(0, 1).flatten(1, 2)
    largest = torch.finfo(rows.dtype).max
    product = torch.bmm(stacked, basis).clamp_(-largest, largest)
    split: Tensor = product.unflatten(1, (rows.shape[0], -1))
    return split.transpose(0, 1)
