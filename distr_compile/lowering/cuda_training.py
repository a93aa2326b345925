"""Calls whose gradients are recorded, on a GPU: the Triton kernels, forward and backward.

A and B are made by PyTorch's calls, as the backward needs them, and Qhat = Q A, Khat = K B by its
products, some heads at a time, so that they stay within the workspace of ``cuda.py``.
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
from distr_compile.lowering import cpu, cuda
from distr_compile.lowering.architecture import architecture
from distr_compile.lowering.call import ALL, Approximation, Call, Shape
from distr_compile.lowering.pieces import some_heads
from distr_compile.lowering.saved import Gradients, Saved, number_of_blocks, rows_of_a_block

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
    blocks = 1 if is_exact else number_of_blocks(shape.num_queries, approximation, False)
    has_blocks = not is_exact and ESTIMATORS[approximation.estimator].needs == "nothing"
    if has_blocks and shape.mask is not None:
        return "the Triton backward takes no mask that may say where grouping blocks begin"
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
    block = rows_of_a_block(call, Saved(saved.lse, bases))
    tile = cuda.tile_of(
        call,
        by_pointers,
        rank=call.approximation.rank,
        is_causal=call.scores.is_causal,
        has_mask=call.mask is not None or call.dropout is not None,
    )
    with _device(call.q):
        for part in _parts(call, bases, block):
            own = part.call
            attention_fwd(
                part.Qhat,
                part.Khat,
                own.v,
                own.mask,
                **own.softmax,
                grouping_block=block,
                tile=tile,
                out=own.out,
                lse=own.lse,
            )


def backward(call: Call, saved: Saved, grad: Tensor, wanted: Gradients) -> None:
    """Fill ``wanted``, but for the gradient of a mask; see ``training.backward``."""
    from distr_compile.kernels.attention.triton_bwd import attention_bwd
    from distr_compile.lowering.tiles import backward_tile_for

    block = rows_of_a_block(call, saved)
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
        for part in _parts(call, saved.bases, block):
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
                grouping_block=block,
                bases=part.bases,
                tile=tile,
                dq=part.of_rows(wanted.q),
                dk=part.of_keys(sums[0]),
                dv=part.of_keys(sums[1]),
                delta=delta,
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
class _Part:
    """What is computed together: some batch entries, and some key heads with their query heads.

    Attributes:
        call: the call of these.
        entries, key_heads: which they are.
        Qhat: ``(b, H, N, r)``.
        Khat: ``(b or 1, H_k, L, M, r)``.
        bases: A and B ``(b or 1, H_k, L, d, r)`` that made them, or None.
    """

    call: Call
    entries: slice
    key_heads: slice
    Qhat: Tensor
    Khat: Tensor
    bases: Bases | None

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


def _parts(call: Call, bases: Bases | None, block: int) -> Iterator[_Part]:
    """Parts whose Qhat and Khat fit the workspace.

    Where K and V are broadcast over the batch, a part has all entries, as their gradients are sums.
    """
    q, k, v = call.q, call.k, call.v
    batch, key_heads = q.shape[0], k.shape[1]
    at_once, is_shared = batch * key_heads, k.shape[0] < batch and v.shape[0] < batch
    if bases is not None:
        blocks, rank = bases[0].shape[2], bases[0].shape[4]
        size = _bytes(q.shape[2] * call.rep, k.shape[2], blocks, rank, q.dtype)
        at_once = max(1, WORKSPACE_BYTES // size)
    # One of K and V is broadcast: it gets a gradient for each entry, summed by the caller.
    if not is_shared and k.shape[0] != v.shape[0]:
        k, v = (t.expand(batch, -1, -1, -1) for t in (k, v))
        call = replace(call, k=k, v=v)
    # A part of shared keys has all entries: key heads are what is counted.
    counted = max(1, at_once // batch) if is_shared else at_once
    for entries, some in some_heads(slice(0, 1 if is_shared else batch), key_heads, counted):
        entries = ALL if is_shared else entries
        own, part = None, call.part(entries, some)
        if bases is not None:
            A, B = (t[entries if t.shape[0] > 1 else ALL, some] for t in bases)
            own = A, B
        yield _Part(part, entries, some, *_factors(part.q, part.k, own, block), own)


def _factors(Q: Tensor, K: Tensor, bases: Bases | None, block: int) -> tuple[Tensor, Tensor]:
    """Qhat ``(b, H, N, r)`` and Khat ``(b or 1, H_k, L, M, r)``, rounded to the dtype of Q."""
    if bases is None:
        return Q, K[:, :, None]
    A, B = (t.to(Q.dtype) for t in bases)
    Khat = K[:, :, None] @ B
    blocks, num_queries = A.shape[2], Q.shape[2]
    # Padded to whole blocks: Q (b, H_k, rep, L, l, d) times A (b or 1, H_k, 1, L, d, r).
    rows = F.pad(Q, (0, 0, 0, blocks * block - num_queries)) if blocks > 1 else Q
    rows = rows.unflatten(2, (blocks, -1)).unflatten(1, (K.shape[1], -1))
    Qhat = (rows @ A[:, :, None]).flatten(1, 2).flatten(2, 3)
    return Qhat[:, :, :num_queries], Khat


def _device(q: Tensor) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext()


FORMS: dict[str, Callable[..., None]] = {
    NAME: forward,
    f"{NAME} by pointers": partial(forward, by_pointers=True),
}
"""The forward by its names, in the order in which to try it."""
