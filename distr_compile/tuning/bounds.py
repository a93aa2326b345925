"""How sure a loss is: it is computed again for random halves of the examples.

The same halves for the exact and the other model. For a mean, losses of random halves spread about
the loss of all examples as those of the bootstrap do (the delete-d jackknife with d = n / 2: Shao
and Wu, Annals of Statistics 17, 1989). But no example comes twice, which metrics that compare
examples with each other, as retrieval does, could not make sense of.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distr_compile.accuracy.metrics import Metric

DRAWS = 1000

FEWER = 200
"""Of rows wider than ``WIDE``: embeddings, whose metric looks at all pairs of examples."""
WIDE = 128


@dataclass(frozen=True)
class Loss:
    """How much worse a model is than the exact one.

    Attributes:
        exact: value of the exact model.
        value: of the other.
        loss: ``Metric.loss`` of the two.
        upper: so high the loss is at most, with the confidence that was asked for.
        examples: how many there were.
    """

    exact: float
    value: float
    loss: float
    upper: float
    examples: int


def loss_with_bound(metric: Metric, exact: Tensor, rows: Tensor, confidence: float) -> Loss:
    """The loss, and a one-sided bound: a quantile over random halves.

    Args:
        metric: of which the rows are.
        exact: rows of the exact model, ``(examples, width)``.
        rows: of the other, the same examples.
        confidence: between 0 and 1. A bound from a handful of examples means little, and where no
            example got worse the bound is the loss itself.
    """
    at_exact, value = metric.result(exact), metric.result(rows)
    found = metric.loss(at_exact, value)
    count = len(rows)
    generator = torch.Generator().manual_seed(0)
    losses: list[float] = []
    for _ in range(DRAWS if rows.shape[1] <= WIDE else FEWER):
        order = torch.randperm(count, generator=generator, device="cpu")
        half = order[: max(count // 2, 1)]
        try:
            losses.append(metric.loss(metric.result(exact[half]), metric.result(rows[half])))
        except ValueError:  # nothing in it that counts, or too few
            continue
    if not losses or any(map(math.isnan, [found, *losses])):
        return Loss(at_exact, value, found, math.inf, count)
    upper = sorted(losses)[math.ceil(confidence * len(losses)) - 1]
    return Loss(at_exact, value, found, max(upper, found), count)
