"""Table 5 and Figure 8: a vision transformer, fine-tuned with each attention on five tasks.

    python -m benchmarks.paper.vit_finetuned

The paper fine-tunes ViT-B/16 for 20 epochs on ImageNet, CIFAR and iNaturalist. Here: the zoo's ViT
(3 layers, 197 tokens) for 300 steps on what :mod:`benchmarks.paper.vit_tasks` says. The 99 % rank
of its scores stands in the last row: a model of low rank says little of ``projection``. The curves
of the losses (Figure 8) are in the results.
"""

from __future__ import annotations

from functools import partial

from benchmarks.paper import tuned
from benchmarks.paper.script import NOT_MEASURED, Script, markdown
from benchmarks.paper.tuned import EXACT, RANKS, key
from benchmarks.paper.vit_tasks import TASKS
from benchmarks.store import Cell


def table(found: dict[str, Cell]) -> str:
    rows: list[list[object]] = []
    for arm in tuned.ARMS:
        rows.append([arm, *(tuned.text(found, task.name, arm, "top1") for task in TASKS)])
    rows.append(["99 % rank of the scores, exact", *(_ranks(found, task.name) for task in TASKS)])
    return markdown(rows, ["attention", *(task.name for task in TASKS)])


def _ranks(found: dict[str, Cell], task: str) -> str:
    c = found.get(key(task, EXACT, 0))
    return ", ".join(f"{rank:.1f}" for rank in c[RANKS]) if c else NOT_MEASURED


SCRIPT = Script(
    "vit_finetuned",
    "Table 5: top-1 of a ViT, fine-tuned (in brackets: less exact, in points)",
    partial(tuned.cells, TASKS),
    table,
    (
        "distr_compile/estimators.py",
        "benchmarks/finetune.py",
        "benchmarks/paper/tuned.py",
        "benchmarks/paper/vit_tasks.py",
        "benchmarks/paper/rivals",
        "tests/zoo",
    ),
    ("timm", "scikit-learn", "mlxtend", "scikit-image"),
)

if __name__ == "__main__":
    SCRIPT.main()
