"""Where people look for time: PyTorch's FLOP counter and its profiler.

The artifact of tlparse is in ``test_reporting.py``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import distr_compile
from distr_compile.estimators import ESTIMATORS

B, H, N, D, R = 2, 3, 128, 64, 32


def qkv() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, H, N, D, generator=generator) for _ in range(3)]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return distr_compile.attention(q, k, v)


def attend_exactly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def test_flops_of_a_call() -> None:
    """Both products at the width that is left, and what the estimator does by itself."""
    with FlopCounterMode(display=False) as counter:
        attend(*qkv())
    # Gram matrices of Q and of K, the solution, then Q A and K B: the formula of the table.
    estimator = ESTIMATORS["projection"].cost(N, N, D, R, block=128).flops
    products = 2 * B * H * N * N * (R + D)
    assert counter.get_total_flops() == products + B * H * estimator
    assert estimator > 2 * 2 * N * D * R, "at least Q A and K B"
    by_op = counter.get_flop_counts()["Global"]
    assert by_op == {torch.ops.distr.attention: counter.get_total_flops()}
    with FlopCounterMode(display=False) as exact:
        distr_compile.attention(*qkv(), group_size=1)
    assert exact.get_total_flops() == 2 * B * H * N * N * 2 * D


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_flops_of_a_backward(backend: str) -> None:
    """By hand: five products with all scores, then those with A and with B, twice each.

    They are Qhat Khat^T again, dQhat and dKhat of width 32, and dO V^T and dV of width 64; Q A and
    dQhat A^T, K B and dKhat B^T.
    """
    torch._dynamo.reset()
    policy = {"default": {"group_size": 2, "min_seq_len": 0, "training": "approximate"}}
    options: dict[str, Any] = {"policy": policy, "compiler": "aot_eager"}
    called: Any = attend
    if backend != "eager":
        called = torch.compile(attend_exactly, backend="distr", options=options)
    leaves = [t.requires_grad_() for t in qkv()]
    called(*leaves).sum().backward()  # compiles
    out = called(*leaves).sum()
    with FlopCounterMode(display=False) as counter:
        out.backward()
    scores = 2 * 3 * 128 * 128
    products = 2 * scores * (3 * 32 + 2 * 64)
    factors = 2 * 2 * 3 * (2 * 128 * 64 * 32 + 2 * 128 * 64 * 32)
    assert products + factors == 44_040_192 + 12_582_912
    by_op = counter.get_flop_counts()["Global"]
    assert by_op == {torch.ops.distr.attention_backward: 56_623_104}
    with FlopCounterMode(display=False) as exact:
        distr_compile.attention(*leaves, group_size=1).sum().backward()
    forward, backward = 2 * scores * 2 * 64, 2 * scores * 5 * 64
    assert exact.get_total_flops() == forward + backward == 25_165_824 + 62_914_560


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_the_profiler_has_a_range_with_the_name_of_the_op(backend: str) -> None:
    torch._dynamo.reset()
    called: Any = torch.compile(attend, backend=backend) if backend != "eager" else attend
    called(*qkv())
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(3):
            called(*qkv())
    (found,) = (each for each in profiled.key_averages() if each.key == "distr::attention")
    assert found.count == 3
    assert found.cpu_time_total > 0
