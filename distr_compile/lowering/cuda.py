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

from distr_compile.estimators import arithmetic, auto_grouping_block
from distr_compile.kernels.attention.dropout import Dropout
from distr_compile.kernels.blocks import Places
from distr_compile.kernels.counted import strict_spans
from distr_compile.kernels.plan import Plan, do_not_repeat, recording
from distr_compile.kernels.roles import Asked, Prologue, prefix_edge
from distr_compile.kernels.rows import four_dimensions, sliced
from distr_compile.lowering.architecture import architecture
from distr_compile.lowering.beside import one_ahead
from distr_compile.lowering.call import Approximation, Shape
from distr_compile.lowering.choose import Call, Implementation, plans

if TYPE_CHECKING:
    from distr_compile.kernels.attention.triton_fwd import Tile

_Bases = tuple[Tensor, Tensor]

WORKSPACE_MIB = 256
"""Most MiB of Qhat, Khat and what makes them at a time; one grouping block of one key head is the
least possible."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    is_causal: bool = False,
    causal_offset: int = 0,
    rank: int,
    estimator: str,
    grouping_block: int = 0,
    rounds: int = 1,
    seed: int = 0,
    softcap: float = 0.0,
    strict: bool = False,
    dropout: Dropout | None = None,
    out: Tensor,
    workspace: int = WORKSPACE_MIB << 20,
    by_pointers: bool = False,
) -> Tensor:
    """Arguments and result as in ``kernels.attention.reference.attention``; ``rank == d`` is exact.

    Args:
        q: ``(B, H, N, d)`` fp32, fp16 or bf16, any strides; k, v alike.
        k: ``(B or 1, H_k, M, d)``.
        v: ``(B or 1, H_k, M, d_v)``.
        mask: bool or floating, broadcastable to ``(B, H, N, M)``; read where it is broadcast.
        sinks: ``(H,)``, one more logit per row, in the denominator only.
        scale: multiplies the scores.
        is_causal: row i sees keys ``j <= i + causal_offset``.
        causal_offset: see ``is_causal``.
        rank: r, d or a divisor of it; with ``projection`` any up to d.
        estimator: a name in ``estimators.ESTIMATORS``.
        grouping_block: query rows per grouping, 0 for ``auto_grouping_block``.
        rounds: of ``projection``, 1 or 2.
        seed: names the random numbers of the estimator.
        softcap: c > 0 turns a score s into ``c * tanh(s / c)``.
        strict: of ``projection``, the form in which no row depends on later ones.
        dropout: says which weights are dropped.
        out: ``(B, H, N, d_v)`` with unit last stride, is filled and returned.
        workspace: bound on Qhat, Khat and what the estimator needs to make them, with ``strict``
            also on what a block's two parts need to become one, bytes.
        by_pointers: load keys and values by pointers, also where the tile has descriptors.

    Raises:
        NoArithmeticError: the table names no module with kernels for the estimator.
        Exception: whatever Triton raises where a kernel does not compile or start; ``out`` may be
            filled in part then.
    """
    module = arithmetic(estimator, "gpu", "prologue") if rank < q.shape[3] else None
    block = grouping_block or auto_grouping_block(q.shape[2], estimator, strict)
    block = max(1, min(block, q.shape[2]))
    offset = causal_offset if is_causal or strict else None
    asked = Asked(
        estimator, rank, block, rounds, seed, offset, strict, given_block=grouping_block
    )  # fmt: skip
    options: dict[str, Any] = {
        "scale": scale,
        "rank": rank,
        "block": block,
        "softcap": softcap,
        "dropout": dropout,
        "out": out,
        "workspace": workspace,
        "by_pointers": by_pointers,
    }
    if mask is not None:
        mask = four_dimensions(mask)
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        if strict and module:
            options |= {"is_causal": is_causal, "causal_offset": causal_offset}
            _attend_spans(q, k, v, mask, sinks, module, asked, **options)
        else:
            prologue = module.prologue(q, k, mask, asked) if module else None
            options |= {"causal_offset": causal_offset if is_causal else None}
            _attend(q, k, v, mask, sinks, prologue, **options)
    return out


def _attend_spans(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    module: ModuleType,
    asked: Asked,
    **options: Any,
) -> None:
    """The strict form: entries whose blocks begin with the same row together.

    The host looks at the mask for that; while a CUDA graph is recorded it cannot, and the blocks
    begin with row 0. The rows before the first block are exact, as that is.
    """
    is_hidden = mask is None or (q.is_cuda and torch.cuda.is_current_stream_capturing())
    sizes, block = (q.shape[0], q.shape[2], k.shape[2]), options["block"]
    offset, out, dropout = options["causal_offset"], options["out"], options["dropout"]
    for span in strict_spans(None if is_hidden else mask, sizes, lambda _: block, offset):
        Q, K, V, O = (t if t.shape[0] == 1 else t[span.entries] for t in (q, k, v, out))  # noqa: E741
        some = mask if mask is None or mask.shape[0] == 1 else mask[span.entries]
        first, part = span.first, dropout and dropout.part(batch=span.entries.start)
        prologue = module.prologue(Q, K, some, replace(asked, first=first, block=span.block))
        if first:
            queries, keys = prologue.counted
            later = None if queries is None else queries[..., first:]
            prologue = replace(prologue, counted=(later, keys))
            own = options | {"out": O[:, :, :first], "dropout": part, "block": first}
            own |= {"causal_offset": offset if own.pop("is_causal") else None, "rank": q.shape[3]}
            _attend(Q[:, :, :first], K, V, _of_rows(some, slice(0, first)), sinks, None, **own)
            part = part and part.part(row=first)
        own = options | {"out": O[:, :, first:], "dropout": part, "block": span.block}
        own["causal_offset"] = offset + first
        rest = _of_rows(some, slice(first, None))
        _attend_strictly(Q[:, :, first:], K, V, rest, sinks, prologue, **own)


def _of_rows(mask: Tensor | None, rows: slice) -> Tensor | None:
    """A mask of four dimensions for some query rows."""
    return mask if mask is None or mask.shape[2] == 1 else mask[:, :, rows]


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    prologue: Prologue | None,
    *,
    scale: float,
    causal_offset: int | None,
    rank: int,
    block: int,
    softcap: float,
    dropout: Dropout | None,
    out: Tensor,
    workspace: int,
    by_pointers: bool,
) -> None:
    # Here, not above: without Triton this fails, and the next implementation runs.
    from distr_compile.kernels.attention.triton_fwd import attention_fwd

    num_queries, num_keys, value_dim = q.shape[2], *v.shape[2:]
    tile = _tile(
        q,
        by_pointers,
        value_dim=value_dim,
        rank=rank,
        is_causal=causal_offset is not None,
        has_mask=mask is not None or dropout is not None,
    )
    chunks = _cut(q, k, prologue, block, rank, workspace)

    def places_of(chunk: _Chunk) -> Any:
        return prologue and prologue.places and prologue.places.part(chunk.batch, chunk.blocks)

    def factors(chunk: _Chunk) -> tuple[Tensor, Tensor]:
        Q, K = q[chunk.batch, chunk.heads, chunk.rows], _of_key_heads(k, chunk)
        if prologue is None:
            return Q, K[:, :, None]
        offset, seen = _seen_by(chunk, causal_offset, num_keys)
        places = places_of(chunk)
        return prologue.factors(
            Q,
            K[:, :, :seen],
            *_counted_in(prologue, chunk, seen),
            is_causal=causal_offset is not None,
            causal_offset=offset,
            **({"places": places} if places else {}),
        )

    def attend(chunk: _Chunk, made: tuple[Tensor, Tensor]) -> None:
        rows, (offset, seen) = chunk.rows, _seen_by(chunk, causal_offset, num_keys)
        attention_fwd(
            made[0],
            made[1][:, :, :, :seen],
            _of_key_heads(v, chunk)[:, :, :seen],
            None if mask is None else sliced(mask, chunk.batch, chunk.heads, rows, slice(seen)),
            None if sinks is None else sinks[chunk.heads],
            scale=scale,
            is_causal=causal_offset is not None,
            causal_offset=offset,
            grouping_block=block if prologue else num_queries,
            softcap=softcap,
            dropout=chunk.of(dropout, rows.start),
            tile=tile,
            out=out[chunk.batch, chunk.heads, rows],
            places=places_of(chunk) or None,
        )

    one_ahead(chunks, factors, attend, q.device)


def _cut(
    q: Tensor, k: Tensor, prologue: Prologue | None, block: int, rank: int, workspace: int
) -> list[_Chunk]:
    """The chunks of a call; one without a prologue, which needs no workspace."""
    cut = partial(
        _chunks,
        q.shape,
        k.shape,
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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    prologue: Prologue,
    *,
    scale: float,
    is_causal: bool,
    causal_offset: int,
    rank: int,
    block: int,
    softcap: float,
    dropout: Dropout | None,
    out: Tensor,
    workspace: int,
    by_pointers: bool,
) -> None:
    """Each grouping block in two parts: keys before it with width r, the others exactly.

    They share a softmax, whose two halves are put together by their denominators.
    """
    value_dim = v.shape[3]
    has_mask = mask is not None or dropout is not None
    tile_of_width = partial(_tile, q, by_pointers, value_dim=value_dim, has_mask=has_mask)
    known_tile = tile_of_width(rank=rank, is_causal=False)
    exact_tile = tile_of_width(rank=q.shape[3], is_causal=is_causal)
    softmax = {"scale": scale, "softcap": softcap}
    call = _Strict(
        q, k, v, mask, sinks, prologue, is_causal, causal_offset, block, dropout, out,
        known=softmax | {"tile": known_tile},
        others=softmax | {"tile": exact_tile, "is_causal": is_causal},
    )  # fmt: skip
    head_bytes, block_bytes = prologue.own_bytes
    # The second part and its sum with the first, in fp32, and the denominators.
    head_bytes += q.shape[1] // k.shape[1] * block * (value_dim * (q.element_size() + 8) + 20)
    for chunk in _chunks(
        q.shape, k.shape, block, rank * q.element_size(), workspace, head_bytes, block_bytes
    ):
        _attend_chunk(call, chunk)


def _tile(q: Tensor, by_pointers: bool, **options: Any) -> Tile:
    """That of the table, or the same without descriptors."""
    from distr_compile.lowering.tiles import tile_for

    tile = tile_for(architecture(q.device), dtype=q.dtype, **options)
    return tile.by_pointers() if by_pointers else tile


@dataclass(frozen=True)
class _Strict:
    """A call in the strict form.

    ``known`` has the options of the attention kernel for keys before a block, ``others`` those for
    the block's own keys and later ones.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    sinks: Tensor | None
    prologue: Prologue
    is_causal: bool
    causal_offset: int
    block: int
    dropout: Dropout | None
    out: Tensor
    known: dict[str, Any]
    others: dict[str, Any]

    def keys_of(self, rows: slice) -> tuple[int, int]:
        """Keys of a block that are approximated, and those that it sees at all."""
        num_keys = self.k.shape[2]
        end = max(0, min(num_keys, rows.stop + self.causal_offset)) if self.is_causal else num_keys
        return prefix_edge(rows.start, num_keys, self.causal_offset), end

    def attend(
        self, chunk: _Chunk, Q: Tensor, K: Tensor, rows: slice, keys: slice, **options: Any
    ) -> None:
        """Attention of some rows of a chunk to some keys."""
        from distr_compile.kernels.attention.triton_fwd import attention_fwd

        V, mask = _of_key_heads(self.v, chunk)[:, :, keys], self.mask
        if mask is not None:
            mask = sliced(mask, chunk.batch, chunk.heads, rows, keys)
        dropout = chunk.of(self.dropout, rows.start, keys.start or 0)
        options |= {"grouping_block": self.block, "dropout": dropout}
        attention_fwd(Q, K, V, mask, **options)


