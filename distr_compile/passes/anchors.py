"""Nodes that are attention, or may be: each has an entry in the report, whatever becomes of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx

from distr_compile.passes.vocabulary import Softmax, read, target_name

_ANCHORS = {
    **dict.fromkeys("softmax _softmax special_softmax softmin _safe_softmax".split(), "softmax"),
    "gumbel_softmax": "softmax",
    **dict.fromkeys("flex_attention flex_attention_hop".split(), "flex"),
    "scaled_dot_product_attention": "sdpa",
    **{
        f"_scaled_dot_product_{name}": "sdpa"
        for name in (
            *("attention_math", "flash_attention_for_cpu", "flash_attention"),
            *("efficient_attention", "cudnn_attention"),
        )
    },
}
_MODULES = {
    F.multi_head_attention_forward: "mha",
    getattr(torch, "_transformer_encoder_layer_fwd", None): "encoder",
}


def anchor_kind(node: fx.Node) -> str | None:
    """``"softmax"``, ``"sdpa"``, ``"mha"``, ``"encoder"`` or ``"flex"``: what a report counts."""
    name = target_name(node)
    if name in {"exp", "div", "div_", "truediv", "itruediv", "divide", "true_divide"}:
        return "softmax" if isinstance(read(node), Softmax) else None
    return _ANCHORS.get(name) or _MODULES.get(node.target)
