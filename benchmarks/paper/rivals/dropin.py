"""Rivals in the place of the attention of timm's vision transformers, and of HF Llama and BERT.

Q, K, V and the output projection stay the model's own; rotary embeddings come first. A layer of
transformers is reached by its attention function, one of timm by a module around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.bert.modeling_bert import BertSelfAttention
from transformers.models.llama.modeling_llama import LlamaAttention

from benchmarks.paper.rivals.layer import Layer, Rival

NAME = "paper-rival"
"""The attention implementation, as transformers knows it."""

Make = Callable[[Layer], Rival]


def replace(model: nn.Module, make: Make, layers: Iterable[int] | None = None) -> list[str]:
    """Put a rival into layers of a model, which is changed.

    Args:
        model: a timm VisionTransformer, or of transformers a BERT or Llama, with any head.
        make: the rival of a layer; its parameters become the model's.
        layers: numbers of layers, negative ones from the end; all if None.

    Returns:
        The names of the attentions in ``model.named_modules()`` that were replaced.

    Raises:
        ValueError: another model, or no such layer.
    """
    kinds = (Attention, BertSelfAttention, LlamaAttention)
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, kinds)]
    is_timm = isinstance(model, VisionTransformer)
    if not found or is_timm != isinstance(found[0][1], Attention):
        raise ValueError(
            f"model: got {type(model).__name__}; accepted: timm's VisionTransformer, BERT and "
            "Llama of transformers; write a drop-in for it here"
        )
    numbers = range(len(found)) if layers is None else tuple(layers)
    if not all(-len(found) <= n < len(found) for n in numbers):
        raise ValueError(
            f"layers: got {list(numbers)}; accepted: -{len(found)} to {len(found) - 1}; name "
            "layers that the model has"
        )
    chosen = [found[number] for number in numbers]
    for name, module in chosen:
        if isinstance(module, Attention):
            assert isinstance(model, VisionTransformer)
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, TimmAttention(module, make(_image(model))))
        else:
            _hang_in(module, make(_text(module)))
    if not is_timm:
        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)  # type: ignore[operator]
    return [name for name, _ in chosen]


def _image(model: VisionTransformer) -> Layer:
    attention = next(m for m in model.modules() if isinstance(m, (Attention, TimmAttention)))
    own = attention if isinstance(attention, Attention) else attention.own
    grid = tuple(model.patch_embed.grid_size)
    tokens = grid[0] * grid[1] + model.num_prefix_tokens
    return Layer(own.num_heads, own.head_dim, tokens, grid=grid, scale=own.scale)


def _text(module: Any) -> Layer:
    config = module.config
    heads, is_causal = config.num_attention_heads, bool(module.is_causal)
    head_dim = getattr(module, "head_dim", None) or module.attention_head_size
    tokens = config.max_position_embeddings
    return Layer(heads, head_dim, tokens, is_causal=is_causal, scale=module.scaling)


class TimmAttention(nn.Module):
    """timm's attention with a rival between its projections."""

    def __init__(self, own: Attention, rival: Rival) -> None:
        super().__init__()
        self.own, self.rival = own, rival

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """As timm's own.

        Raises:
            ValueError: a mask or causality, which images do not have.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("attn_mask, is_causal: got one; accepted: neither; leave them out")
        own = self.own
        shape = (*x.shape[:2], 3, own.num_heads, own.head_dim)
        q, k, v = own.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
        out = self.rival(own.q_norm(q), own.k_norm(k), v, x).transpose(1, 2).flatten(2)
        out = own.norm(out)
        if own.gate is not None:
            out = out * own.gate(x).sigmoid()
        return own.proj_drop(own.proj(out))


def _hang_in(module: nn.Module, rival: Rival) -> None:
    """A module of transformers keeps its rival, which sees the input of each call before it."""
    module.rival = rival

    def see(own: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        own._rival_input = args[0] if args else kwargs["hidden_states"]

    module.register_forward_pre_hook(see, with_kwargs=True)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls: the module's rival, or exact attention where it has none.

    Returns:
        ``(B, N, H, d)`` and no weights.

    Raises:
        ValueError: a mask that is not padding and, where the layer is causal, causality.
    """
    rival = getattr(module, "rival", None)
    if rival is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    keep = None if attention_mask is None else kept(attention_mask, causal=rival.layer.is_causal)
    x = module._rival_input
    del module._rival_input
    return rival(query, key, value, x, keep).transpose(1, 2).contiguous(), None


def kept(mask: Tensor, *, causal: bool) -> Tensor:
    """Which tokens a mask of ``sdpa_mask`` does not hide as padding, ``(B, N)``.

    Args:
        mask: ``(B, 1, N, N)``, bool, True where a key is seen; N may be 1 in the third place.
        causal: whether the layer is.

    Raises:
        ValueError: it hides more.
    """
    keep = mask.any(2)[:, 0]
    tokens = keep.shape[1]
    seen = keep[:, None, None, :].expand(-1, 1, tokens, -1)
    if causal:
        seen = seen & torch.ones(tokens, tokens, dtype=torch.bool, device=mask.device).tril()
    same = (mask == seen) | ~keep[:, None, :, None]  # rows of padding do not matter
    if mask.dtype != torch.bool or not bool(same.all()):
        raise ValueError(
            f"attention_mask: got {mask.dtype} {tuple(mask.shape)} that hides more than padding; "
            "accepted: padded tokens that nothing sees; unpack the sequences"
        )
    return keep