def _attend_chunk(call: _Strict, chunk: _Chunk) -> None:
    block = call.block
    Q, O = (t[chunk.batch, chunk.heads] for t in (call.q, call.out))  # noqa: E741
    K = _of_key_heads(call.k, chunk)
    sinks = None if call.sinks is None else call.sinks[chunk.heads]
    earlier = max(1, chunk.rows.start // block)  # no factors for the first block of all
    if chunk.rows.stop > earlier * block:
        Qhat, Khat = _factors_of_chunk(call, chunk, Q, K, earlier)
    O_others = torch.empty_like(O[:, :, :block])
    lse, lse_others = call.q.new_empty(2, *O_others.shape[:3], dtype=torch.float32)
    for start in range(chunk.rows.start, chunk.rows.stop, block):
        rows = slice(start, min(start + block, chunk.rows.stop))
        edge, end = call.keys_of(rows)
        out_rows, here = O[:, :, rows], slice(0, rows.stop - start)
        others = partial(
            call.attend,
            chunk,
            Q[:, :, rows],
            K[:, :, None, edge:end],
            rows,
            slice(edge, end),
            causal_offset=start + call.causal_offset - edge,
            sinks=sinks,
            **call.others,
        )
        if not edge:
            others(out=out_rows)
            continue
        place = start // block - earlier
        known = partial(
            call.attend,
            chunk,
            Qhat[:, :, place * block :][:, :, here],
            Khat[:, :, place : place + 1, :edge],
            rows,
            slice(edge),
            **call.known,
        )
        if edge >= end:
            known(sinks=sinks, out=out_rows)
            continue
        known(out=out_rows, lse=lse[:, :, here])
        others(out=O_others[:, :, here], lse=lse_others[:, :, here])
        _add_part(out_rows, lse[:, :, here], O_others[:, :, here], lse_others[:, :, here])


def _factors_of_chunk(
    call: _Strict, chunk: _Chunk, Q: Tensor, K: Tensor, earlier: int
) -> tuple[Tensor, Tensor]:
    """Qhat and Khat of the chunk's blocks, from all rows up to its last block."""
    last = (chunk.rows.stop - 1) // call.block * call.block
    num_known = prefix_edge(last, K.shape[2], call.causal_offset)
    so_far = replace(chunk, rows=slice(0, chunk.rows.stop))
    return call.prologue.factors(
        Q[:, :, so_far.rows],
        K[:, :, :num_known],
        *_counted_in(call.prologue, so_far, num_known),
        causal_offset=call.causal_offset,
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
    share = torch.sigmoid(other_lse - lse)  # NaN where both are -inf; both parts are 0 there
    share = share.masked_fill_(other_lse == -torch.inf, 0)[..., None]
    torch.add(out * (1 - share), other * share, out=out)


@dataclass(frozen=True)
class _Chunk:
    """What is computed together: batch entries, query heads with their key heads, query rows.

    Where a mask says where the blocks lie those are all rows, of some ``blocks``.
    """

    batch: slice
    heads: slice
    key_heads: slice
    rows: slice
    blocks: slice = field(default_factory=lambda: slice(0, 1))

    def of(self, dropout: Dropout | None, row: int, key: int = 0) -> Dropout | None:
        """What of the chunk's heads is dropped, from a row and a key of the call on."""
        if dropout is None:
            return None
        return dropout.part(batch=self.batch.start, head=self.heads.start, row=row, key=key)


def _of_key_heads(t: Tensor, chunk: _Chunk) -> Tensor:
    """K or V of a chunk, whose batch may be broadcast."""
    return t[chunk.batch if t.shape[0] > 1 else slice(None), chunk.key_heads]


def _counted_in(prologue: Prologue, chunk: _Chunk, seen: int) -> Iterator[Tensor | None]:
    """``counted`` of the chunk's queries, and of its keys, of which it sees the first ``seen``."""
    for rows, place in zip(prologue.counted, (chunk.rows, slice(seen)), strict=False):
        if rows is None:
            yield None
        else:
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
    of_block = (rep * block + num_keys) * row_bytes + block_bytes
    if places:
        blocks, of_block = places.blocks, num_keys * row_bytes + block_bytes
        head_bytes += rep * num_queries * row_bytes
    of_head = blocks * of_block + head_bytes
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
                        slice(h * rep, last * rep),
                        slice(h, last),
                        slice(row, min(row + some_rows, num_queries)),
                        slice(first, first + some_blocks),
                    )


def _refuses(shape: Shape, approximation: Approximation) -> str | None:
    if shape.device.type != "cuda":
        return "Triton's kernels need a GPU"
    if shape.dtype == torch.float64:
        return "Triton's kernels do not compute in fp64"
    return None


def _refuses_pointers(shape: Shape, approximation: Approximation) -> str | None:
    why = _refuses(shape, approximation)
    if why is None:
        try:
            from distr_compile.lowering.tiles import has_descriptors
        except ImportError:
            return "Triton is not installed"
        if not has_descriptors(architecture(shape.device), shape.dtype):
            why = "no tile of this device has descriptors: pointers are the first form"
    return why


def _run(call: Call, by_pointers: bool = False) -> None:
    how, (Q, K) = call.approximation, (call.q, call.k)
    factors = None
    if call.bases is not None:
        module = arithmetic(how.estimator, "gpu", "prologue")
        factors = partial(_factors_of_bases, module, how.estimator, how.rank)
        Q, K = factors(Q, K, call.mask, call.bases)
    options = {**call.softmax, **call.grouping, "out": call.out, "by_pointers": by_pointers}
    if call.key is None or how.strict:
        attention(Q, K, call.v, call.mask, **options)
        return
    seed = None if call.dropout is None else call.dropout.seed
    with recording((Q, K, call.v, call.mask, call.sinks, seed, call.out)) as recorder:
        attention(Q, K, call.v, call.mask, **options)
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
IMPLEMENTATION = Implementation("distr-triton", _refuses, _run, fallback=_BY_POINTERS)
