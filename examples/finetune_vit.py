"""Fine-tune a trained ViT through the approximation, so that it loses less to it.

python -m examples.finetune_vit

The model of ``tests/zoo`` reads digits in cluttered scenes and was trained exactly. The paper's
estimator at G = 4 costs it accuracy; a short fine-tuning through that very approximation wins some
of it back. The tuned weights are saved, loaded into a new model, and evaluated both ways.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import track
from safetensors.torch import save_file
from torch import nn

import distr_compile
from distr_compile import Policy
from distr_compile.accuracy.evaluate import evaluate
from tests.zoo import RECIPES, ZooModel
from tests.zoo.recipe import load_weights, stored_weights

POLICY = Policy(
    {
        "estimator": "lsh-sample",  # the paper's; projection loses nothing here to begin with
        "group_size": 4,
        "min_seq_len": 0,  # also where it is not faster
        "training": "approximate",  # gradients flow through the approximation
    }
)
RECIPE = RECIPES["digits-vit"]
RATE, CLIP = 3e-4, 1.0


def accuracy(zoo: ZooModel, model: nn.Module) -> dict[str, float]:
    """Top-1 on held-out scenes, exactly and approximated."""
    found = evaluate(model.eval(), zoo.batches, ["top1"], {"exact": None, "distr": POLICY})
    return {name: each.values["top1"] for name, each in found.items()}


def finetune(model: nn.Module, steps: int, compiler: str) -> list[float]:
    """Train ``model`` in place; the loss of each step."""
    options = {"policy": POLICY, "compiler": compiler}
    compiled = torch.compile(model.train(), backend="distr", options=options)
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, max(2, steps))
    generator, losses = torch.Generator().manual_seed(1), []
    for _ in track(range(steps), description="fine-tuning"):
        batch = RECIPE.sample(generator, 1.0)
        loss = F.cross_entropy(batch.call(compiled), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    print(distr_compile.report(compiled))
    return losses


def main(steps: int = 40, compiler: str = "inductor") -> None:
    torch.manual_seed(0)
    zoo = RECIPE.load()
    before = accuracy(zoo, zoo.model)
    losses = finetune(zoo.model, steps, compiler)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tuned.safetensors")
        save_file(stored_weights(zoo.model), path)
        tuned = RECIPE.build()
        load_weights(tuned, path)
    after = accuracy(zoo, tuned)
    quarter = max(1, steps // 4)
    first, last = (sum(part) / len(part) for part in (losses[:quarter], losses[-quarter:]))
    print(f"\nloss, first and last quarter of {steps} steps: {first:.3f} {last:.3f}")
    print(f"{'top-1':<8} {'before':>8} {'after':>8}")
    for name in before:
        print(f"{name:<8} {before[name]:8.3f} {after[name]:8.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--compiler", default="inductor", help="of the backend (default: inductor)")
    options = parser.parse_args()
    main(options.steps, options.compiler)
