"""Symbolic sizes that turn out to be numbers while a graph is captured."""

from __future__ import annotations

import torch
from torch import Tensor

from .capture import error, run

ROWS, KEYS, WIDTH = 17, 33, 32


def test_a_symbol_that_became_a_number() -> None:
    """What was learnt of a size after a tensor was made holds for the tensor, too."""

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        scores = q @ k.mT * WIDTH**-0.5
        return (scores + bias).softmax(-1) @ v  # the bias says how many rows there are

    q, k, v = (torch.randn(2, 4, n, WIDTH) for n in (ROWS, KEYS, KEYS))
    inputs = [q, k, v, torch.randn(1, 4, ROWS, KEYS)]
    torch._dynamo.maybe_mark_dynamic(q, 2)
    capture = run(function, inputs)
    assert capture.row.decision == "distr"
    assert error(capture.output, function(*inputs)) < 1e-5
