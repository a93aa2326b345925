"""DistrAttention on a GPU: the Triton kernels, over chunks of heads and query rows.

A chunk is what shares one launch of the prologue and one of the attention kernel (in the strict
form of ``projection``, two of the latter for each of its grouping blocks). Qhat and Khat live only
in between, and Khat has a copy per grouping block, N / l * M * r elements a head: the walk keeps
them within a workspace of a stated size, whatever the length.

Nothing here waits for the device, but the strict form where a mask may say which rows are padding;
nothing keeps memory after the call or depends on earlier calls.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distr_compile.estimators import arithmetic
from distr_compile.kernels.blocks import Places
from distr_compile.kernels.counted import strict_spans
from distr_compile.kernels.plan import Plan, do_not_repeat, recording
from distr_compile.kernels.roles import Asked, Prologue, prefix_edge
from distr_compile.kernels.rows import four_dimensions, sliced
from distr_compile.lowering.architecture import architecture
from distr_compile.lowering.beside import one_ahead
from distr_compile.lowering.call import Approximation, Call, Shape
from distr_compile.lowering.choose import Implementation, plans

if TYPE_CHECKING:
    from distr_compile.kernels.attention.triton_fwd import Tile

_Bases = tuple[Tensor, Tensor]

WORKSPACE_MIB = 256
"""Most MiB of Qhat, Khat and what makes them at a time; one grouping block of one key head is the
least possible."""


def attention(
    call: Call, *, workspace: int = WORKSPACE_MIB << 20, by_pointers: bool = False
) -> None:
    """Fill ``call.out``; exactly where the rank is d.

    Args:
        call: of fp32, fp16 or bf16 tensors, any strides but those of ``out``; a mask is read where
            it is broadcast. It has no bases: Qhat and Khat stand for Q and K there.
        workspace: bound on Qhat, Khat and what the estimator needs to make them, in the strict form
            also on what a block's two parts need to become one, bytes.
        by_pointers: load keys and values by pointers, also where the tile has descriptors.

    Raises:
        NoArithmeticError: the table names no module with kernels for the estimator.
        Exception: whatever Triton raises where a kernel does not compile or start; ``out`` may be
            filled in part then.
    """
    how, q = call.approximation, call.q
    is_exact = how.rank == q.shape[3]
    module = None if is_exact else arithmetic(how.estimator, "gpu", "prologue")
    if call.mask is not None:
        call = replace(call, mask=four_dimensions(call.mask))
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        if module and call.is_prefix:
            _attend_spans(call, module, workspace, by_pointers)
        else:
            prologue = module.prologue(q, call.k, call.mask, call.asked) if module else None
            _attend(call, prologue, workspace, by_pointers)


def _attend_spans(call: Call, module: ModuleType, workspace: int, by_pointers: bool) -> None:
    """The strict form: entries whose blocks begin with the same row together.

    The host looks at the mask for that; while a CUDA graph is recorded it cannot, and the blocks
    begin with row 0. The rows before the first block are exact, as that is.
    """
    q, mask, block = call.q, call.mask, call.asked.block
    is_hidden = mask is None or (q.is_cuda and torch.cuda.is_current_stream_capturing())
    sizes, offset = (q.shape[0], q.shape[2], call.k.shape[2]), call.scores.offset or 0
    for span in strict_spans(None if is_hidden else mask, sizes, lambda _: block, offset):
        some, first = call.part(span.entries), span.first
        asked = replace(some.asked, first=first, block=span.block)
        prologue = module.prologue(some.q, some.k, some.mask, asked)
        if first:
            queries, keys = prologue.counted
            later = None if queries is None else queries[..., first:]
            prologue = replace(prologue, counted=(later, keys))
            _attend(some.part(rows=slice(first)).exactly(), None, workspace, by_pointers)
            some = some.part(rows=slice(first, None))
        _attend_strictly(some, prologue, span.block, workspace, by_pointers)


def _attend(call: Call, prologue: Prologue | None, workspace: int, by_pointers: bool) -> None:
    """Any form but the strict one."""
    # Here, not above: without Triton this fails, and the next implementation runs.
    from distr_compile.kernels.attention.triton_fwd import attention_fwd

    q, limit, num_keys = call.q, call.limit, call.k.shape[2]
    # Exact: one block of all rows.
    block = call.asked.block if prologue else max(1, q.shape[2])
    has_mask = call.mask is not None or call.dropout is not None
    tile = tile_of(
        call,
        by_pointers,
        rank=call.approximation.rank,
        is_causal=limit is not None,
        has_mask=has_mask,
    )
    chunks = _chunks_of(call, prologue, block, workspace)

    def places_of(chunk: _Chunk) -> Any:
        return prologue and prologue.places and prologue.places.part(chunk.batch, chunk.blocks)

    def factors(chunk: _Chunk) -> tuple[Tensor, Tensor]:
        if prologue is None:  # Q and K in the places of Qhat and Khat
            part = call.part(chunk.batch, chunk.key_heads, chunk.rows)
            return part.q, part.k[:, :, None]
        # Keys from ``seen`` on are seen by no row of the chunk.
        offset, seen = _seen_by(chunk, limit, num_keys)
        part = call.part(chunk.batch, chunk.key_heads, chunk.rows, slice(seen))
        places = places_of(chunk)
        return prologue.factors(
            part.q,
            part.k,
            *_counted_in(prologue, chunk, seen),
            is_causal=limit is not None,
            causal_offset=offset,
            **({"places": places} if places else {}),
        )

    def attend(chunk: _Chunk, made: tuple[Tensor, Tensor]) -> None:
        offset, seen = _seen_by(chunk, limit, num_keys)
        part = call.part(chunk.batch, chunk.key_heads, chunk.rows, slice(seen))
        attention_fwd(
            made[0],
            made[1][:, :, :, :seen],
            part.v,
            part.mask,
            **part.softmax | {"causal_offset": offset},
            grouping_block=block,
            tile=tile,
            out=part.out,
            places=places_of(chunk) or None,
        )

    # On a GPU the factors of a chunk are made beside attention of the one before.
    one_ahead(chunks, factors, attend, q.device)


def _chunks_of(call: Call, prologue: Prologue | None, block: int, workspace: int) -> list[_Chunk]:
    """The chunks of a call; one without a prologue, which needs no workspace."""
    q, rank = call.q, call.approximation.rank
    cut = partial(
        _chunks,
        q.shape,
        call.k.shape,
        block,
        rank * q.element_size(),
        head_bytes=prologue.own_bytes[0] if prologue else 0,
        block_bytes=prologue.own_bytes[1] if prologue else 0,
        places=prologue.places if prologue else None,
    )
    chunks = list(cut(limit=workspace if prologue else None))
    if len(chunks) > 1:
        do_not_repeat()
        if q.is_cuda:  # the next chunk's factors are made meanwhile, and are there, too
            chunks = list(cut(limit=workspace // 2))
    return chunks


def _seen_by(chunk: _Chunk, causal_offset: int | None, num_keys: int) -> tuple[int, int]:
    """The offset of a chunk's first row, and how many keys its last row sees."""
    if causal_offset is None:
        return 0, num_keys
    offset = causal_offset + chunk.rows.start
    return offset, max(0, min(num_keys, chunk.rows.stop + causal_offset))


