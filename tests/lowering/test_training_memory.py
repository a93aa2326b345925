"""Memory of a forward and its backward on a CPU grows with the tokens, not with their square."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distr_compile.lowering import gradients, training
from distr_compile.lowering.choose import Done
from tests.kernels.cpu_kernel import require_kernel
from tests.lowering.test_cpu import LiveBytes

WIDTH = 64


@pytest.fixture(params=["distr-cpu", "torch-products"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What computes both ways, by name."""
    require_kernel()
    name: str = request.param
    for way in ("forward", "backward"):
        monkeypatch.setattr(training, way, _noting(getattr(training, way), name))
    if name == "torch-products":
        kernels = training._kernels

        def none(*_: Any) -> str:
            return "not in this test"

        monkeypatch.setattr(
            training,
            "_kernels",
            lambda shape: kernels(shape)._replace(refuses=none, refuses_backward=none),
        )
    return name


def _noting(run: Any, name: str) -> Any:
    def noting(*args: Any) -> Done:
        done: Done = run(*args)
        assert done.by.removesuffix(", backward") == name, done
        return done

    return noting


def peak(tokens: int, estimator: str) -> int:
    """Most bytes alive at once beside the inputs: output, what is saved, gradients, workspace.

    The workspace of the C++ kernels is allocated as tensors, so that it counts too.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(1, 1, tokens, WIDTH, generator=generator) for _ in range(4))
    options: dict[str, Any] = {
        "scale": 0.125,
        "rank": WIDTH // 2,
        "estimator": estimator,
        "grouping_block": 0,
    }
    with LiveBytes() as memory:
        out, lse, A, B, note = gradients._attention_recorded(q, k, v, *[None] * 5, **options)
        found = gradients._attention_backward(
            grad, q, k, v, None, None, out, lse, A, B, note, None, **options
        )
    assert all(t.isfinite().all() for t in found[:3])
    return memory.peak


@pytest.mark.parametrize("estimator", ["projection", "lsh-mean"])
@pytest.mark.usefixtures("path")
def test_twice_the_tokens_need_twice_the_memory(estimator: str) -> None:
    small, large = (peak(tokens, estimator) for tokens in (4096, 8192))
    assert large <= 2.2 * small
    assert large >= 4 * 8192 * WIDTH * 4, "the output and three gradients at least"


def test_a_matrix_of_scores_would_be_seen() -> None:
    """The measure itself: attention by its formula needs four times as much."""

    def formula(tokens: int) -> int:
        q = torch.ones(1, 1, tokens, WIDTH)
        with LiveBytes() as memory:
            _ = (q @ q.mT).softmax(-1) @ q
        return memory.peak

    assert formula(2048) > 3.5 * formula(1024)
