"""Models of timm: small images, few blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# name -> arguments of create_model; "size" is the side of the input where the model takes any.
TIMM: dict[str, dict[str, Any]] = {
    "beit_base_patch16_224": {
        "img_size": 96,
        "depth": 2,
        "embed_dim": 128,
        "num_heads": 4,
        "init_values": 0.1,
    },
    "botnet26t_256": {"img_size": 128},
    "caformer_s18": {"size": 160},
    "cait_xxs24_224": {"img_size": 96, "depth": 3},
    "coat_lite_tiny": {"img_size": 96},
    "coatnet_nano_rw_224": {"img_size": 128},
    "convit_tiny": {"img_size": 96, "depth": 4, "local_up_to_layer": 2},
    "convnext_atto": {"size": 64},
    "cpubone_nano": {"size": 224},
    "crossvit_tiny_240": {},
    "csatv2": {"size": 512},
    "davit_tiny": {"size": 128, "depths": (1, 1, 1, 1)},
    "deepseek_vit_412m": {"img_size": 112, "depth": 2},
    "deit_tiny_distilled_patch16_224": {"img_size": 96, "depth": 3},
    "edgenext_xx_small": {"size": 128},
    "efficientformer_l1": {"size": 224},
    "efficientformerv2_s0": {"img_size": 224},
    "efficientvim_m1": {"size": 128},
    "efficientvit_b0": {"size": 128},
    "efficientvit_m0": {"size": 224},
    "eva02_tiny_patch14_224": {"img_size": 84, "depth": 2},
    "fasternet_t0": {"size": 64},
    "fastvit_sa12": {"size": 256},
    "focalnet_tiny_srf": {"size": 64},
    "gcresnext26ts": {"size": 64},
    "gcvit_xxtiny": {"img_size": 224},
    "gemma4_vit_167m": {"size": 192, "depth": 2},
    "gmlp_ti16_224": {"img_size": 96},
    "halonet26t": {"size": 256},
    "hiera_tiny_224": {"img_size": 96},
    "iformer_t": {"size": 224},
    "inception_next_atto": {"size": 96},
    "lambda_resnet26rpt_256": {"img_size": 128},
    "levit_128s": {},
    "lowformer_b0": {"size": 224},
    "mambaout_femto": {"size": 64},
    "maxvit_pico_rw_256": {"img_size": 128},
    "mobilenetv4_hybrid_medium": {"size": 128},
    "mobilenetv5_base": {"size": 128},
    "mobilevit_xxs": {"size": 128},
    "mobilevitv2_050": {"size": 128},
    "mvitv2_tiny": {"img_size": 96},
    "naflexvit_base_patch16_gap": {"size": 96, "depth": 2, "embed_dim": 128, "num_heads": 4},
    "nest_tiny_jx": {"img_size": 112},
    "nextvit_small": {"size": 160},
    "pit_ti_224": {"img_size": 112},
    "poolformer_s12": {"size": 64},
    "pvt_v2_b0": {"size": 128},
    "qwen3_vit_88m": {"size": 192, "depth": 2},
    "rdnet_tiny": {"size": 64},
    "regnety_002": {"size": 64},
    "repvit_m1": {"size": 64},
    "resnest14d": {"size": 64},
    "resnet50_clip": {"img_size": 128},
    "resnetv2_18": {"size": 64},
    "sam2_hiera_tiny": {"size": 128},
    "samvit_base_patch16_224": {
        "img_size": 96,
        "depth": 3,
        "embed_dim": 128,
        "num_heads": 4,
        "global_attn_indexes": (2,),
    },
    "shvit_s1": {"size": 224},
    "skresnet18": {"size": 64},
    "starnet_s050": {"size": 64},
    "swiftformer_xs": {"size": 128},
    "swin_tiny_patch4_window7_224": {"img_size": 112, "window_size": 7, "depths": (2, 2, 2, 2)},
    "swinv2_cr_tiny_224": {"img_size": 128, "depths": (2, 2, 2, 2)},
    "swinv2_tiny_window8_256": {"img_size": 128, "depths": (2, 1, 1, 1)},
    "test_coatnet": {"size": 160},
    "tiny_vit_5m_224": {"size": 224},
    "tnt_s_patch16_224": {"img_size": 96, "depth": 2},
    "twins_pcpvt_small": {"size": 128, "depths": (1, 1, 2, 1)},
    "twins_svt_small": {"size": 128, "depths": (2, 2, 2, 2)},
    "visformer_tiny": {"img_size": 128},
    "vit_base_resnet26d_224": {"img_size": 192, "depth": 2},
    "vit_pe_core_tiny_patch16_384": {"img_size": 96, "depth": 2},
    "vit_relpos_small_patch16_224": {"img_size": 96, "depth": 2},
    "vit_small_patch16_rope_mixed_224": {"img_size": 96, "depth": 2},
    "vit_tiny_patch16_224": {"img_size": 96, "depth": 3},
    "vitamin_small_224": {"img_size": 96},
    "volo_d1_224": {"img_size": 128},
    "xcit_nano_12_p16_224": {"size": 96, "depth": 3},
}

# No block of these asks timm whether fused attention is on (or they have no attention at all).
SAME_WHEN_FUSED = frozenset(
    """botnet26t_256 coat_lite_tiny convit_tiny convnext_atto edgenext_xx_small efficientformer_l1
    efficientformerv2_s0 efficientvim_m1 efficientvit_b0 efficientvit_m0 fasternet_t0
    focalnet_tiny_srf gcresnext26ts gcvit_xxtiny gmlp_ti16_224 halonet26t inception_next_atto
    lambda_resnet26rpt_256 levit_128s mambaout_femto mobilevitv2_050 mvitv2_tiny poolformer_s12
    rdnet_tiny regnety_002 repvit_m1 resnest14d resnetv2_18 shvit_s1 skresnet18 starnet_s050
    swiftformer_xs swinv2_cr_tiny_224 swinv2_tiny_window8_256
    tnt_s_patch16_224 visformer_tiny""".split()
)


def build_timm(name: str, variant: str) -> tuple[nn.Module, dict[str, Any]]:
    """The model, and its image under "0"."""
    import timm

    arguments = dict(TIMM[name])
    size = arguments.pop("size", arguments.get("img_size"))
    torch.manual_seed(0)
    previous = timm.layers.use_fused_attn()
    timm.layers.set_fused_attn(variant == "fused")
    try:
        model = timm.create_model(name, pretrained=False, **arguments)
    finally:
        timm.layers.set_fused_attn(bool(previous))
    side: int = size or model.pretrained_cfg["input_size"][-1]
    return model, {"0": torch.randn(2, 3, side, side)}
