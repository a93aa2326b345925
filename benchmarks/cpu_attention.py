"""Time of approximate attention on this CPU beside ``F.scaled_dot_product_attention``.

    python benchmarks/cpu_attention.py [--threads 2] [--estimator projection] [--json PATH]

Every round runs each variant once, in turn, so that a busy machine slows all of them; the ratio to
SDPA is taken within a round. ``padded`` is the alternative that was not taken: Qhat and Khat, given
for free, filled up with zero columns to the width of V, because SDPA's CPU kernel wants one width.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

from distr_compile.estimators import DEFAULT_ESTIMATOR, ESTIMATORS
from distr_compile.lowering import op  # noqa: F401  (registers the op)

GROUP_SIZES = (2, 4)
BLOCKS = (0, 1024, 256, 64)


def variants(q: Tensor, k: Tensor, v: Tensor, estimator: str) -> dict[str, Callable[[], Tensor]]:
    head_dim = q.shape[-1]
    scale = head_dim**-0.5
    half = head_dim // 2
    padded = [F.pad(t[..., :half], (0, head_dim - half)) for t in (q, k)]
    calls: dict[str, Callable[[], Tensor]] = {
        "SDPA": lambda: F.scaled_dot_product_attention(q, k, v, scale=scale),
        "SDPA, padded": lambda: F.scaled_dot_product_attention(*padded, v, scale=scale),
    }
    for group_size in GROUP_SIZES:
        for block in BLOCKS:
            name = f"distr, G = {group_size}, block {block or 'auto'}"
            calls[name] = lambda rank=head_dim // group_size, block=block: (  # type: ignore[misc]
                torch.ops.distr.attention(
                    q, k, v, scale=scale, rank=rank, estimator=estimator, grouping_block=block
                )
            )
    return calls


def measure(calls: dict[str, Callable[[], Tensor]], rounds: int) -> list[dict[str, object]]:
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
    return [
        {
            "variant": name,
            "median ms": statistics.median(ms),
            "min ms": min(ms),
            "max ms": max(ms),
            "x SDPA": statistics.median(
                own / exact for own, exact in zip(ms, times["SDPA"], strict=True)
            ),
        }
        for name, ms in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU attention: ours beside SDPA")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--estimator", default=DEFAULT_ESTIMATOR, choices=list(ESTIMATORS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    results = []
    for name in args.dtypes:
        # The layout of models: heads side by side in memory.
        shape = (1, args.tokens, args.heads, args.head_dim)
        q, k, v = (torch.randn(shape, dtype=getattr(torch, name)).transpose(1, 2) for _ in range(3))
        with torch.inference_mode():
            rows = measure(variants(q, k, v, args.estimator), args.rounds)
        print(f"\n{name}, {args.heads} heads x {args.tokens} tokens x {args.head_dim}")
        print(tabulate(rows, headers="keys", floatfmt=("", ".0f", ".0f", ".0f", ".2f")))
        results += [{"dtype": name, **row} for row in rows]
    if args.json:
        machine = {
            "processor": platform.processor() or platform.machine(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": args.threads,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        sizes = {
            name: getattr(args, name)
            for name in ("tokens", "heads", "head_dim", "rounds", "estimator")
        }
        document = {"machine": machine, "sizes": sizes, "results": results}
        args.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
