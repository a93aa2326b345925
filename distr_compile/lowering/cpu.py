"""DistrAttention in bounded memory: on CPUs by the fused kernel, else in plain PyTorch calls.

A and B come from the module that the table of estimators names for the estimator; what it has to
have is in ``kernels/roles.py``. Qhat = Q A, Khat = K B and attention on them are the fused kernel's
where it runs (``cpu_fused.py``), and otherwise PyTorch's, on any device: the rest of this text.

The same function as ``kernels/attention/reference.py`` in the order of FlashAttention: heads in
chunks, query rows in panels and tiles, keys in chunks with a running softmax. No matrix of N x M
scores exists.

PyTorch's own CPU flash kernel is not used: it refuses Q and K narrower than V, and padding Qhat and
Khat back to the width of V costs what exact attention costs. Measured by ``python
benchmarks/cpu_attention.py --threads 1 --rounds 3`` at 8 heads x 4096 tokens x 64, G = 2, block
auto, torch 2.15, AVX-512, on a machine that was busy with other work, as a multiple of SDPA's time:
fp32 1.01 (padded SDPA 0.98), bf16 0.96 (0.97), fp16 0.57 (0.85).

All arithmetic is fp32 for fp32, fp16 and bf16 inputs, because CPUs without fp16 arithmetic multiply
fp16 matrices far more slowly than fp32 ones, and fp64 for fp64 inputs.
"""

from __future__ import annotations

import collections
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distr_compile.estimators import arithmetic, auto_grouping_block
from distr_compile.kernels.attention.cpu import Group
from distr_compile.kernels.attention.dropout import Dropout
from distr_compile.kernels.roles import Asked, prefix_edge
from distr_compile.kernels.rows import four_dimensions, sliced, stack, working
from distr_compile.lowering import cpu_fused
from distr_compile.lowering.call import Approximation, Shape
from distr_compile.lowering.choose import Call, Implementation
from distr_compile.lowering.placing import FUNCTIONS, Placing

CHUNK = 1 << 20
"""Elements of the largest temporary: a tile of scores, a chunk of K or V, a panel of Q or O."""

PANEL_ROWS = 2048
"""Query rows that share one pass over the keys, so that Khat is made once for all of them."""

KEY_ROWS = 4096
"""Keys per step of the softmax; with ``CHUNK`` it leaves room for tiles of 256 query rows."""

WORKSPACE_MIB = 24
"""Most MiB of tensors alive beside inputs and output, for 4-byte arithmetic and d, d_v <= 256."""


@dataclass(frozen=True)
class _Pieces:
    """How one call is cut up: keys per step, tokens per panel and per tile, key heads at a time."""

    keys: int
    panel: int
    tile: int
    heads: int


