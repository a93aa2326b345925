"""The LSH estimators on a GPU: what launches the kernels of ``triton.py``."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from distr_compile.estimators import NUM_PROJECTIONS
from distr_compile.kernels.blocks import Places
from distr_compile.kernels.counted import counted_rows
from distr_compile.kernels.lsh.reference import COMPUTES as COMPUTES
from distr_compile.kernels.lsh.reference import variant_of
from distr_compile.kernels.padding import BLOCKS_PER_PROGRAM, cdiv, padded
from distr_compile.kernels.places import places
from distr_compile.kernels.plan import launch, new
from distr_compile.kernels.random import seed_offset
from distr_compile.kernels.roles import Asked, Prologue

CHUNK_ROWS = 512
"""Rows of Q per partial sum: 16 fp32 sums per column for 512 rows of it."""

PROJECT_TILE_BYTES = 2**14
"""Size of a tile of Q that is projected: three fit in the 64 KiB of local memory of a gfx942."""

GROUP_TILE_BYTES = 2**15
"""Size of a tile of Q or K whose columns are summed."""

MAX_CHUNKS = 32
"""Most partial sums per grouping block; longer blocks have longer chunks."""

LEAST_WIDTH = 16
"""Of a tile: the least that tensor cores take."""


def prologue(Q: Tensor, K: Tensor, mask: Tensor | None, asked: Asked) -> Prologue:
    """What makes Qhat and Khat of a chunk: it asks for no memory of its own.

    The mask says which rows count and where the blocks lie.
    """
    key_heads, num_keys = K.shape[1:3]
    rep = Q.shape[1] // key_heads
    # Keys have no part in a hash.
    queries, where = counted_rows(mask, Q.shape[2], num_keys, key_heads, rep)[0], None
    if mask is not None and queries is not None:
        where = places(mask, queries, Q.shape[0], num_keys, asked, keys_count=False)
    return Prologue(
        partial(
            lsh_factors,
            rank=asked.rank,
            estimator=asked.estimator,
            grouping_block=asked.block,
            seed=asked.seed,
        ),
        counted=(queries,),
        places=where,
    )


def lsh_factors(
    Q: Tensor,
    K: Tensor,
    queries: Tensor | None = None,
    *,
    rank: int,
    estimator: str,
    grouping_block: int,
    seed: int,
    is_causal: bool = False,
    causal_offset: int = 0,
    places: Places | None = None,
) -> tuple[Tensor, Tensor]:
    """Qhat and Khat of every grouping block: S is about Qhat Khat^T for the rows of the block.

    Inputs may have any strides and are read where they are. Three launches on the current stream
    of the current device, which must be Q's. No host synchronisation; nothing is kept after the
    call.

    Args:
        Q: ``(B, H, N, d)`` fp16, bf16 or fp32. Row 0 begins a grouping block; the last block may be
            short.
        K: ``(B or 1, H_k, M, d)`` of Q's dtype, H_k divides H. The query heads of a key head share
            one grouping.
        queries: bool ``(B or 1, H_k or 1, rep, N)``: the rows of Q that are hashed, the others as
            if they were 0; None for all.
        rank: r, a divisor of d.
        estimator: "lsh-sample" (Qhat takes the first column of each group), "lsh-mean" or
            "lsh-signed".
        grouping_block: query rows per grouping, at least 1.
        seed: names the projection matrix.
        is_causal: row i sees keys ``j <= i + causal_offset`` only. Rows of Khat that no row of
            their grouping block sees may stay unwritten.
        causal_offset: see ``is_causal``.
        places: where the blocks lie, in the place of ``grouping_block``.

    Returns:
        Qhat ``(B, H, N, r)`` and Khat ``(B, H_k, ceil(N / grouping_block), M, r)``, contiguous, of
        Q's dtype. With ``places`` as many blocks as that has, and rows that use no block of it may
        stay unwritten.
    """
    from distr_compile.kernels.lsh.triton import _group_kernel

    batch, heads, num_rows, head_dim = Q.shape
    key_heads, num_keys = K.shape[1:3]
    num_blocks = cdiv(num_rows, grouping_block)
    if places:
        num_blocks, grouping_block = places.blocks, places.rows
    Qhat = new(Q, batch, heads, num_rows, rank)
    Khat = new(Q, batch, key_heads, num_blocks, num_keys, rank)
    variant = variant_of(estimator)
    signed = variant.signed
    # Launches 1 and 2: partial sums of projections, then the order of the columns.
    projected = _project(Q, key_heads, grouping_block, seed, signed, queries, places)
    order = _order(projected, signed)

    # Launch 3: programs of K by unit, span of blocks and tile, then those of Q.
    rows = _tile_rows(Q, GROUP_TILE_BYTES)
    key_tiles = cdiv(num_keys, rows)
    spans = cdiv(num_blocks, BLOCKS_PER_PROGRAM)
    key_programs = batch * key_heads * spans * key_tiles
    tiles_per_block = cdiv(min(grouping_block, num_rows), rows)
    query_tiles = num_blocks * tiles_per_block
    if places:
        query_tiles = cdiv(num_rows, rows) + num_blocks - 1  # a block may end in part of a tile
    launch(
        _group_kernel,
        (key_programs + batch * heads * query_tiles,),
        Q,
        K,
        order,
        places and places.ends,
        Qhat,
        Khat,
        *Q.stride(),
        *K.expand(batch, -1, -1, -1).stride(),
        key_heads,
        heads // key_heads,
        num_rows,
        num_keys,
        grouping_block,
        num_blocks,
        causal_offset,
        key_tiles,
        spans,
        key_programs,
        query_tiles,
        tiles_per_block,
        HEAD_DIM=head_dim,
        WIDTH=padded(head_dim, LEAST_WIDTH),
        GROUP_SIZE=head_dim // rank,
        GROUPS=padded(rank, LEAST_WIDTH),
        ROWS=rows,
        SPAN=BLOCKS_PER_PROGRAM,
        SAMPLE=variant.sample,
        SIGNED=signed,
        CAUSAL=is_causal,
        num_warps=_num_warps(head_dim),
    )
    return Qhat, Khat


def lsh_order(
    Q: Tensor, key_heads: int, *, grouping_block: int, seed: int, signed: bool = False
) -> tuple[Tensor, Tensor]:
    """The order and the signs of Q's columns in every grouping block, as ``lsh_factors`` finds it.

    Returns:
        ``(B, key_heads, ceil(N / grouping_block), d)`` int64, the permutation and, for each column,
        1 or -1; see ``group_columns`` in ``reference.py``.
    """
    order = _order(_project(Q, key_heads, grouping_block, seed, signed), signed).long()
    columns, places = order.unbind(-2)
    return torch.where(columns < 0, ~columns, columns), torch.where(places < 0, -1, 1)


def _project(
    Q: Tensor,
    key_heads: int,
    grouping_block: int,
    seed: int,
    signed: bool,
    queries: Tensor | None = None,
    places: Places | None = None,
) -> Tensor:
    """Projected columns as partial sums, ``(B, H_k, num_blocks, num_chunks, d, 16)`` fp32."""
    from distr_compile.kernels.lsh.triton import _project_kernel

    batch, heads, num_rows, head_dim = Q.shape
    rep = heads // key_heads
    rows = _tile_rows(Q, PROJECT_TILE_BYTES)
    # The cut depends on the shape of a block alone: not on the batch, the heads or the device.
    block_rows = min(grouping_block, num_rows) * rep
    chunk_rows = max(CHUNK_ROWS, cdiv(cdiv(block_rows, MAX_CHUNKS), rows) * rows)
    num_chunks = cdiv(block_rows, chunk_rows)
    num_blocks = places.blocks if places else cdiv(num_rows, grouping_block)
    # Stride 0 where they are broadcast.
    if queries is not None:
        queries = queries.expand(batch, key_heads, -1, -1)
    partial = new(
        Q, batch, key_heads, num_blocks, num_chunks, head_dim, NUM_PROJECTIONS, dtype=torch.float32
    )
    launch(
        _project_kernel,
        (batch * key_heads * num_blocks * num_chunks,),
        Q,
        queries,
        places and places.ends,
        partial,
        *Q.stride(),
        *((0, 0, 0, 0) if queries is None else queries.stride()),
        key_heads,
        rep,
        num_rows,
        grouping_block,
        num_blocks,
        num_chunks,
        chunk_rows,
        seed_offset(seed),
        HEAD_DIM=head_dim,
        WIDTH=padded(head_dim, LEAST_WIDTH),
        NUM=NUM_PROJECTIONS,
        ROWS=rows,
        SIGNED=signed,
        num_warps=_num_warps(head_dim),
    )
    return partial


def _order(partial: Tensor, signed: bool) -> Tensor:
    """``(B, H_k, num_blocks, 2, d)`` int32: the order of the columns and its inverse."""
    from distr_compile.kernels.lsh.triton import _order_kernel

    *units, num_chunks, head_dim, _ = partial.shape
    order = new(partial, *units, 2, head_dim, dtype=torch.int32)
    launch(
        _order_kernel,
        (math.prod(units),),
        partial,
        order,
        num_chunks,
        HEAD_DIM=head_dim,
        WIDTH=padded(head_dim, LEAST_WIDTH),
        NUM=NUM_PROJECTIONS,
        SIGNED=signed,
        num_warps=_num_warps(head_dim),
    )
    return order


def _num_warps(head_dim: int) -> int:
    return 4 if head_dim <= 128 else 8


def _tile_rows(Q: Tensor, tile_bytes: int) -> int:
    return min(128, tile_bytes // (padded(Q.shape[-1], LEAST_WIDTH) * Q.element_size()))
