"""Exact attention by PyTorch: ``F.scaled_dot_product_attention``, and what that cannot say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from distr_compile.kernels.attention import reference
from distr_compile.kernels.attention.dropout import Dropout
from distr_compile.lowering.architecture import architecture

CUDNN_FIRST = ("sm_90",)
"""Where cuDNN's attention is faster than FlashAttention-2, which SDPA takes first.

Published figures for long sequences in fp16: 497 and 648 TFLOP/s against 324 and 370, at d = 64 and
128. Not measured by us.
"""


BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
"""The fused kernels among which SDPA chooses on a GPU."""


def switched_on() -> dict[str, SDPBackend]:
    """The ones of ``BACKENDS`` that nobody has switched off."""
    switches = torch.backends.cuda
    is_on = {
        "flash": switches.flash_sdp_enabled,
        "cudnn": switches.cudnn_sdp_enabled,
        "efficient": switches.mem_efficient_sdp_enabled,
    }
    return {name: backend for name, backend in BACKENDS.items() if is_on[name]()}


def by(backend: SDPBackend, run: Callable[[], Tensor]) -> Tensor:
    """A call of SDPA by one backend.

    Raises:
        RuntimeError: the backend does not take it.
    """
    token = _CHOSEN.set(True)
    try:
        with sdpa_kernel(backend):
            return run()
    finally:
        _CHOSEN.reset(token)


_CHOSEN: ContextVar[bool] = ContextVar("_CHOSEN", default=False)
"""Whether ``by`` has chosen the kernel: then no other may stand in for it."""


def says(softcap: float, sinks: object | None, dropout: object | None = None) -> bool:
    """Whether SDPA has words for a call with this soft cap, these sinks and this dropout.

    It has a dropout, but drops other weights than the seed of a call says.
    """
    return softcap == 0 and sinks is None and dropout is None


def attention(
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
) -> Tensor:
    """The call of the op, exactly, as PyTorch computes it; its result may have any strides.

    SDPA's ``is_causal`` knows no offset and stands beside no mask: there the mask says it. Soft
    caps, sinks and dropout by a seed are beyond SDPA: the scores are written out in fp32, as in the
    models that have them.

    Args:
        q: ``(B, H, N, d)``.
        k: ``(B or 1, H_k, M, d)``; H_k divides H.
        v: ``(B or 1, H_k, M, d_v)``.
        mask: bool or floating, broadcastable to ``(B, H, N, M)``.
        scale: multiplies the scores.
        is_causal: row i sees keys ``j <= i + causal_offset``.
        causal_offset: see ``is_causal``.
        softcap: c > 0 makes the scaled scores s ``c * tanh(s / c)``.
        sinks: ``(H,)`` floating, in the softmax's denominator only.
        dropout: says which weights are dropped.

    Returns:
        ``(B, H, N, d_v)`` in the dtype of q.
    """
    if not says(softcap, sinks, dropout):
        dtype = torch.promote_types(q.dtype, torch.float32)
        return reference.attention(
            q.to(dtype),
            k.to(dtype),
            v.to(dtype),
            mask,
            scale=scale,
            is_causal=is_causal,
            causal_offset=causal_offset,
            rank=q.shape[3],
            softcap=softcap,
            sinks=sinks,
            dropout=dropout,
        ).to(q.dtype)
    if is_causal and causal_offset >= k.shape[2] - 1:
        is_causal = False  # the first row sees every key already, as in a decode step
    if is_causal and scale <= 0:
        q, scale = q * scale, 1.0  # of other scales SDPA on a CPU makes NaN
    if is_causal and (causal_offset or mask is not None):
        mask = with_causal(mask, q, k, causal_offset)
        is_causal = False
    if mask is not None and mask.dim() < 2:
        mask = mask.expand(q.shape[2], k.shape[2])  # SDPA takes a row of keys beside matrices only
    if mask is not None and mask.dtype not in (torch.bool, q.dtype):
        # SDPA takes a mask wider than q only as fp32 beside a half type (of fp32 beside fp64 it
        # makes garbage); a narrower cast could turn finfo.min into -inf.
        mask = mask.to(torch.promote_types(q.dtype, torch.float32))
    k = k if k.shape[0] == q.shape[0] else k.expand(q.shape[0], -1, -1, -1)
    v = v if v.shape[0] == q.shape[0] else v.expand(q.shape[0], -1, -1, -1)
    given = {"is_causal": is_causal, "scale": scale, "enable_gqa": k.shape[1] != q.shape[1]}
    # Dynamo asks no switches while it traces.
    as_chosen = torch.compiler.is_dynamo_compiling() or _CHOSEN.get()
    if as_chosen or torch.backends.cuda.math_sdp_enabled():
        return F.scaled_dot_product_attention(q, k, v, mask, **given)  # type: ignore[arg-type]
    with _products_allowed():
        return F.scaled_dot_product_attention(q, k, v, mask, **given)  # type: ignore[arg-type]


@contextmanager
def _products_allowed() -> Iterator[None]:
    """Let SDPA fall back to PyTorch's products, which ``sdpa_kernel`` forbids.

    The model may spell its attention out, and then knows of no kernel that might be missing.
    """
    torch.backends.cuda.enable_math_sdp(True)
    try:
        yield
    finally:
        torch.backends.cuda.enable_math_sdp(False)


def with_causal(mask: Tensor | None, q: Tensor, k: Tensor, causal_offset: int) -> Tensor:
    """A mask that also hides the keys ``j > i + causal_offset`` of row i."""
    visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    visible = visible.tril(causal_offset)
    if mask is None:
        return visible
    if mask.dtype == torch.bool:
        return mask & visible
    return mask.masked_fill(~visible, -torch.inf)


@contextmanager
def best_sdpa(device: torch.device) -> Iterator[None]:
    """Compile in this context to let exact attention take the device's fastest SDPA backend.

    SDPA settles on a backend while a graph is traced. Only the order of preference changes: what
    is switched off stays so, what cuDNN cannot do goes to the next, and an order that somebody set
    is left alone.
    """
    order = list(torch._C._get_sdp_priority_order())
    cudnn: int = SDPBackend.CUDNN_ATTENTION.value
    flash: int = SDPBackend.FLASH_ATTENTION.value
    if architecture(device) not in CUDNN_FIRST or order[0] != flash:
        yield
        return
    # Not by sdpa_kernel: leaving it changes the place of a backend that is switched off.
    torch._C._set_sdp_priority_order([cudnn, *(b for b in order if b != cudnn)])
    try:
        yield
    finally:
        torch._C._set_sdp_priority_order(order)