def _pieces(block: int, rep: int, num_keys: int, width: int, matrices: int) -> _Pieces:
    """Cut up so that what has one size per head, ``matrices``, and what is cut fit ``CHUNK``."""
    keys = max(1, min(num_keys, KEY_ROWS, CHUNK // width))
    panel = max(1, min(block, PANEL_ROWS // rep, CHUNK // (rep * width)))
    tile = max(1, min(panel, CHUNK // (keys * rep)))
    largest = max(tile * rep * keys, keys * width, panel * rep * width, matrices)
    return _Pieces(keys, panel, tile, max(1, CHUNK // largest))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
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
    sinks: Tensor | None = None,
    bases: tuple[Tensor, Tensor] | None = None,
    strict: bool = False,
    dropout: Dropout | None = None,
    fused: bool | None = None,
    out: Tensor,
    lse: Tensor | None = None,
    keep: tuple[Tensor, Tensor] | None = None,
    only_bases: bool = False,
) -> Tensor:
    """Approximate attention; arguments and result as in ``kernels.attention.reference.attention``.

    Every tensor may have any strides; those of batch or head size 1 and masks are read where they
    are broadcast, never expanded. Inputs are trusted: the op has checked them.

    Args:
        q: ``(B, H, N, d)`` fp64, fp32, fp16 or bf16; k, v alike.
        k: ``(B or 1, H_k, M, d)``.
        v: ``(B or 1, H_k, M, d_v)``.
        mask: bool or floating, broadcastable to ``(B, H, N, M)``.
        scale: multiplies the scores.
        is_causal: row i sees keys ``j <= i + causal_offset``.
        causal_offset: see ``is_causal``.
        rank: r < d; for the LSH estimators a divisor of d.
        estimator: a name in ``estimators.ESTIMATORS``.
        grouping_block: query rows per grouping, 0 for ``auto_grouping_block``.
        rounds: of ``projection``: 1 or 2.
        seed: names the random numbers of the estimator.
        softcap: c > 0 makes the scaled scores s ``c * tanh(s / c)``, before the mask; 0 does not.
        sinks: ``(H,)`` floating, one more score per row, in the softmax's denominator only.
        bases: A and B of ``calibrated``, ``(H_k, d, r)``, which needs no grouping.
        strict: of ``projection``, the form in which no row depends on later ones.
        dropout: says which weights are dropped.
        fused: whether the fused kernel makes the result; None where it can.
        out: ``(B, H, N, d_v)``, any strides, is filled and returned.
        lse: ``(B, H, N)`` in the dtype of the arithmetic, is filled with the logarithm of each
            row's sum of exponentials, sinks included; -inf where the row sees nothing.
        keep: two tensors ``(B, H_k, blocks, d, r)`` in the dtype of the arithmetic, are filled with
            A and B.
        only_bases: fill ``keep`` and nothing else, by PyTorch's calls.

    Raises:
        NoArithmeticError: the table names no module that computes the estimator here.
    """
    module = arithmetic(estimator, "cpu", *FUNCTIONS)
    fused = cpu_fused.takes(q) if fused is None else fused
    num_queries, head_dim = q.shape[2:]
    key_heads, num_keys = k.shape[1:3]
    rep = q.shape[1] // key_heads
    call = _Call(
        q, k, v, mask, sinks, out, scale, is_causal, causal_offset, softcap, strict, lse, dropout
    )  # fmt: skip

    def block_of(rows: int) -> int:
        return grouping_block or auto_grouping_block(rows, estimator, strict)

    asked = Asked(
        estimator=estimator,
        rank=rank,
        block=max(1, min(block_of(num_queries), num_queries)),
        rounds=rounds,
        seed=seed,
        causal_offset=causal_offset if is_causal or strict else None,
        strict=strict,
    )
    found, counts = Placing(q, k, mask, module, block_of).of(asked)
    matrices = module.elements(head_dim, rank)
    for span in found:
        block = span.block
        pieces = _pieces(block, rep, num_keys, max(head_dim, v.shape[-1]), matrices)
        if fused:  # nothing is cut, but the panels of Q of an estimator that reads them here
            panel = pieces.panel * rep * head_dim if module.READS_PANELS else 0
            pieces = replace(pieces, heads=max(1, CHUNK // max(panel, matrices)))
        asked = replace(
            asked,
            block=block,
            panel=pieces.panel,
            key_rows=pieces.keys,
            first=span.first,
            stop=span.stop,
            seen=span.seen,
        )
        for some in _some_heads(span.entries, key_heads, pieces.heads):
            if bases is not None:
                asked = replace(asked, bases=(bases[0][some[1]], bases[1][some[1]]))
            make = module.groups if fused else module.bases
            by = None if fused else pieces
            _attend_some(call, some, counts, make, asked, by, keep, only_bases=only_bases)
    return out


def _attend_some(
    call: _Call,
    some: _Some,
    counts: tuple[Tensor | None, Tensor | None],
    make: Callable[..., Iterator[Any]],
    asked: Asked,
    pieces: _Pieces | None,
    keep: tuple[Tensor, Tensor] | None,
    *,
    only_bases: bool,
) -> None:
    """Fill the output of some heads: by the fused kernel, or with ``pieces`` by PyTorch's products.

    What makes A and B sees only the rows from the first that has a block on.
    """
    part = call.part(some)
    queries, keys = (None if rows is None else sliced(rows, *some) for rows in counts)
    rows, offset = slice(asked.first, asked.stop), asked.causal_offset
    if queries is not None:
        queries = queries[..., rows]
        queries = None if queries.is_cpu and bool(queries.all()) else queries
    own = replace(
        asked, first=0, stop=None, causal_offset=None if offset is None else offset + asked.first
    )
    made = make(part.Q[..., rows, :], part.K, queries, keys, own)
    made = made if keep is None else _kept(made, keep, some)
    if only_bases:
        collections.deque(made, maxlen=0)
    elif pieces is None:
        _attend_fused(call, some, part, made, asked)
    else:
        _attend_blocks(call, part, made, asked, pieces)


def exact_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float,
    is_causal: bool = False,
    causal_offset: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    dropout: Dropout | None = None,
    out: Tensor,
    lse: Tensor | None = None,
) -> Tensor:
    """Exact attention by PyTorch's products, which also says what its backward needs.

    The arguments are those of ``attention``. It is the first block of the strict form.
    """
    num_queries, num_keys = q.shape[2], k.shape[2]
    rep = q.shape[1] // k.shape[1]
    block = max(1, num_queries)
    pieces = _pieces(block, rep, num_keys, max(q.shape[3], v.shape[3]), 0)
    call = _Call(
        q, k, v, mask, sinks, out, scale, is_causal, causal_offset, softcap, True, lse, dropout
    )  # fmt: skip
    one = Asked("", q.shape[3], block, strict=True)
    for some in _some_heads(slice(0, q.shape[0]), k.shape[1], pieces.heads):
        _attend_blocks(call, call.part(some), itertools.repeat((None, None)), one, pieces)
    return out


def _kept(
    made: Iterator[tuple[Tensor, Tensor]], keep: tuple[Tensor, Tensor], some: _Some
) -> Iterator[tuple[Tensor, Tensor]]:
    """What an estimator makes for some heads, copied into ``keep`` as it passes by.

    That is A and B ``(b h, d, r)`` of a block, or a ``Group`` of several.
    """
    kept_A, kept_B = (kept[some] for kept in keep)
    key_heads, rank = kept_A.shape[1], kept_A.shape[4]
    place = 0
    for A, B in made:
        if A.dim() == 3:
            all_A, all_B = A[:, None], B[:, None]
        else:
            all_A, all_B = A.mT, B[..., :rank]
        blocks = slice(place, place + all_A.shape[1])
        kept_A[:, :, blocks].copy_(all_A.unflatten(0, (-1, key_heads)))
        kept_B[:, :, blocks].copy_(all_B.unflatten(0, (-1, key_heads)))
        place = blocks.stop
        yield A, B


Bases = tuple[Tensor, Tensor] | tuple[None, None]
"""A and B of a grouping block; none where all of its scores are exact."""

_Some = tuple[slice, slice]
"""Batch entries and key heads that are computed together."""


def _some_heads(entries: slice, key_heads: int, at_once: int) -> Iterator[_Some]:
    """Batch entries and all key heads, at most ``at_once`` of them, but at least one, at a time."""
    per_batch, batches = min(key_heads, at_once), max(1, at_once // key_heads)
    for b in range(entries.start, entries.stop, batches):
        for h in range(0, key_heads, per_batch):
            yield slice(b, min(b + batches, entries.stop)), slice(h, h + per_batch)


@dataclass(frozen=True)
class _Call:
    """The arguments of ``attention`` that no estimator looks at."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    sinks: Tensor | None
    out: Tensor
    scale: float
    is_causal: bool
    causal_offset: int
    softcap: float
    strict: bool
    lse: Tensor | None = None
    dropout: Dropout | None = None

    def part(self, some: _Some) -> _Heads:
        """Views for some heads."""
        key_heads = self.k.shape[1]
        # Query heads are split into (key head, query head of it): a view for any strides.
        Q, out = (t.unflatten(1, (key_heads, -1))[some] for t in (self.q, self.out))
        K, V = (t[some if t.shape[0] > 1 else (slice(None), some[1])] for t in (self.k, self.v))
        mask, sinks = self.mask, self.sinks
        if mask is not None:
            mask = sliced(_split_mask_heads(mask, key_heads, Q.shape[2]), *some)
        if sinks is not None:
            sinks = _split_sinks(sinks, self.q.dtype, key_heads)[some[1]]
        lse = None if self.lse is None else self.lse.unflatten(1, (key_heads, -1))[some]
        dropout = _of_heads(self.dropout, some, Q.shape[2])
        return _Heads(Q, K, V, mask, sinks, self.softcap, out, lse, dropout)


def _attend_fused(
    call: _Call, some: _Some, part: _Heads, groups: Iterator[Group], asked: Asked
) -> None:
    """Fill the output of some heads by the fused kernel."""
    rep = part.Q.shape[2]
    wide = (some[0], slice(some[1].start * rep, some[1].stop * rep))
    cpu_fused.attend(
        call.q[wide],
        part.K,
        part.V,
        None if call.mask is None else sliced(four_dimensions(call.mask), *wide),
        None if call.sinks is None else call.sinks[wide[1]],
        groups,
        asked=asked,
        scale=call.scale,
        is_causal=call.is_causal,
        causal_offset=call.causal_offset,
        softcap=call.softcap,
        out=call.out[wide],
        lse=None if call.lse is None else call.lse[wide],
        dropout=part.dropout,
    )


def _attend_blocks(
    call: _Call, part: _Heads, bases: Iterator[Bases], asked: Asked, pieces: _Pieces
) -> None:
    """Fill the output of some heads by PyTorch's products, block by block."""
    num_queries, num_keys = call.q.shape[2], call.k.shape[2]
    limit = call.causal_offset if call.is_causal else None
    for (_, rows), (A, B) in zip(asked.blocks(num_queries), bases, strict=False):
        edge = prefix_edge(rows.start, num_keys, call.causal_offset) if call.strict else num_keys
        for first in range(rows.start, rows.stop, pieces.panel):
            last = min(first + pieces.panel, rows.stop)
            _attend_panel(part, first, last, A, B, call.scale, edge, limit, pieces)


@dataclass(frozen=True)
class _Heads:
    """Views of the inputs and the output for the heads that are computed together.

    Q ``(b, h, rep, N, d)``, K ``(b or 1, h, M, d)``, V alike, out ``(b, h, rep, N, d_v)``, the
    mask ``(b, h, N, rep, M)`` with size 1 where it is broadcast, the sinks ``(h, rep)``, the
    logarithms of the sums of exponentials ``(b, h, rep, N)``, if they are asked for, and which
    weights are dropped.
    """

    Q: Tensor
    K: Tensor
    V: Tensor
    mask: Tensor | None
    sinks: Tensor | None
    softcap: float
    out: Tensor
    lse: Tensor | None = None
    dropout: Dropout | None = None

    @property
    def is_plain(self) -> bool:
        """Whether PyTorch's softmax of the scores is all there is to a row that sees a key."""
        return self.sinks is None and self.lse is None and self.dropout is None


def _of_heads(dropout: Dropout | None, some: _Some, rep: int) -> Dropout | None:
    """That of some heads."""
    if dropout is None:
        return None
    return dropout.part(batch=some[0].start, head=some[1].start * rep)


def _drop(dropout: Dropout | None, weights: Tensor, row: int, key: int) -> None:
    """Make dropped weights of ``(b, h, tokens, rep, keys)`` 0, in place, and scale the others.

    ``row`` and ``key`` are the first of them, in the part that the dropout is of.
    """
    if dropout is None:
        return
    b, h, tokens, rep, keys = weights.shape
    part = dropout.part(row=row, key=key)
    stays = part.kept(part.numbers(b, h, rep), tokens, keys).transpose(2, 3)
    weights.mul_(stays).mul_(dropout.scale)


def _split_mask_heads(mask: Tensor, key_heads: int, rep: int) -> Tensor:
    """The mask as ``(B, H_k, N, rep, M)``, size 1 kept where it is broadcast."""
    mask = four_dimensions(mask)
    split = (key_heads, rep) if mask.shape[1] > 1 else (1, 1)
    split_mask: Tensor = mask.unflatten(1, split)
    return split_mask.transpose(2, 3)


def _split_sinks(sinks: Tensor, dtype: torch.dtype, key_heads: int) -> Tensor:
    """The sinks as ``(H_k, rep)`` in the working dtype of Q's ``dtype``."""
    split: Tensor = sinks.unflatten(0, (key_heads, -1))
    return split.to(torch.promote_types(dtype, torch.float32))


def _attend_panel(
    part: _Heads,
    first: int,
    last: int,
    A: Tensor | None,
    B: Tensor | None,
    scale: float,
    edge: int,
    causal_offset: int | None,
    pieces: _Pieces,
) -> None:
    """Fill ``part.out`` for query rows ``first`` to ``last``, one pass over the keys.

    Keys before ``edge`` are scored by Qhat and Khat, those from it on by Q and K.

    Where one chunk holds all keys and every row sees one, the softmax is PyTorch's. Else it is the
    running softmax of FlashAttention: ``top`` is the largest score so far, ``total`` the sum of
    exp(score - top), ``O`` the sum of exp(score - top) V. ``top`` starts at the lowest finite
    number: a score of -inf then adds exp(-inf) = 0, and a row that sees no key ends as 0 without
    any test. A sink is a first key whose V is 0: it starts ``top`` and ``total``.
    """
    b, h, rep, _, _ = part.Q.shape
    num_keys, v_dim = part.V.shape[-2:]
    end = num_keys if causal_offset is None else max(0, min(num_keys, last + causal_offset))
    Q = stack(part.Q[..., first:last, :])
    scale = scale / part.softcap if part.softcap else scale  # what tanh takes
    Qhat = Q if A is None or not edge else torch.bmm(Q, A * scale)
    Q = Q * scale if edge < end else Qhat
    units, rows, _ = Qhat.shape
    top = Qhat.new_full((units, rows, 1), torch.finfo(Qhat.dtype).min)
    total = Qhat.new_zeros(units, rows, 1)
    if part.sinks is not None:
        sinks = part.sinks[None, :, None, :, None].expand(b, h, last - first, rep, 1)
        sinks = sinks.reshape(units, rows, 1)
        top = torch.maximum(top, sinks)
        total = (sinks - top).exp_()
    O = Qhat.new_zeros(units, rows, v_dim)  # noqa: E741

    no_empty_row = part.mask is None and (causal_offset is None or causal_offset >= 0)
    chunks = [*range(0, min(edge, end), pieces.keys), *range(edge, end, pieces.keys), end]
    at_once = len(chunks) == 2 and no_empty_row and part.is_plain
    for key, key_stop in itertools.pairwise(chunks):
        V = _units(part.V[..., key:key_stop, :], b)
        left, right = Q, _units(part.K[..., key:key_stop, :], b)
        if key < edge and B is not None:
            left, right = Qhat, torch.bmm(right, B)
        for token in range(first, last, pieces.tile):
            token_stop = min(token + pieces.tile, last)
            seen = key_stop if causal_offset is None else min(key_stop, token_stop + causal_offset)
            if seen <= key:
                continue
            tile = slice((token - first) * rep, (token_stop - first) * rep)
            S = torch.bmm(left[:, tile], right[:, : seen - key].transpose(1, 2))
            if part.softcap:
                S.tanh_().mul_(part.softcap)
            view = S.view(b, h, token_stop - token, rep, seen - key)
            if part.mask is not None:
                whole = slice(None)
                ranges = (whole, whole, slice(token, token_stop), whole, slice(key, seen))
                _apply_mask(view, sliced(part.mask, *ranges))
            if causal_offset is not None:
                _apply_causal(view, token + causal_offset - key)

            if at_once:
                O[:, tile].baddbmm_(S.softmax(-1), V[:, : seen - key])
                continue
            new_top = torch.maximum(top[:, tile], S.amax(-1, keepdim=True))
            rescale = (top[:, tile] - new_top).exp_()
            P = S.sub_(new_top).exp_()
            top[:, tile].copy_(new_top)
            total[:, tile].mul_(rescale).add_(P.sum(-1, keepdim=True))
            _drop(part.dropout, P.view(view.shape), token, key)
            O[:, tile].mul_(rescale).baddbmm_(P, V[:, : seen - key])
    if part.lse is not None:
        lse = total.log().add_(top)
        part.lse[..., first:last].copy_(lse.view(b, h, last - first, rep).transpose(2, 3))
    # A row that saw a key, or has a sink, has a total of at least 1, from exp(top - top). Where no
    # key was seen O is 0.
    O.div_(total.clamp_(min=1))
    result = O.view(b, h, last - first, rep, v_dim).transpose(2, 3)
    part.out[..., first:last, :].copy_(result)


def _units(t: Tensor, batch: int) -> Tensor:
    """``(b or 1, h, m, c)`` to ``(b h, m, c)`` in the working dtype."""
    return working(t).expand(batch, -1, -1, -1).flatten(0, 1)


def _apply_mask(scores: Tensor, mask: Tensor) -> None:
    if mask.dtype == torch.bool:
        scores.masked_fill_(~mask, -torch.inf)
    else:
        scores.add_(mask)


def _apply_causal(scores: Tensor, diagonal: int) -> None:
    """Let row i of ``(b, h, tokens, rep, keys)`` see ``j <= i + diagonal`` only.

    Columns up to ``diagonal`` are seen by every row and are not touched.
    """
    tokens, keys = scores.shape[2], scores.shape[4]
    common = min(max(diagonal + 1, 0), keys)
    row = torch.arange(tokens, device=scores.device)[:, None, None]
    column = torch.arange(common, keys, device=scores.device)
    scores[..., common:].masked_fill_(column > row + diagonal, -torch.inf)


def run(
    call: Call,
    *,
    fused: bool,
    lse: Tensor | None = None,
    keep: tuple[Tensor, Tensor] | None = None,
    only_bases: bool = False,
) -> None:
    """Compute a call of the op, and what its backward needs; see ``attention``."""
    tensors = call.q, call.k, call.v, call.mask
    options: dict[str, Any] = {**call.softmax, "out": call.out, "lse": lse}
    if call.approximation.rank == call.q.shape[3]:
        compute = cpu_fused.exact_attention if fused else exact_attention
        compute(*tensors, **options)
    else:
        options |= {**call.grouping, "bases": call.bases, "fused": fused, "keep": keep}
        attention(*tensors, **options, only_bases=only_bases)


def _refuses(shape: Shape, approximation: Approximation) -> str | None:
    if approximation.rank == shape.head_dim:
        return "exact attention in PyTorch's own calls is SDPA"
    if shape.device.type == "cuda" and shape.dtype != torch.float64:
        return "on a GPU, PyTorch's products are for fp64"
    return None


IMPLEMENTATION = Implementation("torch-products", _refuses, functools.partial(run, fused=False))
