"""Calls of the fused CPU kernel: exact attention, one of factors that come block by block, and
gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distr_compile.kernels.attention import backward as backward_kernel
from distr_compile.kernels.attention import cpu as kernel
from distr_compile.kernels.attention.cpu import Group
from distr_compile.kernels.counted import Span
from distr_compile.kernels.roles import Asked
from distr_compile.kernels.rows import sliced
from distr_compile.lowering.call import Approximation, Call, Shape
from distr_compile.lowering.choose import Implementation
from distr_compile.lowering.placing import spans_of
from distr_compile.lowering.saved import Gradients, Saved


def exact_attention(call: Call) -> None:
    """Fill ``call.out``, and ``call.lse`` if there is one, by exact attention.

    Args:
        call: of fp32, fp16 or bf16 tensors on the CPU, any strides; its approximation is not
            looked at. Rows that see no key are 0.

    Raises:
        RuntimeError: the kernel is not available; ``kernel.available`` tells.
    """
    _compute(call)


def _compute(call: Call, **options: Any) -> None:
    """The kernel on a call; ``options`` are those of ``kernel.attention`` beside the softmax's."""
    options |= {**call.softmax, "out": call.out, "lse": call.lse}
    kernel.attention(call.q, call.k[:, :, None], call.v, call.mask, **options)


def attend(call: Call, groups: Iterator[Group], asked: Asked) -> None:
    """Fill ``call.out``, and ``call.lse`` if there is one, by the approximation.

    Args:
        call: as of ``exact_attention``.
        groups: A and B of all blocks, in turn.
        asked: where the blocks lie, and whether the form is strict: a block's own keys and later
            ones are scored exactly then.
    """
    num_queries, key_heads = call.q.shape[2], call.k.shape[1]
    first, end = asked.first, num_queries if asked.stop is None else asked.stop

    def attend_rows(rows: slice, bases: Group, block: int, follows: bool) -> None:
        if rows.start >= rows.stop:
            return
        part = call.part(rows=rows)
        exact = (part.q, part.k) if asked.strict else None
        _compute(part, grouping_block=block, bases=bases, exact=exact, follows=follows)

    start = first
    for group in groups:
        AT, B = (t.unflatten(0, (-1, key_heads)) for t in group)  # (b, h, blocks, ...)
        rows = slice(start, min(start + AT.shape[2] * asked.block, end))
        if start == first:  # the rows before the first block go with it
            attend_rows(slice(0, first), (AT[:, :, :1], B[:, :, :1]), first, False)
        attend_rows(rows, (AT, B), asked.block, start > first)
        start = rows.stop
        if start == end:  # and those after the last with that
            last = slice(end, num_queries)
            attend_rows(last, (AT[:, :, -1:], B[:, :, -1:]), num_queries, True)


def backward(call: Call, saved: Saved, grad: Tensor, wanted: Gradients) -> None:
    """Fill ``wanted``; see ``training.backward``."""
    k, v = call.k, call.v
    if k.shape[0] != v.shape[0]:  # one of them is broadcast
        k, v = (t.expand(call.q.shape[0], -1, -1, -1) for t in (k, v))
    call = replace(call, k=k, v=v)
    # What is not fp32, or has a share for each batch entry, is summed elsewhere first.
    dk, dv = (
        to
        if to.dtype == torch.float32 and to.shape == like.shape
        else torch.empty(like.shape, dtype=torch.float32, device="cpu")
        for to, like in ((wanted.k, k), (wanted.v, v))
    )
    delta = None if wanted.sinks is None else torch.empty_like(saved.lse)
    dmask = None
    if wanted.mask is not None:
        sizes = (*(1,) * (4 - wanted.mask.dim()), *wanted.mask.shape)
        dmask = torch.empty(sizes, dtype=torch.float32, device="cpu")
    found = _Found(wanted.q, dk, dv, delta, dmask)
    spans = spans_of(call, saved.bases is not None)
    parts = [part for span in spans for part in _parts(span, call.q.shape[2])]
    # Several parts add to them; one fills them itself.
    if len(parts) > 1:
        for sums in (dk, dv, *([] if dmask is None else [dmask])):
            sums.zero_()
    for part in parts:
        _backward_of_part(call, saved, grad, found, part, len(parts))
    if wanted.mask is not None and dmask is not None:
        wanted.mask.copy_(dmask.view(wanted.mask.shape))
    for to, made in ((wanted.k, dk), (wanted.v, dv)):
        if to is not made:
            to.copy_(made if to.shape == made.shape else made.sum(0, keepdim=True))
    if wanted.sinks is not None and call.sinks is not None and delta is not None:
        lse = saved.lse.masked_fill(saved.lse == -torch.inf, torch.inf)
        share = torch.exp(call.sinks.float()[None, :, None] - lse)
        wanted.sinks.copy_(-(share * delta).sum((0, 2)))


