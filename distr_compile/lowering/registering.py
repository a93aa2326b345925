"""What the ops of this package have in common: library, memory order, autocast, transforms.

They are registered through ``torch.library.Library``, whose boundary costs about half as much host
time a call as that of ``torch.library.custom_op``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

LIBRARY = torch.library.Library("distr", "FRAGMENT")

_DEVICES = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def register(
    name: str,
    schema: str,
    real: Callable[..., Any],
    fake: Callable[..., Any],
    flops: Callable[..., int],
) -> None:
    """Define an op of the library: what runs it, what traces it, and what counts its FLOPs.

    It is refused inside transforms of ``torch.func``; see ``_refuse_transforms``.
    """
    # Any strides are fine: the compiler need not copy an input into the layout it had in the trace.
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
    LIBRARY.impl(name, real, "CompositeExplicitAutograd")
    LIBRARY.impl(name, _refuse_transforms, "FuncTorchDynamicLayerFrontMode")
    torch.library.register_fake(f"distr::{name}", fake, lib=LIBRARY)
    register_flop_formula(getattr(torch.ops.distr, name))(flops)


def register_autocast(name: str, casts: bool = True) -> None:
    """Autocast as SDPA does: floating inputs but fp64 go to the autocast dtype, a bool mask stays.

    Args:
        name: of an op whose first four arguments are cast.
        casts: False casts nothing, as in a backward, whose inputs have been cast.
    """
    for device, key in _DEVICES.items():
        LIBRARY.impl(name, _autocast_rule(name, device, key, casts), key)


def _autocast_rule(name: str, device: str, key: str, casts: bool) -> Callable[..., Any]:
    autocast_key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(t: Tensor | None) -> Tensor | None:
        if not casts or t is None or not t.is_floating_point() or t.dtype == torch.float64:
            return t
        return t.to(torch.get_autocast_dtype(device))

    def autocast(*tensors: Tensor | None, **options: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(autocast_key):
            op: Any = getattr(torch.ops.distr, name).default
            return op(*map(cast, tensors[:4]), *tensors[4:], **options)

    return autocast


def _refuse_transforms(*_: Any, **__: Any) -> NoReturn:
    # Without this, torch.func.grad and jvp silently return a derivative that leaves the op out.
    raise NotImplementedError(
        "distr.attention: got a call inside a torch.func transform (vmap, grad, jvp, ...); the op "
        "has no rule for them: use F.scaled_dot_product_attention there"
    )


def empty_output(q: Tensor, v: Tensor) -> Tensor:
    """``(B, H, N, d_v)`` not filled, in the memory order in which models go on with it."""
    return empty_heads(q, q.shape[2], v.shape[3])


def empty_heads(like: Tensor, tokens: int, width: int) -> Tensor:
    """``(B, H, tokens, width)`` with batch, heads and dtype of ``like``, in memory B, N, H, d."""
    batch, heads = like.shape[:2]
    return like.new_empty(batch, tokens, heads, width).transpose(1, 2)


def lay_out(out: Tensor) -> Tensor:
    """The tensor in the memory order of ``empty_output``."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)
