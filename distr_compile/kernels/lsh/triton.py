"""The LSH estimators in Triton: Qhat and Khat of every grouping block, in three launches.

The definition is ``kernels/lsh/reference.py`` (arXiv 2507.17245, section 3.2 and eq. 2).

1. ``_project_kernel``: N' = 16 random projections of every column of Q, as partial sums over chunks
   of rows. The projection matrix is made in registers from a hash of (row, projection, seed).
2. ``_order_kernel``: adds the partial sums in a fixed order, reads the signs as a Gray code and
   orders the columns by their position along the Gray sequence, ties by index. For ``lsh-signed``
   it also turns columns, which flips all bits of their codes.
3. ``_group_kernel``: Qhat and Khat as products with 0/1 matrices that sum the columns of a group,
   -1 for a column that is turned. A tile of K is read once for up to ``BLOCKS_PER_PROGRAM``
   grouping blocks.

The least a prologue can move and compute, for one head, e bytes per element and n grouping blocks::

    bytes = e (N d + M d) read + e (N r + n M r) written
    FLOPs = 2 * 16 N d (projections) + 2 N d r + 2 n M d r (products with 0/1 matrices)

These kernels read Q twice, since no column of Qhat is known before the whole block was hashed, and
move 16 d fp32 partial sums per chunk twice.

Products of fp16 and bf16 run on tensor cores with fp32 accumulation. No product is rounded:
projections are integers of at most 60 and the grouping matrices are 0/1. In fp32, projections take
three tf32 products of exact parts of Q, and Qhat and Khat are fp32 sums of gathered columns.
Nothing depends on the order in which programs run: there are no atomics.
"""

# Triton's decorators and the kernels under them cannot be typed.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from distr_compile.kernels.triton_places import blocks_from, counted_rows_of, rows_of_tile
from distr_compile.kernels.triton_random import random_numbers


