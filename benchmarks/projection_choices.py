"""What else ``projection`` could be: other blocks, centred keys, fewer rows; error and speed.

    python -m benchmarks.projection_choices error [--models llama gpt2 ...] [--json PATH]
    python -m benchmarks.projection_choices speed [--threads 1] [--rounds 7]

``error``: every layer approximated, in fp64, as ``make regress`` measures it: the KL divergence
from the exact model (for MiniLM one minus the cosine of its embeddings) and the task's metric.

- ``l = ...``: query rows per grouping block; 128 is what "auto" takes at these lengths.
- ``centred``: the mean of the keys is taken off before their Gram matrix. It adds the same number
  to all scores of a row, which a softmax does not see, so no direction need be spent on it.
- ``half the rows``: Gram matrices of every second row of Q and of K.

``speed``: whole calls of the CPU kernel at rank d and with blocks of a quarter, half and all of
the rows, in turn in one run.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from benchmarks import cpu_kernel
from distr_compile.kernels.projection import cpu as projection_cpu
from distr_compile.kernels.projection import reference as projection
from distr_compile.lowering import cpu as lowering
from distr_compile.lowering import cpu_fused
from distr_compile.lowering.call import call_of
from tests.regression import gate

TOKENS = {"llama": 512, "gpt2": 256, "tagger": 256, "t5": 256, "minilm": 256}
AUTO = 128
METRICS = ("perplexity", "f1", "mrr")
CHOICES = ("as it is", "centred", "half the rows")


class Centred(projection_cpu._GramSum):
    """A sum over rows of K less their mean; for Q, whose ridge is not 0, as it is."""

    def __init__(self, like: Tensor) -> None:
        super().__init__(like)
        self._sum = like.new_zeros(*like.shape[:2], 1, like.shape[-1], dtype=self._dtype)
        self._count = self._sum.new_zeros(*like.shape[:2], 1, 1)

    def add(self, rows: Tensor, counts: Tensor | None) -> None:
        """Add the rows, and to their sum."""
        counted = rows.to(self._dtype).nan_to_num(nan=0, posinf=0, neginf=0)
        weights = counted.new_ones(counted.shape[:-1]) if counts is None else counts.to(counted)
        weights = weights.expand(counted.shape[:-1])[..., None]
        self._sum = self._sum + (counted * weights).sum(-2, keepdim=True)
        self._count = self._count + weights.sum(-2, keepdim=True)
        super().add(rows, counts)

    def normalised(self, *, ridge: float) -> tuple[Tensor, Tensor]:
        """The sum of (x - mean)^T (x - mean)."""
        if ridge:
            return super().normalised(ridge=ridge)
        unit = projection.power_of_two(self._largest)
        total = self._sum / unit
        mean = total / self._count.clamp(min=1)
        return projection.normalised(self._C - total.mT @ mean, unit, ridge=ridge)


class HalfTheRows(projection_cpu._GramSum):
    """A sum over every second row."""

    def add(self, rows: Tensor, counts: Tensor | None) -> None:
        """Add every second one of the rows."""
        super().add(rows[..., ::2, :], None if counts is None else counts[..., ::2])


SUMS = dict(zip(CHOICES, (projection_cpu._GramSum, Centred, HalfTheRows), strict=True))


def error_rows(model: str) -> Iterator[dict[str, Any]]:
    """One row for each choice, G and block."""
    blocks = sorted({AUTO, TOKENS[model] // 2, TOKENS[model]})
    wanted = {
        f"G = {g}, l = {block}": {
            "estimator": "projection",
            "group_size": g,
            "grouping_block": block,
        }
        for g in (2, 4)
        for block in blocks
    }
    gate.POLICIES |= wanted
    for choice in CHOICES:
        projection_cpu._GramSum = SUMS[choice]  # type: ignore[misc]
        try:
            result = gate.measure(model, tuple(wanted)).result
        finally:
            projection_cpu._GramSum = SUMS[CHOICES[0]]  # type: ignore[misc]
        for policy, found in result.policies.items():
            metrics = {name: metric.value for name, metric in found.metrics.items()}
            task = next(name for name in METRICS if name in metrics)
            divergence = metrics["kl"] if "kl" in metrics else 1 - metrics["cosine"]
            yield {
                "model": model, "choice": choice, "policy": policy, "metric": task,
                "value": metrics[task], "divergence": divergence,
            }  # fmt: skip


def by_case(rows: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
    """Model and policy -> choice -> its row."""
    cases: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault((row["model"], row["policy"]), {})[row["choice"]] = row
    return cases


def error_table(rows: list[dict[str, Any]]) -> str:
    """A line a model and policy; the divergence of each choice, and the task's metric as it is."""
    lines = []
    for (model, policy), by_choice in by_case(rows).items():
        plain = by_choice[CHOICES[0]]
        line = [model, policy, f"{plain['divergence']:.4g}"]
        for choice in CHOICES[1:]:
            change = by_choice[choice]["divergence"] / plain["divergence"] - 1
            line.append(f"{100 * change:+.1f} %")
        line += [plain["metric"], *(f"{by_choice[choice]['value']:.4g}" for choice in CHOICES)]
        lines.append(line)
    headers = ["model", "policy", "divergence", *CHOICES[1:], "metric", *CHOICES]
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


