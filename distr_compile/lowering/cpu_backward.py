"""Gradients of a call in bounded memory, in plain PyTorch calls, on any device.

With A and B held constant a score is s = (q A) (k B)^T * scale, w its weight exp(s - lse) and
delta = do . o of its row. Then (FlashAttention, arXiv 2205.14135, appendix B.4)

    dV = w^T dO,   ds = w (dO V^T - delta),   dQhat = ds Khat * scale,   dKhat = ds^T Qhat * scale,

and with dQ = dQhat A^T, dK = sum over grouping blocks of dKhat B^T every estimator is served: A and
B of the LSH estimators say which columns are one group, and which are turned. A soft cap c puts a
factor 1 - tanh^2 into ds; where weights were dropped, with z 0 or 1 / (1 - p), dV has w z in the
place of w and ds has z dO V^T, delta being what it is; an additive mask has the gradient ds, summed
where it is broadcast, and a sink, which is a score without a value, has -(its weight) delta.

Heads go in chunks, query rows in panels and tiles, keys in chunks, as in ``cpu.py``; of one size
with N and M are a chunk's dK and dV only. Arithmetic is fp32, or fp64 for fp64 inputs. Sums are
added in one order, so that bits do not depend on anything but the inputs and PyTorch's products.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from distr_compile.kernels.counted import Span
from distr_compile.kernels.roles import Asked, prefix_edge
from distr_compile.kernels.rows import sliced, stack
from distr_compile.lowering.call import Call
from distr_compile.lowering.pieces import (
    Heads,
    Pieces,
    apply_causal,
    apply_mask,
    drop,
    pieces_of,
    some_heads,
    split_mask_heads,
    units_of,
)
from distr_compile.lowering.placing import spans_of
from distr_compile.lowering.saved import Gradients, Saved

NAME = "torch-products"
"""As the report names it."""


@dataclass(frozen=True)
class _Part:
    """What is computed together, and what is filled.

    Attributes:
        heads: views of the inputs, and of the forward's result.
        dO: ``(b, h, rep, N, d_v)``.
        lse: ``(b, h, rep, N)``, infinite where the row sees nothing, so that its weights are 0.
        dQ: ``(b, h, rep, N, d)``.
        dK, dV: ``(b h, M, d or d_v)`` in the dtype of the arithmetic, to which is added.
        dmask: like the mask of ``heads``; to it is added.
        dsinks: likewise.
    """

    heads: Heads
    dO: Tensor
    lse: Tensor
    dQ: Tensor
    dK: Tensor
    dV: Tensor
    dmask: Tensor | None
    dsinks: Tensor | None


def run(call: Call, saved: Saved, grad: Tensor, wanted: Gradients) -> None:
    """Fill ``wanted``; see ``training.backward``."""
    q, k, v = call.q, call.k, call.v
    dtype, key_heads = saved.lse.dtype, k.shape[1]
    # Of broadcast keys, biases and sinks many heads have a share: they are summed here.
    sums = {
        name: torch.zeros(like.shape, dtype=dtype, device=q.device)
        for name, like in (("k", k), ("v", v), ("mask", wanted.mask), ("sinks", wanted.sinks))
        if like is not None and (name in ("mask", "sinks") or like.shape[0] < q.shape[0])
    }
    # Rows that see nothing get weights exp(s - inf) = 0.
    lse = saved.lse.masked_fill(saved.lse == -torch.inf, torch.inf)
    matrices = k.shape[2] * max(q.shape[3], v.shape[3])  # elements of dK or dV of a key head
    for blocks in _Blocks.of(call, saved):
        pieces = pieces_of(call, blocks.span.block, matrices)
        for some in some_heads(blocks.span.entries, key_heads, pieces.heads):
            part = _part(call, grad, lse, wanted, sums, some)
            for start, stop, edge, A, B in blocks.each(some):
                for first in range(start, stop, pieces.panel):
                    _panel(part, first, min(first + pieces.panel, stop), A, B, edge, pieces)
            for name, made in (("k", part.dK), ("v", part.dV)):
                split = made.unflatten(0, (-1, part.heads.K.shape[1]))
                if name in sums:  # one K or V for all entries
                    sums[name][:, some[1]] += split.sum(0, keepdim=True)
                else:
                    getattr(wanted, name)[some].copy_(split)
    for name, total in sums.items():
        getattr(wanted, name).copy_(total)


@dataclass(frozen=True)
class _Blocks:
    """A and B of the grouping blocks of a span, and the keys that each approximates.

    Attributes:
        span: where the blocks lie.
        num_queries: N.
        num_keys: M.
        offset: None, or the causal offset of the strict form.
        bases: A and B ``(B or 1, H_k, blocks or 1, d, r)``; None where all scores are exact.
    """

    span: Span
    num_queries: int
    num_keys: int
    offset: int | None
    bases: tuple[Tensor, Tensor] | None

    @classmethod
    def of(cls, call: Call, saved: Saved) -> Iterator[_Blocks]:
        offset = (call.scores.offset or 0) if call.is_prefix else None
        num_queries, num_keys = call.q.shape[2], call.k.shape[2]
        for span in spans_of(call, saved.bases is not None):
            yield cls(span, num_queries, num_keys, offset, saved.bases)

    def each(
        self, some: tuple[slice, slice]
    ) -> Iterator[tuple[int, int, int, Tensor | None, Tensor | None]]:
        """First row, one past the last, keys that are approximated, A and B ``(b h, d, r)``."""
        asked = Asked("", 0, self.span.block, first=self.span.first, stop=self.span.stop)
        for number, (_, rows) in enumerate(asked.blocks(self.num_queries)):
            edge = self.num_keys
            if self.bases is None:
                yield rows.start, rows.stop, 0, None, None
                continue
            if self.offset is not None:
                edge = prefix_edge(rows.start, self.num_keys, self.offset)
            # Bases of one entry are for all of them.
            for_some = (slice(None), some[1]) if self.bases[0].shape[0] == 1 else some
            A, B = (basis[for_some][:, :, number] for basis in self.bases)
            yield rows.start, rows.stop, edge, A, B


def _part(
    call: Call,
    grad: Tensor,
    lse: Tensor,
    wanted: Gradients,
    sums: dict[str, Tensor],
    some: tuple[slice, slice],
) -> _Part:
    own = call.part(*some)
    heads, key_heads, rep = Heads.of(own), own.k.shape[1], own.rep
    dQ, dO, lse = (t.unflatten(1, (-1, rep))[some] for t in (wanted.q, grad, lse))
    dK, dV = (lse.new_zeros(dO.shape[0] * key_heads, *t.shape[2:]) for t in (own.k, own.v))
    dmask, dsinks = sums.get("mask"), sums.get("sinks")
    if dmask is not None:
        dmask = sliced(split_mask_heads(dmask, call.k.shape[1], rep), *some)
    if dsinks is not None:
        dsinks = dsinks.unflatten(0, (-1, rep))[some[1]]
    return _Part(heads, dO, lse, dQ, dK, dV, dmask, dsinks)


def _panel(
    part: _Part,
    first: int,
    last: int,
    A: Tensor | None,
    B: Tensor | None,
    edge: int,
    pieces: Pieces,
) -> None:
    """Fill ``part.dQ`` for query rows ``first`` to ``last``, and add to what the keys get.

    Keys before ``edge`` were scored by Qhat and Khat, those from it on by Q and K.
    """
    heads, rows = part.heads, slice(first, last)
    b, h, rep, _, _ = heads.Q.shape
    num_keys, limit = heads.K.shape[2], heads.limit
    end = num_keys if limit is None else max(0, min(num_keys, last + limit))
    # Rows stacked token by token, (b h, rows rep, width).
    Q, O, dO = (stack(t[..., rows, :]) for t in (heads.Q, heads.out, part.dO))  # noqa: E741
    lse = part.lse[..., rows].transpose(2, 3).reshape(len(Q), -1, 1)
    delta = (dO * O).sum(-1, keepdim=True)
    if heads.sinks is not None and part.dsinks is not None:
        # The gradient of a sink is minus its weight times delta.
        share = torch.exp(heads.sinks[None, :, None] - lse.view(b, h, last - first, rep))
        part.dsinks.sub_((share * delta.view(b, h, last - first, rep)).sum((0, 2)))
    # The scale is in Q, and so in dK; dQ gets it at the end.
    Q = Q * heads.factor
    dQ = torch.zeros_like(Q)
    # Cut at ``edge`` too: a chunk of keys is scored by one kind of factors.
    chunks = [*range(0, min(edge, end), pieces.keys), *range(edge, end, pieces.keys), end]
    if A is not None and B is not None and edge:
        A, B = (units_of(basis, b).to(Q.dtype) for basis in (A, B))
        hat = torch.bmm(Q, A)
        dhat = torch.zeros_like(hat)
    for key, key_stop in itertools.pairwise(chunks):
        keys = slice(key, key_stop)
        K, V = (units_of(t[..., keys, :], b) for t in (heads.K, heads.V))
        rest = (V, part.dV[:, keys], (dO, delta, lse))
        if B is not None and key < edge:
            Khat = torch.bmm(K, B)
            # Fresh for each chunk, which then gives dK += dKhat B^T.
            dKhat = torch.zeros_like(Khat)
            _chunk(part, rows, keys, (hat, dhat), (Khat, dKhat), *rest, pieces.tile)
            part.dK[:, keys].baddbmm_(dKhat, B.mT)
        else:
            _chunk(part, rows, keys, (Q, dQ), (K, part.dK[:, keys]), *rest, pieces.tile)
    if A is not None and edge:
        dQ.baddbmm_(dhat, A.mT)
    dQ.mul_(heads.factor)
    part.dQ[..., rows, :].copy_(dQ.view(b, h, last - first, rep, -1).transpose(2, 3))


def _chunk(
    part: _Part,
    rows: slice,
    keys: slice,
    left: tuple[Tensor, Tensor],
    right: tuple[Tensor, Tensor],
    V: Tensor,
    dV: Tensor,
    of_rows: tuple[Tensor, Tensor, Tensor],
    tile: int,
) -> None:
    """Add what some query rows and some keys come to, the scores of a tile of rows at a time.

    ``left`` is Q or Qhat, scaled, ``(b h, rows rep, r)``, and where its gradient is summed;
    ``right`` K or Khat ``(b h, m, r)`` likewise; ``of_rows`` dO, delta and lse.
    """
    heads, limit = part.heads, part.heads.limit
    b, h, rep, _, _ = heads.Q.shape
    for token in range(rows.start, rows.stop, tile):
        token_stop = min(token + tile, rows.stop)
        seen = keys.stop if limit is None else min(keys.stop, token_stop + limit)
        if seen <= keys.start:
            continue
        some = slice((token - rows.start) * rep, (token_stop - rows.start) * rep)
        Q, dQ = (t[:, some] for t in left)
        K, dK = (t[:, : seen - keys.start] for t in right)
        dO, delta, lse = (t[:, some] for t in of_rows)
        # The forward again: P = exp(S - lse), (b h, rows rep, keys).
        S, slope = torch.bmm(Q, K.mT), None
        if heads.softcap:
            S.tanh_()
            slope = 1 - S.square()
            S.mul_(heads.softcap)
        view = S.view(b, h, token_stop - token, rep, seen - keys.start)
        whole = slice(None)
        ranges = (whole, whole, slice(token, token_stop), whole, slice(keys.start, seen))
        if heads.mask is not None:
            apply_mask(view, sliced(heads.mask, *ranges))
        if limit is not None:
            apply_causal(view, token + limit - keys.start)
        P = S.sub_(lse).exp_()
        # dP = dO V^T, through dropout; dV has the weights that were left.
        dP, weights = torch.bmm(dO, V[:, : seen - keys.start].mT), P
        if heads.dropout is not None:
            stays = torch.ones_like(P)
            drop(heads.dropout, stays.view(view.shape), token, keys.start)
            weights = P * stays
            dP.mul_(stays)
        dV[:, : seen - keys.start].baddbmm_(weights.mT, dO)
        # dS = P (dP - delta); a mask, added after the soft cap, takes it without the slope.
        dS = dP.sub_(delta).mul_(P)
        if part.dmask is not None:
            dmask = sliced(part.dmask, *ranges)
            dmask.add_(dS.view(view.shape).sum_to_size(dmask.shape))
        if slope is not None:
            dS.mul_(slope).mul_(heads.softcap)
        dQ.baddbmm_(dS, K)
        dK.baddbmm_(dS.mT, Q)