def _attend_strictly(
    call: Call, prologue: Prologue, block: int, workspace: int, by_pointers: bool
) -> None:
    """Each grouping block in two parts: keys before it with width r, the others exactly.

    They share a softmax, whose two halves are put together by their denominators.
    """
    q, value_dim, rank = call.q, call.v.shape[3], call.approximation.rank
    has_mask = call.mask is not None or call.dropout is not None
    tile_of_width = partial(tile_of, call, by_pointers, has_mask=has_mask)
    whole = _Strict(
        call,
        prologue,
        block,
        known_tile=tile_of_width(rank=rank, is_causal=False),
        exact_tile=tile_of_width(rank=q.shape[3], is_causal=call.scores.is_causal),
    )
    head_bytes, block_bytes = prologue.own_bytes
    # The second part and its sum with the first, in fp32, and the denominators.
    head_bytes += call.rep * block * (value_dim * (q.element_size() + 8) + 20)
    row_bytes = rank * q.element_size()
    for chunk in _chunks(
        q.shape, call.k.shape, block, row_bytes, workspace, head_bytes, block_bytes
    ):
        _attend_chunk(whole, chunk)


def tile_of(call: Call, by_pointers: bool, **options: Any) -> Tile:
    """That of the table, or the same without descriptors."""
    from distr_compile.lowering.tiles import tile_for

    q, value_dim = call.q, call.v.shape[3]
    tile = tile_for(architecture(q.device), dtype=q.dtype, value_dim=value_dim, **options)
    return tile.by_pointers() if by_pointers else tile


