"""Models for the tests of the backend, and how they are compiled there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

from distr_compile import Report
from distr_compile.estimators import DEFAULT_ESTIMATOR
from distr_compile.kernels.attention import reference

WIDTH, HEADS, TOKENS = 64, 2, 32
FORCED = {"default": {"min_seq_len": 0}}
EXACT = {"default": {"group_size": 1}}
DISTR = {"group_size": 2, "min_seq_len": 0}

# Both are exact: only the order of the sums differs.
SAME = {"rtol": 1e-4, "atol": 1e-5}
# An approximation with G = 2 moves the outputs of these random layers by more than this.
MOVED = 1e-4


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing compiled or counted before; no gradients."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.merge(attend(*self.split(x))))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        return q, k, v

    def merge(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v


def approximate(attention: Attention, x: Tensor, group_size: int = 2) -> Tensor:
    """``attention(x)`` with the reference of the default estimator in place of the softmax."""
    q, k, v = attention.split(x)
    head_dim = q.shape[-1]
    return attention.out(
        attention.merge(
            reference.attention(
                q,
                k,
                v,
                scale=head_dim**-0.5,
                rank=head_dim // group_size,
                estimator=DEFAULT_ESTIMATOR,
            )
        )
    )


class Block(nn.Module):
    """A graph break between the norm and the attention: all blocks resume in the same code."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attn = Attention()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        torch._dynamo.graph_break()
        return x + self.attn(y)


class Broken(nn.Module):
    """Equal blocks with a graph break in each; returns the output of every block."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x: Tensor) -> list[Tensor]:
        outs = []
        for block in self.blocks:
            x = block(x)
            outs.append(x)
        return outs


def two_layers() -> nn.Sequential:
    return nn.Sequential(Attention(), Attention()).eval()


def tokens(batch: int = 2, length: int = TOKENS) -> Tensor:
    return torch.randn(batch, length, WIDTH)


def compiled(model: Any, policy: Any = FORCED, compiler: str = "eager", **options: Any) -> Any:
    dynamic = options.pop("dynamic", None)
    settings = {"policy": policy, "compiler": compiler, **options}
    return torch.compile(model, backend="distr", dynamic=dynamic, options=settings)


def decisions(report: Report) -> dict[str, str]:
    return {row.layer: row.decision for row in report.rows}


def codes(report: Report) -> list[list[str]]:
    return [[reason.code for reason in row.reasons] for row in report.rows]


def inner(error: pytest.ExceptionInfo[BackendCompilerFailed]) -> str:
    return str(error.value.inner_exception)
