"""Qhat = Q A and Khat = K B in Triton."""

# Triton's decorators and the kernels under them cannot be typed.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from distr_compile.kernels.projection.solve import block_of
from distr_compile.kernels.triton_places import blocks_from, rows_of_tile


@triton.jit
def _multiply_tile(
    tile,
    parts,
    factor,
    out,
    is_row,
    RANK: tl.constexpr,
    WIDTH: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LARGEST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the rows of ``tile`` times A or B at ``out``; what is finite stays finite."""
    for first in range(0, RANKS, COLUMNS):
        x = tl.load(block_of(parts, 0, first, RANKS, WIDTH, COLUMNS))
        hat = tl.dot(tile, x, input_precision=PRECISION)
        # In 16 bits A and B are sums of two parts: two products, added in fp32.
        if tile.dtype != tl.float32:
            low = tl.load(block_of(parts + WIDTH * RANKS, 0, first, RANKS, WIDTH, COLUMNS))
            hat = tl.dot(tile, low, hat)
        hat *= factor
        hat = tl.where(hat > LARGEST, LARGEST, tl.where(hat < -LARGEST, -LARGEST, hat))
        column = first + tl.arange(0, COLUMNS)
        tl.store(
            out[:, None] + column[None, :],
            hat.to(tile.dtype),
            mask=is_row[:, None] & (column < RANK)[None, :],
        )


@triton.jit(
    do_not_specialize=[
        "num_rows",
        "num_keys",
        "block",
        "num_blocks",
        "causal_offset",
        "key_tiles",
        "spans",
        "key_programs",
        "query_tiles",
        "tiles_per_block",
    ]
)
def _multiply_kernel(
    Q,
    K,
    parts,
    factors,
    places,
    Qhat,
    Khat,
    q_stride_b,
    q_stride_h,
    q_stride_n,
    q_stride_d,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    k_stride_d,
    key_heads,
    rep,
    num_rows,
    num_keys,
    block,
    num_blocks,
    causal_offset,
    key_tiles,
    spans,
    key_programs,
    query_tiles,
    tiles_per_block,
    HEAD_DIM: tl.constexpr,
    RANK: tl.constexpr,
    WIDTH: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
    CAUSAL: tl.constexpr,
    STRICT: tl.constexpr,
    LARGEST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Qhat and Khat, both contiguous. The first ``key_programs`` programs have a tile of K each.

    A program of K walks the grouping blocks of its span, a program of Q has the one of its tile.
    """
    pid = tl.program_id(0)
    tile_row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    is_column = (column < HEAD_DIM)[None, :]
    # Numbers of one A and its B, each in PARTS.
    PAIR: tl.constexpr = 2 * PARTS * WIDTH * RANKS
    if pid < key_programs:
        # Khat: one tile of keys for all grouping blocks of a span.
        first_key = pid % key_tiles * ROWS
        first_block = pid // key_tiles % spans * SPAN
        last_block = min(first_block + SPAN, num_blocks)
        unit = (pid // key_tiles // spans).to(tl.int64)
        if CAUSAL:
            # Rows from first_key - causal_offset on see a key of this tile.
            first_row = max(first_key - causal_offset, 0)
            if STRICT:  # the blocks after its own
                first_row = max(first_key - causal_offset + block, 0)
            elif first_row >= num_rows:
                first_block = last_block  # no row sees the tile
            from_block, last = blocks_from(places, unit // key_heads, first_row, block, num_blocks)
            first_block = max(first_block, from_block)
            last_block = min(last_block, last)
        if first_block < last_block:
            key = (first_key + tile_row).to(tl.int64)
            is_key = key < num_keys
            k = K + unit // key_heads * k_stride_b + unit % key_heads * k_stride_h
            tile = tl.load(
                (k + key * k_stride_n)[:, None] + (column * k_stride_d)[None, :],
                mask=is_key[:, None] & is_column,
                other=0.0,
            )
            # Each block has a B of its own for the same tile.
            for i in range(first_block, last_block):
                unit_block = unit * num_blocks + i
                _multiply_tile(
                    tile,
                    parts + unit_block * PAIR + PARTS * WIDTH * RANKS,
                    tl.load(factors + 2 * unit_block + 1),
                    Khat + (unit_block * num_keys + key) * RANK,
                    is_key,
                    RANK,
                    WIDTH,
                    RANKS,
                    COLUMNS,
                    LARGEST,
                    PRECISION,
                )
    else:
        pid -= key_programs
        # Qhat: one tile of rows of one head, in one grouping block.
        head = (pid // query_tiles).to(tl.int64)  # counted over the batch
        heads = key_heads * rep
        i, first, last = rows_of_tile(
            places, head // heads, pid % query_tiles, block, num_rows, tiles_per_block, ROWS
        )
        row = first + tile_row
        is_row = row < last
        row = row.to(tl.int64)
        q = Q + head // heads * q_stride_b + head % heads * q_stride_h
        tile = tl.load(
            (q + row * q_stride_n)[:, None] + (column * q_stride_d)[None, :],
            mask=is_row[:, None] & is_column,
            other=0.0,
        )
        unit_block = head // rep * num_blocks + i
        _multiply_tile(
            tile,
            parts + unit_block * PAIR,
            tl.load(factors + 2 * unit_block),
            Qhat + (head * num_rows + row) * RANK,
            is_row,
            RANK,
            WIDTH,
            RANKS,
            COLUMNS,
            LARGEST,
            PRECISION,
        )
