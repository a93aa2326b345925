"""The kernels of the attention backward in Triton; ``triton_bwd.py`` says what they compute."""

# Triton's decorators and the kernels under them cannot be typed.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import math

import triton
import triton.language as tl

from distr_compile.kernels.triton_places import rows_of_block, rows_of_tile
from distr_compile.kernels.triton_random import is_kept

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _rows(pointers, is_row, in_columns, WHOLE: tl.constexpr):
    """Load a tile, 0 where ``is_row`` or ``in_columns`` is False; WHOLE: no column is missing."""
    if WHOLE:
        return tl.load(pointers, mask=is_row[:, None], other=0.0)
    else:
        return tl.load(pointers, mask=is_row[:, None] & in_columns[None, :], other=0.0)


@triton.jit
def _product_by_columns(
    X, Y, is_x, is_y,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """X Y^T from memory, some columns at a time; X and Y point to the first number of each row."""
    xy = tl.zeros([X.shape[0], Y.shape[0]], tl.float32)
    for first in range(0, WIDTH, COLUMNS):  # a loop: unrolled it takes as many registers as whole
        columns = first + tl.arange(0, COLUMNS)
        x = _rows(X[:, None] + columns[None, :], is_x, columns < WIDTH, WIDTH % COLUMNS == 0)
        y = _rows(Y[:, None] + columns[None, :], is_y, columns < WIDTH, WIDTH % COLUMNS == 0)
        xy = tl.dot(x, tl.trans(y), xy, input_precision=PRECISION)
    return xy


@triton.jit
def _weights(
    s,
    lse,
    Mask,
    mask_offsets,
    is_seen,
    scale,
    SOFTCAP: tl.constexpr,
    IS_CUT: tl.constexpr,
):
    """exp(scores - lse), and the slope of the soft cap; ``mask_offsets``, ``lse`` broadcast."""
    slope = s  # any tensor: not used without a soft cap
    if SOFTCAP != 0.0:
        # tanh as in triton_fwd.py; its slope is 1 - tanh^2.
        root = tl.rsqrt(tl.exp2(s * (scale * (2.0 * LOG2_E / SOFTCAP))) + 1.0)
        tanh = 1.0 - 2.0 * (root * root)
        slope = 1.0 - tanh * tanh
        s = tanh * SOFTCAP
    else:
        s = s * scale
    if Mask is not None:
        mask = tl.load(Mask + mask_offsets, mask=is_seen, other=0)
        if Mask.dtype.element_ty == tl.int1:
            s = tl.where(mask, s, float("-inf"))
        else:
            s += mask.to(tl.float32)
    # Hides later keys, and rows and keys past the end.
    if IS_CUT:
        s = tl.where(is_seen, s, float("-inf"))
    return tl.exp2((s - lse) * LOG2_E), slope


@triton.jit(do_not_specialize=["num_rows", "heads", "num_queries"])
def _delta(
    Out,
    Grad,
    Delta,
    num_rows,
    heads,
    num_queries,
    stride_ob,
    stride_oh,
    stride_on,
    stride_gb,
    stride_gh,
    stride_gn,
    D_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Sums of dO times O of BLOCK_M of all rows ``(B, H, N)``."""
    # Rows are numbered through batch entries and heads.
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = row < num_rows
    n, head = row % num_queries, row // num_queries
    b, h = head // heads, head % heads
    in_v = tl.arange(0, BLOCK_V)
    out = _rows(
        Out + (b * stride_ob + h * stride_oh + n * stride_on)[:, None] + in_v[None, :],
        is_row, in_v < D_V, False,
    )  # fmt: skip
    grad = _rows(
        Grad + (b * stride_gb + h * stride_gh + n * stride_gn)[:, None] + in_v[None, :],
        is_row, in_v < D_V, False,
    )  # fmt: skip
    tl.store(Delta + row, tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1), mask=is_row)


# The other sizes only count: specialising on them would compile the same code again.
@triton.jit(
    do_not_specialize=(
        "causal_offset heads key_heads rep shares num_queries num_keys grouping_block blocks "
        "threshold drop_heads drop_head drop_row drop_key"
    ).split()
)
def _keys_bwd(
    Qhat,
    Khat,
    V,
    Mask,
    Seed,
    Grad,
    Lse,
    Delta,
    Ends,
    B,
    DK,
    DV,
    scale,
    drop_scale,
    threshold,
    drop_heads,
    drop_head,
    drop_row,
    drop_key,
    causal_offset,
    heads,
    key_heads,
    rep,
    shares,
    num_queries,
    num_keys,
    grouping_block,
    blocks,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kl,
    stride_km,
    stride_vb,
    stride_vh,
    stride_vm,
    stride_mb,
    stride_mh,
    stride_mn,
    stride_mm,
    stride_gb,
    stride_gh,
    stride_gn,
    stride_bb,
    stride_bh,
    stride_bl,
    stride_dkb,
    stride_dkh,
    stride_dkm,
    stride_dvb,
    stride_dvh,
    stride_dvm,
    R: tl.constexpr,
    D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BY_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    BASIS_PRECISION: tl.constexpr,
):
    """dV and dK of BLOCK_N keys of one key head, from all query heads and entries that share it."""
    first_key = tl.program_id(0) * BLOCK_N
    # A unit: a key head of an entry of K and V, which ``shares`` entries of Q use.
    unit = tl.program_id(1)
    key_b, key_h = (unit // key_heads).to(tl.int64), (unit % key_heads).to(tl.int64)
    keys = first_key + tl.arange(0, BLOCK_N)
    is_key = keys < num_keys
    wide_keys = keys.to(tl.int64)  # offsets may exceed 2^31
    in_r, in_d, in_v = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    # [BLOCK_N, BLOCK_V], once for all rows; with BY_COLUMNS a product reads V itself.
    v = _rows(
        V + key_b * stride_vb + key_h * stride_vh + wide_keys[:, None] * stride_vm + in_v[None, :],
        is_key, in_v < D_V, BLOCK_V == D_V,
    )  # fmt: skip
    scale = tl.cast(scale, tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    # Of width d where B leads back to K, else of width r.
    dk = tl.zeros([BLOCK_N, BLOCK_D if B is not None else BLOCK_R], tl.float32)
    # Every grouping block of every entry that shares these keys, one after another.
    for part in range(shares * blocks):
        b = key_b * shares + part // blocks
        block = (part % blocks).to(tl.int64)
        # Rows [start, stop) of the block; none where causality hides the tile from all of it.
        start, stop = rows_of_block(Ends, b, part % blocks, grouping_block, num_queries)
        if IS_CAUSAL:  # the first row that sees a key of the tile
            start = tl.maximum(start, first_key - causal_offset)
        tiles = tl.maximum(stop - start + BLOCK_M - 1, 0) // BLOCK_M
        khat = _rows(
            Khat + b * stride_kb + key_h * stride_kh + block * stride_kl
            + wide_keys[:, None] * stride_km + in_r[None, :],
            is_key, in_r < R, BLOCK_R == R,
        )  # fmt: skip
        # Fresh for each block, which has a B of its own: dK += dKhat B^T once the block is done.
        dkhat = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
        # The block's rows in all query heads of the key head, heads one after another.
        for step in range(rep * tiles):
            h = key_h * rep + step // tiles
            rows = start + step % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
            is_row = rows < stop
            wide_rows = rows.to(tl.int64)
            place = (b * heads + h) * num_queries + wide_rows  # in Lse and Delta, (B, H, N)
            q = _rows(
                Qhat + b * stride_qb + h * stride_qh + wide_rows[:, None] * stride_qn
                + in_r[None, :],
                is_row, in_r < R, BLOCK_R == R,
            )  # fmt: skip
            grad = _rows(
                Grad + b * stride_gb + h * stride_gh + wide_rows[:, None] * stride_gn
                + in_v[None, :],
                is_row, in_v < D_V, BLOCK_V == D_V,
            )  # fmt: skip
            # Rows that are none, or that see nothing, have weights of 0.
            lse = tl.load(Lse + place, mask=is_row, other=float("inf"))
            lse = tl.where(lse == float("-inf"), float("inf"), lse)
            delta = tl.load(Delta + place, mask=is_row, other=0.0)
            # Tiles of scores are [BLOCK_N, BLOCK_M] from here on: a row per key.
            is_seen = is_key[:, None] & is_row[None, :]
            if IS_CAUSAL:
                is_seen = is_seen & (keys[:, None] <= rows[None, :] + causal_offset)
            # S^T = Khat Qhat^T, not scaled.
            if BY_COLUMNS:
                s = _product_by_columns(
                    Khat
                    + b * stride_kb
                    + key_h * stride_kh
                    + block * stride_kl
                    + wide_keys * stride_km,
                    Qhat + b * stride_qb + h * stride_qh + wide_rows * stride_qn,
                    is_key,
                    is_row,
                    R,
                    BLOCK_C,
                    PRECISION,
                )
            else:
                s = tl.dot(khat, tl.trans(q), input_precision=PRECISION)
            mask_offsets = is_seen  # any tensor: not used without a mask
            if Mask is not None:
                mask_offsets = (
                    b * stride_mb + h * stride_mh + wide_rows[None, :] * stride_mn
                    + wide_keys[:, None] * stride_mm
                )  # fmt: skip
            # P^T. Keys past the end need no cut: what their rows of dV and dK become is not stored.
            p, slope = _weights(
                s, lse[None, :], Mask, mask_offsets, is_seen, scale, SOFTCAP, IS_CAUSAL
            )
            # dP^T = V dO^T.
            if BY_COLUMNS:
                dp = _product_by_columns(
                    V + key_b * stride_vb + key_h * stride_vh + wide_keys * stride_vm,
                    Grad + b * stride_gb + h * stride_gh + wide_rows * stride_gn,
                    is_key,
                    is_row,
                    D_V,
                    BLOCK_C,
                    PRECISION,
                )
            else:
                dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
            # Dropout: dV takes what is left of P, dP passes through it; in dS P is that before it.
            kept_p = p
            if Seed is not None:
                number = drop_head + b * drop_heads + h
                kept = is_kept(
                    tl.load(Seed), threshold, number, drop_row + rows, drop_key + first_key,
                    BLOCK_N, True,
                )  # fmt: skip
                stays = tl.trans(tl.where(kept, drop_scale, 0.0))
                kept_p = p * stays
                dp = dp * stays
            dv = tl.dot(kept_p.to(grad.dtype), grad, dv, input_precision=PRECISION)
            # dS^T without the scale, which dK gets at the end.
            ds = p * (dp - delta[None, :])
            if SOFTCAP != 0.0:
                ds = ds * slope
            dkhat = tl.dot(ds.to(q.dtype), q, dkhat, input_precision=PRECISION)
        if B is not None:  # B^T: (r, d)
            basis = tl.load(
                B + b * stride_bb + key_h * stride_bh + block * stride_bl
                + in_d[None, :] * R + in_r[:, None],
                mask=(in_r < R)[:, None] & (in_d < D)[None, :],
                other=0.0,
            )  # fmt: skip
            dk = tl.dot(dkhat, basis, dk, input_precision=BASIS_PRECISION)
        else:
            dk += dkhat
    dk = dk * scale  # once, not in every tile
    DK += key_b * stride_dkb + key_h * stride_dkh + wide_keys[:, None] * stride_dkm
    DV += key_b * stride_dvb + key_h * stride_dvh + wide_keys[:, None] * stride_dvm
    if B is not None:
        tl.store(
            DK + in_d[None, :],
            dk.to(DK.dtype.element_ty),
            mask=is_key[:, None] & (in_d < D)[None, :],
        )
    else:
        tl.store(
            DK + in_r[None, :],
            dk.to(DK.dtype.element_ty),
            mask=is_key[:, None] & (in_r < R)[None, :],
        )
    tl.store(
        DV + in_v[None, :], dv.to(DV.dtype.element_ty), mask=is_key[:, None] & (in_v < D_V)[None, :]
    )


@triton.jit(
    do_not_specialize=(
        "causal_offset heads rep num_queries num_keys grouping_block tiles_per_block "
        "threshold drop_heads drop_head drop_row drop_key"
    ).split()
)
def _queries_bwd(
    Qhat,
    Khat,
    V,
    Mask,
    Seed,
    Grad,
    Lse,
    Delta,
    Ends,
    A,
    DQ,
    scale,
    drop_scale,
    threshold,
    drop_heads,
    drop_head,
    drop_row,
    drop_key,
    causal_offset,
    heads,
    rep,
    num_queries,
    num_keys,
    grouping_block,
    tiles_per_block,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kl,
    stride_km,
    stride_vb,
    stride_vh,
    stride_vm,
    stride_mb,
    stride_mh,
    stride_mn,
    stride_mm,
    stride_gb,
    stride_gh,
    stride_gn,
    stride_ab,
    stride_ah,
    stride_al,
    stride_dqb,
    stride_dqh,
    stride_dqn,
    R: tl.constexpr,
    D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    KEYS_FIT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BY_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    BASIS_PRECISION: tl.constexpr,
):
    """dQ of BLOCK_M rows of one query head and grouping block."""
    # A tile of rows lies inside one grouping block: one Khat and one A are for all of it.
    tile, head = tl.program_id(0), tl.program_id(1)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    key_h = h // rep
    block, first_row, stop_row = rows_of_tile(
        Ends, b, tile, grouping_block, num_queries, tiles_per_block, BLOCK_M
    )
    if Ends is not None and first_row >= stop_row:
        return
    rows = first_row + tl.arange(0, BLOCK_M)
    is_row = rows < stop_row
    wide_rows = rows.to(tl.int64)
    in_r, in_v = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_V)
    q = _rows(
        Qhat + b * stride_qb + h * stride_qh + wide_rows[:, None] * stride_qn + in_r[None, :],
        is_row, in_r < R, BLOCK_R == R,
    )  # fmt: skip
    grad = _rows(
        Grad + b * stride_gb + h * stride_gh + wide_rows[:, None] * stride_gn + in_v[None, :],
        is_row, in_v < D_V, BLOCK_V == D_V,
    )  # fmt: skip
    place = head.to(tl.int64) * num_queries + wide_rows
    # Rows that are none, or that see nothing, have weights of 0.
    lse = tl.load(Lse + place, mask=is_row, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    delta = tl.load(Delta + place, mask=is_row, other=0.0)
    Khat += b * stride_kb + key_h * stride_kh + block.to(tl.int64) * stride_kl
    V += b * stride_vb + key_h * stride_vh
    scale = tl.cast(scale, tl.float32)
    # One past the last key that a row of the tile sees; at most 0 where none sees any.
    end = num_keys
    if IS_CAUSAL:
        end = tl.minimum(num_keys, tl.minimum(stop_row, first_row + BLOCK_M) + causal_offset)
    dqhat = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for first_key in range(0, end, BLOCK_N):
        keys = first_key + tl.arange(0, BLOCK_N)
        is_key = keys < num_keys
        wide_keys = keys.to(tl.int64)
        khat = _rows(
            Khat + wide_keys[:, None] * stride_km + in_r[None, :], is_key, in_r < R, BLOCK_R == R
        )
        v = _rows(
            V + wide_keys[:, None] * stride_vm + in_v[None, :], is_key, in_v < D_V, BLOCK_V == D_V
        )
        # Tiles of scores are [BLOCK_M, BLOCK_N] from here on: a row per query.
        is_seen = is_row[:, None] & is_key[None, :]
        if IS_CAUSAL:
            is_seen = is_seen & (keys[None, :] <= rows[:, None] + causal_offset)
        # S = Qhat Khat^T, not scaled.
        if BY_COLUMNS:
            s = _product_by_columns(
                Qhat + b * stride_qb + h * stride_qh + wide_rows * stride_qn,
                Khat + wide_keys * stride_km,
                is_row,
                is_key,
                R,
                BLOCK_C,
                PRECISION,
            )
        else:
            s = tl.dot(q, tl.trans(khat), input_precision=PRECISION)
        mask_offsets = is_seen  # any tensor: not used without a mask
        if Mask is not None:
            mask_offsets = (
                b * stride_mb + h * stride_mh + wide_rows[:, None] * stride_mn
                + wide_keys[None, :] * stride_mm
            )  # fmt: skip
        # Keys that are none would have a weight, which may be infinite, of a Khat of 0.
        p, slope = _weights(
            s, lse[:, None], Mask, mask_offsets, is_seen, scale, SOFTCAP,
            IS_CAUSAL or not KEYS_FIT,
        )  # fmt: skip
        # dP = dO V^T.
        if BY_COLUMNS:
            dp = _product_by_columns(
                Grad + b * stride_gb + h * stride_gh + wide_rows * stride_gn,
                V + wide_keys * stride_vm,
                is_row,
                is_key,
                D_V,
                BLOCK_C,
                PRECISION,
            )
        else:
            dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        if Seed is not None:
            number = drop_head + b * drop_heads + h
            kept = is_kept(
                tl.load(Seed), threshold, number, drop_row + rows, drop_key + first_key,
                BLOCK_N, True,
            )  # fmt: skip
            dp = tl.where(kept, dp * drop_scale, 0.0)  # P stays that before dropout
        # dS without the scale, which dQhat gets at the end.
        ds = p * (dp - delta[:, None])
        if SOFTCAP != 0.0:
            ds = ds * slope
        dqhat = tl.dot(ds.to(khat.dtype), khat, dqhat, input_precision=PRECISION)
    dqhat = dqhat * scale
    DQ += b * stride_dqb + h * stride_dqh + wide_rows[:, None] * stride_dqn
    if A is not None:  # A^T: (r, d), some columns at a time
        A += b * stride_ab + key_h * stride_ah + block.to(tl.int64) * stride_al
        for part in tl.static_range(BLOCK_D // BLOCK_C):
            columns = part * BLOCK_C + tl.arange(0, BLOCK_C)
            basis = tl.load(
                A + columns[None, :] * R + in_r[:, None],
                mask=(in_r < R)[:, None] & (columns < D)[None, :],
                other=0.0,
            )
            dq = tl.dot(dqhat, basis, input_precision=BASIS_PRECISION)
            tl.store(
                DQ + columns[None, :],
                dq.to(DQ.dtype.element_ty),
                mask=is_row[:, None] & (columns < D)[None, :],
            )
    else:
        tl.store(
            DQ + in_r[None, :],
            dqhat.to(DQ.dtype.element_ty),
            mask=is_row[:, None] & (in_r < R)[None, :],
        )
