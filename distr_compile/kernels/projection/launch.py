"""The estimator ``projection`` on a GPU: Qhat = Q A and Khat = K B, in four Triton launches.

The definition is ``kernels/projection/reference.py``; A and B of d x r belong to a key head and a
grouping block.

1. ``_gram_kernel``: partial Gram matrices X^T X over chunks of ``CHUNK_ROWS`` rows of Q and of K,
   each scaled by a power of two so that nothing overflows.
2. ``_sum_kernel``: adds the partial matrices of a block in a fixed order. Where causality ends a
   block inside a chunk of K, the rows up to there have a partial matrix of their own.
3. ``_solve_kernel``: one program per key head and block does the algebra in fp32. X, A and B lie
   in memory, small enough for the caches, and pass through registers in panels of 16 columns. QR
   and Cholesky of the definition are Gram-Schmidt here, in the Euclidean product and then in that
   of Cq: the spans are the same, and A B^T is.
4. ``_multiply_kernel``: Qhat and Khat. A tile of K is read once for up to ``BLOCKS_PER_PROGRAM``
   grouping blocks.

The least it can move and compute is in ``estimators.py``; Q and K are read twice. Products of fp16
and bf16 inputs run on tensor cores with fp32 accumulation, A and B as sums of two numbers of the
inputs' dtype, which keeps 22 and 16 of their bits. Products of fp32 numbers are three tf32 products
each on NVIDIA, but for the small ones of Gram-Schmidt, and fp32 elsewhere. Nothing depends on the
order in which programs run, nor on how a caller cuts heads and grouping blocks into calls: there
are no atomics.
"""

# Triton's decorators and the kernels under them cannot be typed.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from distr_compile.kernels.lsh.triton import BLOCKS_PER_PROGRAM, _random_numbers, _seed_offset
from distr_compile.kernels.projection.reference import RIDGE

MAX_HEAD_DIM = 256

CHUNK_ROWS = 1024
"""Rows of Q or K per partial Gram matrix: 4 d^2 bytes for 1024 rows."""

GRAM_TILE_BYTES = 2**14
"""Size of a tile of Q or K that is multiplied by itself."""

MULTIPLY_TILE_BYTES = 2**15
"""Size of a tile of Q or K that is multiplied by A or B."""

PANEL = 16
"""Columns that are made orthonormal together; the least width of a matrix product."""

LEAST_PIVOT = 2.0**-20
"""A fourth of ``RIDGE``: no squared length in the product of Cq is below that but by rounding."""

TINY = 2.0**-126


# --- Gram matrices ------------------------------------------------------------------------------


