"""The estimator ``projection`` on a GPU: Qhat = Q A and Khat = K B, in four Triton launches.

The definition is ``kernels/projection/reference.py``; A and B of d x r belong to a key head and a
grouping block.

1. ``_gram_kernel``: partial Gram matrices X^T X over chunks of ``CHUNK_ROWS`` rows of Q and of K,
   each scaled by a power of two so that nothing overflows.
2. ``_sum_kernel``: adds the partial matrices of a block in a fixed order. Where causality ends a
   block inside a chunk of K, the rows up to there have a partial matrix of their own.
3. ``_solve_kernel``: one program per key head and block does the algebra in fp32. X, A and B lie
   in memory, small enough for the caches, and pass through registers 64 columns at a time. QR of
   the definition is Cholesky-QR, done twice, and then once more in the product of Cq: the spans are
   the same, and A B^T is. All products are of tensor cores; what is left is Cholesky of 64 x 64
   numbers. ``SHIFT`` keeps it from dividing by rounding errors: columns that are nearly in the span
   of others come out too short and are right after the second time.
4. ``_multiply_kernel``: Qhat and Khat. A tile of K is read once for up to ``BLOCKS_PER_PROGRAM``
   grouping blocks.

The least it can move and compute is in ``estimators.py``; Q and K are read twice. Products of fp16
and bf16 inputs run on tensor cores with fp32 accumulation, A and B as sums of two numbers of the
inputs' dtype, which keeps 22 and 16 of their bits. Products of fp32 numbers are three tf32 products
each on NVIDIA and fp32 elsewhere. Nothing depends on the
order in which programs run, nor on how a caller cuts heads and grouping blocks into calls: there
are no atomics.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from distr_compile.kernels.blocks import Places
from distr_compile.kernels.counted import counted_for
from distr_compile.kernels.padding import BLOCKS_PER_PROGRAM, cdiv, padded
from distr_compile.kernels.places import places
from distr_compile.kernels.plan import launch, new
from distr_compile.kernels.projection.reference import RIDGE
from distr_compile.kernels.random import seed_offset
from distr_compile.kernels.roles import Asked, Prologue

COMPUTES = ("projection",)

MAX_HEAD_DIM = 256

CHUNK_ROWS = 1024
"""Rows of Q or K per partial Gram matrix: 4 d^2 bytes for 1024 rows."""

GRAM_TILE_BYTES = 2**14
"""Size of a tile of Q or K that is multiplied by itself."""

MULTIPLY_TILE_BYTES = 2**15
"""Size of a tile of Q or K that is multiplied by A or B."""

PANEL = 16
"""The least width of a matrix product."""

SHIFT = 2.0**-18
"""Added to a diagonal of 1 before the first Cholesky. A fourth of it is too little against
rounding, more costs accuracy: ``python -m benchmarks.solve_conditioning``."""

LATER_SHIFT = 2.0**-20
"""Likewise before the second, whose columns are nearly orthonormal; the last has none."""

LEAST = 2.0**-22
"""Of a pivot: what is no more is nothing but rounding."""

LOST = 2.0**-38
"""Of a column's square: with no more left of it beside earlier ones it is nothing but rounding."""

TINY = 2.0**-126

LEAST_WIDTH = 32
"""Of a tile: the least depth of a product of matrices."""


