"""Forward-mode AD: a call of which tangents are asked is computed exactly.

The kernels give no tangents. What PyTorch computes from products does, so that a call with a
tangent is written out in them, with all scores at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from distr_compile.kernels.attention import reference
from distr_compile.reporting import Handover, Reason

HANDOVER = Handover(
    Reason(
        "transform",
        "forward-mode AD carries a tangent of an input: the call is exact, by PyTorch's products",
    ),
    "torch-products",
    is_exact=True,
)
"""What the report says of such a call."""


def are_carried(values: Iterable[object]) -> bool:
    """Whether forward-mode AD carries a tangent of one of the values, tensors or not."""
    return forward_ad._current_level >= 0 and any(
        isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in values
    )


def products() -> AbstractContextManager[None]:
    """A context in which ``F.scaled_dot_product_attention`` is PyTorch's products.

    Its fused kernels give no tangents, and raise.
    """
    return sdpa_kernel(SDPBackend.MATH)  # type: ignore[no-any-return]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **softmax: Any) -> Tensor:
    """Exact attention that forward-mode AD differentiates, all scores at once.

    Args:
        q: ``(B, H, N, d)``.
        k: ``(B or 1, H_k, M, d)``; H_k divides H.
        v: ``(B or 1, H_k, M, d_v)``.
        mask: bool or floating, broadcastable to ``(B, H, N, M)``, or None.
        **softmax: ``scale``, ``is_causal``, ``causal_offset``, ``softcap``, ``sinks`` and
            ``dropout``, as ``Scores.softmax`` has them.

    Returns:
        ``(B, H, N, d_v)`` in the dtype of q, with its tangent.
    """
    Q, K, V = (t.to(torch.promote_types(q.dtype, torch.float32)) for t in (q, k, v))
    return reference.attention(Q, K, V, mask, rank=q.shape[3], **softmax).to(q.dtype)