@dataclass(frozen=True)
class _Strict:
    """A call in the strict form.

    Attributes:
        call: all of it.
        prologue: makes its Qhat and Khat.
        block: query rows per grouping block.
        known_tile: for keys before a block, of width r.
        exact_tile: for the block's own keys and later ones, of width d.
    """

    call: Call
    prologue: Prologue
    block: int
    known_tile: Tile
    exact_tile: Tile

    @property
    def offset(self) -> int:
        """Keys ``j <= i + offset`` are not later than row i."""
        return self.call.scores.offset or 0

    def keys_of(self, rows: slice) -> tuple[int, int]:
        """Keys of a block that are approximated, and those that it sees at all."""
        num_keys, limit = self.call.k.shape[2], self.call.limit
        end = num_keys if limit is None else max(0, min(num_keys, rows.stop + limit))
        return prefix_edge(rows.start, num_keys, self.offset), end

    def attend(self, part: Call, Qhat: Tensor, Khat: Tensor, **options: Any) -> None:
        """Attention of a part's rows to its keys; its sinks are for one of the halves."""
        from distr_compile.kernels.attention.triton_fwd import attention_fwd

        all_see = {"sinks": None, "is_causal": False, "causal_offset": 0}
        options = {**part.softmax, **all_see, "grouping_block": self.block, **options}
        attention_fwd(Qhat, Khat, part.v, part.mask, **options)


