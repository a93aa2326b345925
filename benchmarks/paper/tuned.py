"""What Tables 5 and 7 share: one model, fine-tuned with each attention.

Every arm has the same optimiser, steps and batches. Its learning rate is one of the same three,
chosen by a short training on data for validation; that choice is made once an arm, by seed 0. Each
seed's result is compared with exact attention trained from that seed, on the same held-out
examples, by the bootstrap over these.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.finetune import EXACT, KEPT, POLICIES, Subject, rows_of, trained
from benchmarks.paper.rivals import RIVALS
from benchmarks.paper.rivals.dropin import replace as put_in
from benchmarks.paper.rivals.primal import penalty
from benchmarks.paper.script import NOT_MEASURED, Cells
from benchmarks.store import Cell
from distr_compile.accuracy.batch import Batch
from distr_compile.accuracy.evaluate import evaluate
from distr_compile.accuracy.metrics import as_metric
from distr_compile.policy import Policy
from tests.zoo.rank import ranks

STEPS, STEPS_TO_CHOOSE, SEEDS = 300, 60, (0, 1, 2)
RATES = (3e-4, 1e-3, 3e-3)
ETA = 0.05
"""Of Primal's penalty, as its authors have it."""
RANKS = "99 % rank of each layer, exact"
CURVE = 10
"""Steps whose mean loss is one point of a curve."""
OURS = {
    name: POLICIES[name]
    for name in ("lsh-sample, G=2", "lsh-mean, G=2", "projection, G=2", "projection, G=4")
}
ARMS = (EXACT, *RIVALS, *OURS)


@dataclass(frozen=True)
class Task:
    """A model and data to fine-tune it on.

    Attributes:
        name: of the task; files and cells are named by it.
        subject: whether it is to be quick -> the model, its training data, and the data held out.
        validation: likewise -> data to choose the learning rate by.
        others: metrics beside the subject's own.
    """

    name: str
    subject: Callable[[bool], Subject]
    validation: Callable[[bool], list[Batch]]
    others: tuple[str, ...] = ()


def key(task: str, arm: str, seed: int) -> str:
    return f"{task}: {arm}, seed {seed}"


def cells(tasks: tuple[Task, ...], quick: bool) -> Cells:
    """Seed by seed, so that a run that is cut short has every arm once."""
    if quick:
        task = tasks[0]
        return {
            key(task.name, arm, 0): partial(cell, task, arm, 0, True) for arm in ("exact", "Hydra")
        }
    return {
        key(task.name, arm, seed): partial(cell, task, arm, seed, False)
        for seed in SEEDS
        for task in tasks
        for arm in ARMS
    }


def cell(task: Task, arm: str, seed: int, quick: bool) -> Cell:
    """One training, and how it compares with exact attention of the same seed."""
    of = task.subject(quick)
    found = _run(task, arm, seed, quick)
    exact = found if arm == EXACT else _run(task, EXACT, seed, quick)
    rows, exact_rows = (
        {n: x for n, x in each.items() if n in _metrics(task, of)} for each in (found, exact)
    )
    return {
        "rate": found["rate"].item(),
        "units": len(rows[of.metric]),
        RANKS: exact["rank"].tolist(),
        "curve": [x.mean().item() for x in found["losses"].split(CURVE)],
        "values": {name: _value(of, name, x) for name, x in rows.items()},
        "less exact": {
            name: replace(of, metric=name).compared(x, exact_rows[name], 50 if quick else 2000)
            for name, x in rows.items()
        },
    }


def _metrics(task: Task, of: Subject) -> tuple[str, ...]:
    return (of.metric, *task.others)


def _value(of: Subject, name: str, rows: Tensor) -> float:
    return replace(of, metric=name).value(rows)


def _run(task: Task, arm: str, seed: int, quick: bool) -> dict[str, Tensor]:
    """Rows of the held-out data by metric, losses and learning rate; exact ones are kept."""
    path = KEPT / f"{task.name}-{seed}.safetensors"
    if arm == EXACT and path.exists() and not quick:
        return load_file(path)
    of = task.subject(quick)
    rate = RATES[1] if quick else chosen_rate(task, arm)
    model, losses = _tuned(of, arm, seed, 2 if quick else STEPS, rate)
    found: dict[str, Tensor] = {}
    evaluated = arm if arm in OURS else EXACT  # a rival is in the model already
    for name in _metrics(task, of):
        found[name] = rows_of(replace(of, metric=name), model, [evaluated])[evaluated]
    found["losses"], found["rate"] = torch.tensor(losses), torch.tensor(rate)
    if arm == EXACT:
        layers = ranks(model, of.held_out).values()
        found["rank"] = torch.tensor([layer.mean for layer in layers])
    if arm == EXACT and not quick:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: x.contiguous() for name, x in found.items()}, path)
    return found


def _tuned(
    of: Subject, arm: str, seed: int, steps: int, rate: float
) -> tuple[nn.Module, list[float]]:
    torch.manual_seed(seed)  # rivals with parameters draw them
    more: dict[str, Any] = {}
    if arm in RIVALS:
        more["prepare"] = lambda model: put_in(model, RIVALS[arm])
    if arm == "Primal":
        more["penalty"] = lambda model: penalty(model, ETA)
    return trained(of, OURS.get(arm), seed, steps, rate=rate, **more)


@cache
def chosen_rate(task: Task, arm: str) -> float:
    """The learning rate that does best on the data for validation; kept beside the rows."""
    path = KEPT / f"{task.name}-{arm.replace(', ', '-')}-rate.json"
    if path.exists():
        return float(json.loads(path.read_text(encoding="utf-8"))["rate"])
    of = task.subject(False)
    metric, values = as_metric(of.metric), {}
    for rate in RATES:
        model, _ = _tuned(of, arm, 0, STEPS_TO_CHOOSE, rate)
        policy = Policy(default=OURS[arm]) if arm in OURS else None
        found = evaluate(model, task.validation(False), [of.metric], {"arm": policy})
        values[rate] = found["arm"].values[of.metric]
    best = max(values, key=lambda r: values[r] if metric.better == "higher" else -values[r])
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {"rate": best, "values": {str(r): x for r, x in values.items()}}
    path.write_text(json.dumps(kept), encoding="utf-8")
    return best


def text(found: dict[str, Cell], task: str, arm: str, metric: str) -> str:
    """The mean over the seeds; in brackets less exact, the widest interval, the deviation."""
    of = [c for seed in SEEDS if (c := found.get(key(task, arm, seed)))]
    if not of:
        return NOT_MEASURED
    mean = statistics.fmean(c["values"][metric] for c in of)
    if arm == EXACT:
        return f"{mean:.4f}"
    less = [c["less exact"][metric] for c in of]
    low, high = min(x["interval"][0] for x in less), max(x["interval"][1] for x in less)
    difference = statistics.fmean(x["difference"] for x in less)
    same = "" if low > 0 or high < 0 else ", no difference shown"
    seeds = f"{len(of)} seed" + ("" if len(of) == 1 else "s")
    if len(of) > 1:
        seeds += f" ± {statistics.stdev(x['difference'] for x in less):.2f}"
    return f"{mean:.4f} ({difference:+.2f}: {low:+.2f} to {high:+.2f}; {seeds}{same})"
