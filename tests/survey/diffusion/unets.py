"""UNets of diffusers, and the controlnets beside them and beside transformers."""

from __future__ import annotations

from typing import Any

import torch

from .spec import (
    BOTH,
    CONDITION,
    FLUX,
    FLUX_INPUTS,
    HEAD_DIM,
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
)

UNET: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "cross_attention_dim": WIDTH,
    "attention_head_dim": HEADS,  # the number of heads, by a misnomer that diffusers keeps
}
UNET_INPUTS = {"sample": IMAGE_LATENT, **CONDITION}
MOTION: dict[str, Any] = {
    "down_block_types": ("DownBlockMotion", "CrossAttnDownBlockMotion"),
    "up_block_types": ("CrossAttnUpBlockMotion", "UpBlockMotion"),
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "cross_attention_dim": WIDTH,
    "motion_num_attention_heads": 1,
}

UNETS: dict[str, DiffusersSpec] = {
    "UNet1DModel": DiffusersSpec(
        {"sample_size": 256, "extra_in_channels": 64}, {"sample": (2, 2, 256), "timestep": (2,)}
    ),
    "UNet2DModel": DiffusersSpec(
        {
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "attention_head_dim": HEAD_DIM,
        },
        {"sample": (2, 3, 16, 16), "timestep": (2,)},
        BOTH,
    ),
    "UNet2DConditionModel": DiffusersSpec(
        UNET, {**UNET_INPUTS, "encoder_attention_mask": (2, TEXT_TOKENS)}, BOTH
    ),
    "UNet3DConditionModel": DiffusersSpec(
        {
            "down_block_types": ("DownBlock3D", "CrossAttnDownBlock3D"),
            "up_block_types": ("CrossAttnUpBlock3D", "UpBlock3D"),
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "cross_attention_dim": WIDTH,
            "attention_head_dim": HEAD_DIM,
        },
        {
            "sample": (1, 4, 16, 8, 8),
            "timestep": (1,),
            "encoder_hidden_states": (1, TEXT_TOKENS, WIDTH),
        },
        BOTH,
    ),
    "UNetMotionModel": DiffusersSpec(
        {**MOTION, "num_attention_heads": HEADS},
        {
            "sample": (1, 4, 16, 8, 8),
            "timestep": (1,),
            "encoder_hidden_states": (16, TEXT_TOKENS, WIDTH),  # the pipeline repeats it
        },
        BOTH,
    ),
    "UNetSpatioTemporalConditionModel": DiffusersSpec(
        {
            "down_block_types": ("DownBlockSpatioTemporal", "CrossAttnDownBlockSpatioTemporal"),
            "up_block_types": ("CrossAttnUpBlockSpatioTemporal", "UpBlockSpatioTemporal"),
            "block_out_channels": (32, 64),
            "num_attention_heads": (1, 2),
            "layers_per_block": 1,
            "cross_attention_dim": WIDTH,
            "addition_time_embed_dim": 32,
            "projection_class_embeddings_input_dim": 96,
            "num_frames": 16,
        },
        {
            "sample": (1, 16, 8, 8, 8),
            "timestep": (1,),
            "encoder_hidden_states": (1, TEXT_TOKENS, WIDTH),
            "added_time_ids": (1, 3),
        },
        BOTH,
    ),
    "I2VGenXLUNet": DiffusersSpec(
        {
            "down_block_types": ("DownBlock3D", "CrossAttnDownBlock3D"),
            "up_block_types": ("CrossAttnUpBlock3D", "UpBlock3D"),
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "cross_attention_dim": WIDTH,
            "attention_head_dim": HEAD_DIM,
        },
        {
            "sample": (1, 4, 16, 8, 8),
            "timestep": (1,),
            "fps": lambda: torch.tensor([7]),
            "image_latents": (1, 4, 16, 8, 8),
            "image_embeddings": (1, WIDTH),
            "encoder_hidden_states": (1, TEXT_TOKENS, WIDTH),
        },
        BOTH,
    ),
    "Kandinsky3UNet": DiffusersSpec(
        {
            "block_out_channels": (32, 32, 32, 64),
            "groups": 16,
            "layers_per_block": 2,
            "attention_head_dim": HEAD_DIM,
            "time_embedding_dim": 64,
            "cross_attention_dim": WIDTH,
            "encoder_hid_dim": WIDTH,
        },
        {"sample": (2, 4, 32, 32), **CONDITION, "encoder_attention_mask": (2, TEXT_TOKENS)},
        BOTH,
    ),
    "StableCascadeUNet": DiffusersSpec(
        {
            "block_out_channels": (WIDTH, WIDTH),
            "num_attention_heads": (HEADS, HEADS),
            "down_num_layers_per_block": (1, 1),
            "up_num_layers_per_block": (1, 1),
            "conditioning_dim": WIDTH,
            "clip_text_in_channels": WIDTH,
            "clip_text_pooled_in_channels": WIDTH,
            "clip_image_in_channels": WIDTH,
        },
        {
            "sample": (2, 16, 16, 16),
            "timestep_ratio": (2,),
            "clip_text_pooled": (2, 1, WIDTH),
            "clip_text": TEXT,
            "clip_img": (2, 1, WIDTH),
        },
    ),
    "UVit2DModel": DiffusersSpec(
        {
            "hidden_size": WIDTH,
            "cond_embed_dim": WIDTH,
            "micro_cond_encode_dim": 16,
            "micro_cond_embed_dim": 80,
            "encoder_hidden_size": WIDTH,
            "vocab_size": 40,
            "codebook_size": 32,
            "in_channels": WIDTH,
            "block_out_channels": WIDTH,
            "num_res_blocks": 1,
            "block_num_heads": HEADS,
            "num_hidden_layers": 2,
            "num_attention_heads": HEADS,
            "intermediate_size": WIDTH,
            "sample_size": 8,
        },
        {
            "input_ids": (2, 8, 8),
            "encoder_hidden_states": TEXT,
            "pooled_text_emb": (2, WIDTH),
            "micro_conds": (2, 5),
        },
        BOTH,
    ),
    "DreamLiteUNetModel": DiffusersSpec(
        {
            "block_out_channels": (32, 64, 64),
            "layers_per_block": 1,
            "cross_attention_dim": WIDTH,
            "attention_head_dim": HEADS,
        },
        UNET_INPUTS,
    ),
}

