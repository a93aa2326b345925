"""Transformers of diffusers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .spec import (
    BOTH,
    CONDITION,
    FLUX,
    FLUX_INPUTS,
    HEAD_DIM,
    HEADED,
    HEADS,
    HUNYUAN_DIT,
    HUNYUAN_DIT_INPUTS,
    IMAGE_LATENT,
    QWEN_IMAGE,
    QWEN_IMAGE_INPUTS,
    SANA,
    SANA_INPUTS,
    SD3,
    SD3_INPUTS,
    TEXT,
    TEXT_TOKENS,
    WIDTH,
    DiffusersSpec,
    generator,
    rotary,
    text_mask,
)


def _padded_joint_mask(image_tokens: int) -> Tensor:
    """True for every image token and every text token that is no padding."""
    return torch.cat([text_mask(), torch.ones(2, image_tokens, dtype=torch.long)], 1).bool()


def _allegro_rotary() -> tuple[tuple[tuple[Tensor, Tensor], ...], tuple[Tensor, ...]]:
    """Tables of a third of the head width for each axis, and the position of every patch."""
    grid = torch.cartesian_prod(torch.arange(4), torch.arange(4), torch.arange(4))
    tables = [rotary(4, 16)() for _ in range(3)]
    return tuple(tables), tuple(grid.T[:, None])


VIDEO = (1, 4, 4, 8, 8)  # batch, channels, frames, height, width
VIDEO_INPUTS = {
    "hidden_states": VIDEO,
    "encoder_hidden_states": (1, TEXT_TOKENS, WIDTH),
    "timestep": (1,),
}
WAN: dict[str, Any] = {
    **HEADED,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": WIDTH,
    "freq_dim": 32,
    "ffn_dim": WIDTH,
    "num_layers": 2,
    "rope_max_seq_len": 64,
}
COGVIEW: dict[str, Any] = {
    **HEADED,
    "in_channels": 4,
    "num_layers": 2,
    "out_channels": 4,
    "text_embed_dim": WIDTH,
    "time_embed_dim": 32,
    "condition_dim": 8,
    "pos_embed_max_size": 16,
    "sample_size": 16,
}
COGVIEW_INPUTS = {
    "hidden_states": IMAGE_LATENT,
    **CONDITION,
    "original_size": (2, 2),
    "target_size": (2, 2),
    "crop_coords": (2, 2),
}

TRANSFORMERS: dict[str, DiffusersSpec] = {
    "Transformer2DModel": DiffusersSpec(
        {**HEADED, "in_channels": 32, "cross_attention_dim": WIDTH},
        {"hidden_states": (2, 32, 8, 8), "encoder_hidden_states": TEXT},
        BOTH,
    ),
    "TransformerTemporalModel": DiffusersSpec(
        {**HEADED, "in_channels": 32},
        {"hidden_states": (16, 32, 4, 4), "num_frames": 16},
        BOTH,
    ),
    "DiTTransformer2DModel": DiffusersSpec(
        {**HEADED, "num_layers": 2, "sample_size": 16, "num_embeds_ada_norm": 8},
        {
            "hidden_states": IMAGE_LATENT,
            "timestep": lambda: torch.tensor([1, 5]),
            "class_labels": (2,),
        },
        BOTH,
    ),
    "PixArtTransformer2DModel": DiffusersSpec(
        {
            **HEADED,
            "num_layers": 2,
            "sample_size": 16,
            "cross_attention_dim": WIDTH,
            "caption_channels": WIDTH,
            "use_additional_conditions": False,
        },
        {
            "hidden_states": IMAGE_LATENT,
            **CONDITION,
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            "encoder_attention_mask": (2, TEXT_TOKENS),
        },
        BOTH,
    ),
    "PriorTransformer": DiffusersSpec(
        {**HEADED, "num_layers": 2, "embedding_dim": 32, "num_embeddings": TEXT_TOKENS},
        {
            "hidden_states": (2, 32),
            "timestep": (2,),
            "proj_embedding": (2, 32),
            "encoder_hidden_states": (2, TEXT_TOKENS, 32),
            "attention_mask": (2, TEXT_TOKENS),
        },
        BOTH,
    ),
    "HunyuanDiT2DModel": DiffusersSpec({**HUNYUAN_DIT, "num_layers": 2}, HUNYUAN_DIT_INPUTS),
    "LatteTransformer3DModel": DiffusersSpec(
        {
            **HEADED,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "sample_size": 8,
            "patch_size": 2,
            "cross_attention_dim": WIDTH,
            "caption_channels": WIDTH,
            "norm_type": "ada_norm_single",
            "num_embeds_ada_norm": 1000,
            "norm_elementwise_affine": False,
            "video_length": 16,
            "attention_bias": True,
        },
        {
            "hidden_states": (1, 4, 16, 8, 8),
            "timestep": (1,),
            "encoder_hidden_states": (1, TEXT_TOKENS, WIDTH),
        },
        BOTH,
    ),
    "FluxTransformer2DModel": DiffusersSpec(
        {**FLUX, "pooled_projection_dim": 32}, {**FLUX_INPUTS, "pooled_projections": (2, 32)}
    ),
    "Flux2Transformer2DModel": DiffusersSpec(
        {**FLUX, "axes_dims_rope": (8, 8, 8, 8), "timestep_guidance_channels": 32},
        {
            **FLUX_INPUTS,
            "img_ids": (16, 4),
            "txt_ids": (TEXT_TOKENS, 4),
            "guidance": (2,),
        },
    ),
    "ChromaTransformer2DModel": DiffusersSpec(
        {**FLUX, "approximator_hidden_dim": 32, "approximator_layers": 1},
        {**FLUX_INPUTS, "attention_mask": lambda: _padded_joint_mask(16)},
    ),
    "BriaTransformer2DModel": DiffusersSpec(FLUX, FLUX_INPUTS),
    "LongCatImageTransformer2DModel": DiffusersSpec(
        {**FLUX, "pooled_projection_dim": 32}, FLUX_INPUTS
    ),
    "OvisImageTransformer2DModel": DiffusersSpec({**FLUX, "out_channels": 16}, FLUX_INPUTS),
    "SD3Transformer2DModel": DiffusersSpec(
        {**SD3, "num_layers": 2, "dual_attention_layers": (0,), "qk_norm": "rms_norm"}, SD3_INPUTS
    ),
    "AuraFlowTransformer2DModel": DiffusersSpec(
        {
            **HEADED,
            "sample_size": 16,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "joint_attention_dim": WIDTH,
            "caption_projection_dim": WIDTH,
            "pos_embed_max_size": 64,
        },
        {"hidden_states": IMAGE_LATENT, "encoder_hidden_states": TEXT, "timestep": (2,)},
    ),
    "QwenImageTransformer2DModel": DiffusersSpec(QWEN_IMAGE, QWEN_IMAGE_INPUTS),
    "SanaTransformer2DModel": DiffusersSpec(SANA, SANA_INPUTS),
    "StableAudioDiTModel": DiffusersSpec(
        {
            "sample_size": 24,
            "in_channels": 8,
            "num_layers": 2,
            "attention_head_dim": HEAD_DIM,
            "num_attention_heads": HEADS,
            "num_key_value_attention_heads": 1,
            "out_channels": 8,
            "cross_attention_dim": WIDTH,
            "time_proj_dim": 32,
            "global_states_input_dim": WIDTH,
            "cross_attention_input_dim": WIDTH,
        },
        {
            "hidden_states": (2, 8, 24),
            **CONDITION,
            "global_hidden_states": (2, 1, WIDTH),
            "rotary_embedding": rotary(25, HEAD_DIM // 2),
        },
    ),
    "LuminaNextDiT2DModel": DiffusersSpec(
        {
            "sample_size": 8,
            "hidden_size": WIDTH,
            "num_layers": 2,
            "num_attention_heads": HEADS,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "cross_attention_dim": WIDTH,
        },
        {
            "hidden_states": IMAGE_LATENT,
            **CONDITION,
            "encoder_mask": (2, TEXT_TOKENS),
            "image_rotary_emb": lambda: torch.polar(
                torch.ones(32, 32, 16), torch.randn(32, 32, 16, generator=generator())
            ),
            "cross_attention_kwargs": dict,
        },
    ),
    "Lumina2Transformer2DModel": DiffusersSpec(
        {
            "sample_size": 16,
            "in_channels": 4,
            "hidden_size": WIDTH,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "num_attention_heads": HEADS,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "axes_dim_rope": (8, 12, 12),
            "axes_lens": (64, 64, 64),
            "cap_feat_dim": WIDTH,
        },
        {
            "hidden_states": IMAGE_LATENT,
            **CONDITION,
            "encoder_attention_mask": lambda: text_mask().bool(),
        },
    ),
    "CogView3PlusTransformer2DModel": DiffusersSpec(COGVIEW, COGVIEW_INPUTS),
    "CogView4Transformer2DModel": DiffusersSpec(COGVIEW, COGVIEW_INPUTS),
    "CogVideoXTransformer3DModel": DiffusersSpec(
        {
            **HEADED,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 16,
            "text_embed_dim": WIDTH,
            "num_layers": 2,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 9,
            "max_text_seq_length": TEXT_TOKENS,
            "use_rotary_positional_embeddings": True,
        },
        {
            **VIDEO_INPUTS,
            "hidden_states": (1, 3, 4, 8, 8),
            "image_rotary_emb": rotary(48, HEAD_DIM),
        },
    ),
    "AllegroTransformer3DModel": DiffusersSpec(
        {
            **HEADED,
            "attention_head_dim": 48,
            "num_layers": 2,
            "cross_attention_dim": 96,
            "sample_height": 8,
            "sample_width": 8,
            "sample_frames": 4,
            "caption_channels": WIDTH,
        },
        {
            **VIDEO_INPUTS,
            "attention_mask": lambda: torch.ones(1, 4, 8, 8, dtype=torch.long),
            "encoder_attention_mask": (1, TEXT_TOKENS),
            "image_rotary_emb": _allegro_rotary,
        },
    ),
    "LTXVideoTransformer3DModel": DiffusersSpec(
        {
            **HEADED,
            "in_channels": 8,
            "out_channels": 8,
            "cross_attention_dim": WIDTH,
            "num_layers": 2,
            "caption_channels": WIDTH,
        },
        {
            "hidden_states": (2, 32, 8),
            **CONDITION,
            "encoder_attention_mask": (2, TEXT_TOKENS),
            "num_frames": 2,
            "height": 4,
            "width": 4,
        },
    ),
    "MochiTransformer3DModel": DiffusersSpec(
        {
            **HEADED,
            "num_layers": 2,
            "pooled_projection_dim": 32,
            "in_channels": 4,
            "text_embed_dim": WIDTH,
            "time_embed_dim": 32,
            "max_sequence_length": TEXT_TOKENS,
        },
        {**VIDEO_INPUTS, "encoder_attention_mask": lambda: text_mask()[1:].bool()},
    ),
    "HunyuanVideoTransformer3DModel": DiffusersSpec(
        {
            **HEADED,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": WIDTH,
            "pooled_projection_dim": 32,
            "rope_axes_dim": (8, 12, 12),
        },
        {
            **VIDEO_INPUTS,
            "encoder_attention_mask": (1, TEXT_TOKENS),
            "pooled_projections": (1, 32),
            "guidance": lambda: torch.tensor([6000.0]),
        },
    ),
    "HunyuanImageTransformer2DModel": DiffusersSpec(
        {
            **HEADED,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": WIDTH,
            "rope_axes_dim": (16, 16),
        },
        {
            "hidden_states": (2, 4, 8, 8),
            **CONDITION,
            "encoder_attention_mask": (2, TEXT_TOKENS),
        },
    ),
    "WanTransformer3DModel": DiffusersSpec(WAN, VIDEO_INPUTS),
    "WanVACETransformer3DModel": DiffusersSpec(
        {**WAN, "vace_layers": [0], "vace_in_channels": 6},
        {
            **VIDEO_INPUTS,
            "control_hidden_states": (1, 6, 4, 8, 8),
            "control_hidden_states_scale": lambda: torch.ones(1),
        },
    ),
    "SkyReelsV2Transformer3DModel": DiffusersSpec(
        {**WAN, "image_dim": WIDTH, "added_kv_proj_dim": WIDTH},
        {
            **VIDEO_INPUTS,
            # Keys beyond the last 512 are taken for those of the image.
            "encoder_hidden_states": (1, 512, WIDTH),
            "encoder_hidden_states_image": (1, TEXT_TOKENS, WIDTH),
        },
    ),
    "ChronoEditTransformer3DModel": DiffusersSpec(WAN, VIDEO_INPUTS),
    "CosmosTransformer3DModel": DiffusersSpec(
        {
            **HEADED,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "text_embed_dim": WIDTH,
            "adaln_lora_dim": 8,
            "max_size": (4, 32, 32),
        },
        {**VIDEO_INPUTS, "padding_mask": lambda: torch.zeros(1, 1, 64, 64), "fps": 30},
    ),
    "EasyAnimateTransformer3DModel": DiffusersSpec(
        {
            **HEADED,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 2,
            "sample_width": 8,
            "sample_height": 8,
            "num_layers": 2,
            "mmdit_layers": 1,
            "time_embed_dim": 16,
            "text_embed_dim": WIDTH,
        },
        VIDEO_INPUTS,
    ),
    "OmniGenTransformer2DModel": DiffusersSpec(
        {
            "hidden_size": WIDTH,
            "num_attention_heads": HEADS,
            "num_key_value_heads": 1,
            "intermediate_size": WIDTH,
            "num_layers": 2,
            "pad_token_id": 0,
            "vocab_size": 32,
            "time_step_dim": 32,
            "pos_embed_max_size": 16,
            "rope_scaling": {"long_factor": [1.0] * 16, "short_factor": [1.0] * 16},
        },
        {
            "hidden_states": IMAGE_LATENT,
            "timestep": (2,),
            "input_ids": (2, TEXT_TOKENS),
            "input_img_latents": list,
            "input_image_sizes": dict,
            "attention_mask": lambda: torch.ones(2, 85, 85, dtype=torch.long).tril(),
            "position_ids": lambda: torch.arange(85).expand(2, -1),
        },
    ),
    "PRXTransformer2DModel": DiffusersSpec(
        {
            "in_channels": 4,
            "context_in_dim": WIDTH,
            "hidden_size": WIDTH,
            "num_heads": HEADS,
            "depth": 2,
            "axes_dim": [16, 16],
        },
        {
            "hidden_states": IMAGE_LATENT,
            **CONDITION,
            "attention_mask": lambda: text_mask().bool(),
        },
    ),
    "Kandinsky5Transformer3DModel": DiffusersSpec(
        {
            "in_text_dim": WIDTH,
            "in_text_dim2": 32,
            "time_dim": 32,
            "model_dim": WIDTH,
            "ff_dim": WIDTH,
            "num_text_blocks": 1,
            "num_visual_blocks": 1,
            "axes_dims": (8, 12, 12),
        },
        {
            "hidden_states": (1, 2, 8, 8, 4),
            "encoder_hidden_states": (1, TEXT_TOKENS, WIDTH),
            "timestep": (1,),
            "pooled_projections": (1, 32),
            "visual_rope_pos": lambda: [torch.arange(2), torch.arange(4), torch.arange(4)],
            "text_rope_pos": lambda: torch.arange(TEXT_TOKENS),
        },
    ),
    "HiDreamImageTransformer2DModel": DiffusersSpec(
        {
            **HEADED,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "caption_channels": [WIDTH, WIDTH],
            "text_emb_dim": 32,
            "axes_dims_rope": (8, 12, 12),
            "max_resolution": (16, 16),
            "llama_layers": (0, 0),
            "force_inference_output": True,
        },
        {
            "hidden_states": IMAGE_LATENT,
            "timesteps": (2,),
            "encoder_hidden_states_t5": TEXT,
            "encoder_hidden_states_llama3": (1, 2, TEXT_TOKENS, WIDTH),
            "pooled_embeds": (2, 32),
        },
    ),
    "ZImageTransformer2DModel": DiffusersSpec(
        {
            "in_channels": 4,
            "dim": WIDTH,
            "n_layers": 1,
            "n_refiner_layers": 1,
            "n_heads": HEADS,
            "n_kv_heads": HEADS,
            "cap_feat_dim": WIDTH,
            "axes_dims": [8, 12, 12],
            "axes_lens": [128, 32, 32],
        },
        {
            "x": lambda: list(torch.randn(2, 4, 1, 16, 16, generator=generator())),
            "t": lambda: torch.tensor([0.1, 0.7]),
            "cap_feats": lambda: list(torch.randn(2, 20, WIDTH, generator=generator())),
        },
    ),
}
