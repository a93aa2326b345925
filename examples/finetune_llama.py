"""Fine-tune a Llama through the approximation with the Trainer of Hugging Face.

    python -m examples.finetune_llama

The model of ``tests/zoo`` writes Python source, byte by byte, and was trained exactly. At G = 4,
with 32 of 128 columns, ``projection`` costs it perplexity. The Trainer does not know the backend,
so the model is compiled before the Trainer takes it; a short training wins back what was lost, and
``save_pretrained`` and ``from_pretrained`` keep it. Both models are evaluated exactly and
approximated.
"""

from __future__ import annotations

import argparse
import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch import Generator, Tensor, nn
from torch.utils.data import Dataset
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

import distr_compile
from distr_compile import Policy
from distr_compile.accuracy.evaluate import evaluate
from tests.zoo import RECIPES, ZooModel

POLICY = Policy(
    {
        "group_size": 4,
        "min_seq_len": 0,  # also where it is not faster
        "training": "approximate",  # gradients flow through the approximation
    }
)
RECIPE = RECIPES["llama"]
BATCH, RATE, EVALUATED = 4, 5e-4, 4


class Sources(Dataset[dict[str, Tensor]]):
    """Pieces of the standard library's sources; the labels are the same bytes, one on."""

    def __init__(self, count: int) -> None:
        generator = Generator().manual_seed(1)
        batches = [RECIPE.sample(generator, 1.0) for _ in range(count)]
        self.ids = torch.cat([batch.kwargs["input_ids"] for batch in batches])[: count * BATCH]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def perplexity(zoo: ZooModel, model: nn.Module) -> dict[str, float]:
    """On sources that were held out, exactly and approximated."""
    policies = {"exact": None, "distr": POLICY}
    found = evaluate(model.eval(), zoo.batches[:EVALUATED], ["perplexity"], policies)
    return {name: each.values["perplexity"] for name, each in found.items()}


def finetune(model: nn.Module, steps: int, compiler: str, folder: str) -> None:
    """Train ``model`` in place and save it into ``folder``."""
    model.train().compile(backend="distr", options={"policy": POLICY, "compiler": compiler})
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=RATE,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 10),
        logging_steps=max(1, steps // 4),
        report_to=[],
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Sources(steps))
    trainer.train()
    print(distr_compile.report(model))
    trainer.save_model(folder)


def main(steps: int = 60, compiler: str = "inductor") -> None:
    torch.manual_seed(0)
    zoo = RECIPE.load()
    before = perplexity(zoo, zoo.model)
    with tempfile.TemporaryDirectory() as folder:
        finetune(zoo.model, steps, compiler, folder)
        tuned = LlamaForCausalLM.from_pretrained(folder)
    after = perplexity(zoo, tuned)
    print(f"\n{'perplexity':<10} {'before':>8} {'after':>8}")
    for name in before:
        print(f"{name:<10} {before[name]:8.3f} {after[name]:8.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--compiler", default="inductor", help="of the backend (default: inductor)")
    options = parser.parse_args()
    main(options.steps, options.compiler)
