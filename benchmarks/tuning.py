"""Tune every model of the zoo for budgets of 0.1 %, 1 % and 5 % of its metric: does it hold?

    python -m benchmarks.tuning [MODEL ...]

writes ``benchmarks/results/tuning.json`` (models that were not named keep their entries) and prints
the tables of docs/tuning.md. Inputs of the zoo are short, where an estimator costs as much as it
saves; so the choice is made by what the two products take (``time="products"``), which is what is
left at long lengths, and what is saved at the zoo's own lengths stands beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from distr_compile import Policy, tune
from distr_compile.accuracy.batch import Batch
from distr_compile.accuracy.evaluate import evaluate
from distr_compile.accuracy.instrument import site_errors
from distr_compile.accuracy.metrics import as_metric
from distr_compile.tuning.bounds import loss_with_bound
from distr_compile.tuning.cost import clock
from distr_compile.tuning.tuned import Tuning
from distr_compile.tuning.written import versions
from tests.zoo import ZOO, load

RESULTS = Path(__file__).with_name("results") / "tuning.json"
BUDGETS = (0.001, 0.01, 0.05)
UNIFORM = Policy({"estimator": "lsh-sample", "group_size": 2, "min_seq_len": 0})


def measured(name: str) -> dict[str, Any]:
    """The entry of one model."""
    zoo = load(name)
    metric = as_metric(zoo.metrics[0])
    held_out = zoo.batches[1::2]
    both = evaluate(zoo.model, held_out, [metric], {"exact": None, "uniform": UNIFORM})
    rows = [both[policy].rows[metric.name] for policy in both]
    uniform = loss_with_bound(metric, rows[0], rows[1], 0.95)
    entry: dict[str, Any] = {
        "metric": metric.name,
        "exact": uniform.exact,
        "examples": len(rows[0]),
        "uniform": {
            "loss": uniform.loss,
            "products_saved": saved(zoo.model, held_out[:1], UNIFORM, "products"),
        },
        "budgets": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for budget in BUDGETS:
            result = tune(
                zoo.model,
                zoo.batches,
                budget,
                metric=metric,
                path=Path(folder) / "policy.toml",  # one state for all budgets
                time="products",
            )
            print(f"\n{name}, budget {budget:.1%}\n{result}", file=sys.stderr)
            entry["budgets"][str(budget)] = of_budget(result, zoo.model, held_out[:1])
    entry["additive"] = additive(result)
    return entry


def of_budget(result: Tuning, model: torch.nn.Module, batches: list[Batch]) -> dict[str, Any]:
    """What was reached within one budget."""
    policy, held_out = result.policy, result.held_out
    return {
        "held_out_loss": None if held_out is None else held_out.loss,
        "held_out_at_most": None if held_out is None else held_out.upper,
        "tuning_loss": result.tuning.loss,
        "tuning_at_most": result.tuning.upper,
        "within": held_out is None or held_out.loss <= result.budget,
        "looks": result.looks,
        "layers": len(result.chosen.setting),
        "of_layers": len(result.points[1].setting),
        "products_saved": saved(model, batches, policy, "products"),
        "flops_saved": saved(model, batches, policy, "model"),
    }


def saved(model: torch.nn.Module, batches: list[Batch], policy: Policy, time: str) -> float:
    """Share of the exact attentions' operations that a policy saves."""
    count = clock(time, torch.device("cpu"))
    sites = site_errors(model, batches, {"policy": policy}).sites.values()
    exact = math.fsum(count.of_sites([site], None) for site in sites)
    ours = math.fsum(count.of_sites([site], policy.resolve(site.layer), "policy") for site in sites)
    return 1 - ours / exact


def additive(result: Tuning) -> dict[str, Any]:
    """How near the predicted losses of the choices that were verified come to the measured ones."""
    ratios = sorted(
        point.predicted / point.measured
        for point in result.points
        if point.kind in ("frontier", "chosen") and point.measured and point.predicted
    )
    return {"measure": result.smooth, "ratios": ratios}


def table(results: dict[str, Any]) -> str:
    """A line for each model and budget."""
    rows = []
    for name, entry in results["models"].items():
        for budget, of in entry["budgets"].items():
            rows.append(
                [
                    name,
                    f"{entry['metric']} {entry['exact']:.4g}",
                    f"{float(budget):.1%}",
                    *held_out_cells(of),
                    f"{of['layers']} of {of['of_layers']}",
                    f"{of['products_saved']:.0%}",
                    f"{of['flops_saved']:.0%}",
                    of["looks"],
                    f"{entry['uniform']['loss']:.1%}",
                ]
            )
    headers = ["model", "metric, exact", "budget", "held-out loss", "at most (95 %)", "within"]
    headers += ["layers", "products saved", "with estimators", "looks", "`lsh-sample` G = 2"]
    return tabulate(rows, headers, "github", disable_numparse=True)


def held_out_cells(of: dict[str, Any]) -> list[str]:
    if not of["layers"]:
        return ["all exact", "-", "-"]
    within = "yes" if of["within"] else "**no**"
    return [f"{of['held_out_loss']:.2%}", f"{of['held_out_at_most']:.2%}", within]


def additive_table(results: dict[str, Any]) -> str:
    """A line for each model: predicted over measured."""
    rows = []
    for name, entry in results["models"].items():
        ratios = entry["additive"]["ratios"]
        if ratios:
            middle = statistics.median(ratios)
            cells = [f"{x:.2f}" for x in (middle, ratios[0], ratios[-1])]
            rows.append([name, entry["additive"]["measure"], len(ratios), *cells])
    headers = ["model", "measure", "choices", "predicted / measured", "least", "most"]
    return tabulate(rows, headers, "github", disable_numparse=True)


def read() -> dict[str, Any]:
    if not RESULTS.exists():
        return {"models": {}}
    results: dict[str, Any] = json.loads(RESULTS.read_text())
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(ZOO))
    options = parser.parse_args()
    unknown = [name for name in options.models if name not in ZOO]
    if unknown:
        parser.error(f"got {', '.join(unknown)}; accepted: {', '.join(ZOO)}")
    for name in options.models or ZOO:
        entry = measured(name)
        models = {**read()["models"], name: entry}
        results = {"versions": versions(), "models": {x: models[x] for x in ZOO if x in models}}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    results = read()
    print(table(results))
    print()
    print(additive_table(results))


if __name__ == "__main__":
    main()
