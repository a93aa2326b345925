"""How biased gradients are that hold the basis of ``projection`` constant, layer by layer.

    python -m benchmarks.gradient_bias

Each attention of the models of ``tests/zoo`` is differentiated twice on a batch of their data, in
fp64, with a random gradient of its output: by the op, which holds A and B constant, and by autograd
through the definition, A and B included. Reported are the norm of the difference over that of the
full gradient, and the cosine between both. Writes ``benchmarks/results/gradient_bias.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distr_compile.accuracy.instrument import Call, Instrument
from distr_compile.accuracy.progress import progress_bar
from distr_compile.kernels.attention import reference
from tests.zoo import ZOO, load

RESULTS = Path(__file__).parent / "results" / "gradient_bias.json"
GROUP_SIZES = (2, 4)
ENTRIES = 2
"""Batch entries that are looked at."""


def gradients(call: Call, group_size: int) -> dict[str, tuple[Tensor, Tensor]]:
    """dQ and dK of one call: with the basis held constant, and in full."""
    generator = torch.Generator().manual_seed(0)
    mask, sinks = (None if t is None else t.detach() for t in (call.mask, call.sinks))
    if mask is not None and mask.dim() == 4:
        mask = mask[:ENTRIES]
    k, v = (t[: max(1, min(ENTRIES, t.shape[0]))].double() for t in (call.k, call.v))
    q = call.q[:ENTRIES].double()
    options: dict[str, Any] = {
        "scale": call.scores.scale,
        "is_causal": call.scores.is_causal,
        "softcap": call.scores.softcap,
        "rank": q.shape[3] // group_size,
        "estimator": "projection",
        "grouping_block": 0,
    }
    if call.scores.offset is not None:
        options["causal_offset"] = call.scores.offset
    weights, found = None, []
    for is_full in (False, True):
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (q, k)]
            if is_full:
                out = reference.attention(*leaves, v, mask, sinks=sinks, **options)
            else:
                out = torch.ops.distr.attention(*leaves, v, mask, None, None, sinks, **options)
            if weights is None:
                weights = torch.randn(out.shape, generator=generator, dtype=out.dtype)
            found.append(torch.autograd.grad(out, leaves, weights))
    return {name: (found[0][i], found[1][i]) for i, name in enumerate(("dQ", "dK"))}


def compared(held: Tensor, full: Tensor) -> dict[str, float]:
    """Relative norm of the difference, and cosine."""
    norm = full.norm().item()
    cosine = (held * full).sum().item() / (held.norm().item() * norm)
    return {"error": (held - full).norm().item() / norm, "cosine": cosine}


def of_model(name: str) -> dict[str, Any]:
    """Layer -> group size -> gradient -> what ``compared`` says."""
    zoo, found = load(name), {}

    def answer(call: Call) -> Tensor:
        sizes = [g for g in GROUP_SIZES if call.q.shape[3] // g >= 16]
        if call.site.name not in found and sizes:
            found[call.site.name] = {
                str(g): {what: compared(*pair) for what, pair in gradients(call, g).items()}
                for g in sizes
            }
        return call.exact()

    instrument = Instrument(answer)
    with instrument.on(zoo.model) as model:
        zoo.batches[0].call(model)
    return found


def table(results: dict[str, Any]) -> str:
    """A line for each model and group size: medians over the layers, and the worst layer."""
    lines = [
        "| model | G | layers | dQ: error, median (worst) | cosine | dK: error | cosine |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, layers in results.items():
        for g in map(str, GROUP_SIZES):
            of = [layer[g] for layer in layers.values() if g in layer]
            if not of:
                continue
            cells = []
            for what in ("dQ", "dK"):
                for number, worst in (("error", max), ("cosine", min)):
                    values = [each[what][number] for each in of]
                    cells.append(f"{statistics.median(values):.2f} ({worst(values):.2f})")
            lines.append(f"| {name} | {g} | {len(of)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--models", nargs="+", default=list(ZOO), choices=list(ZOO))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    results: dict[str, Any] = {}
    with progress_bar(True) as progress:
        for name in progress.track(options.models, description="models"):
            torch.compiler.reset()
            results[name] = of_model(name)
    options.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
