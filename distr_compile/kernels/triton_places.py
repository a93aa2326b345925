"""Where grouping blocks lie, in a kernel: uniformly, or as the mask says; see ``places.py``."""

# Triton's decorators and the kernels under them cannot be typed.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _ceil(x, y):
    return (x + y - 1) // y


@triton.jit
def counted_rows_of(places, b, i, block, num_rows):
    """First row, and one past the last, of which A and B of block i of an entry are made."""
    if places is not None:
        first = tl.load(places + 5 * b + 2) + i * tl.load(places + 5 * b + 4)
        last = tl.minimum(first + tl.load(places + 5 * b + 4), tl.load(places + 5 * b + 3))
        return first, last
    else:
        return i * block, tl.minimum((i + 1) * block, num_rows)


@triton.jit
def blocks_from(places, b, row, block, num_blocks):
    """The first block of an entry that row ``row``, or a later one, uses; one past the last."""
    if places is not None:
        begin = tl.load(places + 5 * b + 2)
        rows = tl.load(places + 5 * b + 4)
        count = _ceil(tl.load(places + 5 * b + 3) - begin, rows)
        first = tl.minimum(tl.maximum(row - begin, 0) // rows, tl.maximum(count - 1, 0))
        return first, tl.minimum(count, num_blocks)
    else:
        return row // block, num_blocks


@triton.jit
def _lying(places, b):
    """The first row of an entry, one past its last, where block 0 begins, its rows, last block."""
    low = tl.load(places + 5 * b)
    high = tl.load(places + 5 * b + 1)
    begin = tl.load(places + 5 * b + 2)
    rows = tl.load(places + 5 * b + 4)
    last = tl.maximum(_ceil(tl.load(places + 5 * b + 3) - begin, rows), 1) - 1
    return low, high, begin, rows, last


@triton.jit
def rows_of_tile(places, b, tile, block, num_rows, tiles_per_block, ROWS: tl.constexpr):
    """Block of a tile of ROWS rows, its first row, and one past the last row of the block.

    Without ``places`` every block has ``tiles_per_block`` tiles. With it the tiles of an entry come
    one after another, and where there are more of them than the rows need, the first row is no less
    than the end.
    """
    if places is not None:
        low, high, begin, rows, last = _lying(places, b)
        tiles = _ceil(tl.where(last == 0, high, begin + rows) - low, ROWS)  # of the first block
        per_block = _ceil(rows, ROWS)
        rest = tl.maximum(tile - tiles, 0)
        i = tl.where(tile < tiles, 0, tl.minimum(1 + rest // per_block, last))
        first = begin + i * rows + (rest - (i - 1) * per_block) * ROWS
        first = tl.where(i == 0, low + tile * ROWS, first)
        return i, first, tl.where(i == last, high, begin + (i + 1) * rows)
    else:
        i = tile // tiles_per_block
        first = i * block + tile % tiles_per_block * ROWS
        return i, first, tl.minimum((i + 1) * block, num_rows)


@triton.jit
def rows_of_block(places, b, i, block, num_rows):
    """First row that uses block i of an entry, and one past the last; none where it has no such."""
    if places is not None:
        low, high, begin, rows, last = _lying(places, b)
        first = tl.where(i == 0, low, begin + i * rows)
        stop = tl.where(i == last, high, begin + (i + 1) * rows)
        return first, tl.where(i > last, first, stop)
    else:
        return i * block, tl.minimum((i + 1) * block, num_rows)


@triton.jit(do_not_specialize=["heads", "num_rows", "num_keys"])
def _last_seen_kernel(
    mask,
    last_seen,
    stride_b,
    stride_h,
    stride_n,
    stride_m,
    heads,
    num_rows,
    num_keys,
    LOWEST: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """``last_seen[b, row]``: one past the last key that a mask shows to a row of any head."""
    tiles = _ceil(num_rows, ROWS)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    key = tl.arange(0, KEYS)
    last = tl.zeros([ROWS], tl.int32)
    rows = mask + b * stride_b + row.to(tl.int64)[:, None] * stride_n
    for _ in range(heads):
        for start in range(0, num_keys, KEYS):
            is_there = (row < num_rows)[:, None] & (start + key < num_keys)[None, :]
            place = (start + key).to(tl.int64)[None, :] * stride_m
            entry = tl.load(rows + place, mask=is_there, other=0)
            seen = tl.where((entry > LOWEST) & is_there, (start + key + 1)[None, :], 0)
            last = tl.maximum(last, tl.max(seen, 1))
        rows += stride_h
    tl.store(last_seen + b * num_rows + row, last, mask=row < num_rows)
