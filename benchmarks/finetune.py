"""Does training through the approximation beat exact training that is approximated afterwards?

    python -m benchmarks.finetune [--quick] [--show] [--results PATH]

Three trained models of the zoo are trained for some more steps: exactly, and through each of six
approximations, all with the same optimiser, batches and three seeds. The ViT goes on to scenes that
are harder than those it knows; GPT-2 and the tagger go on with what they were trained on, GPT-2 in
batches three times as large, for with its own 300 steps teach it next to nothing. Each
result is compared, on data held out, with the exactly trained and exactly evaluated model of the
same seed ("exact"), and with that same model evaluated through the approximation ("control"): an
approximation that is only used afterwards has to be beaten for training through it to be worth it.

Differences are points (hundredths of top-1 and F1) or per cent of the perplexity, with a 95 %
interval by the bootstrap over the held-out digits or texts, which both sides share.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import math
import statistics
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn

from benchmarks.paper.bootstrap import paired
from benchmarks.paper.script import NOT_MEASURED, Cells, Script, markdown
from benchmarks.store import ROOT, Cell
from distr_compile.accuracy.batch import Batch
from distr_compile.accuracy.evaluate import evaluate
from distr_compile.accuracy.metrics import as_metric, main_output
from distr_compile.policy import Policy
from tests.zoo import RECIPES, digits

STEPS, SEEDS = 300, (0, 1, 2)
RATE, WARMUP, CLIP = 1e-3, 0.1, 1.0
HARD = 0.6
"""How hard the ViT's scenes are; it was trained up to 0.35."""
LARGER, LARGER_RATE = 3, 2e-3
"""GPT-2's batches, in those of its recipe, and its learning rate."""
SCENES = 13
"""Scenes of each of the 320 held-out digits: 4,160 in all."""
FIXED = 16
"""Batches of training data on which the loss is compared before and after."""

MODELS = {"tagger": "BERT tagger (F1)", "gpt2": "GPT-2 (perplexity)", "digits-vit": "ViT (top-1)"}
POLICIES = {
    f"{name}, G={g}": {"estimator": name, "group_size": g, "min_seq_len": 0, "exact": "sdpa"}
    for name in ("lsh-sample", "lsh-mean", "projection")
    for g in (2, 4)
}
EXACT = "exact"
KEPT = ROOT / "build" / "finetune"
"""Weights and rows of what was trained exactly, for the cells that are compared with them."""


@dataclass(frozen=True)
class Subject:
    """A model, its data and its metric.

    Attributes:
        model: with the weights to start from.
        sample: draws a batch to train on.
        held_out: the evaluation data.
        metric: name of the task's metric.
        scenes: of the same unit that follow each other, ``(scenes, units)``; 1 where a row of the
            metric is a unit.
        rate: the highest learning rate.
    """

    model: nn.Module
    sample: Callable[[Generator], Batch]
    held_out: list[Batch]
    metric: str
    scenes: int = 1
    rate: float = RATE

    def value(self, rows: Tensor) -> float:
        """The metric of rows of units."""
        return rows.mean().item() if self.scenes > 1 else as_metric(self.metric).result(rows)

    def compared(self, rows: Tensor, others: Tensor, draws: int) -> dict[str, Any]:
        """Points, or per cent of a perplexity, that ``rows`` have more than ``others``."""
        if self.metric == "perplexity":
            found = paired(lambda x: math.log(self.value(x)), rows, others, draws)
            numbers = [100 * math.expm1(x) for x in (found.difference, found.low, found.high)]
        else:
            found = paired(self.value, rows, others, draws)
            numbers = [100 * x for x in (found.difference, found.low, found.high)]
        return {"difference": numbers[0], "interval": numbers[1:]}


@cache
def subject(name: str, quick: bool) -> Subject:
    recipe = RECIPES[name]
    zoo = recipe.load()
    metric = as_metric(recipe.metrics[0]).name
    if name != "digits-vit":
        held_out = zoo.batches[:2] if quick else zoo.batches
        sample = partial(recipe.sample, progress=1.0)
        if name == "gpt2":
            sample = partial(_joined, sample, LARGER)
            return Subject(zoo.model, sample, held_out, metric, rate=LARGER_RATE)
        return Subject(zoo.model, sample, held_out, metric)
    scenes = 2 if quick else SCENES
    return Subject(zoo.model, _hard_scenes, _held_out_scenes(scenes), metric, scenes)


def _joined(sample: Callable[[Generator], Batch], count: int, generator: Generator) -> Batch:
    """Some batches as one."""
    some = [sample(generator) for _ in range(count)]
    ids = torch.cat([batch.kwargs["input_ids"] for batch in some])
    return Batch(kwargs={"input_ids": ids}, labels=torch.cat([batch.labels for batch in some]))


