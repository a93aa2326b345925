"""From the Gram matrices of a grouping block to A and B, in Triton: one program for each."""

# Triton's decorators and the kernels under them cannot be typed.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from distr_compile.kernels.projection.gram import exponent_of, keys_seen, power_of_two
from distr_compile.kernels.triton_random import random_numbers


@triton.jit
def block_of(X, first_row, first_column, STRIDE: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Pointers to ``(R, C)`` entries of a matrix whose rows are ``STRIDE`` numbers apart."""
    row, column = first_row + tl.arange(0, R), first_column + tl.arange(0, C)
    return X + (row[:, None] * STRIDE + column[None, :])


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
    # Norms go to [1, 4) by a power of 4, as in ``normalised`` of reference.py.
    q_norm = tl.sqrt(tl.sum(tl.sum(q_squares, 1), 0))
    k_norm = tl.sqrt(tl.sum(tl.sum(k_squares, 1), 0))
    # Of 0 the identity is made.
    q_exponent = tl.where(q_norm > 0, exponent_of(q_norm) >> 1, 0)
    k_exponent = tl.where(k_norm > 0, exponent_of(k_norm) >> 1, 0)
    q_factor = tl.where(q_norm > 0, power_of_two(-2 * q_exponent), 0.0)
    k_factor = tl.where(k_norm > 0, power_of_two(-2 * k_exponent), 0.0)
    q_ridge = tl.where(q_norm > 0, RIDGE, 1.0)
    k_ridge = tl.where(k_norm > 0, 0.0, 1.0)
    # Of Cq * Ck as they are scaled and with what is added to their diagonals.
    energy = q_factor * k_factor * tl.sum(tl.sum(products, 1), 0) + q_ridge * k_ridge * HEAD_DIM
    energy += q_ridge * k_factor * tl.sum(tl.sum(k_diagonal, 1), 0)
    energy += k_ridge * q_factor * tl.sum(tl.sum(q_diagonal, 1), 0)
    return q_factor, q_ridge, q_exponent, k_factor, k_ridge, k_exponent, energy


@triton.jit
def _halves(x):
    """x as a sum of two numbers, the first of which has the 11 bits of tf32."""
    high = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def _add_product(sums, a, b, PRECISION: tl.constexpr):
    """sums + a b, with "tf32x3" by three products of tf32 numbers.

    As Triton has it, but for numbers that are not finite, which are none here: a quarter of the
    instructions of a product.
    """
    if PRECISION == "tf32x3":
        a_high, a_low = _halves(a)
        b_high, b_low = _halves(b)
        sums = tl.dot(a_low, b_high, sums, input_precision="tf32")
        sums = tl.dot(a_high, b_low, sums, input_precision="tf32")
        sums = tl.dot(a_high, b_high, sums, input_precision="tf32")
    else:
        sums = tl.dot(a, b, sums, input_precision=PRECISION)
    return sums


@triton.jit
def _apply_gram(
    C, factor, ridge, X, Y, first,
    WIDTH: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr, SLICE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Y = (factor C + ridge I) X for some columns, from memory to memory."""
    DEPTH: tl.constexpr = 32
    for rows in range(0, WIDTH, SLICE):
        y = tl.zeros([SLICE, COLUMNS], tl.float32)
        for k in range(0, WIDTH, DEPTH):
            c = tl.load(block_of(C, rows, k, WIDTH, SLICE, DEPTH))
            x = tl.load(block_of(X, k, first, RANKS, DEPTH, COLUMNS))
            y = _add_product(y, c, x, PRECISION)
        x = tl.load(block_of(X, rows, first, RANKS, SLICE, COLUMNS))
        tl.store(block_of(Y, rows, first, RANKS, SLICE, COLUMNS), factor * y + ridge * x)
    tl.debug_barrier()  # other threads read Y next


@triton.jit
def _inner_products(
    X, x_first, Y, y_first,
    WIDTH: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Some columns of X times some of Y, ``(COLUMNS, COLUMNS)``."""
    DEPTH: tl.constexpr = 32
    w = tl.zeros([COLUMNS, COLUMNS], tl.float32)
    for rows in range(0, WIDTH, DEPTH):
        x = tl.load(block_of(X, rows, x_first, RANKS, DEPTH, COLUMNS))
        y = tl.load(block_of(Y, rows, y_first, RANKS, DEPTH, COLUMNS))
        w = _add_product(w, tl.trans(x), y, PRECISION)
    return w


@triton.jit
def _add_times(
    sums, X, rows, first, W, TRANSPOSED: tl.constexpr,
    RANKS: tl.constexpr, COLUMNS: tl.constexpr, SLICE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sums + some rows and columns of X times W or W^T, ``(COLUMNS, COLUMNS)``, from memory."""
    DEPTH: tl.constexpr = 32 if COLUMNS > 32 else COLUMNS
    for k in range(0, COLUMNS, DEPTH):
        x = tl.load(block_of(X, rows, first + k, RANKS, SLICE, DEPTH))
        if TRANSPOSED:
            w = tl.trans(tl.load(block_of(W, 0, k, COLUMNS, COLUMNS, DEPTH)))
        else:
            w = tl.load(block_of(W, k, 0, COLUMNS, DEPTH, COLUMNS))
        sums = _add_product(sums, x, w, PRECISION)
    return sums


@triton.jit
def _inverse_root(pivot, LEAST: tl.constexpr):
    """pivot^-1/2, and 0 for one that is no more than ``LEAST``."""
    return tl.where(pivot > LEAST, tl.rsqrt(tl.maximum(pivot, LEAST)), 0.0)


@triton.jit
def _inverse_factor(
    W, S, shift, COLUMNS: tl.constexpr, LEAST: tl.constexpr, TINY: tl.constexpr
):  # fmt: skip
    """L^-1 of W + a shift = L L^T; ``S`` has room for W.

    W is scaled to a diagonal of 1, and that becomes 1 + shift: no direction is left with less than
    rounding explains, and L^-1 stays below shift^-1/2. Where a pivot is no more than ``LEAST`` its
    column was nothing but rounding, and becomes 0. Cholesky and the inverse of its factor are one
    sweep, four columns a step. What has been eliminated from W makes room for the inverse.
    """
    STRIDE: tl.constexpr = COLUMNS
    row, column = tl.arange(0, COLUMNS)[:, None], tl.arange(0, COLUMNS)[None, :]
    place = block_of(S, 0, 0, STRIDE, COLUMNS, COLUMNS)
    tl.store(place, W)
    tl.debug_barrier()
    # Scales for a diagonal of 1, along rows and along columns.
    row_scale = tl.rsqrt(tl.maximum(tl.load(S + row * (STRIDE + 1)), TINY))
    column_scale = tl.rsqrt(tl.maximum(tl.load(S + column * (STRIDE + 1)), TINY))
    T = tl.load(place) * row_scale * column_scale  # no longer in the layout of a product
    T += tl.where(row == column, shift, 0.0)
    tl.debug_barrier()
    D = S  # of the next pivot
    across, along = S + column, S + row  # of its row
    for j in range(0, COLUMNS, 4):
        # The rows of the four pivots go through memory: every thread needs them.
        tl.store(place, T, mask=(row >= j) & (row < j + 4))
        tl.debug_barrier()
        t0, t1 = tl.load(across), tl.load(across + STRIDE)
        t2, t3 = tl.load(across + 2 * STRIDE), tl.load(across + 3 * STRIDE)
        m0, m1 = tl.load(along), tl.load(along + STRIDE)
        m2, m3 = tl.load(along + 2 * STRIDE), tl.load(along + 3 * STRIDE)
        # The four pivots and what stands beside them.
        w00, w10, w20, w30 = tl.load(D), tl.load(D + 1), tl.load(D + 2), tl.load(D + 3)
        w11, w22 = tl.load(D + STRIDE + 1), tl.load(D + 2 * STRIDE + 2)
        w21, w31 = tl.load(D + STRIDE + 2), tl.load(D + STRIDE + 3)
        w32, w33 = tl.load(D + 2 * STRIDE + 3), tl.load(D + 3 * STRIDE + 3)
        r0 = _inverse_root(w00, LEAST)
        w10, w20, w30 = w10 * r0, w20 * r0, w30 * r0
        r1 = _inverse_root(w11 - w10 * w10, LEAST)
        w21, w31 = (w21 - w10 * w20) * r1, (w31 - w10 * w30) * r1
        r2 = _inverse_root(w22 - w20 * w20 - w21 * w21, LEAST)
        w32 = (w32 - w20 * w30 - w21 * w31) * r2
        r3 = _inverse_root(w33 - w30 * w30 - w31 * w31 - w32 * w32, LEAST)
        # Four columns of L along the rows: what they are above the pivots is not used.
        m0 *= r0
        m1 = (m1 - w10 * m0) * r1
        m2 = (m2 - w20 * m0 - w21 * m1) * r2
        m3 = (m3 - w30 * m0 - w31 * m1 - w32 * m2) * r3
        # The same across the columns, behind the pivots; before them four rows of the inverse.
        inside = (column >= j) & (column < j + 4)
        t0 = tl.where(inside, tl.where(column == j, 1.0, 0.0), t0) * r0
        t1 = tl.where(inside, tl.where(column == j + 1, 1.0, 0.0), t1)
        t1 = (t1 - w10 * t0) * r1
        t2 = tl.where(inside, tl.where(column == j + 2, 1.0, 0.0), t2)
        t2 = (t2 - w20 * t0 - w21 * t1) * r2
        t3 = tl.where(inside, tl.where(column == j + 3, 1.0, 0.0), t3)
        t3 = (t3 - w30 * t0 - w31 * t1 - w32 * t2) * r3
        # One update for both: W behind the pivots, the inverse before them.
        T = tl.where(inside, 0.0, T) - m0 * t0 - m1 * t1 - m2 * t2 - m3 * t3
        tl.debug_barrier()
        tl.store(across, t0)
        tl.store(across + STRIDE, t1)
        tl.store(across + 2 * STRIDE, t2)
        tl.store(across + 3 * STRIDE, t3)
        D += 4 * (STRIDE + 1)
        across += 4 * STRIDE
        along += 4 * STRIDE
    tl.debug_barrier()
    # The inverse for the scaled W; the scale of the columns makes it that for W.
    return tl.where(column <= row, tl.load(place), 0.0) * column_scale


@triton.jit
def _orthonormalise(
    X, Y, C, factor, ridge, in_gram, shift,
    WIDTH: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr, SLICE: tl.constexpr,
    LEAST: tl.constexpr, LOST: tl.constexpr, TINY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Replace X by orthonormal columns with its span; columns of 0 stay 0. Y is overwritten.

    With ``in_gram`` X^T G X becomes I, G = factor C + ridge I, and Y becomes G X. Up to
    ``COLUMNS`` columns are orthonormalised by Cholesky of their inner products, after the
    earlier ones are taken off; of which then no more than rounding is left becomes 0. Columns that
    are nearly in the span of others are right only after a second call. Y lies behind X.
    """
    # The other factor of inner products: X, or with ``in_gram`` G X, which is Y.
    other = X + tl.where(in_gram, WIDTH * RANKS, 0)
    room = Y + WIDTH * RANKS
    for first in range(0, RANKS, COLUMNS):
        # Squares of the columns, before and after the earlier ones are taken off.
        before = tl.zeros([COLUMNS], tl.float32)
        after = tl.zeros([COLUMNS], tl.float32)
        # X -= E (E'^T X) for each earlier panel E, with E' its other factor.
        for earlier in range(0, first, COLUMNS):
            w = _inner_products(other, earlier, X, first, WIDTH, RANKS, COLUMNS, PRECISION)
            tl.store(block_of(room, 0, 0, COLUMNS, COLUMNS, COLUMNS), -w)
            tl.debug_barrier()
            after *= 0  # that of the last pass counts
            for rows in range(0, WIDTH, SLICE):
                x = tl.load(block_of(X, rows, first, RANKS, SLICE, COLUMNS))
                before += tl.where(earlier == 0, tl.sum(x * x, 0), 0.0)
                x = _add_times(x, X, rows, earlier, room, False, RANKS, COLUMNS, SLICE, PRECISION)
                after += tl.sum(x * x, 0)
                tl.store(block_of(X, rows, first, RANKS, SLICE, COLUMNS), x)
            tl.debug_barrier()
        if first > 0:
            is_left = (after > before * LOST)[None, :]
            for rows in range(0, WIDTH, SLICE):
                place = block_of(X, rows, first, RANKS, SLICE, COLUMNS)
                tl.store(place, tl.where(is_left, tl.load(place), 0.0))
            tl.debug_barrier()
        if in_gram:
            _apply_gram(C, factor, ridge, X, Y, first, WIDTH, RANKS, COLUMNS, SLICE, PRECISION)
        # Cholesky of the panel's inner products; ``room`` takes L^-1.
        w = _inner_products(X, first, other, first, WIDTH, RANKS, COLUMNS, PRECISION)
        tl.debug_barrier()
        w = _inverse_factor(w, room, shift, COLUMNS, LEAST, TINY)
        tl.debug_barrier()
        tl.store(block_of(room, 0, 0, COLUMNS, COLUMNS, COLUMNS), w)
        tl.debug_barrier()
        # X L^-T, and with it G X L^-T where Y is G X.
        for side in range(2 if in_gram else 1):
            place = X + side * (WIDTH * RANKS)
            for rows in range(0, WIDTH, SLICE):
                x = tl.zeros([SLICE, COLUMNS], tl.float32)
                x = _add_times(x, place, rows, first, room, True, RANKS, COLUMNS, SLICE, PRECISION)
                tl.debug_barrier()
                tl.store(block_of(place, rows, first, RANKS, SLICE, COLUMNS), x)
        tl.debug_barrier()


@triton.jit
def _largest(X, WIDTH: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr):
    """The largest entry, in magnitude."""
    SLICE: tl.constexpr = 32
    largest = tl.zeros([SLICE, COLUMNS], tl.float32)
    for rows in range(0, WIDTH, SLICE):
        for first in range(0, RANKS, COLUMNS):
            x = tl.load(block_of(X, rows, first, RANKS, SLICE, COLUMNS))
            largest = tl.maximum(largest, tl.abs(x))
    return tl.max(tl.max(largest, 1), 0)


@triton.jit
def _store_parts(
    parts, x, rows, first,
    WIDTH: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """Part of a matrix as a sum of two numbers of a 16-bit dtype, or as it is."""
    dtype: tl.constexpr = parts.dtype.element_ty
    high = x.to(dtype)
    tl.store(block_of(parts, rows, first, RANKS, SLICE, COLUMNS), high)
    if dtype != tl.float32:
        low = (x - high.to(tl.float32)).to(dtype)
        tl.store(block_of(parts + WIDTH * RANKS, rows, first, RANKS, SLICE, COLUMNS), low)


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
    PARTS: tl.constexpr,
    ROUNDS: tl.constexpr,
    CAUSAL: tl.constexpr,
    STRICT: tl.constexpr,
    RIDGE: tl.constexpr,
    SHIFT: tl.constexpr,
    LATER_SHIFT: tl.constexpr,
    LEAST: tl.constexpr,
    LOST: tl.constexpr,
    TINY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``parts[unit, block]``: A and B; what is made with them takes the ``factors`` besides.

    Matrices are padded with zeros to ``WIDTH`` rows and ``RANKS`` columns, which stay 0.
    """
    # Rows that pass through registers together: tensor cores of sm_90 and later read one factor
    # from shared memory, those before it take both from registers.
    SLICE: tl.constexpr = WIDTH if WIDTH <= 64 or (WIDTH == 128 and cuda_capability_geq(9)) else 64
    pid = tl.program_id(0).to(tl.int64)
    unit = pid // num_blocks
    i = tl.program_id(0) % num_blocks
    # Where Cq and Ck of the block lie among the sums of its unit.
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

    # X, Y, and behind them room through which threads exchange small matrices.
    X = bases + pid * (3 * WIDTH * RANKS)
    Y = X + WIDTH * RANKS
    # The start: ``start_columns`` of random.py, zeros beyond d and r.
    for rows in range(0, WIDTH, SLICE):
        row = (rows + tl.arange(0, SLICE))[:, None]
        for first in range(0, RANKS, COLUMNS):
            column = (first + tl.arange(0, COLUMNS))[None, :]
            x = random_numbers(row * 256 + column, offset).to(tl.float32) / 64
            x = tl.where((row < HEAD_DIM) & (column < RANK), x, 0.0)
            tl.store(block_of(X, rows, first, RANKS, SLICE, COLUMNS), x)
    tl.debug_barrier()
    # Subspace iteration: X = Ck Cq X, and then an orthonormal basis of its span.
    for turn in tl.static_range(ROUNDS):
        for first in range(0, RANKS, COLUMNS):
            _apply_gram(Cq, q_factor, q_ridge, X, Y, first, WIDTH, RANKS, COLUMNS, SLICE, PRECISION)
            _apply_gram(Ck, k_factor, k_ridge, Y, X, first, WIDTH, RANKS, COLUMNS, SLICE, PRECISION)
        # Twice, and at the very end in the product of Cq, where a shift would be an error.
        for time in range(3 if turn + 1 == ROUNDS else 2):
            shift = tl.where(time == 0, SHIFT, tl.where(time == 1, LATER_SHIFT, 0.0))
            _orthonormalise(
                X, Y, Cq, q_factor, q_ridge, time == 2, shift,
                WIDTH, RANKS, COLUMNS, SLICE, LEAST, LOST, TINY, PRECISION,
            )  # fmt: skip
    # X is A here and Y is B = G A, since X^T G X = I, both before balancing.
    x_largest = _largest(X, WIDTH, RANKS, COLUMNS)
    y_largest = _largest(Y, WIDTH, RANKS, COLUMNS)

    # See balance in reference.py.
    counted = (earlier + i) * block if STRICT else min(block, num_rows - i * block)
    counted = (counted * rep).to(tl.float32)
    energy = tl.abs(energy) * (counted / (tl.maximum(seen, 1) * RANK).to(tl.float32))
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
    # What the units of the parts leave out is put on after the products with them.
    tl.store(factors + 2 * pid, power_of_two(balance - a_unit))
    tl.store(factors + 2 * pid + 1, power_of_two(-balance - b_unit))

    A, B = X, Y
    # A P and then B P, with P = 1.5 I - 0.5 A^T B.
    parts += pid * (2 * PARTS * WIDTH * RANKS)
    room = Y + WIDTH * RANKS
    if RANKS == COLUMNS:
        w = _inner_products(A, 0, B, 0, WIDTH, RANKS, COLUMNS, PRECISION)
        tl.store(block_of(room, 0, 0, COLUMNS, COLUMNS, COLUMNS), w)
        tl.debug_barrier()
    for side in range(2):
        scale = -0.5 * power_of_two(tl.where(side == 0, a_unit, b_unit))
        for first in range(0, RANKS, COLUMNS):
            for rows in range(0, WIDTH, SLICE):
                # Times -0.5 below: 1.5 X - 0.5 X W, the panels of W = A^T B in ``room`` in turn.
                sums = -3.0 * tl.load(block_of(X, rows, first, RANKS, SLICE, COLUMNS))
                for k in range(0, RANKS, COLUMNS):
                    if RANKS > COLUMNS:
                        w = _inner_products(A, k, B, first, WIDTH, RANKS, COLUMNS, PRECISION)
                        tl.debug_barrier()
                        tl.store(block_of(room, 0, 0, COLUMNS, COLUMNS, COLUMNS), w)
                        tl.debug_barrier()
                    sums = _add_times(
                        sums, X, rows, k, room, False, RANKS, COLUMNS, SLICE, PRECISION
                    )
                sums *= scale
                _store_parts(parts, sums, rows, first, WIDTH, RANKS, COLUMNS, SLICE)
        X += WIDTH * RANKS
        parts += PARTS * WIDTH * RANKS
