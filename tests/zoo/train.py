"""Train models of the zoo and write their weights.

    OMP_NUM_THREADS=1 python -m tests.zoo.train NAME ...

Everything is drawn from one seed. In bfloat16 where a matrix product is asked for; the weights are
kept in fp32 and written in fp16.
"""

from __future__ import annotations

import argparse
import os
import platform
import time

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Generator, nn

from distr_compile.accuracy.metrics import as_metric, main_output
from tests.zoo import TRAINED
from tests.zoo.recipe import Recipe, ZooModel, stored_weights

SEED = 0
WARMUP = 0.1  # of the steps
CLIP = 1.0  # norm of the gradient


def train(recipe: Recipe) -> tuple[nn.Module, float]:
    """The trained model, and the seconds it took."""
    torch.manual_seed(SEED)
    generator = Generator().manual_seed(SEED)
    model = recipe.build().train()
    optimizers = _optimizers(model, recipe.rate)
    rates = [
        torch.optim.lr_scheduler.OneCycleLR(
            each, recipe.rate, recipe.steps, pct_start=WARMUP, cycle_momentum=False
        )
        for each in optimizers
    ]
    start = time.perf_counter()
    mean = 0.0
    for step in range(1, recipe.steps + 1):
        batch = recipe.sample(generator, step / recipe.steps)
        with torch.autocast("cpu", torch.bfloat16):
            logits = main_output(batch.call(model))
        loss = F.cross_entropy(logits.float().flatten(0, -2), batch.labels.flatten())
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for each in (*optimizers, *rates):
            each.step()
        mean += loss.item()
        if step % 100 == 0:
            seconds = time.perf_counter() - start
            print(f"{recipe.name} step {step}: loss {mean / 100:.4f}, {seconds:.0f} s", flush=True)
            mean = 0.0
    return model.eval(), time.perf_counter() - start


def _optimizers(model: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices within the layers, AdamW for all else."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices, others = [], []
    for parameter in model.parameters():
        is_matrix = parameter.dim() == 2 and min(parameter.shape) >= 64
        (matrices if is_matrix and id(parameter) not in embeddings else others).append(parameter)
    return [
        torch.optim.Muon(matrices, rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


@torch.no_grad()
def skill(zoo: ZooModel) -> float:
    """The task metric on the evaluation data."""
    metric = as_metric(zoo.metrics[0])
    rows = []
    for batch in zoo.batches:
        output = batch.call(zoo.model)
        rows.append(metric.statistic(output, output, batch))
    return metric.result(torch.cat(rows))


def write(recipe: Recipe, model: nn.Module, seconds: float) -> float:
    """Write the weights with the skill they give, which is returned."""
    metadata = {
        "seed": str(SEED),
        "steps": str(recipe.steps),
        "seconds": f"{seconds:.0f}",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    recipe.weights.parent.mkdir(exist_ok=True)
    partial = recipe.weights.with_suffix(".partial")
    for _ in range(2):  # the skill is that of the weights in the file, rounded
        save_file(stored_weights(model), partial, metadata)
        partial.replace(recipe.weights)
        if "skill" in metadata:
            break
        zoo = recipe.load()
        metadata |= {
            "metric": as_metric(zoo.metrics[0]).name,
            "skill": f"{skill(zoo):.4f}",
            "data_digest": zoo.data_digest,
        }
    return float(metadata["skill"])


def main() -> None:
    parser = argparse.ArgumentParser(description="train models of the zoo, write their weights")
    parser.add_argument("names", nargs="+", choices=TRAINED, metavar="NAME", help="of a model")
    for name in parser.parse_args().names:
        recipe = TRAINED[name]
        model, seconds = train(recipe)
        print(f"{name}: {write(recipe, model, seconds):.4f} after {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
