"""Models of transformers: their default config, every size shrunk by one table (``SHRUNK``)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

HEAD_DIM, HEADS, LAYERS, VOCABULARY, TOKENS, TARGET_TOKENS = 32, 2, 2, 128, 24, 20
HIDDEN = HEAD_DIM * HEADS
IMAGE, PATCH = 64, 16  # 16 patches: the fewest queries that may still be approximated


@dataclass(frozen=True)
class HfSpec:
    """How a model type departs from the generic shrinking and the generic inputs.

    ``config`` overrides shrunk values, "a.b" reaching into a sub-config. ``inputs`` replaces the
    generic inputs, ``extra`` adds to them: a shape becomes normal noise (or tokens, or a padded
    mask, by its name).
    """

    variants: tuple[str, ...] = ("eager",)
    config: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    extra: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def _spellings(value: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


# Config keys that mean a size, and the size they get. Anything else keeps its default.
SHRUNK: dict[str, Any] = {
    **_spellings(
        HIDDEN,
        """hidden_size d_model n_embd embed_dim embedding_size emb_dim hidden_dim n_embed
        embedding_dim model_dim projection_dim output_dim d_embed word_embed_proj_dim d_latents dim
        out_hidden_size encoder_hidden_size decoder_hidden_size qformer_hidden_size
        intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff n_inner
        moe_intermediate_size shared_expert_intermediate_size dim_feedforward ffn_hidden_size
        intermediate_dim d_inner decoder_intermediate_size mlp_dim shared_intermediate_size""",
    ),
    **_spellings(
        HEADS,
        """num_attention_heads num_heads n_head n_heads encoder_attention_heads
        decoder_attention_heads attention_heads num_encoder_attention_heads
        num_decoder_attention_heads decoder_num_attention_heads num_self_attention_heads
        num_cross_attention_heads num_experts_per_tok moe_topk""",
    ),
    **_spellings(
        LAYERS,
        """num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers depth
        num_encoder_layers num_decoder_layers num_blocks decoder_num_hidden_layers
        decoder_num_layers""",
    ),
    **_spellings(
        HEAD_DIM,
        """head_dim d_kv attention_head_size global_head_dim d_head kv_channels v_head_dim
        qk_nope_head_dim kv_lora_rank q_lora_rank""",
    ),
    **_spellings(
        256,
        """max_position_embeddings n_positions max_source_positions max_target_positions
        max_seq_len n_ctx max_length seq_length max_sequence_length""",
    ),
    **_spellings(IMAGE, "image_size img_size input_size"),
    **_spellings(4, "num_experts n_routed_experts num_local_experts"),
    **_spellings(1, "n_group topk_group"),
    **_spellings(20, "num_queries num_query_tokens"),
    **_spellings(16, "num_codevectors_per_group num_mel_bins"),
}
KEY_HEADS = frozenset(
    "num_key_value_heads num_kv_heads multi_query_group_num num_global_key_value_heads".split()
)
# Bookkeeping of the serialised config, and stage names that belong to the original depth.
DROPPED = frozenset(
    """transformers_version architectures _name_or_path dtype id2label label2id problem_type
    return_dict output_hidden_states output_attentions stage_names out_features out_indices
    _out_features _out_indices per_layer_config""".split()
)
PLACEHOLDER_TOKENS = {"image": 120, "video": 121, "audio": 122}


def shrink(values: Mapping[str, Any]) -> dict[str, Any]:
    """A serialised config with every size made tiny; grouped key heads stay grouped (2 to 1)."""
    small: dict[str, Any] = {}
    heads = next((values[k] for k in ("num_attention_heads", "n_head") if values.get(k)), None)
    for key, value in values.items():
        whole = isinstance(value, int) and not isinstance(value, bool)
        if key in DROPPED or (key in ("rope_parameters", "rope_scaling") and not value):
            continue
        if isinstance(value, dict) and "model_type" in value:
            small[key] = shrink(value)
        elif key in KEY_HEADS and value is not None:
            small[key] = HEADS if value == heads else 1
        elif key in SHRUNK and whole:
            small[key] = SHRUNK[key]
        elif key in ("image_size", "img_size", "input_size") and isinstance(value, (list, tuple)):
            small[key] = [IMAGE] * len(value)
        elif key == "patch_size" and whole and value > 8:
            small[key] = PATCH
        elif key.endswith("vocab_size") and whole:
            small[key] = VOCABULARY
        elif key.endswith(("_token_id", "_token_index")) and whole and value >= VOCABULARY:
            small[key] = PLACEHOLDER_TOKENS.get(key.split("_")[0], VOCABULARY - 3)
        elif key.endswith("_token_id") and isinstance(value, list):
            small[key] = [min(token, VOCABULARY - 3) for token in value]
        elif key in ("layer_types", "mlp_layer_types", "layers_block_type") and value:
            small[key] = (list(dict.fromkeys(value)) * LAYERS)[:LAYERS]
        else:
            small[key] = value
    return small


def build_hf(name: str, variant: str) -> tuple[nn.Module, dict[str, Any]]:
    """The model, and its inputs by keyword."""
    import transformers
    from transformers import CONFIG_MAPPING, MODEL_MAPPING

    transformers.logging.set_verbosity_error()
    spec = HF[name]
    config_class = CONFIG_MAPPING[name]
    model_class: Any = MODEL_MAPPING[config_class]
    if isinstance(model_class, (list, tuple)):
        model_class = model_class[0]
    values = shrink(config_class().to_dict())
    values.pop("model_type", None)
    for path, value in spec.config.items():
        *parents, key = path.split(".")
        target = values
        for parent in parents:
            target = target.setdefault(parent, {})
        target[key] = value
    torch.manual_seed(0)
    implementation = {"flex": "flex_attention", "sdpa": "sdpa"}.get(variant, "eager")
    model = model_class._from_config(config_class(**values), attn_implementation=implementation)
    inputs = _hf_inputs(model, spec)
    if variant == "attentions":
        inputs["output_attentions"] = True
    return model, inputs


def _hf_inputs(model: Any, spec: HfSpec) -> dict[str, Any]:
    signature = inspect.signature(model.forward).parameters
    values = model.config.to_dict()
    if spec.inputs:
        wanted: dict[str, tuple[int, ...]] = dict(spec.inputs)
    else:
        required = [
            name
            for name, parameter in signature.items()
            if parameter.default is inspect.Parameter.empty
            and parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        ]
        main = required or [next(iter(signature))]
        wanted = {name: _generic_shape(name, values) for name in main}
        wanted.update(spec.extra)
        if "input_ids" in wanted and "attention_mask" in signature:
            wanted.setdefault("attention_mask", wanted["input_ids"])
        if "decoder_input_ids" in signature:
            wanted.setdefault("decoder_input_ids", (2, TARGET_TOKENS))
    generator = torch.Generator().manual_seed(1)
    return {name: _draw(name, shape, generator) for name, shape in wanted.items()}


def _generic_shape(name: str, values: Mapping[str, Any]) -> tuple[int, ...]:
    if name.endswith("input_ids"):
        return (2, TOKENS)
    if name == "pixel_values":
        side = _find(values, "image_size") or IMAGE
        height, width = side if isinstance(side, (list, tuple)) else (side, side)
        return (2, _find(values, "num_channels") or 3, height, width)
    if name == "pixel_values_videos":
        return (2, 4, 3, IMAGE, IMAGE)
    if name == "input_features":
        return (2, _find(values, "num_mel_bins") or 80, 2 * 256)
    if name == "input_values":
        return (2, 8000)
    if name in ("inputs_embeds", "hidden_states"):
        return (2, TOKENS, HIDDEN)
    raise ValueError(f"{name}: no generic shape; give it in HfSpec.inputs")


def _find(values: Mapping[str, Any], key: str) -> Any:
    """The first value of ``key`` in a nested config."""
    if values.get(key) is not None:
        return values[key]
    nested = (_find(value, key) for value in values.values() if isinstance(value, dict))
    return next((value for value in nested if value is not None), None)


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if name.endswith("input_ids"):
        return torch.randint(3, 100, shape, generator=generator)
    if name == "bbox":
        return torch.randint(0, 50, shape, generator=generator).sort(-1).values
    if name.endswith("attention_mask"):
        # Padding on the right: no row of a causal mask is then masked as a whole, where spellings
        # of attention differ by design.
        mask = torch.ones(shape, dtype=torch.long)
        mask[1, -7:] = 0
        return mask
    return torch.randn(shape, generator=generator)


BOTH = ("eager", "sdpa")
IMAGES = (2, 3, IMAGE, IMAGE)
BIG_IMAGES = (2, 3, 2 * IMAGE, 2 * IMAGE)
TEXT = {"input_ids": (2, TOKENS), "attention_mask": (2, TOKENS)}
SERIES = {
    "past_values": (2, 26),
    "past_time_features": (2, 26, 1),
    "past_observed_mask": (2, 26),
    "future_values": (2, 16),
    "future_time_features": (2, 16, 1),
}
SERIES_CONFIG = {
    "prediction_length": 16,
    "context_length": 24,
    "lags_sequence": [1, 2],
    "num_time_features": 1,
    "input_size": 1,
    "feature_size": 5,
}
SWIN = {"embed_dim": 64, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
DISENTANGLED = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}


def _specs(names: str, variants: tuple[str, ...]) -> dict[str, HfSpec]:
    return {name: HfSpec(variants) for name in names.split()}


# What is not here, and why. Needs a package we do not install: dinat (natten), layoutlmv2
# (detectron2), higgs_audio_v2_tokenizer (torchaudio). Fails in its own eager forward at tiny sizes:
# mask2former (mask resizing), udop (integer position bias), d_fine and rt_detr (fixed backbone
# stages), bros, siglip (towers of different width), zamba and zamba2. Needs more than a config to
# start (cache, session, grids): blt, chameleon, emu3, the qwen-vl vision towers, sam3_tracker. The
# rest repeat the attention of a type below word for word, or run text only without their images.

# Types that need nothing but the generic shrinking: first those with an SDPA path, then without.
HF: dict[str, HfSpec] = {
    **_specs(
        """afmoe aimv2_vision_model albert apertus aria_text bart beit biogpt bitnet blenderbot
        camembert cohere cohere2 cohere2_moe ctrl data2vec-audio data2vec-vision deepseek_v32
        deformable_detr deit diffllama dinov2 dinov3_vit distilbert doge electra ernie4_5_moe esmc
        eurobert exaone4 falcon flex_olmo gemma gemma3_text glm glm4 glm4_moe_lite glm_moe_dsa
        gpt_bigcode gpt_neox granite granitemoe gte helium hubert idefics3_vision ijepa
        inkling_text internvl_vision jetmoe jina_embeddings_v3 layoutlm lfm2 llama4_text m2m_100
        marian mbart minicpm3 minimax ministral3 mistral mixtral mobilebert modernbert
        modernbert-decoder moshi mt5 nanochat nomic_bert olmo olmo2 olmoe opt pegasus persimmon phi
        phi3 phimoe pixtral qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next radio roberta
        roberta-prelayernorm sam3_vit_model sam_vision_model sam_hq_vision_model seed_oss
        siglip_vision_model smollm3 stablelm starcoder2 t5 t5gemma2 umt5 unispeech vit vit_msn
        whisper xlm-roberta-xl yolos""",
        BOTH,
    ),
    **_specs(
        """bloom convbert cpmant deepseek_v4 falcon_mamba fastspeech2_conformer
        flaubert fnet fsmt funnel gemma2 gpt_neox_japanese gpt_oss ibert imagegpt luke markuplm
        megatron-bert mgp-str mimo_v2_flash mobilevitv2 mpnet mpt mra mvp nllb-moe nystromformer
        openai-gpt prophetnet rembert roformer splinter squeezebert swiftformer switch_transformers
        t5gemma tapas vaultgemma visual_bert vitdet xglm xlm xlnet yoso""",
        ("eager",),
    ),
    # Spelled in more ways than one.
    "bert": HfSpec((*BOTH, "attentions")),
    "gpt2": HfSpec((*BOTH, "attentions")),
    "llama": HfSpec((*BOTH, "flex")),
    # Sizes that hang together in a way the table cannot know.
    "audio-spectrogram-transformer": HfSpec(
        BOTH, {"max_length": 256}, {"input_values": (2, 256, 16)}
    ),
    "autoformer": HfSpec(config=SERIES_CONFIG, inputs=SERIES),
    "bamba": HfSpec(BOTH, {"mamba_n_heads": 4, "mamba_d_head": 32, "attn_layer_indices": [1]}),
    "big_bird": HfSpec(
        config={"attention_type": "block_sparse", "block_size": 2, "num_random_blocks": 1}
    ),
    "bigbird_pegasus": HfSpec(
        config={"attention_type": "block_sparse", "block_size": 2, "num_random_blocks": 1}
    ),
    "canine": HfSpec(inputs={"input_ids": (2, 96), "attention_mask": (2, 96)}),
    "clap": HfSpec(
        config={
            "audio_config.num_mel_bins": 64,
            "audio_config.depths": [1, 1],
            "audio_config.num_attention_heads": [2, 4],
            "audio_config.spec_size": 64,
            "audio_config.patch_embeds_hidden_size": 64,
            "audio_config.window_size": 4,
            "audio_config.hidden_size": 128,
        },
        inputs={**TEXT, "input_features": (2, 1, 64, 64)},
    ),
    "codegen": HfSpec(config={"n_head": 4, "n_embd": 128, "rotary_dim": 16}),
    "conditional_detr": HfSpec(BOTH, inputs={"pixel_values": BIG_IMAGES}),
    "cvt": HfSpec(),
    "dab-detr": HfSpec(inputs={"pixel_values": BIG_IMAGES}),
    "deberta": HfSpec(config=DISENTANGLED),
    "deberta-v2": HfSpec(config=DISENTANGLED),
    "deepseek_v2": HfSpec(BOTH, {"num_experts_per_tok": 2}),
    "deepseek_v3": HfSpec(BOTH, {"qk_rope_head_dim": 16, "head_dim": 16}),
    "detr": HfSpec(BOTH, inputs={"pixel_values": BIG_IMAGES}),
    "donut-swin": HfSpec(config={"embed_dim": 96, "depths": [1, 1], "num_heads": [3, 6]}),
    "dpt": HfSpec(BOTH),
    "esm": HfSpec(BOTH, {"vocab_size": VOCABULARY, "pad_token_id": 1, "mask_token_id": 4}),
    "gemma3n_text": HfSpec(
        BOTH,
        {
            "intermediate_size": HIDDEN,
            "activation_sparsity_pattern": [0.95, 0.0],
            "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 16,
            "laurel_rank": 8,
        },
    ),
    "gemma4_text": HfSpec(
        BOTH, {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 16}
    ),
    "glpn": HfSpec(inputs={"pixel_values": BIG_IMAGES}),
    "gpt_neo": HfSpec(
        config={
            "attention_types": [[["global", "local"], 1]],
            "attention_layers": ["global", "local"],
        }
    ),
    "gptj": HfSpec(config={"rotary_dim": 16}),
    "granitemoehybrid": HfSpec(
        BOTH, {"mamba_n_heads": 4, "mamba_d_head": 32, "layer_types": ["mamba", "attention"]}
    ),
    "grounding-dino": HfSpec(
        config={
            "backbone_config.embed_dim": 32,
            "backbone_config.depths": [1, 1, 1],
            "backbone_config.num_heads": [1, 2, 4],
            "backbone_config.out_features": ["stage1", "stage2", "stage3"],
        },
        inputs={**TEXT, "pixel_values": IMAGES},
    ),
    "groupvit": HfSpec(config={"vision_config.depths": [1, 1, 1]}, extra={"pixel_values": IMAGES}),
    "hiera": HfSpec(config={"depths": [1, 1, 1, 1]}),
    "hunyuan_v1_dense": HfSpec(BOTH, {"head_dim": HEAD_DIM}),
    "informer": HfSpec(config=SERIES_CONFIG, inputs=SERIES),
    "jamba": HfSpec(
        BOTH, {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}
    ),
    "layoutlmv3": HfSpec(
        config={"coordinate_size": 8, "shape_size": 16}, inputs={**TEXT, "bbox": (2, TOKENS, 4)}
    ),
    "led": HfSpec(config={"attention_window": [16, 16]}),
    "levit": HfSpec(config={"image_size": 2 * IMAGE, "depths": [1, 1, 1]}),
    "lilt": HfSpec(
        config={"channel_shrink_ratio": 2, "hidden_size": 96},
        inputs={**TEXT, "bbox": (2, TOKENS, 4)},
    ),
    "longformer": HfSpec(config={"attention_window": [16, 16]}),
    "longt5": HfSpec(
        config={
            "encoder_attention_type": "transient-global",
            "local_radius": 7,
            "global_block_size": 8,
        }
    ),
    "lxmert": HfSpec(
        config={"visual_feat_dim": 32, "l_layers": 2, "x_layers": 2, "r_layers": 2},
        inputs={**TEXT, "visual_feats": (2, 20, 32), "visual_pos": (2, 20, 4)},
    ),
    "maskformer": HfSpec(
        config={
            "backbone_config.embed_dim": 32,
            "backbone_config.depths": [1, 1, 1, 1],
            "backbone_config.num_heads": [1, 2, 4, 8],
            "backbone_config.window_size": 4,
        },
        inputs={"pixel_values": BIG_IMAGES},
    ),
    "mobilevit": HfSpec(config={"image_size": 2 * IMAGE}),
    "moonshine": HfSpec(
        BOTH,
        {
            "encoder_num_attention_heads": HEADS,
            "decoder_num_attention_heads": HEADS,
            "encoder_num_key_value_heads": HEADS,
            "decoder_num_key_value_heads": HEADS,
        },
    ),
    "nemotron": HfSpec(BOTH, {"head_dim": HEAD_DIM, "num_key_value_heads": HEADS}),
    "patchtst": HfSpec(
        BOTH,
        {"context_length": 256, "patch_length": 8, "patch_stride": 8, "num_input_channels": 2},
        {"past_values": (2, 256, 2)},
    ),
    "pegasus_x": HfSpec(config={"block_size": 16, "num_global_tokens": 16}),
    "perceiver": HfSpec(
        config={
            "num_latents": 32,
            "num_self_attends_per_block": 2,
            "num_blocks": 1,
            "d_model": HIDDEN,
        },
        inputs={"inputs": (2, 40, HIDDEN)},
    ),
    "pvt": HfSpec(config={"image_size": 2 * IMAGE}),
    "pvt_v2": HfSpec(config={"image_size": 2 * IMAGE}),
    "qwen2_5_vl_text": HfSpec(BOTH, {"rope_parameters": MROPE}),
    "recurrent_gemma": HfSpec(
        BOTH, {"num_hidden_layers": 3, "block_types": ["recurrent", "recurrent", "attention"]}
    ),
    "reformer": HfSpec(
        config={
            "axial_pos_embds": False,
            "attn_layers": ["local", "lsh"],
            "num_buckets": 4,
            "feed_forward_size": HIDDEN,
            "local_attn_chunk_length": 8,
            "lsh_attn_chunk_length": 8,
        }
    ),
    "sam2_hiera_det_model": HfSpec(BOTH, {"hidden_size": 96, "num_attention_heads": 1}),
    "sam2_vision_model": HfSpec(
        BOTH,
        {
            "backbone_config.hidden_size": 96,
            "backbone_config.num_attention_heads": 1,
            "backbone_channel_list": [768, 384, 192, 96],
        },
    ),
    "segformer": HfSpec(BOTH, inputs={"pixel_values": BIG_IMAGES}),
    "seggpt": HfSpec(
        config={"image_size": [2 * IMAGE, IMAGE]},
        inputs={
            "pixel_values": (1, 3, IMAGE, IMAGE),
            "prompt_pixel_values": (1, 3, IMAGE, IMAGE),
            "prompt_masks": (1, 3, IMAGE, IMAGE),
        },
    ),
    "sew": HfSpec(BOTH, inputs={"input_values": (2, 16000)}),
    "sew-d": HfSpec(inputs={"input_values": (2, 16000)}),
    "speech_to_text": HfSpec(
        inputs={"input_features": (2, 128, 80), "decoder_input_ids": (2, TARGET_TOKENS)}
    ),
    "swin": HfSpec(BOTH, SWIN),
    "swin2sr": HfSpec(
        config={"embed_dim": 64, "depths": [2, 2], "num_heads": [2, 2], "window_size": 8},
        inputs={"pixel_values": (2, 3, 32, 32)},
    ),
    "swinv2": HfSpec(config=SWIN),
    "table-transformer": HfSpec(inputs={"pixel_values": BIG_IMAGES}),
    "time_series_transformer": HfSpec(config=SERIES_CONFIG, inputs=SERIES),
    "timesformer": HfSpec(
        config={"num_frames": 4}, inputs={"pixel_values": (2, 4, 3, IMAGE, IMAGE)}
    ),
    "videomae": HfSpec(BOTH, {"num_frames": 4}, {"pixel_values": (2, 4, 3, IMAGE, IMAGE)}),
    "vit_mae": HfSpec(BOTH, {"image_size": 2 * IMAGE}),
    "vits": HfSpec(),
    "vivit": HfSpec(
        BOTH,
        {"num_frames": 4, "tubelet_size": [2, 16, 16]},
        {"pixel_values": (2, 4, 3, IMAGE, IMAGE)},
    ),
    "vjepa2": HfSpec(
        BOTH,
        {
            "crop_size": IMAGE,
            "frames_per_clip": 4,
            "pred_hidden_size": HIDDEN,
            "pred_num_attention_heads": HEADS,
            "pred_num_hidden_layers": LAYERS,
        },
    ),
    "wav2vec2": HfSpec(BOTH, extra={"attention_mask": (2, 8000)}),
    "wav2vec2-bert": HfSpec(
        BOTH,
        {"feature_projection_input_dim": 80},
        {"input_features": (2, 48, 80), "attention_mask": (2, 48)},
    ),
    "wav2vec2-conformer": HfSpec(BOTH, {"position_embeddings_type": "relative"}),
    "wavlm": HfSpec(extra={"attention_mask": (2, 8000)}),
    "youtu": HfSpec(BOTH, {"qk_rope_head_dim": 16, "head_dim": 16}),
    # Two towers.
    **{
        name: HfSpec(BOTH, extra={"pixel_values": IMAGES})
        for name in ("altclip", "chinese_clip", "clip", "metaclip_2", "owlvit")
    },
    **{
        name: HfSpec(extra={"pixel_values": IMAGES})
        for name in ("blip", "bridgetower", "flava", "git", "vilt")
    },
    "xclip": HfSpec(
        BOTH,
        {
            "vision_config.mit_hidden_size": HIDDEN,
            "vision_config.mit_intermediate_size": HIDDEN,
            "vision_config.mit_num_attention_heads": HEADS,
            "vision_config.mit_num_hidden_layers": 1,
            "vision_config.num_frames": 4,
            "prompt_num_attention_heads": HEADS,
        },
        {**TEXT, "pixel_values": (2, 4, 3, IMAGE, IMAGE)},
    ),
}
