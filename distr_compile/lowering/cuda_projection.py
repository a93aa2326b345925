"""The estimator ``projection`` on a GPU: ``kernels/projection/launch.py``, asked by ``cuda.py``."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from distr_compile.kernels.projection.reference import counted_before, counted_rows
from distr_compile.lowering.cuda import Asked, Prologue

COMPUTES = ("projection",)


def prologue(q: Tensor, k: Tensor, mask: Tensor | None, asked: Asked) -> Prologue:
    """What makes Qhat and Khat of a chunk, and which rows of the call count for it by the mask."""
    from distr_compile.kernels.projection.launch import projection_factors, workspace_bytes

    _, heads, num_queries, head_dim = q.shape
    key_heads, num_keys = k.shape[1:3]
    rep, block, offset = heads // key_heads, asked.block, asked.strict_offset
    sizes = (num_queries, num_keys, key_heads, rep)
    if offset is None:
        blocks, counted = 0, counted_rows(mask, *sizes)
    else:
        blocks = -(-num_queries // block)
        counted = counted_before(mask, *sizes, block=block, causal_offset=offset)
    return Prologue(
        partial(
            projection_factors,
            rank=asked.rank,
            rounds=asked.rounds,
            grouping_block=block,
            seed=asked.seed,
        ),
        workspace_bytes(block, num_keys, head_dim, asked.rank, rep, q.element_size(), blocks),
        counted,
    )
