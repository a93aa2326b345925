"""Attention forward in Triton: softmax(scale * Qhat Khat^T + mask) V in one pass over the keys.

The running softmax of FlashAttention, in exp2. Qhat and Khat have width r, V has width d_v. Rows of
Qhat come in grouping blocks of l rows (the paper's l), each with a Khat of its own: a tile of
queries lies inside one of them, so that beside an index the kernel knows nothing of grouping, and
exact attention is the same kernel with r = d and one block.

Precision: fp16 and bf16 products run on tensor cores and accumulate in fp32; everything between the
two products is fp32, only the weights are rounded to V's dtype for the second one. fp32 inputs are
multiplied as three tf32 products each on NVIDIA (close to fp32 accuracy; PyTorch's own fused fp32
kernel does the same), in fp32 elsewhere; never as a single tf32 product.
"""

# Triton's decorators and the kernels under them cannot be typed.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import math
from collections.abc import Callable
from contextvars import copy_context
from dataclasses import dataclass, replace
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from distr_compile.kernels.attention.dropout import Dropout
from distr_compile.kernels.attention.triton_arguments import (
    check,
    describable,
    descriptor,
    dropped,
    power_of_two,
    strides,
)
from distr_compile.kernels.blocks import Places
from distr_compile.kernels.padding import cdiv
from distr_compile.kernels.plan import do_not_repeat, launch
from distr_compile.kernels.triton_places import rows_of_tile
from distr_compile.kernels.triton_random import is_kept

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)

LEAST_SCALE = 1e-30
"""Smaller and negative scales are multiplied out: folded, 0 * -inf would be undefined."""

L2_BYTES = 24 << 20
"""Keys and values of the heads whose causal tiles are interleaved: they share the L2 cache."""


