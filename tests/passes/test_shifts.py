"""Numbers and biases beside bounds and fills: what is far out stays so, or the scores are left."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import distr_compile
from distr_compile.lowering.exactly import computing_exactly

from .by_backend import EXACT, FORCED, codes, compiled
from .test_not_what_it_seems import qkv

B = torch.zeros(24, 24)
LATER = torch.ones(24, 24).triu(1) > 0
Change = Callable[[Tensor, Tensor], Tensor]

NEAR: dict[str, tuple[Change, Tensor]] = {
    "a number before an upper bound": (lambda s, b: (s + 2e4).clamp(max=2e4), B),
    "a number before a lower bound": (lambda s, b: (s - 1e4).clamp(min=-1e4), B),
    "a number before a bound of two": (lambda s, b: (s + 12000).clamp(-1e4, 1e4), B),
    "a number, scaled, before a bound": (lambda s, b: ((s + 1) * 2e4).clamp(max=2e4) / 2e4, B),
    "a number before a minimum": (lambda s, b: torch.minimum(s + 2e4, torch.full((), 2e4)), B),
    "a bias before a bound": (lambda s, b: (s + b).clamp(-1e4, 1e4), B + 1e4),
    "a number before a fill": (lambda s, b: (s - 2e4).masked_fill(LATER, -1e4), B),
    "a number of the input's before a fill": (
        lambda s, b: (s - 1e3 * s.shape[-1]).masked_fill(LATER, -1e4),
        B,
    ),
    "a bias before a fill": (lambda s, b: (s + b).masked_fill(LATER, -1e4), B - 2e4),
    "a bias after a fill": (lambda s, b: s.masked_fill(LATER, -1e4) + b, LATER * 1e4),
    "a fill that a clamp lifts, and a bias": (
        lambda s, b: s.masked_fill(LATER, -1e9).clamp(min=-1e4) + b,
        LATER * 1e4,
    ),
    "a factor before a fill": (lambda s, b: (s * 2e4).masked_fill(LATER, -1e4), B),
    "a tensor's factor before a fill": (
        lambda s, b: (s * b[:1, :1].exp()).masked_fill(LATER, -1e4),
        B + 10,
    ),
    "what is not finite": (lambda s, b: s + math.inf, B),
    "a bound that is no number": (lambda s, b: s.clamp(min=math.nan), B),
    "a maximum after a number, then fills": (
        lambda s, b: (s + 1e6 - (s + 1e6).amax(-1, True)).masked_fill(LATER, -1e4) / 1000,
        B,
    ),
    "a fill that is divided again and again": (
        lambda s, b: s.masked_fill(LATER, -1e4) / 9 / 9 / 9 / 9,
        B,
    ),
}


class Attention(torch.nn.Module):
    """Each has a report of its own, which functions of one code have not."""

    def __init__(self, change: Change) -> None:
        super().__init__()
        self.change = change

    def forward(self, q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
        return self.change(q @ k.mT / 6, b).softmax(-1) @ v


@pytest.mark.parametrize(("policy", "dynamic"), [(EXACT, None), (FORCED, True)])
@pytest.mark.parametrize("name", NEAR)
def test_what_a_shift_brings_near_is_left(
    name: str, policy: dict[str, Any], dynamic: bool | None
) -> None:
    change, bias = NEAR[name]
    model = Attention(change)
    run = compiled(model, policy, dynamic=dynamic)
    with computing_exactly(), torch.no_grad():
        got, wanted = run(*qkv(), bias), model(*qkv(), bias)
        torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4, equal_nan=True)
    assert codes(run)[0] in {"scores-edited", "weights-reused"}


FAR: dict[str, Change] = {
    "a number before a far fill": lambda s, b: (s + 3).masked_fill(LATER, -1e9),
    "a small number before a fill": lambda s, b: (s - 3).masked_fill(LATER, -2e4),
    "a number after a fill": lambda s, b: s.masked_fill(LATER, -1e4) + 30,
    "a bias before a far fill": lambda s, b: (s + b).masked_fill(LATER, -1e9),
    "a bias after a far fill": lambda s, b: s.masked_fill(LATER, -1e5) + b,
    "a maximum before a fill": lambda s, b: (s - s.amax(-1, True)).masked_fill(LATER, -1e4),
    "the smallest number of fp16 in fp32, beside a bias": lambda s, b: (s + b).masked_fill(
        LATER, -65504.0
    ),
    "an unknown number before the smallest": lambda s, b: (s - b.shape[0]).masked_fill(
        LATER, torch.finfo(s.dtype).min
    ),
    "a fill of minus infinity": lambda s, b: (s + b - 30).masked_fill(LATER, -torch.inf),
    "a number before far bounds": lambda s, b: (s + 7).clamp(-5e4, 5e4),
    "a bias before farther bounds": lambda s, b: (s + b).clamp(min=-1e6),
    "a bias after bounds": lambda s, b: s.clamp(-5e4, 5e4) + b,
    "bounds of the dtype": lambda s, b: (s + b + 5).clamp(min=torch.finfo(s.dtype).min),
}


@pytest.mark.parametrize("name", FAR)
def test_what_stays_far_is_approximated(name: str) -> None:
    bias = torch.randn(24, 24, generator=torch.Generator().manual_seed(5))
    model = Attention(FAR[name])
    run = compiled(model)
    with computing_exactly(), torch.no_grad():
        torch.testing.assert_close(run(*qkv(), bias), model(*qkv(), bias), atol=2e-5, rtol=1e-4)
    assert distr_compile.report(run).rows[0].decision == "distr"


# -- factors that are tensors, in half precision --------------------------------------------------


def tempered(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
    return (((q * 2**-7) @ (k * 2**-7).mT) * t).softmax(-1) @ v


def far_tempered(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
    return ((q @ (k * 1e-5).mT) * (40 * t)).softmax(-1) @ v


@pytest.mark.parametrize("factor", [tempered, far_tempered])
@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_queries_in_half_precision_do_not_overflow_where_exact(
    factor: Callable[..., Tensor], compiler: str
) -> None:
    """The tensor would go into Q, which may be large where K is small."""
    q, k, v = (x.half() for x in qkv())
    t = torch.full((2, 1, 1), 1000.0, dtype=torch.half)
    torch._dynamo.reset()
    options = {"policy": EXACT, "compiler": compiler}
    run = torch.compile(factor, backend="distr", options=options)
    got, wanted = run(80 * q, 80 * k, v, t), factor(80 * q, 80 * k, v, t)
    assert wanted.isfinite().all()
    torch.testing.assert_close(got, wanted, atol=0.02, rtol=0.02)


def test_numbers_that_keep_queries_small_stay() -> None:
    q, k, v = (x.half() for x in qkv())
    t = torch.full((2, 1, 1), 1000.0, dtype=torch.half)
    run = compiled(tempered, FORCED)
    with computing_exactly():
        got = run(80 * q, 80 * k, v, t)
    torch.testing.assert_close(got, tempered(80 * q, 80 * k, v, t), atol=0.02, rtol=0.02)
    assert distr_compile.report(run).rows[0].decision == "distr"