@triton.jit
def _exponent(x):
    """Floor of log2 of positive fp32 numbers; -127 for 0 and what is not normal."""
    return (x.to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def _power_of_two(exponent):
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
            grown = tl.maximum(exponent, tl.minimum(_exponent(largest), 126))
            sums *= _power_of_two(2 * (exponent - grown))
            exponent = grown
            unit = _power_of_two(-exponent)
            left = (left.to(tl.float32) * unit).to(dtype)
            right = (right.to(tl.float32) * unit).to(dtype)
        sums = tl.dot(tl.trans(left), right, sums, input_precision=PRECISION)
    if dtype == tl.float16:
        exponent = 0
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
    row 0.
    """
    unit = (tl.program_id(0) // jobs).to(tl.int64)
    job = tl.program_id(0) % jobs
    first_column = tl.program_id(1) * COLUMNS
    b, h = unit // key_heads, unit % key_heads
    out = partial + tl.program_id(0).to(tl.int64) * (WIDTH * WIDTH)
    exponents += tl.program_id(0)
    if job < (earlier + num_blocks) * query_chunks:
        i = job // query_chunks - earlier
        first_token = (i * block).to(tl.int64)
        first = job % query_chunks * CHUNK
        last = min(first + CHUNK, min(block, num_rows - i * block) * rep)
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
            last = _keys_seen(job - key_chunks, num_rows, num_keys, block, causal_offset, STRICT)
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
def _keys_seen(i, num_rows, num_keys, block, causal_offset, STRICT: tl.constexpr):
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
    if matrix < num_blocks:
        first = matrix * query_chunks
        last = first + query_chunks
        if STRICT:
            last = first + earlier * query_chunks
            first = tl.full([], 0, tl.int32)
    else:
        first = (earlier + num_blocks) * query_chunks
        last = first + key_chunks
        if CAUSAL:
            i = matrix - num_blocks
            rest = last + i
            seen = _keys_seen(i, num_rows, num_keys, block, causal_offset, STRICT)
            last = first + seen // CHUNK

    exponents += unit * jobs
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
        share = _power_of_two(2 * (tl.load(exponents + job) - largest))
        sums += tl.load(place) * share
        place += SIZE
    if rest < jobs:
        share = _power_of_two(2 * (tl.load(exponents + rest) - largest))
        sums += tl.load(partial + rest.to(tl.int64) * SIZE) * share
    tl.store(grams + tl.program_id(0).to(tl.int64) * SIZE + entry, sums)
    tl.store(gram_exponents + tl.program_id(0), largest)


# --- bases --------------------------------------------------------------------------------------


@triton.jit
def _block_of(X, first_row, first_column, STRIDE: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Pointers to ``(R, C)`` entries of a matrix whose rows are ``STRIDE`` numbers apart."""
    row, column = first_row + tl.arange(0, R), first_column + tl.arange(0, C)
    return X + row[:, None] * STRIDE + column[None, :]


@triton.jit
def _scales_of_grams(Cq, Ck, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, RIDGE: tl.constexpr):
    """What makes of the sums the matrices of ``gram`` in ``reference.py``.

    Returns for each: factor, what is added to the diagonal, exponent; then the sum of the entries
    of Cq * Ck.
    """
    SLICE: tl.constexpr = 16
    q_squares = tl.zeros([SLICE, WIDTH], tl.float32)
    k_squares = tl.zeros([SLICE, WIDTH], tl.float32)
    products = tl.zeros([SLICE, WIDTH], tl.float32)
    q_diagonal = tl.zeros([SLICE, WIDTH], tl.float32)
    k_diagonal = tl.zeros([SLICE, WIDTH], tl.float32)
    for first in range(0, WIDTH, SLICE):
        cq = tl.load(_block_of(Cq, first, 0, WIDTH, SLICE, WIDTH))
        ck = tl.load(_block_of(Ck, first, 0, WIDTH, SLICE, WIDTH))
        on = first + tl.arange(0, SLICE)[:, None] == tl.arange(0, WIDTH)[None, :]
        q_squares += cq * cq
        k_squares += ck * ck
        products += cq * ck
        q_diagonal += tl.where(on, cq, 0.0)
        k_diagonal += tl.where(on, ck, 0.0)
    q_norm = tl.sqrt(tl.sum(tl.sum(q_squares, 1), 0))
    k_norm = tl.sqrt(tl.sum(tl.sum(k_squares, 1), 0))
    # Of 0 the identity is made.
    q_exponent = tl.where(q_norm > 0, _exponent(q_norm) >> 1, 0)
    k_exponent = tl.where(k_norm > 0, _exponent(k_norm) >> 1, 0)
    q_factor = tl.where(q_norm > 0, _power_of_two(-2 * q_exponent), 0.0)
    k_factor = tl.where(k_norm > 0, _power_of_two(-2 * k_exponent), 0.0)
    q_ridge = tl.where(q_norm > 0, RIDGE, 1.0)
    k_ridge = tl.where(k_norm > 0, 0.0, 1.0)
    energy = q_factor * k_factor * tl.sum(tl.sum(products, 1), 0) + q_ridge * k_ridge * HEAD_DIM
    energy += q_ridge * k_factor * tl.sum(tl.sum(k_diagonal, 1), 0)
    energy += k_ridge * q_factor * tl.sum(tl.sum(q_diagonal, 1), 0)
    return q_factor, q_ridge, q_exponent, k_factor, k_ridge, k_exponent, energy


@triton.jit
def _apply_gram(
    C,
    factor,
    ridge,
    X,
    Y,
    WIDTH: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Y = (factor C + ridge I) X, from memory to memory."""
    DEPTH: tl.constexpr = 32
    for first in range(0, RANKS, COLUMNS):
        y = tl.zeros([WIDTH, COLUMNS], tl.float32)
        for k in range(0, WIDTH, DEPTH):
            c = tl.load(_block_of(C, 0, k, WIDTH, WIDTH, DEPTH))
            x = tl.load(_block_of(X, k, first, RANKS, DEPTH, COLUMNS))
            y = tl.dot(c, x, y, input_precision=PRECISION)
        x = tl.load(_block_of(X, 0, first, RANKS, WIDTH, COLUMNS))
        tl.store(_block_of(Y, 0, first, RANKS, WIDTH, COLUMNS), factor * y + ridge * x)
    tl.debug_barrier()


@triton.jit
def _orthonormalise(
    X, WIDTH: tl.constexpr, RANKS: tl.constexpr, PANEL: tl.constexpr, TINY: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Replace X by orthonormal columns with its span; columns of 0 stay 0.

    Where X has a smaller rank, what the first pass leaves of a column is a rounding error and need
    not be orthogonal to anything; the second makes it so.
    """
    column = tl.arange(0, PANEL)[None, :]
    for first in range(0, RANKS, PANEL):
        x = tl.load(_block_of(X, 0, first, RANKS, WIDTH, PANEL))
        x /= tl.maximum(tl.max(tl.abs(x), 0), TINY)[None, :]
        for _ in range(2):
            for earlier in range(0, first, PANEL):
                e = tl.load(_block_of(X, 0, earlier, RANKS, WIDTH, PANEL))
                w = tl.dot(tl.trans(e), x, input_precision="ieee")
                x -= tl.dot(e, w, input_precision=PRECISION)
            for j in range(PANEL):
                a = tl.sum(tl.where(column == j, x, 0.0), 1)[:, None]
                w = tl.sum(a * x, 0)[None, :]
                square = tl.maximum(tl.sum(tl.where(column == j, w, 0.0), 1), TINY)
                length = tl.rsqrt(square)[:, None]
                a *= length
                x = tl.where(column > j, x - a * (w * length), tl.where(column == j, a, x))
        tl.store(_block_of(X, 0, first, RANKS, WIDTH, PANEL), x)
        tl.debug_barrier()


@triton.jit
def _orthonormalise_in_gram(
    X, Y, WIDTH: tl.constexpr, RANKS: tl.constexpr, PANEL: tl.constexpr,
    LEAST_PIVOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Given Y = C X, replace X by columns with X^T C X = I and its span, and Y by C X.

    Returns the largest entries of X and of Y.
    """
    column = tl.arange(0, PANEL)[None, :]
    x_largest = 0.0
    y_largest = 0.0
    for first in range(0, RANKS, PANEL):
        x = tl.load(_block_of(X, 0, first, RANKS, WIDTH, PANEL))
        y = tl.load(_block_of(Y, 0, first, RANKS, WIDTH, PANEL))
        for earlier in range(0, first, PANEL):
            f = tl.load(_block_of(Y, 0, earlier, RANKS, WIDTH, PANEL))
            w = tl.dot(tl.trans(f), x, input_precision="ieee")
            e = tl.load(_block_of(X, 0, earlier, RANKS, WIDTH, PANEL))
            x -= tl.dot(e, w, input_precision=PRECISION)
            y -= tl.dot(f, w, input_precision=PRECISION)
        for j in range(PANEL):
            a = tl.sum(tl.where(column == j, x, 0.0), 1)[:, None]
            b = tl.sum(tl.where(column == j, y, 0.0), 1)[:, None]
            w = tl.sum(b * x, 0)[None, :]
            square = tl.maximum(tl.sum(tl.where(column == j, w, 0.0), 1), LEAST_PIVOT)
            length = tl.rsqrt(square)[:, None]
            a *= length
            b *= length
            w *= length
            x = tl.where(column > j, x - a * w, tl.where(column == j, a, x))
            y = tl.where(column > j, y - b * w, tl.where(column == j, b, y))
        tl.store(_block_of(X, 0, first, RANKS, WIDTH, PANEL), x)
        tl.store(_block_of(Y, 0, first, RANKS, WIDTH, PANEL), y)
        x_largest = tl.maximum(x_largest, tl.max(tl.max(tl.abs(x), 1), 0))
        y_largest = tl.maximum(y_largest, tl.max(tl.max(tl.abs(y), 1), 0))
        tl.debug_barrier()
    return x_largest, y_largest


@triton.jit
def _store_parts(parts, x, first, WIDTH: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr):
    """Some columns of a matrix as a sum of two numbers of a 16-bit dtype, or as they are."""
    dtype: tl.constexpr = parts.dtype.element_ty
    high = x.to(dtype)
    tl.store(_block_of(parts, 0, first, RANKS, WIDTH, COLUMNS), high)
    if dtype != tl.float32:
        low = (x - high.to(tl.float32)).to(dtype)
        tl.store(_block_of(parts + WIDTH * RANKS, 0, first, RANKS, WIDTH, COLUMNS), low)


@triton.jit(
    do_not_specialize=[
        "num_rows",
        "num_keys",
        "block",
        "num_blocks",
        "causal_offset",
        "earlier",
        "offset",
    ]
)
def _solve_kernel(
    grams,
    exponents,
    bases,
    parts,
    factors,
    rep,
    num_rows,
    num_keys,
    block,
    num_blocks,
    causal_offset,
    earlier,
    matrices,
    offset,
    HEAD_DIM: tl.constexpr,
    RANK: tl.constexpr,
    WIDTH: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PANEL: tl.constexpr,
    PARTS: tl.constexpr,
    ROUNDS: tl.constexpr,
    CAUSAL: tl.constexpr,
    STRICT: tl.constexpr,
    RIDGE: tl.constexpr,
    LEAST_PIVOT: tl.constexpr,
    TINY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``parts[unit, block]``: A and B; what is made with them takes the ``factors`` besides.

    Matrices are padded with zeros to ``WIDTH`` rows and ``RANKS`` columns, which stay 0.
    """
    pid = tl.program_id(0).to(tl.int64)
    unit = pid // num_blocks
    i = tl.program_id(0) % num_blocks
    q_place = unit * matrices + i
    k_place = unit * matrices + num_blocks
    seen = num_keys
    if CAUSAL:
        k_place += i
        seen = _keys_seen(i, num_rows, num_keys, block, causal_offset, STRICT)
    Cq = grams + q_place * (WIDTH * WIDTH)
    Ck = grams + k_place * (WIDTH * WIDTH)
    q_factor, q_ridge, q_exponent, k_factor, k_ridge, k_exponent, energy = _scales_of_grams(
        Cq, Ck, WIDTH, HEAD_DIM, RIDGE
    )

    X = bases + pid * (2 * WIDTH * RANKS)
    Y = X + WIDTH * RANKS
    row = tl.arange(0, WIDTH)[:, None]
    for first in range(0, RANKS, COLUMNS):
        column = (first + tl.arange(0, COLUMNS))[None, :]
        x = _random_numbers(row * 256 + column, offset).to(tl.float32) / 64
        x = tl.where((row < HEAD_DIM) & (column < RANK), x, 0.0)
        tl.store(_block_of(X, 0, first, RANKS, WIDTH, COLUMNS), x)
    tl.debug_barrier()
    for _ in range(ROUNDS):
        _apply_gram(Cq, q_factor, q_ridge, X, Y, WIDTH, RANKS, COLUMNS, PRECISION)
        _apply_gram(Ck, k_factor, k_ridge, Y, X, WIDTH, RANKS, COLUMNS, PRECISION)
        _orthonormalise(X, WIDTH, RANKS, PANEL, TINY, PRECISION)
    _apply_gram(Cq, q_factor, q_ridge, X, Y, WIDTH, RANKS, COLUMNS, PRECISION)
    x_largest, y_largest = _orthonormalise_in_gram(
        X, Y, WIDTH, RANKS, PANEL, LEAST_PIVOT, PRECISION
    )
    _apply_gram(Cq, q_factor, q_ridge, X, Y, WIDTH, RANKS, COLUMNS, PRECISION)

    # See balance in reference.py.
    rows = (earlier + i) * block if STRICT else min(block, num_rows - i * block)
    rows = (rows * rep).to(tl.float32)
    energy = tl.abs(energy) * (rows / (tl.maximum(seen, 1) * RANK).to(tl.float32))
    balance = tl.where(energy > 0, _exponent(energy) + 1 >> 1, 0)
    balance += k_exponent + tl.load(exponents + k_place)
    balance = (balance - q_exponent - tl.load(exponents + q_place)) >> 1
    balance = tl.minimum(tl.maximum(balance, -120), 120)
    dtype: tl.constexpr = parts.dtype.element_ty
    if dtype == tl.float16:  # its range takes the numbers, not their scale
        a_unit = -_exponent(tl.maximum(x_largest, TINY))
        b_unit = -_exponent(tl.maximum(y_largest, TINY))
    else:
        a_unit = balance
        b_unit = -balance
    tl.store(factors + 2 * pid, _power_of_two(balance - a_unit))
    tl.store(factors + 2 * pid + 1, _power_of_two(-balance - b_unit))

    # A P and B P with P = 1.5 I - 0.5 A^T B.
    parts += pid * (2 * PARTS * WIDTH * RANKS)
    for first in range(0, RANKS, PANEL):
        b = tl.load(_block_of(Y, 0, first, RANKS, WIDTH, PANEL))
        a_sum = -3.0 * tl.load(_block_of(X, 0, first, RANKS, WIDTH, PANEL))
        b_sum = -3.0 * b
        for k in range(0, RANKS, PANEL):
            x = tl.load(_block_of(X, 0, k, RANKS, WIDTH, PANEL))
            w = tl.dot(tl.trans(x), b, input_precision=PRECISION)
            a_sum += tl.dot(x, w, input_precision=PRECISION)
            y = tl.load(_block_of(Y, 0, k, RANKS, WIDTH, PANEL))
            b_sum += tl.dot(y, w, input_precision=PRECISION)
        a_sum *= -0.5 * _power_of_two(a_unit)
        b_sum *= -0.5 * _power_of_two(b_unit)
        _store_parts(parts, a_sum, first, WIDTH, RANKS, PANEL)
        _store_parts(parts + PARTS * WIDTH * RANKS, b_sum, first, WIDTH, RANKS, PANEL)


# --- Qhat and Khat ------------------------------------------------------------------------------


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
        x = tl.load(_block_of(parts, 0, first, RANKS, WIDTH, COLUMNS))
        hat = tl.dot(tile, x, input_precision=PRECISION)
        if tile.dtype != tl.float32:
            low = tl.load(_block_of(parts + WIDTH * RANKS, 0, first, RANKS, WIDTH, COLUMNS))
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
    ]
)
def _multiply_kernel(
    Q,
    K,
    parts,
    factors,
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
    PAIR: tl.constexpr = 2 * PARTS * WIDTH * RANKS
    if pid < key_programs:
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
                first_block = last_block
            first_block = max(first_block, first_row // block)
        if first_block < last_block:
            key = (first_key + tile_row).to(tl.int64)
            is_key = key < num_keys
            k = K + unit // key_heads * k_stride_b + unit % key_heads * k_stride_h
            tile = tl.load(
                (k + key * k_stride_n)[:, None] + (column * k_stride_d)[None, :],
                mask=is_key[:, None] & is_column,
                other=0.0,
            )
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
        i = pid // query_tiles % num_blocks
        head = (pid // query_tiles // num_blocks).to(tl.int64)  # counted over the batch
        heads = key_heads * rep
        row = i * block + pid % query_tiles * ROWS + tile_row
        is_row = row < min((i + 1) * block, num_rows)
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


# --- host functions -----------------------------------------------------------------------------


def projection_factors(
    Q: Tensor,
    K: Tensor,
    queries: Tensor | None = None,
    keys: Tensor | None = None,
    *,
    rank: int,
    rounds: int = 1,
    grouping_block: int,
    seed: int,
    is_causal: bool = False,
    causal_offset: int = 0,
    earlier: int = 0,
) -> tuple[Tensor, Tensor]:
    """Qhat and Khat of every grouping block: S is about Qhat Khat^T for the rows of the block.

    Inputs may have any strides and are read where they are. Four launches on the current stream of
    the current device, which must be Q's. No host synchronisation; nothing is kept after the call.

    Args:
        Q: ``(B, H, N, d)`` fp16, bf16 or fp32, d at most 256. Row 0 begins a grouping block; the
            last block may be short.
        K: ``(B or 1, H_k, M, d)`` of Q's dtype, H_k divides H. The query heads of a key head share
            A and B.
        queries: bool ``(B or 1, H_k or 1, rep, N)``, of ``reference.counted_rows``: the
            rows of Q that influence A and B. None, for both this and ``keys``: all.
        keys: bool ``(B or 1, H_k or 1, M)``, the rows of K that do.
        rank: r, from 1 to d.
        rounds: of the subspace iteration, 1 or 2.
        grouping_block: query rows per pair of A and B, at least 1.
        seed: names the columns the iteration starts from.
        is_causal: row i sees keys ``j <= i + causal_offset`` only; keys that no row of a block sees
            do not influence its A and B, and their rows of its Khat may stay unwritten.
        causal_offset: see ``is_causal``.
        earlier: if not 0, the strict form, of the grouping blocks of Q after this many: their A and
            B come from all rows before the block, of Q and with ``causal_offset`` of K, and only
            these keys' rows of its Khat are written.

    Returns:
        Qhat ``(B, H, N, r)`` and Khat ``(B, H_k, ceil(N / grouping_block), M, r)``, contiguous, of
        Q's dtype; N without the ``earlier`` blocks.

    Raises:
        ValueError: d or r is out of range.
    """
    is_strict = earlier > 0
    if is_strict:
        first_row = earlier * grouping_block
        Q, causal_offset, is_causal = Q[:, :, first_row:], causal_offset + first_row, True
        queries = None if queries is None else queries[..., first_row:]
    batch, heads, num_rows, head_dim = Q.shape
    key_heads, num_keys = K.shape[1:3]
    if not 1 <= rank <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"rank: got {rank} for head_dim {head_dim}; must be from 1 to head_dim, and head_dim "
            f"at most {MAX_HEAD_DIM}"
        )
    K = K.expand(batch, -1, -1, -1)
    rep = heads // key_heads
    num_blocks = triton.cdiv(num_rows, grouping_block)
    units = batch * key_heads
    width, ranks = _padded(head_dim), triton.cdiv(rank, PANEL) * PANEL
    precision = "ieee" if torch.version.hip else "tf32x3"
    causal_offset = min(max(causal_offset, -num_rows), num_keys)
    where = (num_rows, num_keys, grouping_block, num_blocks, causal_offset)

    query_chunks, key_chunks, jobs, matrices = _cut(
        num_rows, num_keys, grouping_block, rep, is_causal, earlier
    )
    partial = Q.new_empty(units, jobs, width, width, dtype=torch.float32)
    exponents = Q.new_empty(units, jobs, dtype=torch.int32)
    if queries is not None and keys is not None:
        queries = queries.expand(batch, key_heads, -1, -1)
        keys = keys.expand(batch, key_heads, -1)
    columns = width if width <= 128 else 64
    _gram_kernel[(units * jobs, width // columns)](
        Q,
        K,
        Q if queries is None else queries,  # not read
        Q if keys is None else keys,
        partial,
        exponents,
        *Q.stride(),
        *K.stride(),
        *((0, 0, 0, 0) if queries is None else queries.stride()),
        *((0, 0, 0) if keys is None else keys.stride()),
        key_heads,
        rep,
        *where,
        earlier,
        query_chunks,
        key_chunks,
        jobs,
        HEAD_DIM=head_dim,
        WIDTH=width,
        COLUMNS=columns,
        ROWS=max(16, min(64, GRAM_TILE_BYTES // (width * Q.element_size()))),
        CHUNK=CHUNK_ROWS,
        STRICT=is_strict,
        COUNTED=queries is not None,
        PRECISION=precision,
        num_warps=4 if width <= 64 else 8,
        num_stages=2,
    )

    grams = partial.new_empty(units, matrices, width, width)
    gram_exponents = exponents.new_empty(units, matrices)
    tile = min(width * width, 2048)
    _sum_kernel[(units * matrices, width * width // tile)](
        partial,
        exponents,
        grams,
        gram_exponents,
        *where,
        earlier,
        query_chunks,
        key_chunks,
        jobs,
        matrices,
        SIZE=width * width,
        TILE=tile,
        CHUNK=CHUNK_ROWS,
        CAUSAL=is_causal,
        STRICT=is_strict,
        num_warps=4,
    )

    num_parts = 1 if Q.dtype == torch.float32 else 2
    bases = grams.new_empty(units, num_blocks, 2, width, ranks)
    parts = Q.new_empty(units, num_blocks, 2, num_parts, width, ranks)
    factors = grams.new_empty(units, num_blocks, 2)
    columns = next(c for c in (64, 32, 16) if ranks % c == 0)
    _solve_kernel[(units * num_blocks,)](
        grams,
        gram_exponents,
        bases,
        parts,
        factors,
        rep,
        *where,
        earlier,
        matrices,
        _seed_offset(seed),
        HEAD_DIM=head_dim,
        RANK=rank,
        WIDTH=width,
        RANKS=ranks,
        COLUMNS=columns,
        PANEL=PANEL,
        PARTS=num_parts,
        ROUNDS=rounds,
        CAUSAL=is_causal,
        STRICT=is_strict,
        RIDGE=RIDGE,
        LEAST_PIVOT=LEAST_PIVOT,
        TINY=TINY,
        PRECISION=precision,
        num_warps=4 if width <= 64 else 8,
        num_stages=2,
    )

    Qhat = Q.new_empty(batch, heads, num_rows, rank)
    Khat = Q.new_empty(batch, key_heads, num_blocks, num_keys, rank)
    rows = max(16, min(128, MULTIPLY_TILE_BYTES // (width * Q.element_size())))
    key_tiles = triton.cdiv(num_keys, rows)
    spans = triton.cdiv(num_blocks, BLOCKS_PER_PROGRAM)
    key_programs = units * spans * key_tiles
    query_tiles = triton.cdiv(min(grouping_block, num_rows), rows)
    _multiply_kernel[(key_programs + batch * heads * num_blocks * query_tiles,)](
        Q,
        K,
        parts,
        factors,
        Qhat,
        Khat,
        *Q.stride(),
        *K.stride(),
        key_heads,
        rep,
        *where,
        key_tiles,
        spans,
        key_programs,
        query_tiles,
        HEAD_DIM=head_dim,
        RANK=rank,
        WIDTH=width,
        RANKS=ranks,
        COLUMNS=PANEL if Q.dtype == torch.float32 else columns,
        PARTS=num_parts,
        ROWS=rows,
        SPAN=BLOCKS_PER_PROGRAM,
        CAUSAL=is_causal,
        STRICT=is_strict,
        LARGEST=torch.finfo(Q.dtype).max,
        PRECISION=precision,
        num_warps=4 if width * Q.element_size() <= 128 else 8,
        num_stages=1,
    )
    return Qhat, Khat


def workspace_bytes(
    rows: int,
    num_keys: int,
    head_dim: int,
    rank: int,
    rep: int,
    element_bytes: int,
    strict_blocks: int = 0,
) -> tuple[int, int]:
    """Device memory of ``projection_factors`` beside its results, for one key head.

    Args:
        rows: query rows of a grouping block.
        num_keys: M.
        head_dim: d.
        rank: r.
        rep: query heads per key head.
        element_bytes: of Q and K.
        strict_blocks: in the strict form the grouping blocks of the longest call, those that are
            ``earlier`` with it; else 0.

    Returns:
        Bytes once, and bytes for each grouping block (with causality; less without).
    """
    matrix = 4 * _padded(head_dim) ** 2
    panels = _padded(head_dim) * triton.cdiv(rank, PANEL) * PANEL
    query_chunks, key_chunks, _, _ = _cut(rows, num_keys, rows, rep, False)
    parts = element_bytes * (1 if element_bytes == 4 else 2)
    # In the strict form those of all earlier blocks are there, however few blocks are made.
    chunks_once, chunks = (strict_blocks * query_chunks, 0) if strict_blocks else (0, query_chunks)
    return (
        (chunks_once + key_chunks + 1) * matrix,
        (chunks + 3) * matrix + 2 * panels * (4 + parts),
    )


def _cut(
    num_rows: int, num_keys: int, block: int, rep: int, is_causal: bool, earlier: int = 0
) -> tuple[int, int, int, int]:
    """Chunks of a block of Q, chunks of K, partial matrices and sums of them, of one key head.

    The cut of a block and of K does not depend on what else is in the call.
    """
    num_blocks = triton.cdiv(num_rows, block)
    query_chunks = triton.cdiv((block if earlier else min(block, num_rows)) * rep, CHUNK_ROWS)
    key_chunks = num_keys // CHUNK_ROWS if is_causal else triton.cdiv(num_keys, CHUNK_ROWS)
    blocks_of_keys = num_blocks if is_causal else 0
    return (
        query_chunks,
        key_chunks,
        (earlier + num_blocks) * query_chunks + key_chunks + blocks_of_keys,
        num_blocks + (blocks_of_keys if is_causal else 1),
    )


def _padded(width: int) -> int:
    """Width of a tile: a power of two, and at least the depth of a product of matrices."""
    return max(32, 1 << (width - 1).bit_length())
