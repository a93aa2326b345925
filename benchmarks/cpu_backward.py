"""Speed of the CPU kernel's backward, and of both ways, as a multiple of that of SDPA's.

    python -m benchmarks.cpu_backward

SDPA's backward, ours at rank d (exact) and ours at G = 2 with given A and B take turns, on one
thread, and then forward and backward through the op, where ``calibrated`` has given A and B; a
ratio is the median over the rounds of processor times, so that other work on the machine counts
little. The load beside is printed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from distr_compile.kernels.attention.backward import backward
from distr_compile.lowering import op
from distr_compile.lowering.call import Approximation, Scores, op_arguments

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def arms(
    tokens: int, head_dim: int, dtype: torch.dtype, causal: bool
) -> dict[str, Callable[[], Any]]:
    """The backward of one call of two heads, by each."""
    generator = torch.Generator().manual_seed(0)
    sizes = (1, 2, tokens, head_dim)
    leaves = [torch.randn(sizes, generator=generator).to(dtype).requires_grad_() for _ in range(3)]
    out = F.scaled_dot_product_attention(*leaves, is_causal=causal)
    grad = torch.randn(sizes, generator=generator).to(dtype)
    q, k, v = (t.detach() for t in leaves)
    scale = head_dim**-0.5
    scores = q.float() @ k.float().mT * scale
    if causal:
        scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1) > 0, -torch.inf)
    lse = scores.logsumexp(-1)
    bases = tuple(torch.randn(1, 2, 1, head_dim, head_dim // 2) / head_dim**0.5 for _ in "AB")
    made = {"dq": torch.empty_like(q), "dk": torch.empty(sizes), "dv": torch.empty(sizes)}

    def ours(bases: Any) -> Callable[[], Any]:
        options: dict[str, Any] = {"scale": scale, "is_causal": causal, "bases": bases, **made}
        return lambda: backward(q, k, v, None, out.detach(), lse, grad, **options)

    return {
        "sdpa": lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True),
        "rank d": ours(None),
        "G = 2": ours(bases),
    }


def both_ways(
    tokens: int, head_dim: int, dtype: torch.dtype, causal: bool
) -> dict[str, Callable[[], Any]]:
    """Forward and backward of one call of two heads, by each."""
    generator = torch.Generator().manual_seed(0)
    sizes = (1, 2, tokens, head_dim)
    leaves = [torch.randn(sizes, generator=generator).to(dtype).requires_grad_() for _ in range(3)]
    grad = torch.randn(sizes, generator=generator).to(dtype)
    scores = Scores(head_dim**-0.5, causal)
    bases = [torch.randn(2, head_dim, head_dim // 2) / head_dim**0.5 for _ in "AB"]

    def ours(how: Approximation, *given: torch.Tensor) -> Callable[[], Any]:
        arguments = op_arguments(how, scores)
        return lambda: torch.autograd.grad(
            op.call(*leaves, None, *given, **arguments), leaves, grad
        )

    return {
        "sdpa": lambda: torch.autograd.grad(
            F.scaled_dot_product_attention(*leaves, is_causal=causal), leaves, grad
        ),
        "rank d, both ways": ours(Approximation.none(head_dim)),
        "G = 2, both ways": ours(Approximation("calibrated", head_dim // 2), *bases),
    }


def ratios(table: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """SDPA's time over each other one's: the median over the rounds."""
    times: dict[str, list[float]] = {name: [] for name in table}
    for _ in range(rounds + 1):
        for name, run in table.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    beside = list(zip(*(found[1:] for found in times.values()), strict=True))
    return {
        name: statistics.median(each[0] / each[i] for each in beside)
        for i, name in enumerate(table)
        if i
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"N = {options.tokens}, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    print("| dtype | d | causal | rank d | G = 2 | rank d, both ways | G = 2, both ways |")
    print("|---" * 7 + "|")
    for name, dtype in DTYPES.items():
        for head_dim in (64, 128):
            for causal in (False, True):
                shape = (options.tokens, head_dim, dtype, causal)
                found = ratios(arms(*shape), options.rounds)
                found |= ratios(both_ways(*shape), options.rounds)
                cells = " | ".join(f"{ratio:.2f}" for ratio in found.values())
                print(
                    f"| {name} | {head_dim} | {'yes' if causal else 'no'} | {cells} |", flush=True
                )


if __name__ == "__main__":
    main()