def _attend_chunk(whole: _Strict, chunk: _Chunk) -> None:
    block = whole.block
    earlier = max(1, chunk.rows.start // block)  # no factors for the first block of all
    if chunk.rows.stop > earlier * block:
        Qhat, Khat = _factors_of_chunk(whole, chunk, earlier)
    heads = whole.call.part(chunk.batch, chunk.key_heads)
    # Room for the exact half of a block that has two; used again by every block.
    O_others = torch.empty_like(heads.out[:, :, :block])
    lse, lse_others = heads.q.new_empty(2, *O_others.shape[:3], dtype=torch.float32)
    for start in range(chunk.rows.start, chunk.rows.stop, block):
        rows = slice(start, min(start + block, chunk.rows.stop))
        edge, end = whole.keys_of(rows)
        part, here = heads.part(rows=rows, keys=slice(edge, end)), slice(0, rows.stop - start)
        others = partial(
            whole.attend,
            part,
            part.q,
            part.k[:, :, None],
            is_causal=part.scores.is_causal,
            causal_offset=part.scores.offset,
            sinks=part.sinks,
            tile=whole.exact_tile,
        )
        if not edge:  # no earlier keys: all are exact
            others(out=part.out)
            continue
        place = start // block - earlier  # among the blocks that have factors here
        known = partial(
            whole.attend,
            heads.part(rows=rows, keys=slice(edge)),
            Qhat[:, :, place * block :][:, :, here],
            Khat[:, :, place : place + 1, :edge],
            tile=whole.known_tile,
        )
        if edge >= end:  # earlier keys only
            known(sinks=part.sinks, out=part.out)
            continue
        # Two halves. The sinks, which count once, go with the exact one.
        known(out=part.out, lse=lse[:, :, here])
        others(out=O_others[:, :, here], lse=lse_others[:, :, here])
        _add_part(part.out, lse[:, :, here], O_others[:, :, here], lse_others[:, :, here])


def _factors_of_chunk(whole: _Strict, chunk: _Chunk, earlier: int) -> tuple[Tensor, Tensor]:
    """Qhat and Khat of the chunk's blocks, from all rows up to its last block."""
    so_far = replace(chunk, rows=slice(0, chunk.rows.stop))
    last = (chunk.rows.stop - 1) // whole.block * whole.block  # first row of the last block
    # Later keys are approximated by no block of the chunk.
    num_known = prefix_edge(last, whole.call.k.shape[2], whole.offset)
    part = whole.call.part(chunk.batch, chunk.key_heads, so_far.rows, slice(num_known))
    return whole.prologue.factors(
        part.q,
        part.k,
        *_counted_in(whole.prologue, so_far, num_known),
        causal_offset=whole.offset,
        earlier=earlier,
    )


def _add_part(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Make of ``out`` the attention to both of two sets of keys, given that to each.

    Args:
        out: ``(B, H, N, d_v)``; other alike.
        lse: ``(B, H, N)`` fp32, the logarithm of the softmax's denominator; -inf where a row sees
            nothing. ``other_lse`` alike.
        other: see ``out``.
        other_lse: see ``lse``.
    """
    # The other part's share of both denominators: e^other_lse / (e^lse + e^other_lse).
    share = torch.sigmoid(other_lse - lse)  # NaN where both are -inf; both parts are 0 there
    share = share.masked_fill_(other_lse == -torch.inf, 0)[..., None]
    torch.add(out * (1 - share), other * share, out=out)


@dataclass(frozen=True)
class _Chunk:
    """What is computed together: batch entries, key heads with their query heads, query rows.

    Where a mask says where the blocks lie those are all rows, of some ``blocks``.
    """

    batch: slice
    key_heads: slice
    rows: slice
    blocks: slice = field(default_factory=lambda: slice(0, 1))


def _counted_in(prologue: Prologue, chunk: _Chunk, seen: int) -> Iterator[Tensor | None]:
    """``counted`` of the chunk's queries, and of its keys, of which it sees the first ``seen``."""
    for rows, place in zip(prologue.counted, (chunk.rows, slice(seen)), strict=False):
        if rows is None:
            yield None
        else:
            # Queries have an axis for the query heads of a key head, keys do not.
            within = (slice(None),) * (rows.dim() - 3)
            yield sliced(rows, chunk.batch, chunk.key_heads, *within, place)


def _chunks(
    q_shape: torch.Size,
    k_shape: torch.Size,
    block: int,
    row_bytes: int,
    limit: int | None,
    head_bytes: int = 0,
    block_bytes: int = 0,
    places: Places | None = None,
) -> Iterator[_Chunk]:
    """Cut a call so that the Qhat and Khat of a chunk, ``row_bytes`` a row, take ``limit`` bytes.

    The prologue's ``head_bytes`` for each key head and ``block_bytes`` for each of its grouping
    blocks are counted in.

    As many heads as fit with all their rows, so that K is read once; where one key head is too
    much, as many of its grouping blocks as fit, but at least one.
    """
    batch, heads, num_queries, _ = q_shape
    key_heads, num_keys = k_shape[1:3]
    rep = heads // key_heads
    blocks = -(-num_queries // block)
    # Bytes of a grouping block of one key head: its Qhat, its Khat and what makes them.
    of_block = (rep * block + num_keys) * row_bytes + block_bytes
    if places:
        blocks, of_block = places.blocks, num_keys * row_bytes + block_bytes
        head_bytes += rep * num_queries * row_bytes  # rows are not cut then: Qhat once a head
    of_head = blocks * of_block + head_bytes
    # Key heads that fit with all of their blocks; 0 where not even one does.
    together = batch * key_heads if limit is None else limit // max(1, of_head)
    some_batches = max(1, min(batch, together // key_heads))
    some_heads = max(1, min(key_heads, together))
    some_rows, some_blocks = num_queries, blocks
    if limit is not None and together == 0:
        some_blocks = max(1, (limit - head_bytes) // of_block)
        some_rows = num_queries if places else block * some_blocks
    for b in range(0, batch, some_batches):
        for h in range(0, key_heads, some_heads):
            last = min(h + some_heads, key_heads)
            for row in range(0, num_queries, max(1, some_rows)):
                for first in range(0, blocks if places else 1, some_blocks):
                    yield _Chunk(
                        slice(b, b + some_batches),
                        slice(h, last),
                        slice(row, min(row + some_rows, num_queries)),
                        slice(first, first + some_blocks),
                    )


def refuses(shape: Shape, approximation: Approximation) -> str | None:
    """Why the kernels do not compute a call, or None."""
    if shape.device.type != "cuda":
        return "Triton's kernels need a GPU"
    if shape.dtype == torch.float64:
        return "Triton's kernels do not compute in fp64"
    return None


def _refuses_pointers(shape: Shape, approximation: Approximation) -> str | None:
    why = refuses(shape, approximation)
    if why is None:
        try:
            from distr_compile.lowering.tiles import has_descriptors
        except ImportError:
            return "Triton is not installed"
        if not has_descriptors(architecture(shape.device), shape.dtype):
            why = "no tile of this device has descriptors: pointers are the first form"
    return why


def _run(call: Call, by_pointers: bool = False) -> None:
    how, factors = call.approximation, None
    # Bases are multiplied by PyTorch, outside of the plan; the rest is exact, of width r.
    if call.bases is not None:
        module = arithmetic(how.estimator, "gpu", "prologue")
        factors = partial(_factors_of_bases, module, how.estimator, how.rank)
        Q, K = factors(call.q, call.k, call.mask, call.bases)
        call = replace(call, q=Q, k=K).exactly()
    # The strict form has PyTorch's calls between its launches, which no plan repeats.
    if call.key is None or call.is_prefix:
        attention(call, by_pointers=by_pointers)
        return
    seed = None if call.dropout is None else call.dropout.seed
    given = (call.q, call.k, call.v, call.mask, call.sinks, seed, call.out)
    with recording(given) as recorder:
        attention(call, by_pointers=by_pointers)
    plan = recorder.plan()
    if plan is not None:
        plans.put(call.key, partial(_repeat, plan, factors))


def _factors_of_bases(
    module: Any,
    estimator: str,
    rank: int,
    Q: Tensor,
    K: Tensor,
    mask: Tensor | None,
    bases: _Bases,
) -> tuple[Tensor, Tensor]:
    """Qhat and Khat of the whole call, which the estimator's module makes of given bases."""
    asked = Asked(estimator, rank, Q.shape[2], bases=bases)
    Qhat, Khat = module.prologue(Q, K, mask, asked).factors(Q, K)
    return Qhat, Khat


def _repeat(
    plan: Plan,
    factors: Callable[..., tuple[Tensor, Tensor]] | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    bases: _Bases | None,
    out: Tensor,
) -> None:
    """What the op calls where it knows a call: ``factors``, if there are bases, and launches."""
    if factors is not None:
        q, k = factors(q, k, mask, bases)
    plan(q, k, v, mask, sinks, seed, out)


_BY_POINTERS = Implementation(
    "distr-triton by pointers", _refuses_pointers, partial(_run, by_pointers=True)
)
IMPLEMENTATION = Implementation("distr-triton", refuses, _run, fallback=_BY_POINTERS)
