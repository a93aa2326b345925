"""Autoencoders of diffusers."""

from __future__ import annotations

from typing import Any

from .spec import (
    BOTH,
    DiffusersSpec,
)

IMAGE_VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (32, 64),
}
VIDEO_SAMPLE = (1, 3, 5, 32, 32)


AUTOENCODERS: dict[str, DiffusersSpec] = {
    "AutoencoderKL": DiffusersSpec(IMAGE_VAE, {"sample": (2, 3, 32, 32)}, BOTH),
    "AsymmetricAutoencoderKL": DiffusersSpec(
        {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "down_block_out_channels": (32, 64),
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "up_block_out_channels": (32, 64),
        },
        {"sample": (2, 3, 32, 32)},
        BOTH,
    ),
    "AutoencoderKLTemporalDecoder": DiffusersSpec(
        {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "block_out_channels": (32, 64),
            "layers_per_block": 2,
        },
        {"sample": (4, 3, 32, 32), "num_frames": 4},
        BOTH,
    ),
    "AutoencoderKLFlux2": DiffusersSpec(IMAGE_VAE, {"sample": (2, 3, 32, 32)}),
    "VQModel": DiffusersSpec(
        {**IMAGE_VAE, "num_vq_embeddings": 32}, {"sample": (2, 3, 32, 32)}, BOTH
    ),
    "AutoencoderTiny": DiffusersSpec({}, {"sample": (1, 3, 32, 32)}),
    "AutoencoderDC": DiffusersSpec(
        {
            "latent_channels": 4,
            "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
            "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
            "encoder_block_out_channels": (32, 64),
            "decoder_block_out_channels": (32, 64),
            "encoder_layers_per_block": (1, 1),
            "decoder_layers_per_block": (1, 1),
            "encoder_qkv_multiscales": ((), (5,)),
            "decoder_qkv_multiscales": ((), (5,)),
        },
        {"sample": (2, 3, 32, 32)},
    ),
    "AutoencoderKLCogVideoX": DiffusersSpec(
        {
            "down_block_types": ("CogVideoXDownBlock3D",) * 2,
            "up_block_types": ("CogVideoXUpBlock3D",) * 2,
            "block_out_channels": (32, 32),
            "layers_per_block": 1,
            "temporal_compression_ratio": 2,
            "latent_channels": 4,
        },
        {"sample": (1, 3, 3, 16, 16)},
    ),
    "AutoencoderKLWan": DiffusersSpec(
        {
            "base_dim": 32,
            "z_dim": 4,
            "dim_mult": [1, 2],
            "num_res_blocks": 1,
            "temperal_downsample": [True],
        },
        {"sample": VIDEO_SAMPLE},
    ),
    "AutoencoderKLQwenImage": DiffusersSpec(
        {
            "base_dim": 32,
            "z_dim": 4,
            "dim_mult": [1, 2],
            "num_res_blocks": 1,
            "temperal_downsample": [False],
        },
        {"sample": (1, 3, 1, 32, 32)},
    ),
    "AutoencoderKLHunyuanVideo": DiffusersSpec(
        {
            "block_out_channels": (32, 32, 32, 64),
            "layers_per_block": 1,
            "latent_channels": 4,
        },
        {"sample": VIDEO_SAMPLE},
        BOTH,
    ),
    "AutoencoderKLHunyuanImage": DiffusersSpec(
        {
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 32,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "spatial_compression_ratio": 2,
            "sample_size": 32,
        },
        {"sample": (2, 3, 32, 32)},
    ),
    "AutoencoderKLHunyuanVideo15": DiffusersSpec(
        {
            "latent_channels": 32,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "spatial_compression_ratio": 2,
            "temporal_compression_ratio": 2,
        },
        {"sample": (1, 3, 3, 16, 16)},
    ),
    "AutoencoderKLMochi": DiffusersSpec(
        {
            "encoder_block_out_channels": (32, 32, 64, 64),
            "decoder_block_out_channels": (32, 32, 64, 64),
            "layers_per_block": (1, 1, 1, 1, 1),
            "latent_channels": 4,
            "in_channels": 15,
        },
        {"sample": (1, 3, 19, 16, 16)},
    ),
    "AutoencoderKLCosmos": DiffusersSpec(
        {
            "encoder_block_out_channels": (32, 64),
            "decode_block_out_channels": (32, 64),
            "attention_resolutions": (8,),
            "resolution": 32,
            "num_layers": 1,
            "latent_channels": 4,
            # Not "haar": FX writes its ``(-1) ** x`` as ``-1 ** x``, so the code of its graph
            # computes another thing than the model, with any backend that runs it.
            "patch_type": "rearrange",
            "spatial_compression_ratio": 4,
            "temporal_compression_ratio": 4,
        },
        {"sample": (1, 3, 9, 32, 32)},
    ),
}
