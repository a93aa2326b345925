"""Tiny models as folders that timm and transformers load, and a folder of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

TEXT = "It was the best of times, it was the worst of times. " * 30


def pictures(folder: Path, each: int) -> Path:
    """Red noise in the class ``ant``, blue in ``bee``."""
    rng = np.random.default_rng(0)
    for channel, name in ((0, "ant"), (2, "bee")):
        (folder / "pictures" / name).mkdir(parents=True)
        for number in range(each):
            pixels = rng.integers(0, 99, (40, 48, 3), dtype=np.uint8)
            pixels[..., channel] += 120
            Image.fromarray(pixels).save(folder / "pictures" / name / f"{number}.png")
    return folder / "pictures"


def tiny_timm(num_classes: int = 2) -> Any:
    """One block of a ViT on pictures of 32 x 32: 65 tokens, head width 32."""
    import timm

    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **_SHAPE, num_classes=num_classes).eval()


_SHAPE: dict[str, Any] = {
    "depth": 1,
    "embed_dim": 64,
    "num_heads": 2,
    "img_size": 32,
    "patch_size": 4,
}


def saved_timm(folder: Path) -> Path:
    """That model, as ``timm:local-dir:FOLDER`` finds it."""
    from timm.models import save_for_hf

    model = tiny_timm()
    config = {**model.pretrained_cfg, "input_size": (3, 32, 32), "num_classes": 2}
    save_for_hf(model, str(folder / "vit"), model_config=config, model_args=_SHAPE)
    return folder / "vit"


def saved_gpt2(folder: Path) -> Path:
    """One block of a GPT-2 with a tokenizer of characters, as ``hf:FOLDER`` finds them."""
    import tokenizers
    import transformers

    vocabulary = {letter: i for i, letter in enumerate(["?", *sorted(set(TEXT))])}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="?")
    letters = tokenizers.Tokenizer(model)
    letters.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="?")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(vocabulary),
        n_positions=66,
        n_embd=64,
        n_layer=1,
        n_head=2,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder / "gpt2")
    tokenizer.save_pretrained(folder / "gpt2")
    return folder / "gpt2"
