"""Teach an approximated model to answer as the exact one does: distillation, without labels.

    python -m examples.distill

Teacher and student are the BERT of ``tests/zoo`` that says of every byte of Python source what it
is part of. The student's attention goes through the paper's estimator at G = 2, which costs it a
lot; it learns to give the teacher's probabilities on texts nobody labelled. Its weights are saved,
loaded into a new model, and evaluated on labels that neither saw.
"""

from __future__ import annotations

import argparse
import tempfile
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor, nn

import distr_compile
from distr_compile import Policy
from distr_compile.accuracy.evaluate import evaluate
from tests.zoo import RECIPES, ZooModel
from tests.zoo.recipe import load_weights, stored_weights

POLICY = Policy(
    {
        "estimator": "lsh-sample",  # the paper's; projection loses nothing here to begin with
        "group_size": 2,
        "min_seq_len": 0,  # also where it is not faster
        "training": "approximate",  # gradients flow through the approximation
    }
)
RECIPE = RECIPES["tagger"]
RATE = 1e-3


def f1(zoo: ZooModel, model: nn.Module) -> dict[str, float]:
    """Macro F1 on texts that were held out, exactly and approximated."""
    found = evaluate(model.eval(), zoo.batches, ["f1"], {"exact": None, "distr": POLICY})
    return {name: each.values["f1"] for name, each in found.items()}


def divergence(student: Tensor, teacher: Tensor, counted: Tensor) -> Tensor:
    """The mean KL divergence at the bytes that count, of logits ``(B, N, classes)``."""
    student, teacher = (x[counted].log_softmax(-1) for x in (student, teacher))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def distill(teacher: nn.Module, student: nn.Module, steps: int, compiler: str) -> list[float]:
    """Train ``student`` in place; the divergence at each step."""
    options = {"policy": POLICY, "compiler": compiler}
    compiled = torch.compile(student.train(), backend="distr", options=options)
    optimizer = torch.optim.AdamW(student.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, max(2, steps))
    generator, losses = torch.Generator().manual_seed(1), []
    for _ in track(range(steps), description="distilling"):
        batch = RECIPE.sample(generator, 1.0)
        with torch.no_grad():
            wanted = batch.call(teacher).logits
        counted = batch.kwargs["attention_mask"].bool()
        loss = divergence(batch.call(compiled).logits, wanted, counted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    print(distr_compile.report(compiled))
    return losses


def main(steps: int = 200, compiler: str = "inductor") -> None:
    torch.manual_seed(0)
    zoo = RECIPE.load()
    student = deepcopy(zoo.model)
    before = f1(zoo, student)
    losses = distill(zoo.model, student, steps, compiler)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "student.safetensors")
        save_file(stored_weights(student), path)
        tuned = RECIPE.build()
        load_weights(tuned, path)
    after = f1(zoo, tuned)
    quarter = max(1, steps // 4)
    first, last = (sum(part) / len(part) for part in (losses[:quarter], losses[-quarter:]))
    print(f"\nKL, first and last quarter of {steps} steps: {first:.3f} {last:.3f}")
    print(f"{'macro F1':<8} {'before':>8} {'after':>8}")
    for name in before:
        print(f"{name:<8} {before[name]:8.3f} {after[name]:8.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--compiler", default="inductor", help="of the backend (default: inductor)")
    options = parser.parse_args()
    main(options.steps, options.compiler)
