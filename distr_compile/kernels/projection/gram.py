"""Gram matrices of Q and of K in Triton: partial ones over chunks of rows, and their sums."""

# Triton's decorators and the kernels under them cannot be typed.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from distr_compile.kernels.triton_places import counted_rows_of


@triton.jit
def exponent_of(x):
    """Floor of log2 of positive fp32 numbers; -127 for 0 and what is not normal."""
    return (x.to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def power_of_two(exponent):
    """2^exponent as fp32, from 2^-126 to 2^127; the nearest of these beyond."""
    exponent = tl.minimum(tl.maximum(exponent, -126), 127)
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _load_finite(x, stride_d, column, is_row, HEAD_DIM: tl.constexpr):
    """Some columns of the rows at ``x``; 0 in place of what is not there or not finite."""
    tile = tl.load(
        x[:, None] + (column * stride_d)[None, :],
        mask=is_row[:, None] & (column < HEAD_DIM)[None, :],
        other=0.0,
    )
    return tl.where(tl.abs(tile.to(tl.float32)) < float("inf"), tile, 0.0)


@triton.jit
def _gram_of_rows(
    X,
    stride_h,
    stride_n,
    stride_d,
    counted,
    counted_stride_h,
    counted_stride_n,
    rep,
    first,
    last,
    out,
    out_exponent,
    first_column,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    COUNTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Some columns of X^T X, over the counted ones of the rows ``first`` to ``last``.

    Row i is token ``i // rep`` of head ``i % rep``. X^T X = 4^exponent times what is written.
    """
    column = tl.arange(0, WIDTH)
    some = first_column + tl.arange(0, COLUMNS)
    dtype: tl.constexpr = X.dtype.element_ty
    # Some columns of X^T X so far, [WIDTH, COLUMNS], in units of 4^exponent.
    sums = tl.zeros([WIDTH, COLUMNS], tl.float32)
    exponent = -127
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        token, head = (row // rep).to(tl.int64), (row % rep).to(tl.int64)
        is_row = row < last
        if COUNTED:
            place = token * counted_stride_n + head * counted_stride_h
            is_row = tl.load(counted + place, mask=is_row, other=0) != 0
        rows = X + token * stride_n + head * stride_h
        left = _load_finite(rows, stride_d, column, is_row, HEAD_DIM)
        if COLUMNS < WIDTH:
            right = _load_finite(rows, stride_d, some, is_row, HEAD_DIM)
        else:
            # The same numbers by another expression: Triton 3.6 fails to compile the product of a
            # tile with itself for sm_100.
            right = tl.where((some < HEAD_DIM)[None, :], left, 0.0)
        if dtype != tl.float16:
            # Squares of fp16 numbers fit fp32. Others are divided by the power of two below the
            # largest so far; 2^-127 is no normal number, so 126 is the last.
            largest = tl.max(tl.max(tl.abs(left.to(tl.float32)), 1), 0)
            grown = tl.maximum(exponent, tl.minimum(exponent_of(largest), 126))
            # What was summed before goes over to the larger unit.
            sums *= power_of_two(2 * (exponent - grown))
            exponent = grown
            unit = power_of_two(-exponent)
            left = (left.to(tl.float32) * unit).to(dtype)
            right = (right.to(tl.float32) * unit).to(dtype)
        sums = tl.dot(tl.trans(left), right, sums, input_precision=PRECISION)
    if dtype == tl.float16:
        exponent = 0  # never scaled
    tl.store(out + column[:, None] * WIDTH + some[None, :], sums)
    tl.store(out_exponent, exponent)


@triton.jit(
    do_not_specialize=[
        "num_rows",
        "num_keys",
        "block",
        "num_blocks",
        "causal_offset",
        "earlier",
        "query_chunks",
        "key_chunks",
        "jobs",
    ]
)
def _gram_kernel(
    Q,
    K,
    query_counted,
    key_counted,
    places,
    seen,
    partial,
    exponents,
    q_stride_b,
    q_stride_h,
    q_stride_n,
    q_stride_d,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    k_stride_d,
    cq_stride_b,
    cq_stride_h,
    cq_stride_r,
    cq_stride_n,
    ck_stride_b,
    ck_stride_h,
    ck_stride_n,
    key_heads,
    rep,
    num_rows,
    num_keys,
    block,
    num_blocks,
    causal_offset,
    earlier,
    query_chunks,
    key_chunks,
    jobs,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    STRICT: tl.constexpr,
    COUNTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``partial[unit, job]``; a unit is a key head of one batch element.

    The jobs of a unit: the chunks of each grouping block of Q, the chunks of K, and with causality
    for each block the keys it sees beyond its last whole chunk. ``earlier`` blocks of Q lie before
    row 0. ``seen`` says of how many keys that is, in the place of causality.
    """
    unit = (tl.program_id(0) // jobs).to(tl.int64)
    job = tl.program_id(0) % jobs
    first_column = tl.program_id(1) * COLUMNS
    b, h = unit // key_heads, unit % key_heads
    out = partial + tl.program_id(0).to(tl.int64) * (WIDTH * WIDTH)
    exponents += tl.program_id(0)
    if job < (earlier + num_blocks) * query_chunks:
        i = job // query_chunks - earlier  # below 0 for blocks before row 0
        begin, end = counted_rows_of(places, b, i, block, num_rows)
        first_token = begin.to(tl.int64)
        first = job % query_chunks * CHUNK
        last = min(first + CHUNK, (end - begin) * rep)
        Q += b * q_stride_b + h * rep * q_stride_h + first_token * q_stride_n
        query_counted += b * cq_stride_b + h * cq_stride_h + first_token * cq_stride_n
        _gram_of_rows(
            Q,
            q_stride_h,
            q_stride_n,
            q_stride_d,
            query_counted,
            cq_stride_r,
            cq_stride_n,
            rep,
            first,
            last,
            out,
            exponents,
            first_column,
            HEAD_DIM,
            WIDTH,
            COLUMNS,
            ROWS,
            COUNTED,
            PRECISION,
        )
    else:
        job -= (earlier + num_blocks) * query_chunks
        first = job * CHUNK
        last = min(first + CHUNK, num_keys)
        if job >= key_chunks:
            # The rest of block i: keys that it sees beyond its last whole chunk.
            i = job - key_chunks
            if seen is not None:
                last = tl.load(seen + b * num_blocks + i)
            else:
                last = keys_seen(i, num_rows, num_keys, block, causal_offset, STRICT)
            first = last // CHUNK * CHUNK
        K += b * k_stride_b + h * k_stride_h
        key_counted += b * ck_stride_b + h * ck_stride_h
        _gram_of_rows(
            K,
            k_stride_h,
            k_stride_n,
            k_stride_d,
            key_counted,
            0,
            ck_stride_n,
            1,
            first,
            last,
            out,
            exponents,
            first_column,
            HEAD_DIM,
            WIDTH,
            COLUMNS,
            ROWS,
            COUNTED,
            PRECISION,
        )


@triton.jit
def keys_seen(i, num_rows, num_keys, block, causal_offset, STRICT: tl.constexpr):
    """Keys that some row of block i sees; if strict, those that come before its first row."""
    rows = i * block if STRICT else min((i + 1) * block, num_rows)
    return min(max(rows + causal_offset, 0), num_keys)


@triton.jit(
    do_not_specialize=[
        "num_rows",
        "num_keys",
        "block",
        "num_blocks",
        "causal_offset",
        "earlier",
        "query_chunks",
        "key_chunks",
        "jobs",
        "matrices",
    ]
)
def _sum_kernel(
    partial,
    exponents,
    grams,
    gram_exponents,
    seen,
    key_heads,
    num_rows,
    num_keys,
    block,
    num_blocks,
    causal_offset,
    earlier,
    query_chunks,
    key_chunks,
    jobs,
    matrices,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    CAUSAL: tl.constexpr,
    STRICT: tl.constexpr,
):
    """``grams[unit]``: Cq of each block, then Ck, with causality of each block; not yet scaled.

    If strict, Cq of a block is that of all rows before it.
    """
    unit = (tl.program_id(0) // matrices).to(tl.int64)
    matrix = tl.program_id(0) % matrices
    rest = jobs  # none
    # Cq: the chunks of its block, or of all blocks before it.
    if matrix < num_blocks:
        first = matrix * query_chunks
        last = first + query_chunks
        if STRICT:
            last = first + earlier * query_chunks
            first = tl.full([], 0, tl.int32)
    else:
        # Ck: all chunks of K, or the whole ones that block i sees, and its rest.
        first = (earlier + num_blocks) * query_chunks
        last = first + key_chunks
        if CAUSAL:
            i = matrix - num_blocks
            rest = last + i
            if seen is not None:
                keys = tl.load(seen + unit // key_heads * num_blocks + i)
            else:
                keys = keys_seen(i, num_rows, num_keys, block, causal_offset, STRICT)
            last = first + keys // CHUNK

    exponents += unit * jobs
    # The parts have units of their own: all are brought to the largest, by powers of two.
    largest = -127
    for job in range(first, last):
        largest = tl.maximum(largest, tl.load(exponents + job))
    if rest < jobs:
        largest = tl.maximum(largest, tl.load(exponents + rest))

    entry = tl.program_id(1) * TILE + tl.arange(0, TILE)
    partial += unit * jobs * SIZE + entry
    place = partial + first.to(tl.int64) * SIZE
    sums = tl.zeros([TILE], tl.float32)
    for job in range(first, last):
        share = power_of_two(2 * (tl.load(exponents + job) - largest))
        sums += tl.load(place) * share
        place += SIZE
    if rest < jobs:
        share = power_of_two(2 * (tl.load(exponents + rest) - largest))
        sums += tl.load(partial + rest.to(tl.int64) * SIZE) * share
    tl.store(grams + tl.program_id(0).to(tl.int64) * SIZE + entry, sums)
    tl.store(gram_exponents + tl.program_id(0), largest)
