"""Small models with attention for the tests of calibration."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, KEY_HEADS = 32, 4, 2


class Attention(nn.Module):
    """Causal or padded self-attention, 4 query heads on 2 key heads of width 32."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(64, HEADS * WIDTH)
        self.kv = nn.Linear(64, 2 * KEY_HEADS * WIDTH)
        self.out = nn.Linear(HEADS * WIDTH, 64)

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k, v = self.kv(x).chunk(2, -1)
        q, k, v = (t.unflatten(-1, (-1, WIDTH)).transpose(1, 2) for t in (self.q(x), k, v))
        return q, k, v

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        mask = None if keep is None else keep[:, None, None, :]
        out = F.scaled_dot_product_attention(
            *self.operands(x), mask, is_causal=keep is None, enable_gqa=True
        )
        return self.out(out.transpose(1, 2).flatten(2))


class Stack(nn.Module):
    """Two such layers with residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Attention(), Attention()])

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, keep)
        return x


def stack() -> nn.Module:
    """With weights that are always the same, and attention that is far from uniform."""
    torch.manual_seed(0)
    model = Stack().eval()
    with torch.no_grad():
        for layer in model.layers:
            layer.q.weight *= 3  # type: ignore[union-attr,operator]
    return model


def noise(seed: int, batch: int, tokens: int) -> Tensor:
    return torch.randn(batch, tokens, 64, generator=torch.Generator().manual_seed(seed))
