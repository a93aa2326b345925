"""A and B of the estimator ``projection`` on a CPU: ``projection.h`` of the fused kernel."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from distr_compile.kernels.attention import cpu
from distr_compile.kernels.projection.reference import RIDGE

_int64, _pointer = ctypes.c_int64, ctypes.c_void_p

SUMS = 8
"""Gram matrices per unit and block in the workspace: at most four pieces of Q and four of K."""


class _Bases(ctypes.Structure):
    """``struct Bases`` of ``projection.h``, field by field."""

    _fields_ = (
        ("size", _int64),
        *((name, _pointer) for name in "q k queries keys start seen a b carry carry_out".split()),
        ("q_strides", _int64 * 5),
        ("k_strides", _int64 * 4),
        ("queries_strides", _int64 * 4),
        ("keys_strides", _int64 * 3),
        *(
            (name, _int64)
            for name in "batch key_heads rep num_queries num_keys head_dim rank block first_block "
            "blocks rounds strict limited causal_offset dtype".split()
        ),
        ("ridge", ctypes.c_double),
        ("parallel_for", _pointer),
        ("threads", _int64),
        ("workspace", _pointer),
    )


def matrix_size(head_dim: int) -> int:
    """Elements of a Gram matrix in the workspace, its unit beside it."""
    return head_dim * cpu.padded(head_dim) + 16


def projection_bases(
    Q: Tensor,
    K: Tensor,
    queries: Tensor | None,
    keys: Tensor | None,
    start: Tensor,
    carry: Tensor | None,
    *,
    block: int,
    first_block: int,
    blocks: int,
    rounds: int,
    causal_offset: int | None,
    strict: bool,
    seen: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The bases of some grouping blocks, one after another, of all heads at once.

    Args:
        Q: ``(b, h, rep, N, d)`` fp32, fp16 or bf16, any strides.
        K: ``(b or 1, h, M, d)``.
        queries: ``(b or 1, h or 1, rep, N)`` bool, which rows count; None for all.
        keys: ``(b or 1, h or 1, M)`` bool, likewise.
        start: ``(d, r)`` fp32, what the iteration starts from.
        carry: what the call for the blocks before returned; None for the first.
        block: query rows per grouping block.
        first_block: the first of the blocks that are wanted.
        blocks: how many.
        rounds: 1 or 2.
        causal_offset: row i sees keys ``j <= i + causal_offset``; None where all do.
        strict: from the rows and keys before a block; ``causal_offset`` is a number then.
        seen: for each of all blocks the keys before this number count, if not all that
            ``causal_offset`` leaves do; never fewer than in the block before.

    Returns:
        A^T ``(b h, blocks, r, d)`` and B ``(b h, blocks, d, padded r)`` fp32, as
        ``cpu.attention`` takes them, and the next call's ``carry``. Beside them the call allocates
        ``SUMS`` Gram matrices per head and block, and 11 matrices of d x d, at most, per thread.
    """
    lib = cpu.library()
    b, h, rep, num_queries, d = Q.shape
    rank = start.shape[1]
    call = _Bases(size=ctypes.sizeof(_Bases), ridge=RIDGE)
    call.batch, call.key_heads, call.rep, call.num_queries, call.num_keys = (
        b, h, rep, num_queries, K.shape[2],
    )  # fmt: skip
    call.head_dim, call.rank, call.block, call.first_block = d, rank, block, first_block
    call.blocks, call.rounds, call.strict = blocks, rounds, strict
    call.limited, call.causal_offset = causal_offset is not None, causal_offset or 0
    call.dtype, call.parallel_for = cpu.DTYPES[Q.dtype], lib.parallel_for
    call.threads = torch.get_num_threads()
    keep = [cpu.point(call, "q", Q), cpu.point(call, "k", K)]
    keep += [
        cpu.point(call, name, t)
        for name, t in (("queries", queries), ("keys", keys))
        if t is not None
    ]
    new = {"dtype": torch.float32, "device": "cpu"}
    AT = torch.empty(b * h, blocks, rank, d, **new)  # type: ignore[call-overload]
    B = torch.empty(b * h, blocks, d, cpu.padded(rank), **new)  # type: ignore[call-overload]
    size = (b * h, 2, matrix_size(d))
    carry = torch.zeros(size, **new) if carry is None else carry  # type: ignore[call-overload]
    carry_out = torch.empty_like(carry)
    if seen is not None:
        keep.append(limits := torch.tensor(seen, dtype=torch.int64, device="cpu"))
        call.seen = limits.data_ptr()
    call.start, call.a, call.b = start.data_ptr(), AT.data_ptr(), B.data_ptr()
    call.carry, call.carry_out = carry.data_ptr(), carry_out.data_ptr()
    workspace = cpu.workspace(lib.handle.distr_bases_workspace(ctypes.byref(call)))
    call.workspace = workspace.data_ptr()
    lib.handle.distr_bases(ctypes.byref(call))
    return AT, B, carry_out
