"""Attention under autocast, inside of the graph and around it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from .capture import error, run, run_exact
from .inputs import ROWS, B, Block, CappedWithSinks, eager


class Autocast(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.inner(x)


class Bare(nn.Module):
    """Attention on its inputs: under autocast the products cast fp32 operands themselves."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = x.view(B, ROWS, 3, 32).transpose(1, 2), x.cos(), x.sin()
        k, v = (y.view(B, ROWS, 3, 32).transpose(1, 2) for y in (k, v))
        return (q @ k.transpose(-2, -1) * 32**-0.5).softmax(dim=-1) @ v


class Padded(nn.Module):
    """A finite fill, in bf16 as the scores are, beside Q, K and V in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = x.view(B, ROWS, 3, 32).transpose(1, 2), x.cos(), x.sin()
        k, v = (y.view(B, ROWS, 3, 32).transpose(1, 2) for y in (k, v))
        scores = q @ k.transpose(-2, -1) * 32**-0.5
        return scores.masked_fill(torch.arange(ROWS) > ROWS - 5, -1e9).softmax(dim=-1) @ v


@pytest.mark.parametrize("inner", [Block, Bare, Padded, CappedWithSinks])
@pytest.mark.parametrize("is_inside", [True, False])
@pytest.mark.parametrize("is_exact", [True, False])
def test_autocast(inner: type[nn.Module], is_inside: bool, is_exact: bool) -> None:
    torch.manual_seed(0)
    model, x = inner().eval(), torch.randn(B, ROWS, 96)
    cast = Autocast(model)
    oracle = eager(model, [x], torch.float64)
    expected = eager(cast, [x])
    runner = run_exact if is_exact else run
    if is_inside:
        capture = runner(cast, [x])
    else:
        with torch.autocast("cpu", torch.bfloat16):
            capture = runner(model, [x])
    assert capture.output.dtype == expected.dtype == torch.bfloat16
    assert error(capture.output, oracle) <= 2 * error(expected, oracle) + 0.004
    assert capture.row.decision == ("exact" if is_exact else "distr")
    assert capture.row.dtype == "bfloat16"