CONTROLNETS: dict[str, DiffusersSpec] = {
    "ControlNetModel": DiffusersSpec(
        {
            **{key: value for key, value in UNET.items() if key != "up_block_types"},
            "conditioning_embedding_out_channels": (16, 16),
        },
        {**UNET_INPUTS, "controlnet_cond": (2, 3, 32, 32)},
        BOTH,
    ),
    "ControlNetUnionModel": DiffusersSpec(
        {
            **{key: value for key, value in UNET.items() if key != "up_block_types"},
            "conditioning_embedding_out_channels": (16, 16),
            "num_trans_channel": 32,
            "num_trans_head": 1,
            "num_proj_channel": 32,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
        },
        {
            **UNET_INPUTS,
            "controlnet_cond": lambda: [torch.ones(2, 3, 32, 32)],
            "control_type": lambda: torch.eye(6)[:1].expand(2, 6),
            "control_type_idx": lambda: [0],
            "added_cond_kwargs": lambda: {
                "text_embeds": torch.ones(2, WIDTH),
                "time_ids": torch.ones(2, 6),
            },
        },
    ),
    "SparseControlNetModel": DiffusersSpec(
        {
            **{key: value for key, value in MOTION.items() if key != "up_block_types"},
            "attention_head_dim": HEADS,
        },
        {
            "sample": (1, 4, 16, 8, 8),
            "timestep": (1,),
            "encoder_hidden_states": (16, TEXT_TOKENS, WIDTH),
            "controlnet_cond": (1, 4, 16, 8, 8),
            "conditioning_mask": lambda: torch.ones(1, 1, 16, 8, 8),
        },
    ),
    "UNetControlNetXSModel": DiffusersSpec(
        {
            **{key: value for key, value in UNET.items() if key in ("cross_attention_dim",)},
            "sample_size": 16,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (32, 64),
            "num_attention_heads": HEADS,
            "ctrl_conditioning_embedding_out_channels": (16, 16),
            "ctrl_block_out_channels": (16, 32),
            "ctrl_num_attention_heads": 1,
            "ctrl_max_norm_num_groups": 16,
        },
        {**UNET_INPUTS, "controlnet_cond": (2, 3, 32, 32)},
        BOTH,
    ),
    "FluxControlNetModel": DiffusersSpec(
        {**FLUX, "pooled_projection_dim": 32},
        {**FLUX_INPUTS, "controlnet_cond": (2, 16, 16), "pooled_projections": (2, 32)},
    ),
    "SD3ControlNetModel": DiffusersSpec(SD3, {**SD3_INPUTS, "controlnet_cond": IMAGE_LATENT}),
    "HunyuanDiT2DControlNetModel": DiffusersSpec(
        {**HUNYUAN_DIT, "transformer_num_layers": 4},
        {**HUNYUAN_DIT_INPUTS, "controlnet_cond": IMAGE_LATENT},
    ),
    "QwenImageControlNetModel": DiffusersSpec(
        QWEN_IMAGE, {**QWEN_IMAGE_INPUTS, "controlnet_cond": (2, 16, 16)}
    ),
    "SanaControlNetModel": DiffusersSpec(SANA, {**SANA_INPUTS, "controlnet_cond": IMAGE_LATENT}),
}