class _Found(NamedTuple):
    """Gradients to be filled: of Q, of K, V and the mask in fp32, and each row's delta."""

    q: Tensor
    k: Tensor
    v: Tensor
    delta: Tensor | None
    mask: Tensor | None


class _Part(NamedTuple):
    """Entries and rows whose grouping blocks are equally long, the first of them and the last."""

    entries: slice
    rows: slice
    block: int
    blocks: slice


def _parts(span: Span, num_queries: int) -> Iterator[_Part]:
    """The rows of a span that have blocks, those before them and those after."""
    entries, first, stop, block = span[:4]
    yield _Part(entries, slice(first, stop), block, slice(0, -(-(stop - first) // block)))
    # Rows before the first block use its A and B, those after the last those of the last.
    if first > 0:
        yield _Part(entries, slice(0, first), first, slice(0, 1))
    if stop < num_queries:
        last = (stop - first - 1) // block
        yield _Part(entries, slice(stop, num_queries), num_queries, slice(last, last + 1))


def _backward_of_part(
    call: Call,
    saved: Saved,
    grad: Tensor,
    found: _Found,
    part: _Part,
    parts: int,
) -> None:
    """Fill what a part gives, or where there are several, add what it gives to all keys."""
    bases, delta, of_rows = saved.bases, found.delta, (part.entries, slice(None), part.rows)
    sums = [t if t.shape[0] == 1 else t[part.entries] for t in (found.k, found.v)]
    if found.mask is not None:
        sums.append(sliced(found.mask, *of_rows))
    # The kernel fills what it is given: where parts are added, each has tensors of its own.
    made = sums if parts == 1 else [t.new_empty(t.shape) for t in sums]
    if bases is not None:
        few = slice(None) if bases[0].shape[0] == 1 else part.entries
        bases = (bases[0][few, :, part.blocks], bases[1][few, :, part.blocks])
    own_delta = None if delta is None else delta.new_empty(delta[of_rows].shape)
    own = call.part(entries=part.entries, rows=part.rows)
    scores = own.scores
    backward_kernel.backward(
        own.q,
        own.k,
        own.v,
        own.mask,
        own.out,
        saved.lse[of_rows],
        grad[of_rows],
        scale=scores.scale,
        is_causal=scores.is_causal,
        causal_offset=scores.offset or 0,
        grouping_block=part.block,
        softcap=scores.softcap,
        bases=bases,
        strict=call.is_prefix and bases is not None,
        dropout=own.dropout,
        dq=found.q[of_rows],
        dk=made[0],
        dv=made[1],
        delta=own_delta,
        dmask=made[2] if found.mask is not None else None,
    )
    if delta is not None and own_delta is not None:
        delta[of_rows].copy_(own_delta)
    if parts > 1:
        for total, some in zip(sums, made, strict=True):
            total += some


def refuses_backward(shape: Shape, approximation: Approximation, mask_grad: bool) -> str | None:
    """Why the kernel does not compute the gradients of a call, or None."""
    is_shared = shape.mask is not None and shape.mask[0][1] < shape.num_heads
    if mask_grad and is_shared and shape.num_key_heads > 1:
        return "the fused C++ backward gives no gradient to a mask that heads share"
    return _refuses(shape, approximation)


def _refuses(shape: Shape, approximation: Approximation) -> str | None:
    if shape.device.type != "cpu":
        return "the fused C++ kernel is for CPUs"
    if shape.dtype not in kernel.DTYPES:
        return f"the fused C++ kernel does not compute in {str(shape.dtype)[6:]}"
    return kernel.unavailable_reason()


def _run(call: Call) -> None:
    from distr_compile.lowering import cpu  # which calls this module

    cpu.run(call, fused=True)


IMPLEMENTATION = Implementation("distr-cpu", _refuses, _run)
