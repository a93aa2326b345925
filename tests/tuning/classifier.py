"""A model, its task, and how it is tuned in tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distr_compile.accuracy.batch import Batch
from distr_compile.tuning.tune import tune
from distr_compile.tuning.tuned import Tuning
from tests.tiny_models import Stack, noise

CANDIDATES = (
    {"estimator": "projection", "rank": 16},
    {"estimator": "projection", "rank": 24},
    {"estimator": "lsh-mean", "rank": 16},
)


class Classifier(nn.Module):
    """Four layers and a class for every token."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Stack()
        self.body.layers.extend(Stack().layers)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))  # type: ignore[no-any-return]


def classifier() -> nn.Module:
    torch.manual_seed(0)
    model = Classifier().eval()
    with torch.no_grad():
        for layer in model.body.layers:
            layer.q.weight *= 3  # type: ignore[union-attr,operator]
    return model


def task(model: nn.Module, count: int = 12) -> list[Batch]:
    """Labels that the exact model gets right about 9 times in 10."""
    batches = []
    for seed in range(count):
        x = noise(seed, 2, 64)
        with torch.no_grad():
            logits: Tensor = model(x)
        generator = torch.Generator().manual_seed(seed)
        labels = logits.argmax(-1)
        slip = torch.rand(labels.shape, generator=generator) < 0.1
        labels[slip] = (labels[slip] + 1) % 10
        batches.append(Batch((x,), labels=labels))
    return batches


def tuned(model: nn.Module, batches: Any, budget: float, **more: Any) -> Tuning:
    arguments: dict[str, Any] = {
        "candidates": CANDIDATES,
        "time": "products",
        "progress": False,
        **more,
    }
    return tune(model, batches, budget, **arguments)
