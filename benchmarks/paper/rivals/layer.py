"""What a rival is told of the layer that it stands in, and what all of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Layer:
    """One attention of a model.

    Attributes:
        heads: query heads, H.
        head_dim: columns of Q and K in each head, d; V is as wide.
        tokens: the most there can be, those of the class included.
        is_causal: a token sees itself and those before it.
        grid: rows and columns of an image's patches; None for text.
        scale: multiplies Q K^T, where there is such a product; 1 / sqrt(d) if None.
    """

    heads: int
    head_dim: int
    tokens: int
    is_causal: bool = False
    grid: tuple[int, int] | None = None
    scale: float | None = None

    @property
    def width(self) -> int:
        """Features of all heads joined, C."""
        return self.heads * self.head_dim

    @property
    def prefix(self) -> int:
        """Tokens before the patches of an image, such as that of the class."""
        return 0 if self.grid is None else self.tokens - self.grid[0] * self.grid[1]


class Rival(nn.Module, ABC):
    """Attention of one layer. A subclass says how tokens that all count attend to each other."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """Return the output of one call without padding.

        Args:
            q: ``(B, H, N, d)``, floating, any strides; k and v alike.
            k: see ``q``.
            v: see ``q``.
            x: ``(B, N, width of the model)``, the input of the layer.

        Returns:
            ``(B, H, N, d)``.
        """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, keep: Tensor | None = None
    ) -> Tensor:
        """Return the output of one call; tokens that are padding are taken out before.

        Args:
            q: ``(B, H, N, d)``, floating, any strides.
            k: ``(B, H_k, N, d)``; H_k divides H, and query head h uses key head ``h // (H / H_k)``.
            v: as ``k``.
            x: ``(B, N, width of the model)``, the input of the layer.
            keep: ``(B, N)``, bool, False for padding; None where every token counts.

        Returns:
            ``(B, H, N, d)``, 0 in rows that are padding.

        Raises:
            ValueError: sizes that are not those of the layer, or K of another length than Q.
        """
        self._check(q, k, v)
        k, v = (t.repeat_interleave(self.layer.heads // t.shape[1], dim=1) for t in (k, v))
        if keep is None or bool(keep.all()):
            return self.attend(q, k, v, x)
        out = torch.zeros_like(q)
        heads = torch.arange(self.layer.heads, device=q.device)[:, None]
        for examples, tokens in patterns(keep):
            if len(tokens):
                rows = (t[examples][:, :, tokens] for t in (q, k, v))
                found = self.attend(*rows, x[examples][:, tokens])
                out[examples[:, None, None], heads, tokens] = found.to(out.dtype)
        return out

    def _check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        heads, head_dim = self.layer.heads, self.layer.head_dim
        if q.shape[1] != heads or heads % k.shape[1] or q.shape[3] != head_dim:
            raise ValueError(
                f"query, key: got {tuple(q.shape)} and {tuple(k.shape)}; accepted: {heads} query "
                f"heads of width {head_dim}, and key heads that divide them; make the rival for "
                "this layer"
            )
        if k.shape != v.shape or k.shape[2] != q.shape[2]:
            raise ValueError(
                f"key, value: got {tuple(k.shape)} and {tuple(v.shape)} beside {q.shape[2]} "
                "queries; accepted: self-attention, as many keys as queries, all as wide; call the "
                "model without a cache"
            )


def patterns(keep: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The numbers of examples that keep the same tokens, with the numbers of those tokens."""
    kinds, kind = keep.unique(dim=0, return_inverse=True)
    for number, tokens in enumerate(kinds):
        yield (kind == number).nonzero()[:, 0], tokens.nonzero()[:, 0]
