"""Scenes with one handwritten digit, and the vision transformers that name it.

A scene is a digit of scikit-learn's ``load_digits`` somewhere in a larger picture: turned, scaled,
among fainter pieces of other digits, in noise. A model has to find it before it can read it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from distr_compile.accuracy.batch import Batch
from tests.zoo.recipe import Recipe, load_weights

HELD_OUT = 320  # of 1797 digits
PIECES = 3
NOISE = 0.1
HARDEST, SHOWN = 0.35, 0.3  # of what scenes can be: at the end of training, in evaluation
BATCH = 32


@cache
def digits(*, held_out: bool) -> tuple[Tensor, Tensor]:
    """``(n, 1, 8, 8)`` fp32 from 0 to 1, and ``(n,)`` what they show; no digit is in both parts."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=Generator().manual_seed(0))
    part = order[:HELD_OUT] if held_out else order[HELD_OUT:]
    images = torch.tensor(data.images, dtype=torch.float32)[part, None] / 16
    return images, torch.tensor(data.target)[part]


def scenes(
    chosen: Tensor, size: int, generator: Generator, *, held_out: bool, hard: float = SHOWN
) -> Tensor:
    """``(n, 1, size, size)`` fp32: a scene for each of the digits of numbers ``chosen``.

    ``hard`` from 0 to 1 is how far off the middle they may be, and how strong all else is.
    """
    return scenes_of(digits(held_out=held_out)[0], chosen, size, generator, hard=hard)


def scenes_of(
    images: Tensor, chosen: Tensor, size: int, generator: Generator, *, hard: float = SHOWN
) -> Tensor:
    """:func:`scenes` with other pictures in the place of the digits, ``(n, 1, 8, 8)`` fp32."""
    count = len(chosen)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    def placed(image: Tensor, reach: float) -> Tensor:
        """``(n, 1, 8, 8)`` turned, 2 to 2.5 times as large, the middle at most ``reach`` off."""
        angle, scale = uniform(-0.3, 0.3), size / 8 / uniform(2.0, 2.5)
        turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1)
        matrix = scale[:, None, None] * turn.view(-1, 2, 2)
        shift = matrix @ uniform(-reach, reach, 2, 1)
        grid = F.affine_grid(
            torch.cat([matrix, -shift], -1), [count, 1, size, size], align_corners=False
        )
        return F.grid_sample(image, grid, align_corners=False)

    scene = placed(images[chosen], hard * 10 / size)
    places = torch.arange(8)
    for _ in range(PIECES):
        other = images[torch.randint(len(images), (count,), generator=generator)]
        corner = torch.randint(0, 5, (count, 2, 1), generator=generator)
        inside = (places >= corner) & (places < corner + 4)  # (n, row or column, 8)
        piece = placed(other * (inside[:, :1].mT & inside[:, 1:])[:, None], 1.0)
        scene = torch.maximum(scene, piece * hard * uniform(0.3, 0.7, 1, 1, 1))
    return scene + NOISE * hard * torch.randn(scene.shape, generator=generator)


def _recipe(name: str, size: int, **options: Any) -> Recipe:
    def sample(generator: Generator, progress: float) -> Batch:
        labels = digits(held_out=False)[1]
        chosen = torch.randint(len(labels), (BATCH,), generator=generator)
        hard = HARDEST * min(
            1.0, 2 * progress
        )  # among clutter from the start nothing is learnt for long
        x = scenes(chosen, size, generator, held_out=False, hard=hard)
        return Batch((x,), labels=labels[chosen])

    def evaluation() -> list[Batch]:
        labels = digits(held_out=True)[1]
        every, generator = torch.arange(HELD_OUT), Generator().manual_seed(1)
        pictures = scenes(every, size, generator, held_out=True)
        pairs = zip(pictures.split(BATCH), labels.split(BATCH), strict=True)
        return [Batch((part,), labels=answers) for part, answers in pairs]

    return Recipe(
        name, metrics=("top1", "kl"), sample=sample, evaluation=evaluation, head_dim=64, **options
    )


def _started(model: nn.Module) -> nn.Module:
    """With weights from which a small model learns sooner than from those for large ones."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    return model


def _with_waves(model: Any) -> nn.Module:
    """The model, started, with sines of row and column for a beginning of its positions."""
    side, width = model.patch_embed.grid_size[0], model.embed_dim // 4
    phase = torch.arange(side)[:, None] * 1.5 * 30 ** (-torch.arange(width) / width)
    waves = 0.3 * torch.cat([phase.sin(), phase.cos()], -1)
    rows, columns = waves[:, None].expand(-1, side, -1), waves.expand(side, -1, -1)
    with torch.no_grad():
        model.pos_embed[0, -side * side :] = torch.cat([rows, columns], -1).flatten(0, 1)
    return _started(model)


SIZES = {
    "in_chans": 1,
    "num_classes": 10,
    "embed_dim": 128,
    "depth": 3,
    "num_heads": 2,
    "mlp_ratio": 2,
}


def _vit_577() -> nn.Module:
    """The trained ViT of 197 tokens for pictures of 72 pixels: its positions are resampled."""
    from timm.layers import resample_abs_pos_embed
    from timm.models.vision_transformer import VisionTransformer

    (short,) = (recipe for recipe in RECIPES if recipe.name == "digits-vit")
    trained = _vit()
    load_weights(trained, short.weights)
    model = VisionTransformer(img_size=72, patch_size=3, **SIZES)
    state = trained.state_dict()
    state["pos_embed"] = resample_abs_pos_embed(
        state["pos_embed"], [24, 24], num_prefix_tokens=model.num_prefix_tokens
    )
    model.load_state_dict(state)
    return model


def _vit() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return _with_waves(VisionTransformer(img_size=42, patch_size=3, **SIZES))


def _deit() -> nn.Module:
    from timm.models.deit import VisionTransformerDistilled

    return _with_waves(VisionTransformerDistilled(img_size=30, patch_size=3, **SIZES))


def _swin() -> nn.Module:
    from timm.models.swin_transformer import SwinTransformer

    return _started(
        SwinTransformer(
            img_size=32,
            patch_size=2,
            in_chans=1,
            num_classes=10,
            embed_dim=64,
            depths=(2, 2),
            num_heads=(1, 2),
            window_size=8,
            mlp_ratio=2,
            drop_path_rate=0.0,
        )
    )


TASK = "names the digit in a cluttered scene"
RECIPES = (
    _recipe(
        "digits-vit",
        42,
        build=_vit,
        description=f"timm VisionTransformer, 197 tokens, {TASK}",
        num_layers=3,
        floor=0.97,
        steps=1200,
        rate=3e-3,
    ),
    _recipe(
        "digits-swin",
        32,
        build=_swin,
        description=f"timm SwinTransformer, shifted windows of 64 tokens, relative bias, {TASK}",
        num_layers=4,
        floor=0.97,
        steps=1200,
        rate=3e-3,
    ),
    _recipe(
        "digits-deit",
        30,
        build=_deit,
        description=f"timm VisionTransformerDistilled, two class tokens and 100 others, {TASK}",
        num_layers=3,
        floor=0.97,
        steps=1600,
        rate=3e-3,
    ),
)

FINE_TUNED = _recipe(
    "digits-vit-577",
    72,
    build=_vit_577,
    description=f"the ViT of 197 tokens, fine-tuned exactly for 577, {TASK}",
    num_layers=3,
    floor=0.95,
    steps=300,
    rate=1e-3,
)
"""For the paper's Table 8; the accuracy gate does without, its ViT of 197 tokens is like it."""