@triton.jit
def _load(pointers, rows, columns, SOME_ROWS: tl.constexpr, SOME_COLUMNS: tl.constexpr):
    """Load a tile, 0 where ``rows`` or ``columns`` is False; only the tests that are needed."""
    if SOME_ROWS and SOME_COLUMNS:
        return tl.load(pointers, mask=rows[:, None] & columns[None, :], other=0.0)
    elif SOME_ROWS:
        return tl.load(pointers, mask=rows[:, None], other=0.0)
    elif SOME_COLUMNS:
        return tl.load(pointers, mask=columns[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _walk_keys(
    acc,
    total,
    highest,
    q,
    Khat,
    V,
    Mask,
    Seed,
    threshold,
    drop_head,
    drop_rows,
    drop_key,
    last_key,
    start,
    stop,
    num_keys,
    scale,
    k_at,
    v_at,
    stride_km: tl.constexpr,
    stride_vm: tl.constexpr,
    stride_mm,
    R: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    FOLD_SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BOUNDARY: tl.constexpr,
    KEYS_FIT: tl.constexpr,
    USE_TMA: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    DROP_BY_FOUR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the keys from ``start`` to ``stop`` to the running softmax of one tile of queries.

    Only with BOUNDARY are there keys that some row must not see: those after ``last_key`` (one
    number, or one per row). With USE_TMA Khat and V are tensor descriptors, read at ``k_at`` and
    ``v_at``, which give 0 outside of the tensor; else pointers to the first key.
    """
    # Widths are padded to powers of two: columns from R and D_V on are 0.
    in_r = tl.arange(0, BLOCK_R) < R
    in_v = tl.arange(0, BLOCK_V) < D_V
    first = tl.cast(start, tl.int64)  # offsets in elements may exceed 2^31
    if not USE_TMA:
        Khat += first * stride_km
        V += first * stride_vm
    if Mask is not None:
        Mask += first * stride_mm
    # The few tiles of a boundary would pay for a pipeline in registers and not live to use it.
    stages: tl.constexpr = 1 if BOUNDARY else None
    for n in tl.range(start, stop, BLOCK_N, num_stages=stages, warp_specialize=WARP_SPECIALIZE):
        keys = n + tl.arange(0, BLOCK_N)
        in_keys = keys < num_keys
        # Without BOUNDARY all tiles are whole: no key of theirs lies past the end.
        past_end: tl.constexpr = BOUNDARY and not KEYS_FIT
        # Scores: k [BLOCK_N, BLOCK_R], s = Qhat Khat^T [BLOCK_M, BLOCK_N] in fp32, not scaled.
        if USE_TMA:
            k = Khat.load([k_at[0], k_at[1], k_at[2], n, 0]).reshape(BLOCK_N, BLOCK_R)
        else:
            k = _load(Khat, in_keys, in_r, past_end, BLOCK_R != R)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if SOFTCAP != 0.0:
            # tanh(x) = 1 - 2 / (exp(2x) + 1), right up to both infinities. ``scale`` turns s into
            # 2x * log2(e); the square of rsqrt is a reciprocal without a division's corrections.
            root = tl.rsqrt(tl.exp2(s * scale) + 1.0)
            s = SOFTCAP - (2.0 * SOFTCAP) * (root * root)
        elif not FOLD_SCALE:
            s = s * scale
        # With FOLD_SCALE s is not scaled yet: then the mask is a bool one, which has no units.
        if Mask is not None:
            mask = tl.load(Mask, mask=in_keys[None, :], other=0) if past_end else tl.load(Mask)
            if Mask.dtype.element_ty == tl.int1:
                s = tl.where(mask, s, float("-inf"))
            else:
                s += mask.to(tl.float32)
        # ``last_key`` is at most the last key of all: this hides columns past the end as well.
        if BOUNDARY:
            s = tl.where(keys[None, :] <= last_key[:, None], s, float("-inf"))

        # Running softmax: ``highest`` is in log2 units with FOLD_SCALE, in natural ones without.
        # The maximum starts at the lowest finite number: -inf scores then give 0 without a test.
        if FOLD_SCALE:
            new_highest = tl.maximum(highest, tl.max(s, 1) * scale)
            p = tl.exp2(s * scale - new_highest[:, None])
            shrink = tl.exp2(highest - new_highest)
        else:
            new_highest = tl.maximum(highest, tl.max(s, 1))
            p = tl.exp2((s - new_highest[:, None]) * LOG2_E)
            shrink = tl.exp2((highest - new_highest) * LOG2_E)
        # Before dropout, which acts on the weights: dropped ones count in the denominator.
        total = total * shrink + tl.sum(p, 1)
        if Seed is not None:
            seed = tl.load(Seed)
            kept = is_kept(
                seed, threshold, drop_head, drop_rows, drop_key + n, BLOCK_N, DROP_BY_FOUR
            )
            p = tl.where(kept, p, 0.0)
        # acc [BLOCK_M, BLOCK_V]: what was added relative to a lower maximum shrinks, then += P V.
        acc = acc * shrink[:, None]
        if USE_TMA:
            v = V.load([v_at[0], v_at[1], n, 0]).reshape(BLOCK_N, BLOCK_V)
        else:
            v = _load(V, in_keys, in_v, past_end, BLOCK_V != D_V)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        highest = new_highest

        if not USE_TMA:
            Khat += BLOCK_N * stride_km
            V += BLOCK_N * stride_vm
        if Mask is not None:
            Mask += tl.cast(stride_mm, tl.int64) * BLOCK_N
    return acc, total, highest


# The other sizes only count: specialising on them would compile the same code again.
@triton.jit(
    do_not_specialize=(
        "causal_offset batch_heads heads rep num_queries num_keys grouping_block tiles "
        "tiles_per_block heads_together threshold drop_heads drop_head drop_row drop_key"
    ).split()
)
def _attention_fwd(
    Qhat,
    Khat,
    V,
    Mask,
    Sinks,
    Seed,
    Ends,
    Out,
    Lse,
    scale,
    drop_scale,
    threshold,
    drop_heads,
    drop_head,
    drop_row,
    drop_key,
    causal_offset,
    batch_heads,
    heads,
    rep,
    num_queries,
    num_keys,
    grouping_block,
    tiles,
    tiles_per_block,
    heads_together,
    k_batches,
    v_batches,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kl,
    stride_km: tl.constexpr,
    stride_vb,
    stride_vh,
    stride_vm: tl.constexpr,
    stride_mb,
    stride_mh,
    stride_mn,
    stride_mm,
    stride_sh,
    stride_ob,
    stride_oh,
    stride_on,
    stride_lb,
    stride_lh,
    stride_ln,
    R: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    FOLD_SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASK_PER_ROW: tl.constexpr,
    KEYS_FIT: tl.constexpr,
    DROP_BY_FOUR: tl.constexpr,
    ALIGNED: tl.constexpr,
    USE_TMA: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of BLOCK_M queries of one head, against all of the keys that it sees.

    Heads are walked ``heads_together`` at a time, tile by tile and head by head, and causal tiles
    with the most keys first: the last programs to start are the short ones.
    """
    # Which tile of which head; within a group of heads the head varies fastest.
    program = tl.program_id(0)
    first_head = program // (tiles * heads_together) * heads_together
    width = tl.minimum(heads_together, batch_heads - first_head)
    within = program % (tiles * heads_together)
    head = first_head + within % width
    tile = within // width
    if IS_CAUSAL:
        tile = tiles - 1 - tile
    b = (head // heads).to(tl.int64)
    h = (head % heads).to(tl.int64)
    key_h = h // rep

    block, first_row, stop_row = rows_of_tile(
        Ends, b, tile, grouping_block, num_queries, tiles_per_block, BLOCK_M
    )
    # With a mask's blocks the grid is an upper bound, and some programs have no rows.
    if Ends is not None and first_row >= stop_row:
        return
    rows = first_row + tl.arange(0, BLOCK_M)
    # Rows past the end repeat the last one, so that no load of a row needs a test.
    safe_rows = tl.minimum(rows, stop_row - 1).to(tl.int64)
    keys = tl.arange(0, BLOCK_N).to(tl.int64)
    in_r = tl.arange(0, BLOCK_R)
    in_v = tl.arange(0, BLOCK_V)

    if WARP_SPECIALIZE:  # Qhat is contiguous, and rows past the block are those of the next
        rows_of_q = tl.make_tensor_descriptor(
            Qhat, [batch_heads * num_queries, R], [R, 1], [BLOCK_M, BLOCK_R]
        )
        q = rows_of_q.load([head * num_queries + first_row, 0])
    else:
        Qhat += b * stride_qb + h * stride_qh
        Qhat += safe_rows[:, None] * stride_qn + in_r[None, :]
        q = _load(Qhat, rows, in_r < R, False, BLOCK_R != R)
    # Batch entry (0 where all share one), key head and block: where descriptors are read.
    k_at = (head // heads % k_batches, key_h.to(tl.int32), block)
    v_at = (head // heads % v_batches, key_h.to(tl.int32))
    if not USE_TMA:
        # The hint lets loads be wide; the launch works out what divides all of these strides.
        Khat += tl.multiple_of(
            b * stride_kb + key_h * stride_kh + block.to(tl.int64) * stride_kl, ALIGNED
        )
        Khat += keys[:, None] * stride_km + in_r[None, :]
        V += tl.multiple_of(b * stride_vb + key_h * stride_vh, ALIGNED)
        V += keys[:, None] * stride_vm + in_v[None, :]
    if Mask is not None:
        Mask += b * stride_mb + h * stride_mh
        Mask += keys[None, :] * stride_mm
        if MASK_PER_ROW:  # else [1, BLOCK_N]: one row for all queries
            Mask += safe_rows[:, None] * stride_mn

    # What s is multiplied by: to log2 units with FOLD_SCALE, to 2x in log2 units for tanh(x).
    scale = tl.cast(scale, tl.float32)
    if FOLD_SCALE:
        scale = scale * LOG2_E
    elif SOFTCAP != 0.0:
        scale = scale * (2.0 * LOG2_E / SOFTCAP)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    highest = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if Sinks is not None:  # the row has seen one score already, of a key whose value is 0
        sink = tl.load(Sinks + h * stride_sh).to(tl.float32)
        if FOLD_SCALE:
            sink = sink * LOG2_E
            highest = tl.maximum(highest, sink)
            total = tl.exp2(sink - highest)
        else:
            highest = tl.maximum(highest, sink)
            total = tl.exp2((sink - highest) * LOG2_E)

    # Two walks: whole tiles of keys that all rows see, then up to ``seen`` with a test per row.
    if IS_CAUSAL:
        whole = tl.minimum(tl.maximum(first_row + causal_offset + 1, 0), num_keys)
        seen = tl.minimum(tl.maximum(stop_row + causal_offset, 0), num_keys)
        seen = tl.minimum(seen, tl.maximum(first_row + BLOCK_M + causal_offset, 0))
        last_key = tl.minimum(rows + causal_offset, num_keys - 1)
    else:
        whole = num_keys
        seen = num_keys
        last_key = tl.full([1], 0, tl.int32) + (num_keys - 1)
    whole = whole // BLOCK_N * BLOCK_N
    # Dropout knows heads by their number through the batch, rows by that in the whole call.
    drop_head = drop_head + head // heads * drop_heads + head % heads
    drop_rows = drop_row + rows
    acc, total, highest = _walk_keys(
        acc, total, highest, q, Khat, V, Mask, Seed, threshold, drop_head, drop_rows, drop_key,
        last_key, 0, whole, num_keys, scale,
        k_at, v_at, stride_km, stride_vm, stride_mm, R, D_V, BLOCK_N, BLOCK_R, BLOCK_V,
        FOLD_SCALE, SOFTCAP, False, KEYS_FIT, USE_TMA, WARP_SPECIALIZE, DROP_BY_FOUR, PRECISION,
    )  # fmt: skip
    if IS_CAUSAL or not KEYS_FIT:
        acc, total, highest = _walk_keys(
            acc, total, highest, q, Khat, V, Mask, Seed, threshold, drop_head, drop_rows, drop_key,
            last_key, whole, seen, num_keys, scale,
            k_at, v_at, stride_km, stride_vm, stride_mm, R, D_V, BLOCK_N, BLOCK_R, BLOCK_V,
            FOLD_SCALE, SOFTCAP, True, KEYS_FIT, USE_TMA, False, DROP_BY_FOUR, PRECISION,
        )  # fmt: skip

    # A row that saw no key has an acc of 0, and stays 0.
    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    acc = acc * (drop_scale / total)[:, None]  # drop_scale: 1 / (1 - p) of the kept weights
    in_block = rows < stop_row
    rows = rows.to(tl.int64)
    Out += b * stride_ob + h * stride_oh
    tl.store(
        Out + rows[:, None] * stride_on + in_v[None, :],
        acc.to(Out.dtype.element_ty),
        mask=in_block[:, None] & (in_v < D_V)[None, :],
    )
    if Lse is not None:
        if FOLD_SCALE:
            highest = highest * LN_2  # from log2 units
        lse = tl.where(nothing, float("-inf"), highest + tl.log2(total) * LN_2)
        tl.store(Lse + b * stride_lb + h * stride_lh + rows * stride_ln, lse, mask=in_block)


@dataclass(frozen=True)
class Tile:
    """How the kernel is cut up and launched; any tile gives the same attention up to rounding.

    Attributes:
        block_m: query rows per program, a power of two, at least 16; fewer for short sequences and
            grouping blocks.
        block_n: keys per step of the softmax, a power of two, at least 16; fewer for few keys.
        num_warps: warps per program.
        num_stages: tiles of keys and values in flight.
        use_tma: load Khat and V by tensor descriptors (Hopper and later) where they allow it: they
            start at, and step by, multiples of 16 bytes, and no step is 0. Where they do not, by
            pointers.
        warp_specialize: let some warps load while others compute, where this tile uses descriptors,
            has 128 rows and 4 warps, Qhat is contiguous and allows descriptors too, M is a multiple
            of block_n and there is neither mask nor causality; nowhere else, as Triton does not
            compile it there. Takes a little scratch memory from PyTorch at every launch.
    """

    block_m: int = 128
    block_n: int = 128
    num_warps: int = 8
    num_stages: int = 2
    use_tma: bool = False
    warp_specialize: bool = False

    def by_pointers(self) -> Tile:
        """The same without descriptors: addresses take registers, so that more warps share them."""
        num_warps = 8 if self.block_m >= 128 else self.num_warps
        return replace(self, use_tma=False, warp_specialize=False, num_warps=num_warps)


def attention_fwd(
    Qhat: Tensor,
    Khat: Tensor,
    V: Tensor,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    is_causal: bool = False,
    causal_offset: int = 0,
    grouping_block: int,
    softcap: float = 0.0,
    dropout: Dropout | None = None,
    tile: Tile,
    out: Tensor,
    lse: Tensor | None = None,
    places: Places | None = None,
) -> None:
    """Fill ``out`` with softmax(scale * Qhat Khat^T + mask) V (eq. 1 and 2 of arXiv 2507.17245).

    Strides are free. Of Qhat, Khat and V one whose last stride is not 1 is copied first; a mask
    never is, and is read through its strides where it is broadcast.

    Args:
        Qhat: ``(B, H, N, r)`` fp16, bf16 or fp32; Khat, V and out alike.
        Khat: ``(B or 1, H_k, L, M, r)``, one for each of the L = ceil(N / grouping_block) blocks of
            query rows, or L = 1 and all rows share it (exact attention: Q and ``K[:, :, None]``).
            H_k divides H; query head h uses key head ``h // (H / H_k)``.
        V: ``(B or 1, H_k, M, d_v)``.
        mask: broadcastable to ``(B, H, N, M)``; bool (True = attend) or floating (added, in fp32).
        sinks: ``(H,)`` floating, any dtype; one more score per row, not scaled, which counts in the
            softmax's denominator only.
        scale: multiplies the scores; any sign.
        is_causal: row i sees keys ``j <= i + causal_offset``.
        causal_offset: see ``is_causal``.
        grouping_block: l, query rows per Khat.
        softcap: c > 0 turns the scaled scores s into ``c * tanh(s / c)``, before mask and
            causality, with an absolute error up to about c * 2^-20; 0 does not.
        dropout: says which weights are dropped.
        tile: how to cut the work up.
        out: ``(B, H, N, d_v)``, last stride 1. Rows that see no key are 0.
        lse: ``(B, H, N)`` fp32 or None: filled with the natural logarithm of the softmax's
            denominator, sinks included; -inf for rows that see nothing.
        places: where the blocks lie, in the place of ``grouping_block``: L is the number that it
            says. Rows that use no block of it are not written.

    Raises:
        ValueError: shapes, dtypes or strides other than these.
    """
    check(Qhat, Khat, V, sinks, grouping_block, out, lse, places)
    batch, heads, num_queries, r = Qhat.shape
    key_heads, blocks, num_keys = Khat.shape[1:4]
    d_v = V.shape[-1]
    Qhat, Khat, V = (t if t.stride(-1) == 1 else t.contiguous() for t in (Qhat, Khat, V))
    if mask is not None:
        mask = mask.expand(batch, heads, num_queries, num_keys)  # stride 0 where it is broadcast
    # One Khat for all rows: tiles are cut as if they were one block.
    if blocks == 1:
        grouping_block = max(num_queries, 1)
    if places:
        grouping_block = max(1, places.rows)
    block_m = min(tile.block_m, power_of_two(min(grouping_block, num_queries)))
    # Dropout's numbers take registers: half as many keys at a time.
    keys_at_once = tile.block_n if dropout is None else max(16, tile.block_n // 2)
    block_n = min(keys_at_once, power_of_two(num_keys))
    tiles_per_block = cdiv(grouping_block, block_m)
    # The last block may be shorter, and take fewer tiles.
    last_block = num_queries - (blocks - 1) * grouping_block
    tiles = (blocks - 1) * tiles_per_block + cdiv(last_block, block_m)
    if places:
        tiles = cdiv(num_queries, block_m) + blocks - 1  # each block may end in part of a tile
    rep = heads // key_heads
    bytes_of_head = max(num_keys * (r + d_v) * V.element_size(), 1)
    together = min(rep * max(1, L2_BYTES // bytes_of_head), batch * heads)
    is_bias = mask is not None and mask.dtype != torch.bool
    keys_fit = num_keys % block_n == 0
    use_tma = tile.use_tma and describable(Khat) and describable(V)
    if tile.use_tma and not use_tma:
        tile = tile.by_pointers()
    warp_specialize = (
        tile.warp_specialize
        and use_tma
        and (block_m, tile.num_warps) == (128, 4)
        and (Qhat.is_contiguous() and describable(Qhat) and Qhat.numel() < 2**31)
        and (keys_fit and mask is None and not is_causal and dropout is None)
    )
    programs = tiles * batch * heads
    if not programs:
        return
    keys, values = Khat, V
    if use_tma:
        keys = descriptor(Khat, [1, 1, 1, block_n, power_of_two(r)])
        values = descriptor(V, [1, 1, block_n, power_of_two(d_v)])
    with torch.cuda.device_of(Qhat):
        start = partial(
            launch,
            _attention_fwd,
            (programs,),
            Qhat=Qhat,
            Khat=keys,
            V=values,
            Mask=mask,
            Sinks=sinks,
            Seed=None if dropout is None else dropout.seed,
            Ends=places and places.ends,
            Out=out,
            Lse=lse,
            scale=float(scale),
            **dropped(dropout),
            # Beyond these bounds all keys are seen, or none: an int32 for any offset.
            causal_offset=min(max(causal_offset, -num_queries), num_keys),
            batch_heads=batch * heads,
            heads=heads,
            rep=rep,
            num_queries=num_queries,
            num_keys=num_keys,
            grouping_block=grouping_block,
            tiles=tiles,
            tiles_per_block=tiles_per_block,
            heads_together=together if is_causal else 1,  # else all tiles take as long
            k_batches=Khat.shape[0],
            v_batches=V.shape[0],
            **strides("q", "bhn", Qhat),
            **strides("k", "bhlm", Khat),
            **strides("v", "bhm", V),
            **strides("m", "bhnm", mask),
            **strides("s", "h", sinks),
            **strides("o", "bhn", out),
            **strides("l", "bhn", lse),
            R=r,
            D_V=d_v,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_R=power_of_two(r),
            BLOCK_V=power_of_two(d_v),
            IS_CAUSAL=is_causal,
            # A positive scale moves through the maximum into the exponent. In its units of log2(e)
            # a bias of the lowest finite number would overflow.
            FOLD_SCALE=scale > LEAST_SCALE and not softcap and not is_bias,
            SOFTCAP=float(softcap),
            MASK_PER_ROW=mask is not None and num_queries > 1 and mask.stride(2) != 0,
            KEYS_FIT=keys_fit,
            DROP_BY_FOUR=dropout is not None and dropout.key % 4 == 0,
            # Triton tells only multiples of 16 by itself; eight fp16 numbers are one load as well.
            ALIGNED=math.gcd(16, *Khat.stride()[:3], *V.stride()[:2]),
            USE_TMA=use_tma,
            WARP_SPECIALIZE=warp_specialize,
            PRECISION="ieee" if torch.version.hip else "tf32x3",
            num_warps=tile.num_warps if block_m > 64 else min(tile.num_warps, 4),
            num_stages=tile.num_stages,
            enable_fp_fusion=True,  # Triton 3.9 has it off: 14 % more instructions
        )
        if warp_specialize:
            # In a context of its own, not to change what other kernels of the program use.
            copy_context().run(_with_scratch, start)
        else:
            start()


def _with_scratch(start: Callable[[], object]) -> None:
    """Launch a kernel that makes a tensor descriptor, for which Triton asks for device memory."""
    triton.set_allocator(
        lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda")
    )
    do_not_repeat()
    start()
