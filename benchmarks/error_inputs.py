"""Q, K and V drawn so that one property decides how hard they are to approximate.

Every set is ``(trials, 1, tokens, head_dim)`` fp64, one head, and the same in every run.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Draw = Callable[[int, int, int, torch.Generator], tuple[Tensor, Tensor]]
"""(trials, tokens, head_dim, generator) -> Q and K, ``(trials, tokens, head_dim)``"""

CLUSTER = 8
"""Columns that are alike in ``similar_columns``: every group size of up to 8 divides it."""


@dataclass(frozen=True)
class Inputs:
    """Q, K, V of one attention call, ``(B, H, N, d)`` each, as many key heads as query heads.

    A mask is additive, ``(B or 1, H or 1, N, M)``; a scale of 0 stands for d ** -0.5.
    """

    Q: Tensor
    K: Tensor
    V: Tensor
    is_causal: bool = False
    mask: Tensor | None = None
    scale: float = 0.0


def uniform(trials: int, tokens: int, head_dim: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Every number from (0, 1), as in section 4.2 of the paper."""
    shape = (2, trials, tokens, head_dim)
    Q, K = torch.rand(shape, generator=g, dtype=torch.float64)
    return Q, K


def gaussian(trials: int, tokens: int, head_dim: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Nothing to find: all columns and all rows are independent."""
    Q, K = _normal(g, 2, trials, tokens, head_dim)
    return Q, K


def similar_columns(correlation: float) -> Draw:
    """Gaussian, the columns of Q in clusters of eight, scattered, with this correlation inside.

    At 1 the columns of a cluster are equal, and S has rank d / 8.
    """

    def draw(trials: int, tokens: int, head_dim: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        own, K = _normal(g, 2, trials, tokens, head_dim)
        shared = _normal(g, trials, tokens, head_dim // CLUSTER).repeat_interleave(CLUSTER, -1)
        Q = math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own
        return Q[..., torch.randperm(head_dim, generator=g)], K

    return draw


def one_hot_rows(
    trials: int, tokens: int, head_dim: int, g: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Every query is four times one of the keys: nearly all of its attention goes there."""
    K = _normal(g, trials, tokens, head_dim)
    return 4 * K[:, torch.randperm(tokens, generator=g)], K


def sliding_window(
    trials: int, tokens: int, head_dim: int, g: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Scaled scores of about 64 exp(-(i - j)^2 / 128): random Fourier features of positions."""
    frequencies = _normal(g, trials, 1, head_dim // 2) / 8
    angles = torch.arange(tokens, dtype=torch.float64)[:, None] * frequencies
    waves = torch.cat([angles.cos(), angles.sin()], dim=-1) * math.sqrt(128 / head_dim)
    return waves * head_dim**0.25, waves * head_dim**0.25


def outlier_channels(
    trials: int, tokens: int, head_dim: int, g: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Gaussian, two channels of K a hundred times as large."""
    Q, K = _normal(g, 2, trials, tokens, head_dim)
    K[..., torch.randperm(head_dim, generator=g)[:2]] *= 100
    return Q, K


def rank_one(trials: int, tokens: int, head_dim: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Every query is a multiple of one vector."""
    Q = _normal(g, trials, tokens, 1) * _normal(g, trials, 1, head_dim)
    return Q, _normal(g, trials, tokens, head_dim)


def heavy_tails(
    trials: int, tokens: int, head_dim: int, g: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Student's t with two degrees of freedom: the variance is infinite."""
    normal, one, two = _normal(g, 3, 2, trials, tokens, head_dim)
    Q, K = normal / ((one**2 + two**2) / 2).sqrt()
    return Q, K


DRAWS: dict[str, Draw] = {
    "uniform(0, 1)": uniform,
    "Gaussian": gaussian,
    **{f"similar columns, {c:g}": similar_columns(c) for c in (0.25, 0.5, 0.75, 0.9, 1.0)},
    "one-hot rows": one_hot_rows,
    "sliding window": sliding_window,
    "outlier channels": outlier_channels,
    "rank 1": rank_one,
    "heavy tails": heavy_tails,
}


def draw(name: str, *, trials: int, tokens: int, head_dim: int) -> Inputs:
    """One set; V is Gaussian."""
    g = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    Q, K = DRAWS[name](trials, tokens, head_dim, g)
    V = _normal(g, trials, tokens, head_dim)
    return Inputs(Q[:, None], K[:, None], V[:, None])


def _normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64)
