"""The bias of gradients with a constant basis: what is compared, and the table in the docs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gradient_bias
from distr_compile.accuracy.instrument import Call, Site
from distr_compile.kernels.attention import reference
from distr_compile.lowering.call import Scores
from tests.zoo import ZOO

DOCS = Path(__file__).parents[1] / "docs" / "training.md"


def test_the_docs_have_the_table_of_the_results() -> None:
    results = json.loads(gradient_bias.RESULTS.read_text(encoding="utf-8"))
    assert list(results) == list(ZOO)
    assert gradient_bias.table(results) in DOCS.read_text(encoding="utf-8")


def test_what_is_said_of_two_gradients() -> None:
    found = gradient_bias.compared(torch.tensor([3.0, 3.0]), torch.tensor([3.0, 0.0]))
    assert found == {"error": 1.0, "cosine": pytest.approx(math.sqrt(0.5))}


def test_the_full_gradient_is_the_numerical_one() -> None:
    """By central differences; the one with a constant basis is another."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, 2, 40, 32, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    call = Call(Site("a", "a"), q, k, v, None, None, Scores(0.2), 0, {})
    weights = torch.randn(q.shape, generator=torch.Generator().manual_seed(0), dtype=q.dtype)
    options: dict[str, Any] = {"scale": 0.2, "rank": 16, "estimator": "projection"}

    def loss(q: Tensor, k: Tensor) -> float:
        return (reference.attention(q, k, v, **options) * weights).sum().item()

    step = 1e-5 * torch.randn(q.shape, generator=generator, dtype=q.dtype)
    numerical = {
        "dQ": (loss(q + step, k) - loss(q - step, k)) / 2,
        "dK": (loss(q, k + step) - loss(q, k - step)) / 2,
    }
    for name, (held, full) in gradient_bias.gradients(call, 2).items():
        assert (full * step).sum().item() == pytest.approx(numerical[name], rel=1e-5)
        assert (held * step).sum().item() != pytest.approx(numerical[name], rel=1e-2)
