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
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from distr_compile.estimators import arithmetic
from distr_compile.kernels.roles import Asked, prefix_edge
from distr_compile.kernels.rows import sliced, stack
from distr_compile.lowering import cpu_fused
from distr_compile.lowering.call import Approximation, Call, Shape
from distr_compile.lowering.choose import Implementation
from distr_compile.lowering.pieces import (
    Heads,
    Pieces,
    Some,
    apply_causal,
    apply_mask,
    drop,
    heads_at_once,
    pieces_of,
    some_heads,
    units_of,
)
from distr_compile.lowering.placing import FUNCTIONS, Placing


def run(
    call: Call,
    *,
    fused: bool,
    keep: tuple[Tensor, Tensor] | None = None,
    only_bases: bool = False,
) -> None:
    """Compute a call of the op, and what its backward needs.

    Every tensor may have any strides; those of batch or head size 1 and masks are read where they
    are broadcast, never expanded. Inputs are trusted: the op has checked them.

    Args:
        call: of fp64, fp32, fp16 or bf16 tensors.
        fused: whether the fused kernel makes the result.
        keep: two tensors ``(B, H_k, blocks, d, r)`` in the dtype of the arithmetic, are filled with
            A and B.
        only_bases: fill ``keep`` and nothing else, by PyTorch's calls.

    Raises:
        NoArithmeticError: the table names no module that computes the estimator here.
    """
    if call.approximation.rank < call.q.shape[3]:
        approximate(call, fused=fused, keep=keep, only_bases=only_bases)
    elif fused:
        cpu_fused.exact_attention(call)
    else:
        _exact_attention(call)


def approximate(
    call: Call, *, fused: bool, keep: tuple[Tensor, Tensor] | None = None, only_bases: bool = False
) -> None:
    """Approximate attention, as ``run``."""
    how, head_dim, key_heads = call.approximation, call.q.shape[3], call.k.shape[1]
    module = arithmetic(how.estimator, "cpu", *FUNCTIONS)
    found, counts = Placing(call.q, call.k, call.mask, module, how.block_of).of(call.asked)
    matrices = module.elements(head_dim, how.rank)
    for span in found:
        pieces = pieces_of(call, span.block, matrices)
        if fused:  # nothing is cut, but the panels of Q of an estimator that reads them here
            panel = pieces.panel * call.rep * head_dim if module.READS_PANELS else 0
            pieces = replace(pieces, heads=heads_at_once(max(panel, matrices)))
        for some in some_heads(span.entries, key_heads, pieces.heads):
            part = call.part(*some)
            asked = replace(
                part.asked,
                block=span.block,
                panel=pieces.panel,
                key_rows=pieces.keys,
                first=span.first,
                stop=span.stop,
                seen=span.seen,
            )
            queries, keys = (None if rows is None else sliced(rows, *some) for rows in counts)
            made = _made(part, module.groups if fused else module.bases, queries, keys, asked)
            made = made if keep is None else _kept(made, keep, some)
            if only_bases:
                collections.deque(made, maxlen=0)  # run through: ``_kept`` copies
            elif fused:
                cpu_fused.attend(part, made, asked)
            else:
                _attend_blocks(part, made, asked, pieces)


def _made(
    part: Call,
    make: Callable[..., Iterator[Any]],
    queries: Tensor | None,
    keys: Tensor | None,
    asked: Asked,
) -> Iterator[Any]:
    """A and B of some heads, of the rows from the first that has a block to the last.

    ``queries`` and ``keys`` say which of them count.
    """
    rows, offset = slice(asked.first, asked.stop), asked.causal_offset
    if queries is not None:
        queries = queries[..., rows]
        # None is the shorter way where all count; on a GPU the host would have to wait for that.
        queries = None if queries.is_cpu and bool(queries.all()) else queries
    # Rows are counted from the first block on, and so is the causal offset.
    own = replace(
        asked, first=0, stop=None, causal_offset=None if offset is None else offset + asked.first
    )
    Q = part.q.unflatten(1, (part.k.shape[1], -1))
    return make(Q[..., rows, :], part.k, queries, keys, own)


def _exact_attention(call: Call) -> None:
    """Exact attention by PyTorch's products, all of it one block."""
    num_queries = max(1, call.q.shape[2])
    pieces = pieces_of(call, num_queries, 0)
    one = Asked("", call.q.shape[3], num_queries)
    for some in some_heads(slice(0, call.q.shape[0]), call.k.shape[1], pieces.heads):
        _attend_blocks(call.part(*some), itertools.repeat((None, None)), one, pieces)


