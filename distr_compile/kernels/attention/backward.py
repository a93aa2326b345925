"""The backward of the fused CPU kernel, ``backward.h``: its arguments, handed over by ctypes."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from distr_compile.kernels.attention import build
from distr_compile.kernels.attention import cpu as kernel
from distr_compile.kernels.attention.dropout import Dropout
from distr_compile.kernels.rows import four_dimensions

_int64, _pointer = ctypes.c_int64, ctypes.c_void_p

_STRIDES = {
    **dict.fromkeys(("q", "k", "v", "mask", "out", "grad"), 4),
    **dict.fromkeys(("basis", "basis_t"), 3),
    **dict.fromkeys(("dq", "dk", "dv", "dmask"), 4),
}


class _Gradients(ctypes.Structure):
    """``struct Gradients`` of ``backward.h``, field by field."""

    _fields_ = (
        ("size", _int64),
        *(
            (name, _pointer)
            for name in "q k v mask out grad lse a a_t b b_t dq dk dv delta dmask".split()
        ),
        *((f"{name}_strides", _int64 * count) for name, count in _STRIDES.items()),
        *(
            (name, _int64)
            for name in "batch heads key_heads shares queries keys entries rank head_dim value_dim "
            "block is_causal causal_offset strict dtype mask_kind".split()
        ),
        ("scale", ctypes.c_double),
        ("softcap", ctypes.c_double),
        ("dropout", kernel.DroppedWeights),
        ("parallel_for", _pointer),
        ("threads", _int64),
        ("workspace", _pointer),
    )


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
    *,
    scale: float,
    is_causal: bool = False,
    causal_offset: int = 0,
    grouping_block: int = 0,
    softcap: float = 0.0,
    bases: tuple[Tensor, Tensor] | None = None,
    strict: bool = False,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    delta: Tensor | None = None,
    dmask: Tensor | None = None,
    dropout: Dropout | None = None,
    lib: build.Library | None = None,
) -> None:
    """Gradients of softmax(scale * Q A (K B)^T + mask) V by Q, K and V, with fp32 sums.

    Beside inputs and outputs a thread takes a workspace that does not grow with N or M: at most 6
    MiB for d = 128 and r = 64, and 10 in the strict form. Bits do not depend on the number of
    threads, which is that of ``torch.set_num_threads``; key heads are what is dealt out to them,
    with all batch entries where a mask that these share gets a gradient.

    Args:
        q: ``(B, H, N, d)`` fp32, fp16 or bf16, any strides.
        k: ``(B or 1, H_k, M, d)``.
        v: ``(B or 1, H_k, M, d_v)``, with the batch size of k.
        mask: bool or floating, broadcastable to ``(B, H, N, M)``.
        out: ``(B, H, N, d_v)``, the result of the forward.
        lse: ``(B, H, N)`` fp32, the logarithm of each row's sum of exponentials.
        grad: ``(B, H, N, d_v)`` in the dtype of q, the gradient of ``out``.
        scale: multiplies the scores.
        is_causal: row i sees keys ``j <= i + causal_offset``.
        causal_offset: see ``is_causal``.
        grouping_block: query rows that share A and B; 0 for all.
        softcap: c > 0 makes scaled scores s ``c * tanh(s / c)``; 0 does not.
        bases: A and B ``(B or 1, H_k, blocks, d, r)``; None where the call is exact.
        strict: with bases, the form in which a block that starts at row s > 0 uses them for keys
            before ``s + causal_offset`` only, and the first block for none.
        dq: ``(B, H, N, d)`` in the dtype of q, any strides, is filled.
        dk: like k but in fp32 and with unit last stride, is filled.
        dv: like v, likewise.
        dmask: fp32, contiguous, of the mask's sizes, four of them; filled with its gradient, the
            sum over what it is broadcast over. That is not several heads, if there are several key
            heads.
        delta: ``(B, H, N)`` fp32, contiguous; filled with each row's sum of ``grad * out``.
        dropout: says which weights were dropped.
        lib: see ``cpu.attention``.

    Raises:
        RuntimeError: the kernel is not available.
    """
    lib = kernel.library() if lib is None else lib
    # The kernel adds to them, chunk of rows after chunk of rows.
    dk.zero_()
    dv.zero_()
    queries = q.shape[2]
    if not out.numel():
        for given in (dq, delta, dmask):
            if given is not None:
                given.zero_()
        return
    call = _Gradients(size=ctypes.sizeof(_Gradients), scale=scale, softcap=softcap)
    call.batch, call.heads, call.queries, call.head_dim = q.shape
    call.key_heads, call.keys, call.value_dim = v.shape[1:]
    # One task takes all entries that share a K and V, so that no two tasks add to one sum.
    call.shares = call.entries = call.batch // k.shape[0]
    call.strict = strict
    call.rank, call.block = call.head_dim, min(grouping_block or queries, queries)
    call.is_causal, call.causal_offset = is_causal, causal_offset
    call.dtype, call.mask_kind = kernel.DTYPES[q.dtype], kernel.NO_MASK
    lse = lse.contiguous()
    call.lse = lse.data_ptr()
    tensors = {"q": q, "k": k, "v": v, "out": out, "grad": grad, "dq": dq, "dk": dk, "dv": dv}
    if mask is not None:
        call.mask_kind = kernel.MASK_DTYPES[mask.dtype]
        tensors["mask"] = four_dimensions(mask)
    # The struct has addresses only: what they point to must outlive the call.
    keep = [kernel.point(call, name, t) for name, t in tensors.items()]
    if dmask is not None:
        keep.append(kernel.point(call, "dmask", dmask.zero_()))
        if dmask.shape[0] < call.batch:  # entries share its sums as well
            call.entries = call.batch
    if bases is not None:
        call.rank = bases[0].shape[4]
        A, B = (t.float() for t in bases)
        # Each product reads its matrix row by row: both come as they are and transposed.
        for names, strides, made in (
            (("a", "b"), "basis_strides", (_padded(A), _padded(B))),
            (("a_t", "b_t"), "basis_t_strides", (_padded(A.mT), _padded(B.mT))),
        ):
            for name, t in zip(names, made, strict=True):
                setattr(call, name, t.data_ptr())
                keep.append(t)
            getattr(call, strides)[:] = [
                s if n > 1 else 0 for s, n in zip(t.stride()[:3], t.shape[:3], strict=True)
            ]
    if dropout is not None:
        call.dropout = kernel.DroppedWeights.of(dropout)
    if delta is not None:
        call.delta = delta.data_ptr()
    call.threads = torch.get_num_threads()
    call.parallel_for = lib.parallel_for
    memory = kernel.workspace(lib.handle.distr_backward_workspace(ctypes.byref(call)))
    call.workspace = memory.data_ptr()
    lib.handle.distr_backward(ctypes.byref(call))


def _padded(matrix: Tensor) -> Tensor:
    """Contiguous, with columns of zeros up to a multiple of ``RANK_UNIT``."""
    more = kernel.padded(matrix.shape[-1]) - matrix.shape[-1]
    return torch.nn.functional.pad(matrix, (0, more)).contiguous()
