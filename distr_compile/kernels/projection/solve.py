"""From the Gram matrices of a grouping block to A and B, in Triton: one program for each."""

# Triton's decorators and the kernels under them cannot be typed.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from distr_compile.kernels.projection.gram import exponent_of, keys_seen, power_of_two
from distr_compile.kernels.triton_random import random_numbers


@triton.jit
def block_of(X, first_row, first_column, STRIDE: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
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
        cq = tl.load(block_of(Cq, first, 0, WIDTH, SLICE, WIDTH))
        ck = tl.load(block_of(Ck, first, 0, WIDTH, SLICE, WIDTH))
        on = first + tl.arange(0, SLICE)[:, None] == tl.arange(0, WIDTH)[None, :]
        q_squares += cq * cq
        k_squares += ck * ck
        products += cq * ck
        q_diagonal += tl.where(on, cq, 0.0)
        k_diagonal += tl.where(on, ck, 0.0)
    q_norm = tl.sqrt(tl.sum(tl.sum(q_squares, 1), 0))
    k_norm = tl.sqrt(tl.sum(tl.sum(k_squares, 1), 0))
    # Of 0 the identity is made.
    q_exponent = tl.where(q_norm > 0, exponent_of(q_norm) >> 1, 0)
    k_exponent = tl.where(k_norm > 0, exponent_of(k_norm) >> 1, 0)
    q_factor = tl.where(q_norm > 0, power_of_two(-2 * q_exponent), 0.0)
    k_factor = tl.where(k_norm > 0, power_of_two(-2 * k_exponent), 0.0)
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
            c = tl.load(block_of(C, 0, k, WIDTH, WIDTH, DEPTH))
            x = tl.load(block_of(X, k, first, RANKS, DEPTH, COLUMNS))
            y = tl.dot(c, x, y, input_precision=PRECISION)
        x = tl.load(block_of(X, 0, first, RANKS, WIDTH, COLUMNS))
        tl.store(block_of(Y, 0, first, RANKS, WIDTH, COLUMNS), factor * y + ridge * x)
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
        x = tl.load(block_of(X, 0, first, RANKS, WIDTH, PANEL))
        x /= tl.maximum(tl.max(tl.abs(x), 0), TINY)[None, :]
        for _ in range(2):
            for earlier in range(0, first, PANEL):
                e = tl.load(block_of(X, 0, earlier, RANKS, WIDTH, PANEL))
                w = tl.dot(tl.trans(e), x, input_precision="ieee")
                x -= tl.dot(e, w, input_precision=PRECISION)
            for j in range(PANEL):
                a = tl.sum(tl.where(column == j, x, 0.0), 1)[:, None]
                w = tl.sum(a * x, 0)[None, :]
                square = tl.maximum(tl.sum(tl.where(column == j, w, 0.0), 1), TINY)
                length = tl.rsqrt(square)[:, None]
                a *= length
                x = tl.where(column > j, x - a * (w * length), tl.where(column == j, a, x))
        tl.store(block_of(X, 0, first, RANKS, WIDTH, PANEL), x)
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
        x = tl.load(block_of(X, 0, first, RANKS, WIDTH, PANEL))
        y = tl.load(block_of(Y, 0, first, RANKS, WIDTH, PANEL))
        for earlier in range(0, first, PANEL):
            f = tl.load(block_of(Y, 0, earlier, RANKS, WIDTH, PANEL))
            w = tl.dot(tl.trans(f), x, input_precision="ieee")
            e = tl.load(block_of(X, 0, earlier, RANKS, WIDTH, PANEL))
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
        tl.store(block_of(X, 0, first, RANKS, WIDTH, PANEL), x)
        tl.store(block_of(Y, 0, first, RANKS, WIDTH, PANEL), y)
        x_largest = tl.maximum(x_largest, tl.max(tl.max(tl.abs(x), 1), 0))
        y_largest = tl.maximum(y_largest, tl.max(tl.max(tl.abs(y), 1), 0))
        tl.debug_barrier()
    return x_largest, y_largest


@triton.jit
def _store_parts(parts, x, first, WIDTH: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr):
    """Some columns of a matrix as a sum of two numbers of a 16-bit dtype, or as they are."""
    dtype: tl.constexpr = parts.dtype.element_ty
    high = x.to(dtype)
    tl.store(block_of(parts, 0, first, RANKS, WIDTH, COLUMNS), high)
    if dtype != tl.float32:
        low = (x - high.to(tl.float32)).to(dtype)
        tl.store(block_of(parts + WIDTH * RANKS, 0, first, RANKS, WIDTH, COLUMNS), low)


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
        seen = keys_seen(i, num_rows, num_keys, block, causal_offset, STRICT)
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
        x = random_numbers(row * 256 + column, offset).to(tl.float32) / 64
        x = tl.where((row < HEAD_DIM) & (column < RANK), x, 0.0)
        tl.store(block_of(X, 0, first, RANKS, WIDTH, COLUMNS), x)
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
    balance = tl.where(energy > 0, exponent_of(energy) + 1 >> 1, 0)
    balance += k_exponent + tl.load(exponents + k_place)
    balance = (balance - q_exponent - tl.load(exponents + q_place)) >> 1
    balance = tl.minimum(tl.maximum(balance, -120), 120)
    dtype: tl.constexpr = parts.dtype.element_ty
    if dtype == tl.float16:  # its range takes the numbers, not their scale
        a_unit = -exponent_of(tl.maximum(x_largest, TINY))
        b_unit = -exponent_of(tl.maximum(y_largest, TINY))
    else:
        a_unit = balance
        b_unit = -balance
    tl.store(factors + 2 * pid, power_of_two(balance - a_unit))
    tl.store(factors + 2 * pid + 1, power_of_two(-balance - b_unit))

    # A P and B P with P = 1.5 I - 0.5 A^T B.
    parts += pid * (2 * PARTS * WIDTH * RANKS)
    for first in range(0, RANKS, PANEL):
        b = tl.load(block_of(Y, 0, first, RANKS, WIDTH, PANEL))
        a_sum = -3.0 * tl.load(block_of(X, 0, first, RANKS, WIDTH, PANEL))
        b_sum = -3.0 * b
        for k in range(0, RANKS, PANEL):
            x = tl.load(block_of(X, 0, k, RANKS, WIDTH, PANEL))
            w = tl.dot(tl.trans(x), b, input_precision=PRECISION)
            a_sum += tl.dot(x, w, input_precision=PRECISION)
            y = tl.load(block_of(Y, 0, k, RANKS, WIDTH, PANEL))
            b_sum += tl.dot(y, w, input_precision=PRECISION)
        a_sum *= -0.5 * power_of_two(a_unit)
        b_sum *= -0.5 * power_of_two(b_unit)
        _store_parts(parts, a_sum, first, WIDTH, RANKS, PANEL)
        _store_parts(parts + PARTS * WIDTH * RANKS, b_sum, first, WIDTH, RANKS, PANEL)