@triton.jit(do_not_specialize=["num_rows", "block", "num_blocks", "num_chunks", "offset"])
def _project_kernel(
    Q,
    counted,
    places,
    partial,
    stride_b,
    stride_h,
    stride_n,
    stride_d,
    counted_stride_b,
    counted_stride_h,
    counted_stride_r,
    counted_stride_n,
    key_heads,
    rep,
    num_rows,
    block,
    num_blocks,
    num_chunks,
    chunk_rows,
    offset,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    NUM: tl.constexpr,
    ROWS: tl.constexpr,
    SIGNED: tl.constexpr,
):
    """``partial[unit, block, chunk]`` = Q^T P over the rows of one chunk, ``(HEAD_DIM, NUM)``.

    A unit is a key head of one batch element. The rows of its ``rep`` query heads are stacked token
    by token. With SIGNED the first projection is the sum of a column. Rows that are not
    ``counted``, where that is given, are 0.
    """
    # A program has one chunk of rows of one grouping block of one unit.
    pid = tl.program_id(0)
    chunk = pid % num_chunks
    i = pid // num_chunks % num_blocks
    unit = (pid // num_chunks // num_blocks).to(tl.int64)
    b, h = unit // key_heads, unit % key_heads
    first_token, stop = counted_rows_of(places, b, i, block, num_rows)
    # Rows are stacked: token * rep + head, from the first token of the block on.
    first = chunk * chunk_rows
    last = min(first + chunk_rows, (stop - first_token) * rep)

    column, p = tl.arange(0, WIDTH), tl.arange(0, NUM)
    is_column = column < HEAD_DIM
    first_token = first_token.to(tl.int64)
    Q += b * stride_b + h * rep * stride_h + first_token * stride_n
    if counted is not None:
        counted += b * counted_stride_b + h * counted_stride_h + first_token * counted_stride_n
    sums = tl.zeros([WIDTH, NUM], tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        token, head = (row // rep).to(tl.int64), (row % rep).to(tl.int64)
        is_row = row < last
        if counted is not None:
            place = token * counted_stride_n + head * counted_stride_r
            is_row = tl.load(counted + place, mask=is_row, other=0) != 0
        q = tl.load(
            Q + (token * stride_n + head * stride_h)[:, None] + (column * stride_d)[None, :],
            mask=is_row[:, None] & is_column[None, :],
            other=0.0,
        )
        # [ROWS, NUM], rows of the matrix by their place in the block.
        P = random_numbers(row[:, None] * NUM + p[None, :], offset)
        if SIGNED:
            P = tl.where((p == 0)[None, :], 1, P)
        P = P.to(q.dtype)
        if q.dtype == tl.float32:
            # Parts of at most 11 bits, which tf32 holds exactly, add up to the 24 bits of q.
            for _ in tl.static_range(3):
                part = (q.to(tl.int32, bitcast=True) & -(2**13)).to(tl.float32, bitcast=True)
                sums = tl.dot(tl.trans(part), P, sums, input_precision="tf32")
                q -= part
        else:
            sums = tl.dot(tl.trans(q), P, sums)

    partial += pid.to(tl.int64) * (HEAD_DIM * NUM)
    tl.store(partial + column[:, None] * NUM + p[None, :], sums, mask=is_column[:, None])


@triton.jit(do_not_specialize=["num_chunks"])
def _order_kernel(
    partial,
    order,
    num_chunks,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    NUM: tl.constexpr,
    SIGNED: tl.constexpr,
):
    """Write the order of ``reference.group_columns`` and its inverse, a block per program.

    ``order[unit, block]`` is ``(2, HEAD_DIM)``: the column at every place, and the place of every
    column, which is the number of columns that stand before it. A column that is turned, in either
    row, has ``~number``, which is negative, for its number.
    """
    pid = tl.program_id(0).to(tl.int64)
    column, p = tl.arange(0, WIDTH), tl.arange(0, NUM)
    is_column = column < HEAD_DIM
    partial += pid * num_chunks * (HEAD_DIM * NUM)
    # In one order, whichever program made them first: equal bits every time.
    sums = tl.zeros([WIDTH, NUM], tl.float32)
    for chunk in range(num_chunks):
        entry = (chunk * HEAD_DIM + column[:, None]) * NUM + p[None, :]
        sums += tl.load(partial + entry, mask=is_column[:, None], other=0.0)

    # Projection 0 is the sum of the column: turning flips it and all others.
    if SIGNED:
        turned = tl.sum(tl.where((p == 0)[None, :] & (sums > 0), 1, 0), 1) == 0
        sums = tl.where(turned[:, None], -sums, sums)
    # Signs as bits, projection 0 highest; then the place of that code among Gray codes.
    position = tl.sum((sums > 0).to(tl.int32) << (NUM - 1 - p)[None, :], 1)
    position ^= position >> 8
    position ^= position >> 4
    position ^= position >> 2
    position ^= position >> 1
    # By position, ties by column; what is no column comes last.
    key = tl.where(is_column, position * WIDTH + column, 2**31 - 1)
    # Counted, not sorted: how many keys are less, [WIDTH, WIDTH].
    place = tl.sum((key[None, :] < key[:, None]).to(tl.int32), 1)
    order += pid * (2 * HEAD_DIM)
    at_place, of_column = column, place
    if SIGNED:
        at_place, of_column = tl.where(turned, ~column, column), tl.where(turned, ~place, place)
    tl.store(order + place, at_place, mask=is_column)
    tl.store(order + HEAD_DIM + column, of_column, mask=is_column)


@triton.jit
def _load_tile(x, stride_d, is_row, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """The rows at ``x``, padded with zeros to ``(ROWS, WIDTH)``."""
    column = tl.arange(0, WIDTH)
    return tl.load(
        x[:, None] + (column * stride_d)[None, :],
        mask=is_row[:, None] & (column < HEAD_DIM)[None, :],
        other=0.0,
    )


@triton.jit
def _group_tile(
    tile,
    x,
    stride_d,
    is_row,
    order,
    COUNT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    SIGNED: tl.constexpr,
):
    """Sums of the first COUNT columns of every group, ``(ROWS, GROUPS)`` fp32.

    ``tile`` holds the rows at ``x``; in fp32 it is not used, hence never loaded.
    """
    group = tl.arange(0, GROUPS)
    # fp32: columns are gathered and added, since a tf32 product would round them.
    if tile.dtype == tl.float32:
        sums = tl.zeros([ROWS, GROUPS], tl.float32)
        is_group = group < HEAD_DIM // GROUP_SIZE
        for member in range(COUNT):
            column = tl.load(order + group * GROUP_SIZE + member, mask=is_group, other=0)
            is_turned = column < 0
            if SIGNED:
                column = tl.where(is_turned, ~column, column)
            entry = tl.load(
                x[:, None] + (column * stride_d)[None, :],
                mask=is_row[:, None] & is_group[None, :],
                other=0.0,
            )
            if SIGNED:
                entry = tl.where(is_turned[None, :], -entry, entry)
            sums += entry
        return sums
    else:
        # 16 bits: a product with the 0/1 matrix [WIDTH, GROUPS], -1 for a column that is turned.
        column = tl.arange(0, WIDTH)
        place = tl.load(order + HEAD_DIM + column, mask=column < HEAD_DIM, other=0)
        is_turned = place < 0
        if SIGNED:
            place = tl.where(is_turned, ~place, place)
        # COUNT is 1 where a group's first column stands for it.
        counts = (column < HEAD_DIM) & (place % GROUP_SIZE < COUNT)
        member = (tl.where(counts, place // GROUP_SIZE, -1)[:, None] == group[None, :]).to(tl.int32)
        if SIGNED:
            member = tl.where(is_turned[:, None], -member, member)
        return tl.dot(tile, member.to(tile.dtype))


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
def _group_kernel(
    Q,
    K,
    order,
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
    WIDTH: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
    SAMPLE: tl.constexpr,
    SIGNED: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Qhat and Khat, both contiguous. The first ``key_programs`` programs have a tile of K each.

    A program of K walks the grouping blocks of its span, a program of Q has the one of its tile.
    """
    RANK: tl.constexpr = HEAD_DIM // GROUP_SIZE
    pid = tl.program_id(0)
    tile_row, group = tl.arange(0, ROWS), tl.arange(0, GROUPS)
    is_group = (group < RANK)[None, :]
    if pid < key_programs:
        # Khat: one tile of keys for all grouping blocks of a span.
        first_key = pid % key_tiles * ROWS
        first_block = pid // key_tiles % spans * SPAN
        last_block = min(first_block + SPAN, num_blocks)
        unit = (pid // key_tiles // spans).to(tl.int64)
        if CAUSAL:
            # Rows from first_key - causal_offset on see a key of this tile.
            first_row = max(first_key - causal_offset, 0)
            from_block, last = blocks_from(places, unit // key_heads, first_row, block, num_blocks)
            first_block = max(first_block, from_block)
            last_block = min(last_block, last)
            if first_row >= num_rows:
                first_block = last_block  # no row sees the tile
        if first_block < last_block:
            key = (first_key + tile_row).to(tl.int64)
            is_key = key < num_keys
            k = (
                K
                + unit // key_heads * k_stride_b
                + unit % key_heads * k_stride_h
                + key * k_stride_n
            )
            tile = _load_tile(k, k_stride_d, is_key, HEAD_DIM, WIDTH)
            for i in range(first_block, last_block):
                unit_block = unit * num_blocks + i
                khat = _group_tile(
                    tile,
                    k,
                    k_stride_d,
                    is_key,
                    order + unit_block * (2 * HEAD_DIM),
                    GROUP_SIZE,
                    HEAD_DIM,
                    WIDTH,
                    GROUP_SIZE,
                    GROUPS,
                    ROWS,
                    SIGNED,
                )
                out = Khat + (unit_block * num_keys + key) * RANK
                tl.store(
                    out[:, None] + group[None, :],
                    khat.to(Khat.dtype.element_ty),
                    mask=is_key[:, None] & is_group,
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
        q = Q + head // heads * q_stride_b + head % heads * q_stride_h + row * q_stride_n
        qhat = _group_tile(
            _load_tile(q, q_stride_d, is_row, HEAD_DIM, WIDTH),
            q,
            q_stride_d,
            is_row,
            order + (head // rep * num_blocks + i) * (2 * HEAD_DIM),
            1 if SAMPLE else GROUP_SIZE,
            HEAD_DIM,
            WIDTH,
            GROUP_SIZE,
            GROUPS,
            ROWS,
            SIGNED,
        )
        if not SAMPLE:
            qhat *= 1.0 / GROUP_SIZE  # the mean of a group
        out = Qhat + (head * num_rows + row) * RANK
        tl.store(
            out[:, None] + group[None, :],
            qhat.to(Qhat.dtype.element_ty),
            mask=is_row[:, None] & is_group,
        )