def prologue(Q: Tensor, K: Tensor, mask: Tensor | None, asked: Asked) -> Prologue:
    """What makes Qhat and Khat of a chunk, and which rows of the call count for it by the mask."""
    _, heads, num_queries, head_dim = Q.shape
    key_heads, num_keys = K.shape[1:3]
    rep, block = heads // key_heads, asked.block
    sizes, where = (num_queries, num_keys, key_heads, rep), None
    counted = counted_for(mask, *sizes, asked)
    # Where the blocks of the strict form lie its caller says.
    if not asked.strict and mask is not None and counted[0] is not None:
        where = places(mask, counted[0], Q.shape[0], num_keys, asked, keys_count=True)
        block = where.rows
    blocks = cdiv(num_queries, block) if asked.strict else 0
    return Prologue(
        partial(
            projection_factors,
            rank=asked.rank,
            rounds=asked.rounds,
            grouping_block=block,
            seed=asked.seed,
        ),
        workspace_bytes(block, num_keys, head_dim, asked.rank, rep, Q.element_size(), blocks),
        counted,
        where,
    )


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
    places: Places | None = None,
) -> tuple[Tensor, Tensor]:
    """Qhat and Khat of every grouping block: S is about Qhat Khat^T for the rows of the block.

    Inputs may have any strides and are read where they are. Four launches on the current stream of
    the current device, which must be Q's. No host synchronisation; nothing is kept after the call.

    Args:
        Q: ``(B, H, N, d)`` fp16, bf16 or fp32, d at most 256. Row 0 begins a grouping block; the
            last block may be short.
        K: ``(B or 1, H_k, M, d)`` of Q's dtype, H_k divides H. The query heads of a key head share
            A and B.
        queries: bool ``(B or 1, H_k or 1, rep, N)``, of ``counted.counted_rows``: the
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
        places: where the blocks lie, in the place of ``grouping_block`` and of what causality says
            of A and B.

    Returns:
        Qhat ``(B, H, N, r)`` and Khat ``(B, H_k, ceil(N / grouping_block), M, r)``, contiguous, of
        Q's dtype; N without the ``earlier`` blocks. With ``places`` as many blocks as that has, and
        rows that use no block of it may stay unwritten.

    Raises:
        ValueError: d or r is out of range.
    """
    call = _prepared(Q, K, rank, grouping_block, is_causal, causal_offset, earlier, places)
    # As Q in ``_prepared``: the kernel reads the rows before at negative places.
    if earlier and queries is not None:
        queries = queries[..., earlier * grouping_block :]
    partial, exponents = _partial_grams(call, queries, keys)
    grams, gram_exponents = _sum_grams(call, partial, exponents)
    parts, factors = _solve(call, grams, gram_exponents, rounds, seed)
    return _multiply(call, parts, factors)


@dataclass(frozen=True)
class _Call:
    """One call of ``projection_factors``, as its launches take it.

    Attributes:
        Q: ``(B, H, N, d)``, without the ``earlier`` blocks.
        K: ``(B, H_k, M, d)``.
        rank: r.
        block: query rows per grouping block.
        is_causal: which keys a block counts depends on where it stands.
        causal_offset: see ``projection_factors``, counted from row 0 of ``Q``.
        earlier: grouping blocks before row 0 of ``Q``; if there are any, the form is strict.
        num_blocks: grouping blocks of ``Q``.
        width: of a tile that holds d columns.
        ranks: r rounded up to whole panels.
        precision: of products of fp32 numbers.
        places: where the blocks lie, or None.
    """

    Q: Tensor
    K: Tensor
    rank: int
    block: int
    is_causal: bool
    causal_offset: int
    earlier: int
    num_blocks: int
    width: int
    ranks: int
    precision: str
    places: Places | None = None

    @property
    def units(self) -> int:
        """Key heads, counted over the batch."""
        return self.K.shape[0] * self.K.shape[1]

    @property
    def rep(self) -> int:
        """Query heads of a key head."""
        return self.Q.shape[1] // self.K.shape[1]

    @property
    def is_limited(self) -> bool:
        """Whether a block counts some of the keys only, those up to one of them."""
        if self.places is not None:
            return self.places.seen is not None
        return self.is_causal

    @property
    def where(self) -> tuple[int, int, int, int, int]:
        """Rows, keys, rows of a block, blocks and offset: five arguments of every kernel."""
        num_rows, num_keys = self.Q.shape[2], self.K.shape[2]
        return num_rows, num_keys, self.block, self.num_blocks, self.causal_offset

    @property
    def cut(self) -> tuple[int, int, int, int]:
        """Chunks of a block of Q, chunks of K, partial matrices and their sums."""
        num_rows, num_keys = self.Q.shape[2], self.K.shape[2]
        # Of the longest block: beside ``earlier`` ones, which are whole, few rows may be left.
        rows = self.block if self.earlier or self.places else min(self.block, num_rows)
        return _chunk_counts(
            rows * self.rep, num_keys, self.num_blocks, self.is_limited, self.earlier
        )


def _prepared(
    Q: Tensor,
    K: Tensor,
    rank: int,
    block: int,
    is_causal: bool,
    causal_offset: int,
    earlier: int,
    places: Places | None,
) -> _Call:
    # Q begins with the first block that is wanted; the Gram kernel reads the rows before it.
    if earlier:
        Q, causal_offset = Q[:, :, earlier * block :], causal_offset + earlier * block
    num_rows, head_dim = Q.shape[2:]
    if not 1 <= rank <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"rank: got {rank} for head_dim {head_dim}; must be from 1 to head_dim, and head_dim "
            f"at most {MAX_HEAD_DIM}"
        )
    return _Call(
        Q=Q,
        K=K.expand(Q.shape[0], -1, -1, -1),
        rank=rank,
        block=places.rows if places else block,
        is_causal=is_causal or earlier > 0,
        causal_offset=min(max(causal_offset, -num_rows), K.shape[2]),
        earlier=earlier,
        num_blocks=places.blocks if places else cdiv(num_rows, block),
        width=padded(head_dim, LEAST_WIDTH),
        ranks=cdiv(rank, PANEL) * PANEL,
        precision="ieee" if torch.version.hip else "tf32x3",
        places=places,
    )


