"""Table 7: a Llama, fine-tuned with each attention at two lengths.

    python -m benchmarks.paper.llama_finetuned

The paper fine-tunes Llama-3.2-1B on MathInstruct and asks MMLU. Here: the zoo's Llama (4 layers,
heads of 128, Python source byte by byte, trained exactly on 512 bytes) goes on with each attention
at N = 256 and 512, and is asked for the next byte of sources that were held out.
"""

from __future__ import annotations

from functools import cache, partial

from torch import Generator

from benchmarks.finetune import Subject
from benchmarks.paper import tuned
from benchmarks.paper.script import Script, markdown
from benchmarks.paper.tuned import Task
from benchmarks.store import Cell
from distr_compile.accuracy.batch import Batch
from tests.zoo import RECIPES

LENGTHS = (256, 512)
METRICS = {"perplexity": "perplexity", "top1": "next byte"}
PUBLISHED = {
    "exact": (33.29, 32.50),
    "Flatten": (31.25, 31.27),
    "Primal": (24.11, 31.25),
    "Hydra": (29.46, 22.75),
    "Hyper": (33.29, 32.50),
    "lsh-sample, G=2": (31.37, 31.50),
}
"""Accuracy at N = 256 and 512."""
RECIPE = RECIPES["llama"]


def cut(batch: Batch, tokens: int) -> Batch:
    """The same bytes in texts of this length."""
    ids, labels = batch.kwargs["input_ids"], batch.labels
    return Batch(kwargs={"input_ids": ids.reshape(-1, tokens)}, labels=labels.reshape(-1, tokens))


@cache
def subject(tokens: int, quick: bool) -> Subject:
    zoo = RECIPE.load()
    held_out = zoo.batches[:1] if quick else zoo.batches

    def sample(generator: Generator) -> Batch:
        return cut(RECIPE.sample(generator, 1.0), tokens)

    return Subject(zoo.model, sample, [cut(b, tokens) for b in held_out], "perplexity")


@cache
def validation(tokens: int, quick: bool) -> list[Batch]:
    """Training text that no seed of the training draws."""
    generator = Generator().manual_seed(99)
    return [cut(RECIPE.sample(generator, 1.0), tokens) for _ in range(8)]


TASKS = tuple(
    Task(f"N={n}", partial(subject, n), partial(validation, n), ("top1",)) for n in LENGTHS
)


def table(found: dict[str, Cell]) -> str:
    rows: list[list[object]] = []
    for arm, (first, second) in PUBLISHED.items():
        rows.append([f"paper, {arm}", "", f"{first} %", "", f"{second} %"])
    for arm in tuned.ARMS:
        cells = (tuned.text(found, task.name, arm, metric) for task in TASKS for metric in METRICS)
        rows.append([arm, *cells])
    header = [f"{task.name}, {name}" for task in TASKS for name in METRICS.values()]
    return markdown(rows, ["attention", *header])


SCRIPT = Script(
    "llama_finetuned",
    "Table 7: Llama, fine-tuned (in brackets: less exact, in per cent and points)",
    partial(tuned.cells, TASKS),
    table,
    (
        "distr_compile/estimators.py",
        "benchmarks/finetune.py",
        "benchmarks/paper/tuned.py",
        "benchmarks/paper/rivals",
        "tests/zoo",
    ),
    ("transformers",),
)

if __name__ == "__main__":
    SCRIPT.main()