def _hard_scenes(generator: Generator) -> Batch:
    labels = digits.digits(held_out=False)[1]
    chosen = torch.randint(len(labels), (digits.BATCH,), generator=generator)
    pictures = digits.scenes(chosen, 42, generator, held_out=False, hard=HARD)
    return Batch((pictures,), labels=labels[chosen])


def _held_out_scenes(scenes: int) -> list[Batch]:
    labels, batches = digits.digits(held_out=True)[1], []
    every = torch.arange(len(labels))
    for seed in range(1, scenes + 1):
        generator = Generator().manual_seed(seed)
        pictures = digits.scenes(every, 42, generator, held_out=True, hard=HARD)
        pairs = zip(pictures.split(digits.BATCH), labels.split(digits.BATCH), strict=True)
        batches += [Batch((part,), labels=answers) for part, answers in pairs]
    return batches


# --- training and evaluation -------------------------------------------------------------------


def trained(
    of: Subject,
    policy: dict[str, Any] | None,
    seed: int,
    steps: int,
    *,
    rate: float | None = None,
    prepare: Callable[[nn.Module], object] = lambda model: None,
    penalty: Callable[[nn.Module], Tensor | float] = lambda model: 0.0,
) -> tuple[nn.Module, list[float]]:
    """A copy of the model after ``steps`` more, and the loss of each.

    Args:
        of: the model and its data.
        policy: through which approximation; None for the model as it is.
        seed: of the batches.
        steps: of the optimiser.
        rate: the highest learning rate; None for the subject's own.
        prepare: changes the copy before.
        penalty: added to the loss.
    """
    rate = of.rate if rate is None else rate
    model = deepcopy(of.model).train()
    prepare(model)
    run: Any = model
    if policy is not None:
        torch._dynamo.reset()
        options = {"policy": Policy({**policy, "training": "approximate"}), "compiler": "eager"}
        run = torch.compile(model, backend="distr", options=options)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, max(2, steps), pct_start=WARMUP, cycle_momentum=False
    )
    generator, losses = Generator().manual_seed(1000 + seed), []
    for _ in range(steps):
        loss = _loss(run, of.sample(generator))
        optimizer.zero_grad()
        (loss + penalty(model)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return model.eval(), losses


def _loss(run: Callable[..., Any], batch: Batch) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = main_output(batch.call(run))
    return F.cross_entropy(logits.float().flatten(0, -2), batch.labels.flatten())


@torch.no_grad()
def loss_on_training_data(of: Subject, model: nn.Module, batches: int) -> float:
    """The mean loss, exactly, on batches that are the same for every model."""
    generator = Generator().manual_seed(77)
    return statistics.fmean(_loss(model, of.sample(generator)).item() for _ in range(batches))


def rows_of(of: Subject, model: nn.Module, arms: list[str]) -> dict[str, Tensor]:
    """Rows of the units of the held-out data, evaluated through each of ``arms``."""
    policies = {arm: None if arm == EXACT else Policy(default=POLICIES[arm]) for arm in arms}
    found = evaluate(model, of.held_out, [of.metric], policies)
    rows = {arm: each.rows[of.metric] for arm, each in found.items()}
    return {arm: by_unit(x, of.scenes) for arm, x in rows.items()} if of.scenes > 1 else rows


def by_unit(rows: Tensor, scenes: int) -> Tensor:
    """The share of hits among the scenes of each unit.

    Args:
        rows: hits and labels of each scene, ``(scenes * units, 2)``, the units of one scene after
            those of the other.
        scenes: of each unit.

    Returns:
        ``(units, 1)``.
    """
    hits, labels = rows.unbind(-1)
    return (hits / labels).view(scenes, -1).mean(0)[:, None]


# --- cells -------------------------------------------------------------------------------------


def key(name: str, seed: int, arm: str) -> str:
    return f"{name}, seed {seed}: {arm}"


def cells(quick: bool) -> Cells:
    if quick:
        arms = (EXACT, "lsh-sample, G=2")
        return {key("tagger", 0, arm): partial(cell, "tagger", 0, arm, True) for arm in arms}
    found: Cells = {f"{name}: untouched": partial(untouched, name) for name in MODELS}
    for seed in SEEDS:
        for name in MODELS:
            for arm in (EXACT, *POLICIES):
                found[key(name, seed, arm)] = partial(cell, name, seed, arm, False)
    return found


def untouched(name: str) -> Cell:
    """The model as it was, exactly and through each approximation."""
    of = subject(name, False)
    rows = rows_of(of, of.model, [EXACT, *POLICIES])
    return {
        "metric": of.metric,
        "units": len(rows[EXACT]),
        "values": {arm: of.value(x) for arm, x in rows.items()},
        "less exact": {arm: of.compared(rows[arm], rows[EXACT], 2000) for arm in POLICIES},
    }


def cell(name: str, seed: int, arm: str, quick: bool) -> Cell:
    """One training and what became of it."""
    of, draws = subject(name, quick), 50 if quick else 2000
    exact = _exactly_trained(name, seed, quick)
    if arm == EXACT:
        return {
            "metric": of.metric,
            "units": len(exact[EXACT]),
            "values": {each: of.value(x) for each, x in exact.items() if each != "losses"},
            "loss before, after": exact["losses"].tolist(),
            "less exact": {
                each: of.compared(exact[each], exact[EXACT], draws)
                for each in POLICIES
                if each in exact
            },
        }
    model, _ = trained(of, POLICIES[arm], seed, 2 if quick else STEPS)
    rows = rows_of(of, model, [EXACT, arm])
    return {
        "metric": of.metric,
        "value": of.value(rows[arm]),
        "evaluated exactly": of.value(rows[EXACT]),
        "less exact": of.compared(rows[arm], exact[EXACT], draws),
        "less control": of.compared(rows[arm], exact[arm], draws),
    }


@cache
def _exactly_trained(name: str, seed: int, quick: bool) -> dict[str, Tensor]:
    """Rows of the exactly trained model, by how it is evaluated; and its losses."""
    path = KEPT / f"{name}-{seed}.safetensors"
    if path.exists() and not quick:
        return load_file(path)
    of, batches = subject(name, quick), 2 if quick else FIXED
    model, _ = trained(of, None, seed, 2 if quick else STEPS)
    rows = rows_of(of, model, [EXACT, "lsh-sample, G=2"] if quick else [EXACT, *POLICIES])
    losses = [loss_on_training_data(of, each, batches) for each in (of.model, model)]
    rows["losses"] = torch.tensor(losses, dtype=torch.float64)
    if not quick:
        KEPT.mkdir(parents=True, exist_ok=True)
        save_file({each: x.contiguous() for each, x in rows.items()}, path)
    return rows


# --- the table ---------------------------------------------------------------------------------


def table(found: dict[str, Cell]) -> str:
    """A row for each way to train and evaluate, a column for each model."""
    rows: list[list[object]] = []
    rows.append(["untouched, exact", *(_untouched(found, name, EXACT) for name in MODELS)])
    rows.append(["trained exactly, exact", *(_exact(found, name) for name in MODELS)])
    for arm in POLICIES:
        rows.append([f"untouched, {arm}", *(_untouched(found, name, arm) for name in MODELS)])
        rows.append([f"control, {arm}", *(_seeds(_control(found, n, arm)) for n in MODELS)])
        through = [_of_seeds(found, name, arm) for name in MODELS]
        rows.append([f"through, {arm}", *(_seeds([c["less exact"] for c in x]) for x in through)])
        gain = [[c["less control"] for c in x] for x in through]
        rows.append(["less control", *map(_seeds, gain)])
    return markdown(rows, ["trained, evaluated", *MODELS.values()])


def _of_seeds(found: dict[str, Cell], name: str, arm: str) -> list[Cell]:
    return [c for seed in SEEDS if (c := found.get(key(name, seed, arm)))]


def _control(found: dict[str, Cell], name: str, arm: str) -> list[Cell]:
    return [c["less exact"][arm] for c in _of_seeds(found, name, EXACT)]


def _untouched(found: dict[str, Cell], name: str, arm: str) -> str:
    cell = found.get(f"{name}: untouched")
    if cell is None:
        return NOT_MEASURED
    value = f"{cell['values'][arm]:.4f}"
    return value if arm == EXACT else f"{value} ({_difference([cell['less exact'][arm]])})"


def _exact(found: dict[str, Cell], name: str) -> str:
    values = [c["values"][EXACT] for c in _of_seeds(found, name, EXACT)]
    return f"{statistics.fmean(values):.4f}{_spread(values, '.4f')}" if values else NOT_MEASURED


def _seeds(compared: list[Cell]) -> str:
    return _difference(compared) if compared else NOT_MEASURED


def _difference(compared: list[Cell]) -> str:
    """The mean over seeds, the widest of their intervals, and how far the seeds lie apart."""
    differences = [c["difference"] for c in compared]
    low = min(c["interval"][0] for c in compared)
    high = max(c["interval"][1] for c in compared)
    same = "" if low > 0 or high < 0 else ", no difference shown"
    mean = statistics.fmean(differences)
    return f"{mean:+.2f}: {low:+.2f} to {high:+.2f}{_spread(differences, '.2f')}{same}"


def _spread(values: list[float], form: str) -> str:
    if len(values) < 2:
        return f"; {len(values)} seed"
    return f"; {len(values)} seeds ± {statistics.stdev(values):{form}}"


SCRIPT = Script(
    "finetune",
    "Trained through the approximation (points, or per cent of the perplexity)",
    cells,
    table,
    (
        "distr_compile/estimators.py",
        "distr_compile/kernels/lsh/reference.py",
        "distr_compile/kernels/projection/reference.py",
        "tests/zoo",
    ),
    ("timm", "transformers", "scikit-learn"),
    folder="",
)

if __name__ == "__main__":
    SCRIPT.main()
