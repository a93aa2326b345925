"""Calls whose gradients are recorded, on a GPU: the Triton kernels, forward and backward.

A and B are made by PyTorch's calls, as the backward needs them, and Qhat = Q A, Khat = K B by its
products, some heads at a time, so that they stay within the workspace of ``cuda.py``. Where a mask
may say where the grouping blocks lie, the host waits for it once, forward and backward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from distr_compile.estimators import ESTIMATORS
from distr_compile.kernels.blocks import Places
from distr_compile.kernels.counted import Span
from distr_compile.kernels.roles import Asked
from distr_compile.lowering import cpu, cuda
from distr_compile.lowering.architecture import architecture
from distr_compile.lowering.call import ALL, Approximation, Call, Shape
from distr_compile.lowering.pieces import some_heads
from distr_compile.lowering.placing import spans_of
from distr_compile.lowering.saved import Gradients, Saved, number_of_blocks

NAME = "distr-triton"
"""As the report names it."""

WIDEST = 128
"""The widest Q and V that the backward has tiles for."""

WORKSPACE_BYTES = cuda.WORKSPACE_MIB << 20
"""Most bytes of Qhat and Khat at a time; those of one key head are the least possible."""

Bases = tuple[Tensor, Tensor]


def is_for(shape: Shape) -> bool:
    """Whether a call is on a GPU."""
    return shape.device.type == "cuda"


def refuses(shape: Shape, approximation: Approximation) -> str | None:
    """Why the kernels do not compute a call whose gradients are recorded, or None."""
    if why := cuda.refuses(shape, approximation):
        return why
    if approximation.strict and ESTIMATORS[approximation.estimator].strict == "prefix":
        return "the Triton backward does not compute the strict form"
    if max(shape.head_dim, shape.value_dim) > WIDEST:
        return f"the Triton backward takes widths up to {WIDEST}"
    is_exact = approximation.rank == shape.head_dim
    blocks, has_mask = 1, shape.mask is not None
    if not is_exact:
        blocks = number_of_blocks(shape.num_queries, approximation, has_mask)
    rep = shape.num_heads // shape.num_key_heads
    size = _bytes(shape.num_queries * rep, shape.num_keys, blocks, approximation.rank, shape.dtype)
    if not is_exact and size > WORKSPACE_BYTES:
        return (
            f"Qhat and Khat of one key head in {blocks} grouping blocks take {size >> 20} MiB, "
            f"more than {WORKSPACE_BYTES >> 20}"
        )
    return None


def refuses_backward(shape: Shape, approximation: Approximation, mask_grad: bool) -> str | None:
    """Why the kernels do not compute the gradients of a call, or None."""
    if mask_grad:
        return "the Triton backward gives no gradient to a mask"
    return refuses(shape, approximation)


def _bytes(rows: int, keys: int, blocks: int, rank: int, dtype: torch.dtype) -> int:
    return (rows + blocks * keys) * rank * dtype.itemsize


def forward(call: Call, saved: Saved, *, by_pointers: bool = False) -> None:
    """Fill ``call.out`` and ``saved``; see ``training.forward``."""
    from distr_compile.kernels.attention.triton_fwd import attention_fwd

    bases = saved.bases
    if bases is not None:
        cpu.run(call, fused=False, keep=bases, only_bases=True)  # fills ``saved.bases``
    elif call.bases is not None and call.approximation.rank < call.q.shape[3]:
        A, B = call.bases
        bases = A[None, :, None], B[None, :, None]  # one block for all entries
    lying = _Lying.of(call, bases)
    tile = cuda.tile_of(
        call,
        by_pointers,
        rank=call.approximation.rank,
        is_causal=call.scores.is_causal,
        has_mask=call.mask is not None or call.dropout is not None,
    )
    with _device(call.q):
        for part in _parts(call, bases, lying):
            own = part.call
            attention_fwd(
                part.Qhat,
                part.Khat,
                own.v,
                own.mask,
                **own.softmax,
                grouping_block=lying.block,
                tile=tile,
                out=own.out,
                lse=own.lse,
                places=part.places,
            )


def backward(call: Call, saved: Saved, grad: Tensor, wanted: Gradients) -> None:
    """Fill ``wanted``, but for the gradient of a mask; see ``training.backward``."""
    from distr_compile.kernels.attention.triton_bwd import attention_bwd
    from distr_compile.lowering.tiles import backward_tile_for

    lying = _Lying.of(call, saved.bases)
    tile = backward_tile_for(
        architecture(call.q.device),
        width=max(call.q.shape[3], call.v.shape[3]),
        rank=call.approximation.rank,
        dtype=call.q.dtype,
    )
    of_sinks = None  # from which the parts subtract
    if wanted.sinks is not None:
        of_sinks = torch.zeros(wanted.sinks.shape, dtype=torch.float32, device=call.q.device)
    # Where only one of K and V is broadcast, the other one has a gradient for each entry.
    is_mixed = call.k.shape[0] != call.v.shape[0]
    sums = [
        t.new_empty(call.q.shape[0], *t.shape[1:]) if is_mixed and t.shape[0] == 1 else t
        for t in (wanted.k, wanted.v)
    ]
    with _device(call.q):
        for part in _parts(call, saved.bases, lying):
            own = part.call
            softmax = own.softmax
            sinks, lse = softmax.pop("sinks"), part.of_rows(saved.lse).contiguous()
            delta = None if of_sinks is None else torch.empty_like(lse)
            attention_bwd(
                part.Qhat,
                part.Khat,
                own.v,
                own.mask,
                own.out,
                lse,
                part.of_rows(grad),
                **softmax,
                grouping_block=lying.block,
                bases=part.bases,
                tile=tile,
                dq=part.of_rows(wanted.q),
                dk=part.of_keys(sums[0]),
                dv=part.of_keys(sums[1]),
                delta=delta,
                places=part.places,
            )
            if of_sinks is not None and sinks is not None and delta is not None:
                # Where a row sees nothing its sink has no share: exp(sink - inf) is 0.
                seen = lse.masked_fill(lse == -torch.inf, torch.inf)
                share = torch.exp(sinks.float()[None, :, None] - seen)
                of_sinks[part.heads] -= (share * delta).sum((0, 2))
    if wanted.sinks is not None and of_sinks is not None:
        wanted.sinks.copy_(of_sinks)
    for to, made in zip((wanted.k, wanted.v), sums, strict=True):
        if to is not made:
            to.copy_(made.sum(0, keepdim=True))


@dataclass(frozen=True)
class _Lying:
    """Where the grouping blocks of a call lie.

    Attributes:
        spans: batch entries whose blocks lie alike.
        blocks: blocks of an entry, at most.
        block: query rows of a block, at most.
        places: the same as numbers that the kernels read; None where the blocks of all entries
            begin with row 0, and each has as many rows as the others, but for the last.
    """

    spans: list[Span]
    blocks: int
    block: int
    places: Places | None

    @classmethod
    def of(cls, call: Call, bases: Bases | None) -> _Lying:
        """The blocks of a call that has A and B; one of all rows where it is exact."""
        num_queries = call.q.shape[2]
        spans = spans_of(call, bases is not None)
        blocks = max(1, *(-(-(span.stop - span.first) // span.block) for span in spans))
        block = max(span.block for span in spans)
        if all((span.first, span.stop, span.block) == (0, num_queries, block) for span in spans):
            return cls(spans, blocks, block, None)
        ends = [
            (0, num_queries, span.first, span.stop, span.block)
            for span in spans
            for _ in range(span.entries.start, span.entries.stop)
        ]
        lying = torch.tensor(ends, dtype=torch.int32).to(call.q.device, non_blocking=True)
        return cls(spans, blocks, block, Places(lying, None, blocks, block))

    def part(self, entries: slice) -> _Lying:
        """The same of some entries, whose number is then counted from 0."""
        spans = []
        for span in self.spans:
            start = max(span.entries.start, entries.start)
            stop = min(span.entries.stop, entries.stop)
            if start < stop:
                own = slice(start - entries.start, stop - entries.start)
                spans.append(span._replace(entries=own))
        places = self.places and self.places.part(entries, slice(0, self.blocks))
        return replace(self, spans=spans, places=places)


@dataclass(frozen=True)
class _Part:
    """What is computed together: some batch entries, and some key heads with their query heads.

    Attributes:
        call: the call of these.
        entries, key_heads: which they are.
        Qhat: ``(b, H, N, r)``.
        Khat: ``(b or 1, H_k, L, M, r)``.
        bases: A and B ``(b or 1, H_k, L, d, r)`` that made them, or None.
        places: where the blocks of these entries lie, if a mask says that.
    """

    call: Call
    entries: slice
    key_heads: slice
    Qhat: Tensor
    Khat: Tensor
    bases: Bases | None
    places: Places | None

    @property
    def heads(self) -> slice:
        """Its query heads."""
        start = self.key_heads.start * self.call.rep
        return slice(start, start + self.Qhat.shape[1])

    def of_rows(self, t: Tensor) -> Tensor:
        """The part of ``(B, H, ...)``."""
        return t[self.entries, self.heads]

    def of_keys(self, t: Tensor) -> Tensor:
        """The part of ``(B or 1, H_k, ...)``."""
        return t[self.entries if t.shape[0] > 1 else ALL, self.key_heads]


def _parts(call: Call, bases: Bases | None, lying: _Lying) -> Iterator[_Part]:
    """Parts whose Qhat and Khat fit the workspace.

    Where K and V are broadcast over the batch, a part has all entries, as their gradients are sums.
    """
    q, k, v = call.q, call.k, call.v
    batch, key_heads = q.shape[0], k.shape[1]
    at_once, is_shared = batch * key_heads, k.shape[0] < batch and v.shape[0] < batch
    if bases is not None:
        bases = bases[0][:, :, : lying.blocks], bases[1][:, :, : lying.blocks]
        rank = bases[0].shape[4]
        size = _bytes(q.shape[2] * call.rep, k.shape[2], lying.blocks, rank, q.dtype)
        at_once = max(1, WORKSPACE_BYTES // size)
    # One of K and V is broadcast: it gets a gradient for each entry, summed by the caller.
    if not is_shared and k.shape[0] != v.shape[0]:
        k, v = (t.expand(batch, -1, -1, -1) for t in (k, v))
        call = replace(call, k=k, v=v)
    # A part of shared keys has all entries: key heads are what is counted.
    counted = max(1, at_once // batch) if is_shared else at_once
    for entries, some in some_heads(slice(0, 1 if is_shared else batch), key_heads, counted):
        entries = slice(0, batch) if is_shared else entries
        own, part, here = None, call.part(entries, some), lying.part(entries)
        if bases is not None:
            A, B = (t[entries if t.shape[0] > 1 else ALL, some] for t in bases)
            own = A, B
        yield _Part(part, entries, some, *_factors(part.q, part.k, own, here), own, here.places)


def _factors(Q: Tensor, K: Tensor, bases: Bases | None, lying: _Lying) -> tuple[Tensor, Tensor]:
    """Qhat ``(b, H, N, r)`` and Khat ``(b or 1, H_k, L, M, r)``, rounded to the dtype of Q."""
    if bases is None:
        return Q, K[:, :, None]
    A, B = (t.to(Q.dtype) for t in bases)
    Khat = K[:, :, None] @ B
    if lying.places is not None:
        return _rows_by_spans(Q, A, lying.spans), Khat
    blocks, num_queries = A.shape[2], Q.shape[2]
    # Padded to whole blocks: Q (b, H_k, rep, L, l, d) times A (b or 1, H_k, 1, L, d, r).
    rows = F.pad(Q, (0, 0, 0, blocks * lying.block - num_queries)) if blocks > 1 else Q
    rows = rows.unflatten(2, (blocks, -1)).unflatten(1, (K.shape[1], -1))
    Qhat = (rows @ A[:, :, None]).flatten(1, 2).flatten(2, 3)
    return Qhat[:, :, :num_queries], Khat


def _rows_by_spans(Q: Tensor, A: Tensor, spans: list[Span]) -> Tensor:
    """Qhat ``(b, H, N, r)`` where A ``(b, H_k, L, d, r)`` belongs to rows as the spans say."""
    num_queries, key_heads = Q.shape[2], A.shape[1]
    Qhat = Q.new_empty(*Q.shape[:3], A.shape[4])
    for span in spans:
        asked = Asked("", 0, span.block, first=span.first, stop=span.stop)
        for number, (_, rows) in enumerate(asked.blocks(num_queries)):
            some = Q[span.entries, :, rows].unflatten(1, (key_heads, -1))
            made = some @ A[span.entries, :, number, None]
            Qhat[span.entries, :, rows] = made.flatten(1, 2)
    return Qhat


def _device(q: Tensor) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext()


FORMS: dict[str, Callable[..., None]] = {
    NAME: forward,
    f"{NAME} by pointers": partial(forward, by_pointers=True),
}
"""The forward by its names, in the order in which to try it."""
