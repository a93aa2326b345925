"""Modules that stay one node in a Dynamo graph, opened up only where their attention is rewritten.

``F.multi_head_attention_forward`` (``nn.MultiheadAttention``) and
``torch._transformer_encoder_layer_fwd`` (``nn.TransformerEncoderLayer`` in eval mode) carry their
weights as arguments. Their sizes are read here for the matcher; :func:`spell_out` writes the
projections, the attention and what follows as plain calls. Where the attention stays exact the node
is left alone.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.operator_schemas import get_signature_for_torch_op

from distr_compile.passes import vocabulary as voc
from distr_compile.passes.emit import Emitter, erase_idle
from distr_compile.passes.memory import Memory
from distr_compile.passes.site import AttentionSite, Causal, RefusedError, dropped
from distr_compile.passes.vocabulary import fake, shape_of, target_name

Attend = Callable[[Emitter, Any, Any, Any, Any, Any], fx.Node]
"""(emit, q, k, v, mask, scale) -> output, all (B, H, N, d): writes the attention."""


def _arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of a module's call by name, those that are left out by their defaults."""
    target: Any = node.target
    overloads = get_signature_for_torch_op(target)  # None of what is written in Python
    bound = (overloads[0] if overloads else inspect.signature(target)).bind(
        *node.args, **node.kwargs
    )
    bound.apply_defaults()
    return dict(bound.arguments)


def multi_head_site(node: fx.Node, memory: Memory) -> AttentionSite:
    """The site of ``F.multi_head_attention_forward``, or ``RefusedError`` with the reason."""
    a = _arguments(node)
    outputs = [user for user in node.users if user not in memory.dead]
    if any(user.target is not operator.getitem or user.args[1] != 0 for user in outputs):
        raise RefusedError("weights-reused", "the weights are returned (need_weights)")
    if not outputs:
        raise RefusedError("dead", "nothing reads the result of this attention")
    dropout_p = dropped(a["dropout_p"]) if a["training"] else 0.0
    if a["bias_k"] is not None or a["bias_v"] is not None or a["add_zero_attn"]:
        raise RefusedError("extra-keys", "bias_k, bias_v or add_zero_attn append keys")
    if a["static_k"] is not None or a["static_v"] is not None:
        raise RefusedError("extra-keys", "static_k or static_v replace the keys")
    query, key = shape_of(a["query"]), shape_of(a["key"])
    if len(query) not in (2, 3) or not all(map(voc.is_tensor, (a["query"], a["key"], a["value"]))):
        raise RefusedError("layout", "the query is not (N, E) or (N, B, E)")
    masks = _masks(a)
    is_causal = bool(a["is_causal"]) and a["key_padding_mask"] is None and not a["need_weights"]
    kind = "bool" if all(fake(mask).dtype is torch.bool for mask in masks) else "float"
    kind = "causal" if is_causal else kind if masks else "none"
    batch = query[1] if len(query) == 3 else 1
    sizes = (batch, a["num_heads"], query[0], key[0], query[-1])
    causal = Causal(0) if is_causal else None
    rest: dict[str, Any] = {"mask_kind": kind, "causal": causal, "dropout_p": dropout_p}
    return _site(node, "mha", outputs[0], sizes, **rest)


def encoder_layer_site(node: fx.Node) -> AttentionSite:
    """The site of ``torch._transformer_encoder_layer_fwd``, or ``RefusedError`` with the reason."""
    a = _arguments(node)
    shape, out = shape_of(a["src"]), voc.tensor_of(node)
    if len(shape) != 3 or out is None or out.is_nested:
        raise RefusedError("layout", "the input is not (B, N, E)")
    if a["mask"] is not None and a["mask_type"] not in (0, 1, 2):
        raise RefusedError("layout", f"mask_type {a['mask_type']} is not known")
    sizes = (shape[0], a["num_heads"], shape[1], shape[1], a["embed_dim"])
    return _site(node, "encoder", node, sizes, mask_kind="none" if a["mask"] is None else "bool")


def _site(
    node: fx.Node, kind: str, result: fx.Node, sizes: tuple[Any, ...], **rest: Any
) -> AttentionSite:
    """The site of a module; ``sizes``: batch, heads, queries, keys, width of all heads."""
    batch, heads, queries, keys, width = sizes
    out = fake(result)
    return AttentionSite(
        kind=kind,
        anchor=node,
        form=target_name(node).strip("_"),
        output=node,
        dtype=out.dtype,
        device=out.device,
        requires_grad=out.requires_grad,
        batch=batch,
        num_heads=heads,
        num_key_heads=heads,
        num_queries=queries,
        num_keys=keys,
        head_dim=width // heads,
        value_dim=width // heads,
        interior=(node,),
        **rest,
    )


def spell_out(site: AttentionSite, emit: Emitter, attend: Attend) -> fx.Node:
    """Write the module's arithmetic as plain calls around ``attend``; what it comes to."""
    spell = _spell_out_multi_head if site.kind == "mha" else _spell_out_encoder
    scale = 1.0 / math.sqrt(site.head_dim)
    return spell(site, emit, lambda q, k, v, mask: attend(emit, q, k, v, mask, scale))


