"""One attention on the CPU, exactly, by our estimators and by the rivals: calls to be timed.

Inputs are random; tokens lie before heads in memory, as models leave them. A call of ours includes
all that its estimator does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.paper.rivals import RIVALS, Layer
from distr_compile.kernels.attention import cpu as kernel
from distr_compile.lowering import cpu as lowering
from distr_compile.lowering import cpu_fused
from distr_compile.lowering.call import call_of

ESTIMATORS = ("projection", "lsh-sample", "lsh-mean")
MIN_RANK = 16

Calls = dict[str, Callable[[], object]]


def drawn(tokens: int, d: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K and V, ``(1, heads, tokens, d)`` fp32."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, tokens, heads, d, generator=g).transpose(1, 2) for _ in range(3))
    return q, k, v


def exact_calls(tokens: int, d: int, heads: int) -> Calls:
    """PyTorch's and, where there is a compiler for it, our exact kernel ("exact")."""
    q, k, v = drawn(tokens, d, heads)
    out = torch.empty(1, tokens, heads, d).transpose(1, 2)
    exact = call_of(q, k, v, scale=d**-0.5, out=out)
    return {
        "SDPA": lambda: F.scaled_dot_product_attention(q, k, v),
        "exact": lambda: cpu_fused.exact_attention(exact),
    }


def our_calls(tokens: int, d: int, heads: int, group_sizes: tuple[int, ...]) -> Calls:
    """The estimators that need no calibration, where ``MIN_RANK`` columns are left."""
    q, k, v = drawn(tokens, d, heads)
    out = torch.empty(1, tokens, heads, d).transpose(1, 2)

    def call(**options: Any) -> Callable[[], object]:
        ready = call_of(q, k, v, scale=d**-0.5, out=out, **options)
        return lambda: lowering.run(ready, fused=kernel.available(q.dtype))

    return {
        f"{name}, G={g}": call(rank=d // g, estimator=name)
        for name in ESTIMATORS
        for g in group_sizes
        if d // g >= MIN_RANK
    }


def rival_calls(tokens: int, d: int, heads: int) -> Calls:
    """The rivals as layers of text, whose parameters are as at the start of training."""
    torch.manual_seed(0)
    q, k, v = drawn(tokens, d, heads)
    x = q.transpose(1, 2).flatten(2)
    made = {name: make(Layer(heads, d, tokens)) for name, make in RIVALS.items()}
    return {name: (lambda rival=rival: rival(q, k, v, x)) for name, rival in made.items()}
