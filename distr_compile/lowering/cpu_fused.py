"""Calls of the fused CPU kernel: exact attention, one of factors that come block by block, and
gradients."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from distr_compile.estimators import ESTIMATORS
from distr_compile.kernels.attention import backward as backward_kernel
from distr_compile.kernels.attention import cpu as kernel
from distr_compile.kernels.attention.cpu import Group
from distr_compile.kernels.attention.dropout import Dropout
from distr_compile.lowering.call import Approximation, Shape
from distr_compile.lowering.choose import Call, Implementation
from distr_compile.lowering.saved import Gradients, Saved, rows_of_a_block


def takes(q: Tensor) -> bool:
    """Whether the fused kernel runs on these inputs, here; ``kernel.unavailable_reason`` says why
    not."""
    return q.device.type == "cpu" and kernel.available(q.dtype)


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
    """Exact attention by the fused kernel: rank = d, nothing is approximated.

    Args:
        q: ``(B, H, N, d)`` fp32, fp16 or bf16 on the CPU, any strides.
        k: ``(B or 1, H_k, M, d)``; H_k divides H.
        v: ``(B or 1, H_k, M, d_v)``.
        mask: bool or floating, broadcastable to ``(B, H, N, M)``.
        scale: multiplies the scores.
        is_causal: row i sees keys ``j <= i + causal_offset``.
        causal_offset: see ``is_causal``.
        softcap: c > 0 makes the scaled scores s ``c * tanh(s / c)``; 0 does not.
        sinks: ``(H,)`` floating, in the softmax's denominator only.
        dropout: says which weights are dropped.
        out: ``(B, H, N, d_v)``, any strides, is filled and returned; rows that see no key are 0.
        lse: ``(B, H, N)`` fp32, is filled with the logarithm of each row's sum of exponentials.

    Raises:
        RuntimeError: the kernel is not available; ``takes`` tells.
    """
    return kernel.attention(
        q,
        k[:, :, None],
        v,
        mask,
        sinks,
        scale=scale,
        is_causal=is_causal,
        causal_offset=causal_offset,
        softcap=softcap,
        dropout=dropout,
        out=out,
        lse=lse,
    )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    groups: Iterator[Group],
    *,
    block: int,
    scale: float,
    is_causal: bool,
    causal_offset: int,
    softcap: float,
    strict: bool,
    out: Tensor,
    lse: Tensor | None = None,
    dropout: Dropout | None = None,
) -> None:
    """Fill ``out`` with the approximation whose A and B come in ``groups``.

    Args:
        q: ``(b, h rep, N, d)``, the query heads of h key heads.
        k: ``(b or 1, h, M, d)``; v ``(b or 1, h, M, d_v)``.
        v: see ``k``.
        mask: broadcastable to ``(b, h rep, N, M)``.
        sinks: ``(h rep,)``.
        groups: A and B of all blocks, in turn.
        block: query rows per grouping block.
        scale: multiplies the scores.
        is_causal: row i sees keys ``j <= i + causal_offset``.
        causal_offset: see ``is_causal``.
        softcap: see ``exact_attention``.
        strict: the strict form: a block's own keys and later ones are scored exactly.
        out: ``(b, h rep, N, d_v)``.
        lse: ``(b, h rep, N)`` fp32, see ``exact_attention``.
        dropout: says which weights are dropped.
    """
    num_queries, key_heads, start = q.shape[2], k.shape[1], 0
    for group in groups:
        AT, B = (t.unflatten(0, (-1, key_heads)) for t in group)
        rows = slice(start, min(start + AT.shape[2] * block, num_queries))
        cut = mask
        if mask is not None and mask.dim() > 1 and mask.shape[-2] > 1:
            cut = mask[..., rows, :]
        Q = q[:, :, rows]
        kernel.attention(
            Q,
            k[:, :, None],
            v,
            cut,
            sinks,
            scale=scale,
            is_causal=is_causal,
            causal_offset=causal_offset + start,
            grouping_block=block,
            softcap=softcap,
            bases=(AT, B),
            exact=(Q, k) if strict else None,
            follows=start > 0,
            out=out[:, :, rows],
            lse=None if lse is None else lse[:, :, rows],
            dropout=None if dropout is None else dropout.part(row=start),
        )
        start = rows.stop


def backward(call: Call, saved: Saved, grad: Tensor, wanted: Gradients) -> None:
    """Fill ``wanted``; see ``training.backward``."""
    batch, k, v = call.q.shape[0], call.k, call.v
    if k.shape[0] != v.shape[0]:  # one of them is broadcast
        k, v = (t.expand(batch, -1, -1, -1) for t in (k, v))
    # What is not fp32, or has a share for each batch entry, is summed elsewhere first.
    dk, dv = (
        to
        if to.dtype == torch.float32 and to.shape == like.shape
        else torch.empty(like.shape, dtype=torch.float32)
        for to, like in ((wanted.k, k), (wanted.v, v))
    )
    delta = None if wanted.sinks is None else torch.empty_like(saved.lse)
    dmask = None
    if wanted.mask is not None:
        sizes = (*(1,) * (4 - wanted.mask.dim()), *wanted.mask.shape)
        dmask = torch.empty(sizes, dtype=torch.float32)
    scores = call.scores
    backward_kernel.backward(
        call.q,
        k,
        v,
        call.mask,
        call.out,
        saved.lse,
        grad,
        scale=scores.scale,
        is_causal=scores.is_causal,
        causal_offset=scores.offset or 0,
        grouping_block=rows_of_a_block(call, saved),
        softcap=scores.softcap,
        bases=saved.bases,
        strict=_is_prefix(call.approximation) and saved.bases is not None,
        dropout=call.dropout,
        dq=wanted.q,
        dk=dk,
        dv=dv,
        delta=delta,
        dmask=dmask,
    )
    if wanted.mask is not None and dmask is not None:
        wanted.mask.copy_(dmask.view(wanted.mask.shape))
    for to, made in ((wanted.k, dk), (wanted.v, dv)):
        if to is not made:
            to.copy_(made if to.shape == made.shape else made.sum(0, keepdim=True))
    if wanted.sinks is not None and call.sinks is not None and delta is not None:
        lse = saved.lse.masked_fill(saved.lse == -torch.inf, torch.inf)
        share = torch.exp(call.sinks.float()[None, :, None] - lse)
        wanted.sinks.copy_(-(share * delta).sum((0, 2)))


def refuses_backward(shape: Shape, approximation: Approximation, mask_grad: bool) -> str | None:
    """Why the kernel does not compute the gradients of a call, or None."""
    is_shared = shape.mask is not None and shape.mask[0][1] < shape.num_heads
    if mask_grad and is_shared and shape.num_key_heads > 1:
        return "the fused C++ backward gives no gradient to a mask that heads share"
    return _refuses(shape, approximation)


def _is_prefix(approximation: Approximation) -> bool:
    return approximation.strict and ESTIMATORS[approximation.estimator].strict == "prefix"


def _refuses(shape: Shape, approximation: Approximation) -> str | None:
    if shape.device.type != "cpu":
        return "the fused C++ kernel is for CPUs"
    if shape.dtype not in kernel.DTYPES:
        return f"the fused C++ kernel does not compute in {str(shape.dtype)[6:]}"
    return kernel.unavailable_reason()


def _run(call: Call) -> None:
    from distr_compile.lowering import cpu  # which calls this module for every other estimator

    cpu.run(call, fused=True)


IMPLEMENTATION = Implementation("distr-cpu", _refuses, _run)