def _partial_grams(
    call: _Call, queries: Tensor | None, keys: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gram matrices of chunks, ``(units, jobs, width, width)`` fp32, and their exponents."""
    from distr_compile.kernels.projection.gram import _gram_kernel

    Q, K, width = call.Q, call.K, call.width
    query_chunks, key_chunks, jobs, _ = call.cut
    partial = new(Q, call.units, jobs, width, width, dtype=torch.float32)
    exponents = new(Q, call.units, jobs, dtype=torch.int32)
    if queries is not None and keys is not None:
        queries = queries.expand(*K.shape[:2], -1, -1)
        keys = keys.expand(*K.shape[:2], -1)
    # A sum [width, columns] is held in registers.
    columns = width if width <= 128 else 64
    launch(
        _gram_kernel,
        (call.units * jobs, width // columns),
        Q,
        K,
        Q if queries is None else queries,  # not read
        Q if keys is None else keys,
        call.places and call.places.ends,
        call.places and call.places.seen,
        partial,
        exponents,
        *Q.stride(),
        *K.stride(),
        *((0, 0, 0, 0) if queries is None else queries.stride()),
        *((0, 0, 0) if keys is None else keys.stride()),
        K.shape[1],
        call.rep,
        *call.where,
        call.earlier,
        query_chunks,
        key_chunks,
        jobs,
        HEAD_DIM=Q.shape[3],
        WIDTH=width,
        COLUMNS=columns,
        ROWS=max(16, min(64, GRAM_TILE_BYTES // (width * Q.element_size()))),
        CHUNK=CHUNK_ROWS,
        STRICT=call.earlier > 0,
        COUNTED=queries is not None,
        PRECISION=call.precision,
        num_warps=4 if width <= 64 else 8,
        num_stages=2,
    )
    return partial, exponents


def _sum_grams(call: _Call, partial: Tensor, exponents: Tensor) -> tuple[Tensor, Tensor]:
    """Cq of each block and Ck, ``(units, matrices, width, width)`` fp32, and their exponents."""
    from distr_compile.kernels.projection.gram import _sum_kernel

    query_chunks, key_chunks, jobs, matrices = call.cut
    size = call.width**2
    grams = new(partial, call.units, matrices, call.width, call.width)
    gram_exponents = new(exponents, call.units, matrices)
    tile = min(size, 2048)  # entries of a sum per program
    launch(
        _sum_kernel,
        (call.units * matrices, size // tile),
        partial,
        exponents,
        grams,
        gram_exponents,
        call.places and call.places.seen,
        call.K.shape[1],
        *call.where,
        call.earlier,
        query_chunks,
        key_chunks,
        jobs,
        matrices,
        SIZE=size,
        TILE=tile,
        CHUNK=CHUNK_ROWS,
        CAUSAL=call.is_limited,
        STRICT=call.earlier > 0,
        num_warps=4,
    )
    return grams, gram_exponents


def _solve(
    call: _Call, grams: Tensor, exponents: Tensor, rounds: int, seed: int
) -> tuple[Tensor, Tensor]:
    """A and B in parts, ``(units, blocks, 2, parts, width, ranks)``, and a factor for each."""
    from distr_compile.kernels.projection.solve import _solve_kernel

    num_parts = _num_parts(call.Q.dtype)
    where = call.where
    if call.places:  # the numbers of rows and of keys matter little here: as if all were full
        where = (call.num_blocks * call.block, where[1], *where[2:4], where[1])
    shape = (call.units, call.num_blocks, 2)
    bases = new(grams, *shape[:2], 3, call.width, call.ranks)  # X, Y and room
    parts = new(call.Q, *shape, num_parts, call.width, call.ranks)
    factors = new(grams, *shape)
    launch(
        _solve_kernel,
        (call.units * call.num_blocks,),
        grams,
        exponents,
        bases,
        parts,
        factors,
        call.rep,
        *where,
        call.earlier,
        call.cut[-1],
        seed_offset(seed),
        HEAD_DIM=call.Q.shape[3],
        RANK=call.rank,
        WIDTH=call.width,
        RANKS=call.ranks,
        COLUMNS=_columns(call.ranks),
        PARTS=num_parts,
        ROUNDS=rounds,
        CAUSAL=call.is_limited,
        STRICT=call.earlier > 0,
        RIDGE=RIDGE,
        SHIFT=SHIFT,
        LATER_SHIFT=LATER_SHIFT,
        LEAST=LEAST,
        LOST=LOST,
        TINY=TINY,
        PRECISION=call.precision,
        num_warps=4,
        num_stages=1,
    )
    return parts, factors


def _multiply(call: _Call, parts: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Qhat ``(B, H, N, r)`` and Khat ``(B, H_k, blocks, M, r)``."""
    from distr_compile.kernels.projection.multiply import _multiply_kernel

    Q, K, num_blocks = call.Q, call.K, call.num_blocks
    (batch, heads, num_rows, head_dim), (key_heads, num_keys) = Q.shape, K.shape[1:3]
    Qhat = new(Q, batch, heads, num_rows, call.rank)
    Khat = new(Q, batch, key_heads, num_blocks, num_keys, call.rank)
    row_bytes = call.width * Q.element_size()
    rows = max(16, min(128, MULTIPLY_TILE_BYTES // row_bytes))
    key_tiles = cdiv(num_keys, rows)
    spans = cdiv(num_blocks, BLOCKS_PER_PROGRAM)
    key_programs = call.units * spans * key_tiles
    tiles_per_block = cdiv(min(call.block, num_rows), rows)
    query_tiles = num_blocks * tiles_per_block
    # An upper bound: each block may end in part of a tile.
    if call.places:
        query_tiles = cdiv(num_rows, rows) + num_blocks - 1
    launch(
        _multiply_kernel,
        (key_programs + batch * heads * query_tiles,),
        Q,
        K,
        parts,
        factors,
        call.places and call.places.ends,
        Qhat,
        Khat,
        *Q.stride(),
        *K.stride(),
        key_heads,
        call.rep,
        *call.where,
        key_tiles,
        spans,
        key_programs,
        query_tiles,
        tiles_per_block,
        HEAD_DIM=head_dim,
        RANK=call.rank,
        WIDTH=call.width,
        RANKS=call.ranks,
        COLUMNS=PANEL if Q.dtype == torch.float32 else _columns(call.ranks),
        PARTS=_num_parts(Q.dtype),
        ROWS=rows,
        SPAN=BLOCKS_PER_PROGRAM,
        CAUSAL=call.is_causal,
        STRICT=call.earlier > 0,
        LARGEST=torch.finfo(Q.dtype).max,
        PRECISION=call.precision,
        num_warps=4 if row_bytes <= 128 else 8,
        num_stages=1,
    )
    return Qhat, Khat


def _columns(ranks: int) -> int:
    """Columns of A and B that pass through registers together; they divide ``ranks``."""
    return next(c for c in (64, 32, 16) if ranks % c == 0)


def _num_parts(dtype: torch.dtype) -> int:
    """Numbers of the inputs' dtype that add up to an entry of A and B."""
    return 1 if dtype == torch.float32 else 2


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
    matrix = 4 * padded(head_dim, LEAST_WIDTH) ** 2
    panels = padded(head_dim, LEAST_WIDTH) * cdiv(rank, PANEL) * PANEL
    query_chunks, key_chunks, _, _ = _chunk_counts(rows * rep, num_keys, 1, False)
    parts = element_bytes * (1 if element_bytes == 4 else 2)
    # Once: chunks of K and their sum. Each block: chunks of Q, two sums and the rest of K;
    # X, Y and room in fp32, A and B in parts.
    # In the strict form those of all earlier blocks are there, however few blocks are made.
    chunks_once, chunks = (strict_blocks * query_chunks, 0) if strict_blocks else (0, query_chunks)
    return (
        (chunks_once + key_chunks + 1) * matrix,
        (chunks + 3) * matrix + panels * (12 + 2 * parts),
    )


def _chunk_counts(
    rows_of_block: int, num_keys: int, num_blocks: int, is_causal: bool, earlier: int = 0
) -> tuple[int, int, int, int]:
    """Chunks of a block of Q, chunks of K, partial matrices and sums of them, of one key head.

    The chunks of a block and of K do not depend on what else is in the call.
    """
    query_chunks = cdiv(rows_of_block, CHUNK_ROWS)
    # With causality whole chunks only: a block has a matrix for the keys after its last one.
    key_chunks = num_keys // CHUNK_ROWS if is_causal else cdiv(num_keys, CHUNK_ROWS)
    blocks_of_keys = num_blocks if is_causal else 0
    return (
        query_chunks,
        key_chunks,
        (earlier + num_blocks) * query_chunks + key_chunks + blocks_of_keys,
        num_blocks + (blocks_of_keys if is_causal else 1),
    )