def _kept(
    made: Iterator[tuple[Tensor, Tensor]], keep: tuple[Tensor, Tensor], some: Some
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
        else:  # a ``Group``: A^T, and B padded
            all_A, all_B = A.mT, B[..., :rank]
        blocks = slice(place, place + all_A.shape[1])
        kept_A[:, :, blocks].copy_(all_A.unflatten(0, (-1, key_heads)))
        kept_B[:, :, blocks].copy_(all_B.unflatten(0, (-1, key_heads)))
        place = blocks.stop
        yield A, B


Bases = tuple[Tensor, Tensor] | tuple[None, None]
"""A and B of a grouping block; none where all of its scores are exact."""


def _attend_blocks(call: Call, bases: Iterator[Bases], asked: Asked, pieces: Pieces) -> None:
    """Fill the output of some heads by PyTorch's products, block by block."""
    heads, num_queries, num_keys = Heads.of(call), call.q.shape[2], call.k.shape[2]
    for (_, rows), (A, B) in zip(asked.blocks(num_queries), bases, strict=False):
        edge = num_keys
        if A is None:
            edge = 0  # every key is scored exactly
        elif asked.strict:
            edge = prefix_edge(rows.start, num_keys, call.scores.offset or 0)
        for first in range(rows.start, rows.stop, pieces.panel):
            last = min(first + pieces.panel, rows.stop)
            _attend_panel(heads, first, last, A, B, edge, pieces)


def _attend_panel(
    part: Heads,
    first: int,
    last: int,
    A: Tensor | None,
    B: Tensor | None,
    edge: int,
    pieces: Pieces,
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
    (num_keys, v_dim), limit = part.V.shape[-2:], part.limit
    end = num_keys if limit is None else max(0, min(num_keys, last + limit))
    Q = stack(part.Q[..., first:last, :])  # (b h, rows rep, d), token by token
    Qhat = Q if A is None or not edge else torch.bmm(Q, A * part.factor)
    Q = Q * part.factor if edge < end else Qhat
    units, rows, _ = Qhat.shape
    top = Qhat.new_full((units, rows, 1), torch.finfo(Qhat.dtype).min)
    total = Qhat.new_zeros(units, rows, 1)
    if part.sinks is not None:
        sinks = part.sinks[None, :, None, :, None].expand(b, h, last - first, rep, 1)
        sinks = sinks.reshape(units, rows, 1)
        top = torch.maximum(top, sinks)
        total = (sinks - top).exp_()
    O = Qhat.new_zeros(units, rows, v_dim)  # noqa: E741

    no_empty_row = part.mask is None and (limit is None or limit >= 0)
    # Cut at ``edge`` too: a chunk of keys is scored by one kind of factors.
    chunks = [*range(0, min(edge, end), pieces.keys), *range(edge, end, pieces.keys), end]
    at_once = len(chunks) == 2 and no_empty_row and part.is_plain
    for key, key_stop in itertools.pairwise(chunks):
        V = units_of(part.V[..., key:key_stop, :], b)
        left, right = Q, units_of(part.K[..., key:key_stop, :], b)
        if key < edge and B is not None:
            left, right = Qhat, torch.bmm(right, B)
        for token in range(first, last, pieces.tile):
            token_stop = min(token + pieces.tile, last)
            seen = key_stop if limit is None else min(key_stop, token_stop + limit)
            if seen <= key:
                continue
            tile = slice((token - first) * rep, (token_stop - first) * rep)  # of stacked rows
            S = torch.bmm(left[:, tile], right[:, : seen - key].transpose(1, 2))
            if part.softcap:
                S.tanh_().mul_(part.softcap)
            view = S.view(b, h, token_stop - token, rep, seen - key)
            if part.mask is not None:
                whole = slice(None)
                ranges = (whole, whole, slice(token, token_stop), whole, slice(key, seen))
                apply_mask(view, sliced(part.mask, *ranges))
            if limit is not None:
                apply_causal(view, token + limit - key)

            if at_once:
                O[:, tile].baddbmm_(S.softmax(-1), V[:, : seen - key])
                continue
            new_top = torch.maximum(top[:, tile], S.amax(-1, keepdim=True))
            rescale = (top[:, tile] - new_top).exp_()
            P = S.sub_(new_top).exp_()
            top[:, tile].copy_(new_top)
            total[:, tile].mul_(rescale).add_(P.sum(-1, keepdim=True))
            drop(part.dropout, P.view(view.shape), token, key)  # ``total`` has them all
            O[:, tile].mul_(rescale).baddbmm_(P, V[:, : seen - key])
    if part.lse is not None:
        lse = total.log().add_(top)
        part.lse[..., first:last].copy_(lse.view(b, h, last - first, rep).transpose(2, 3))
    # A row that saw a key, or has a sink, has a total of at least 1, from exp(top - top). Where no
    # key was seen O is 0.
    O.div_(total.clamp_(min=1))
    result = O.view(b, h, last - first, rep, v_dim).transpose(2, 3)
    part.out[..., first:last, :].copy_(result)


def _refuses(shape: Shape, approximation: Approximation) -> str | None:
    if approximation.rank == shape.head_dim:
        return "exact attention in PyTorch's own calls is SDPA"
    if shape.device.type == "cuda" and shape.dtype != torch.float64:
        return "on a GPU, PyTorch's products are for fp64"
    return None


IMPLEMENTATION = Implementation("torch-products", _refuses, functools.partial(run, fused=False))
