"""What the models of diffusers share: the form of an entry, sizes, configs and inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

HEADS, HEAD_DIM, TEXT_TOKENS = 2, 32, 20
WIDTH = HEADS * HEAD_DIM
SDPA, BOTH = ("sdpa",), ("sdpa", "eager")


@dataclass(frozen=True)
class DiffusersSpec:
    """Arguments of a model class and of its forward.

    In ``inputs`` a tuple is the shape of a tensor, drawn by what its name says (``_draw``); a
    function is called; anything else is passed as it is.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)
    variants: tuple[str, ...] = SDPA


def rotary(tokens: int, width: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """Cosines and sines in the form (tokens, width), each angle twice."""

    def tables() -> tuple[Tensor, Tensor]:
        rates = 100.0 ** -(torch.arange(0, width, 2) / width)
        angles = torch.outer(torch.arange(tokens), rates).repeat_interleave(2, 1)
        return angles.cos(), angles.sin()

    return tables


def generator() -> torch.Generator:
    """A generator that draws the same numbers each time it is made."""
    return torch.Generator().manual_seed(1)


def text_mask() -> Tensor:
    """Ones for tokens, zeros for the padding of the second text."""
    mask = torch.ones(2, TEXT_TOKENS, dtype=torch.long)
    mask[1, -7:] = 0
    return mask


IMAGE_LATENT = (2, 4, 16, 16)
TEXT = (2, TEXT_TOKENS, WIDTH)
CONDITION = {"timestep": (2,), "encoder_hidden_states": TEXT}
HEADED: dict[str, Any] = {"num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM}
JOINT: dict[str, Any] = {**HEADED, "joint_attention_dim": WIDTH, "num_layers": 1}
FLUX: dict[str, Any] = {
    **JOINT,
    "in_channels": 16,
    "num_single_layers": 1,
    "axes_dims_rope": (8, 12, 12),
}
FLUX_INPUTS = {
    "hidden_states": (2, 16, 16),
    "encoder_hidden_states": TEXT,
    "timestep": (2,),
    "img_ids": (16, 3),
    "txt_ids": (TEXT_TOKENS, 3),
}
HUNYUAN_DIT: dict[str, Any] = {
    **HEADED,
    "in_channels": 4,
    "patch_size": 2,
    "sample_size": 16,
    "hidden_size": WIDTH,
    "cross_attention_dim": WIDTH,
    "cross_attention_dim_t5": WIDTH,
    "pooled_projection_dim": 16,
    "text_len": 8,
    "text_len_t5": 12,
}
HUNYUAN_DIT_INPUTS = {
    "hidden_states": IMAGE_LATENT,
    "timestep": (2,),
    "encoder_hidden_states": (2, 8, WIDTH),
    "text_embedding_mask": lambda: torch.ones(2, 8, dtype=torch.long),
    "encoder_hidden_states_t5": (2, 12, WIDTH),
    "text_embedding_mask_t5": (2, 12),
    "image_meta_size": (2, 6),
    "style": lambda: torch.zeros(2, dtype=torch.long),
    "image_rotary_emb": rotary(64, HEAD_DIM),
}
SANA: dict[str, Any] = {
    **HEADED,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 1,
    "num_cross_attention_heads": HEADS,
    "cross_attention_head_dim": HEAD_DIM,
    "cross_attention_dim": WIDTH,
    "caption_channels": WIDTH,
    "sample_size": 16,
}
SANA_INPUTS = {
    "hidden_states": IMAGE_LATENT,
    **CONDITION,
    "encoder_attention_mask": (2, TEXT_TOKENS),
}
QWEN_IMAGE: dict[str, Any] = {
    **JOINT,
    "in_channels": 16,
    "out_channels": 4,
    "axes_dims_rope": (8, 12, 12),
}
QWEN_IMAGE_INPUTS = {
    "hidden_states": (2, 16, 16),
    **CONDITION,
    "encoder_hidden_states_mask": (2, TEXT_TOKENS),
    "img_shapes": lambda: [[(1, 4, 4)]] * 2,
}
SD3: dict[str, Any] = {
    **JOINT,
    "sample_size": 16,
    "in_channels": 4,
    "caption_projection_dim": WIDTH,
    "pooled_projection_dim": 32,
    "pos_embed_max_size": 16,
}
SD3_INPUTS = {"hidden_states": IMAGE_LATENT, **CONDITION, "pooled_projections": (2, 32)}