def _spell_out_multi_head(site: AttentionSite, emit: Emitter, attend: Any) -> fx.Node:
    a = _arguments(site.anchor)
    heads, is_batched = site.num_heads, len(shape_of(a["query"])) == 3
    weights = [a["q_proj_weight"], a["k_proj_weight"], a["v_proj_weight"]]
    if not a["use_separate_proj_weight"]:
        weights = emit.thirds(a["in_proj_weight"])
    biases: list[Any] = [None] * 3 if a["in_proj_bias"] is None else emit.thirds(a["in_proj_bias"])

    def split_heads(x: fx.Node) -> fx.Node:  # (N, [B,] E) -> (B, H, N, d)
        x = emit.method("unflatten", x, -1, (heads, -1))
        x = x if is_batched else emit.method("unsqueeze", x, 1)
        return emit.method("permute", x, 1, 2, 0, 3)

    q, k, v = (
        split_heads(emit.function(F.linear, a[name], weight, bias))
        for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True)
    )
    mask = None if site.is_causal else _merged_mask(a, emit, heads)
    out = attend(q, k, v, mask)
    out = emit.method("flatten", emit.method("permute", out, 2, 0, 1, 3), 2)  # (N, B, E)
    if not is_batched:
        out = emit.method("squeeze", out, 1)
    return emit.function(F.linear, out, a["out_proj_weight"], a["out_proj_bias"])


def replace_results(site: AttentionSite, out: fx.Node) -> None:
    """Let ``out`` be the first of the two results of ``multi_head_attention_forward``.

    The second, the weights, has no reader: else there was no site.
    """
    for user in list(site.anchor.users):
        if user.args[1] == 0:
            user.replace_all_uses_with(out)
        erase_idle(site.anchor.graph, user)


def _masks(a: dict[str, Any]) -> list[fx.Node]:
    return [a[name] for name in ("attn_mask", "key_padding_mask") if a[name] is not None]


def _merged_mask(a: dict[str, Any], emit: Emitter, heads: int) -> fx.Node | None:
    """The module's two masks (True hides) as one: bool (True attends) or additive float."""
    mask, padding = a["attn_mask"], a["key_padding_mask"]
    if mask is not None and len(shape_of(mask)) == 3:  # (B * H, N_q, N_k)
        mask = emit.method("unflatten", mask, 0, (-1, heads))
    if padding is not None and len(shape_of(padding)) == 2:  # (B, N_k); else (N_k,)
        padding = emit.method("unsqueeze", emit.method("unsqueeze", padding, 1), 1)
    masks = [m for m in (mask, padding) if m is not None]
    if not masks:
        return None
    is_bool = [fake(m).dtype is torch.bool for m in _masks(a)]
    if all(is_bool):
        hidden = masks[0] if len(masks) == 1 else emit.method("logical_or", *masks)
        return emit.method("logical_not", hidden)
    dtype = fake(a["query"]).dtype
    terms = [emit.additive(m, dtype) if b else m for m, b in zip(masks, is_bool, strict=True)]
    return terms[0] if len(terms) == 1 else emit.function(torch.add, *terms)


def _spell_out_encoder(site: AttentionSite, emit: Emitter, attend: Any) -> fx.Node:
    a = _arguments(site.anchor)
    heads, width = site.num_heads, a["embed_dim"]

    def norm(x: fx.Node, which: int) -> fx.Node:
        weight, bias = a[f"norm_weight_{which}"], a[f"norm_bias_{which}"]
        return emit.function(F.layer_norm, x, (width,), weight, bias, a["eps"])

    def self_attention(x: fx.Node) -> fx.Node:
        qkv = emit.function(F.linear, x, a["qkv_weight"], a["qkv_bias"])
        q, k, v = (
            emit.method("transpose", emit.method("unflatten", part, -1, (heads, -1)), 1, 2)
            for part in emit.thirds(qkv, dim=-1)
        )
        out = attend(q, k, v, _encoder_mask(a, emit))
        out = emit.method("flatten", emit.method("transpose", out, 1, 2), 2)
        return emit.function(F.linear, out, a["proj_weight"], a["proj_bias"])

    def feed_forward(x: fx.Node) -> fx.Node:
        x = emit.function(F.linear, x, a["ffn_weight_1"], a["ffn_bias_1"])
        x = emit.function(F.gelu if a["use_gelu"] else F.relu, x)
        return emit.function(F.linear, x, a["ffn_weight_2"], a["ffn_bias_2"])

    x = a["src"]
    if a["norm_first"]:
        x = emit.function(torch.add, x, self_attention(norm(x, 1)))
        x = emit.function(torch.add, x, feed_forward(norm(x, 2)))
    else:
        x = norm(emit.function(torch.add, x, self_attention(x)), 1)
        x = norm(emit.function(torch.add, x, feed_forward(x)), 2)
    return x


def _encoder_mask(a: dict[str, Any], emit: Emitter) -> fx.Node | None:
    """Non-zero hides: the kernel reads any mask as boolean, also an additive one of 0 and -inf."""
    mask = a["mask"]
    if mask is None:
        return None
    if a["mask_type"] == 1:  # (B, N)
        mask = emit.method("unsqueeze", emit.method("unsqueeze", mask, 1), 1)
    return emit.method("logical_not", emit.method("to", mask, torch.bool))