NAMES = {"llama": "Llama", "gpt2": "GPT-2", "tagger": "BERT tagger", "t5": "T5", "minilm": "MiniLM"}


def document(rows: list[dict[str, Any]], exact: dict[str, float]) -> Iterator[str]:
    """The lines of the table in docs/estimator-tables.md.

    Args:
        rows: of ``error``.
        exact: the task's metric of each exact model.
    """
    for (model, policy), by_choice in by_case(rows).items():
        group_size, block = policy.replace("G = ", "").replace("l = ", "").split(", ")
        plain = by_choice[CHOICES[0]]
        changes = [
            f"{100 * (by_choice[choice]['divergence'] / plain['divergence'] - 1):+.0f} %"
            for choice in CHOICES[1:]
        ]
        metric = f"{plain['metric']} {plain['value']:.4g} ({exact[model]:.4g})"
        parts = [NAMES[model], group_size, block, f"{plain['divergence']:.2g}", *changes, metric]
        yield f"| {' | '.join(parts)} |"


def arms(dtype: torch.dtype, d: int, tokens: int, heads: int) -> dict[str, Callable[[], object]]:
    """Whole calls: our exact kernel, and ``projection`` at G = 2 and 4 with each block."""
    q, k, v, out = (torch.randn(1, tokens, heads, d).to(dtype).transpose(1, 2) for _ in range(4))
    common: dict[str, Any] = {"scale": d**-0.5, "is_causal": False, "out": out}

    def approximate(group_size: int, block: int) -> Callable[[], object]:
        options = {"rank": d // group_size, "estimator": "projection", "grouping_block": block}
        ready = call_of(q, k, v, **options, **common)
        return lambda: lowering.run(ready, fused=True)

    exact = call_of(q, k, v, **common)
    found: dict[str, Callable[[], object]] = {"rank d": lambda: cpu_fused.exact_attention(exact)}
    for group_size in (2, 4):
        for part in (4, 2, 1):
            found[f"G = {group_size}, N / {part}"] = approximate(group_size, tokens // part)
    return found


def speed_table(rounds: int) -> str:
    """A line a shape: the speed of every block over our exact kernel."""
    lines, headers = [], []
    for name, dtype in cpu_kernel.DTYPES.items():
        for d, tokens, heads in ((64, 1024, 8), (128, 1024, 4), (64, 4096, 2), (128, 4096, 2)):
            load = os.getloadavg()[0]
            times = cpu_kernel.measure(arms(dtype, d, tokens, heads), rounds, 0.2)
            headers = list(times)[1:]
            ratios = [f"{cpu_kernel.ratio(times, arm, 'rank d'):.2f}" for arm in headers]
            lines.append([name, d, tokens, *ratios, f"{load:.1f}"])
            print(*lines[-1], flush=True)
    return tabulate(lines, ["dtype", "d", "N", *headers, "load"], tablefmt="github")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("error", "speed"))
    parser.add_argument("--models", nargs="+", choices=TOKENS, default=list(TOKENS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the rows of errors")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.what == "speed":
        print(speed_table(options.rounds))
        return
    rows: list[dict[str, Any]] = []
    for model in options.models:
        rows += error_rows(model)
        print(error_table([row for row in rows if row["model"] == model]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
