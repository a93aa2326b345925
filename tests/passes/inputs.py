"""Example inputs for functions that spell attention, made from the names of their arguments."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

B, H, ROWS, KEYS, WIDTH, VALUE_WIDTH = 2, 3, 17, 33, 40, 24
C = 1 / math.sqrt(WIDTH)

Shapes = Mapping[str, tuple[int, ...]]

SHAPES: Shapes = {
    "q": (B, H, ROWS, WIDTH),
    "k": (B, H, KEYS, WIDTH),
    "v": (B, H, KEYS, VALUE_WIDTH),
    "bias": (B, 1, ROWS, KEYS),
    "table": (H, ROWS, KEYS),
    "keep": (B, 1, ROWS, KEYS),
    "padding": (B, KEYS),
    "x": (B, ROWS, H * WIDTH),
}
"""An argument's shape by its name; others are one number. ``keep`` and ``padding`` are boolean."""


def example_inputs(
    function: Callable[..., Any], shapes: Shapes | None = None, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Random inputs; every row of a boolean mask sees a key."""
    generator = torch.Generator().manual_seed(0)
    known = {**SHAPES, **(shapes or {})}
    called = function.forward if isinstance(function, nn.Module) else function

    def make(name: str) -> Tensor:
        x = torch.randn(known.get(name, ()), generator=generator)
        if name not in {"keep", "padding"}:
            return x.to(dtype)
        seen = x > -0.5
        seen[..., 0] = True
        return seen

    return [make(name) for name in inspect.signature(called).parameters]


def in_dtype(thing: Any, dtype: torch.dtype) -> Any:
    """A copy of a module or tensor whose floating-point values have ``dtype``."""
    if isinstance(thing, nn.Module):
        return copy.deepcopy(thing).to(dtype)
    if isinstance(thing, Tensor):
        return thing.to(dtype, copy=True) if thing.is_floating_point() else thing.clone()
    return thing


def eager(
    function: Callable[..., Any], inputs: list[Tensor], dtype: torch.dtype = torch.float32
) -> Any:
    """What the model itself computes in ``dtype``, from copies of the inputs."""
    with torch.no_grad():
        return in_dtype(function, dtype)(*[in_dtype(x, dtype) for x in inputs])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(96, 3 * 96), nn.Linear(96, 96)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(B, ROWS, 3, 3, 32).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) * 32**-0.5).softmax(dim=-1)
        return self.out((weights @ v).transpose(1, 2).reshape(B, ROWS, 96))


class CappedWithSinks(nn.Module):
    """Sinks stay fp32, and so do the scores beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.sinks = nn.Linear(96, 3 * 96), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(B, ROWS, 3, 3, 32).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q @ k.transpose(-2, -1) * 32**-0.5 / 0.1).tanh() * 0.1
        column = self.sinks.reshape(1, -1, 1, 1).expand(B, -1, ROWS, -1)
        weights = torch.cat([scores, column], -1).softmax(dim=-1)[..., :-1]
        return weights.to(v.dtype) @ v
