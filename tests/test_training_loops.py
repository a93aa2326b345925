"""Training through the approximation in other people's loops: one real run each.

The libraries are those of the extra ``integrations``; where one is missing its test fails.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distr_compile
from tests.kernels.cpu_kernel import require_kernel
from tests.test_training import TRAINED, layers, tokens

OPTIONS = {"policy": TRAINED, "compiler": "eager"}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    require_kernel()
    torch.manual_seed(0)
    torch._dynamo.reset()


def classifier() -> Any:
    """A small BERT that is to tell the first token of a text."""
    transformers: Any = importlib.import_module("transformers")
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        attention_probs_dropout_prob=0.0,
        hidden_dropout_prob=0.0,
        num_labels=2,
    )
    return transformers.BertForSequenceClassification(config)


def texts() -> list[dict[str, Any]]:
    ids = torch.randint(0, 64, (64, 48), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": int(row[0] > 31)} for row in ids]


def is_approximated_both_ways(model: nn.Module) -> bool:
    rows = distr_compile.report(model).rows
    return {(row.decision, row.backward) for row in rows} == {("distr", "distr-cpu")}


def test_a_trainer_of_transformers(tmp_path: Path) -> None:
    """The Trainer of Hugging Face, with a model that was compiled in place: the loss falls."""
    transformers: Any = importlib.import_module("transformers")
    model = classifier()
    options = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=30,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        logging_steps=5,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    model.compile(backend="distr", options=OPTIONS)
    trainer = transformers.Trainer(model=model, args=options, train_dataset=texts())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    assert is_approximated_both_ways(model)


def test_low_rank_adapters_of_peft() -> None:
    """The frozen weights stay, the adapters learn."""
    peft: Any = importlib.import_module("peft")
    model = classifier()
    config = peft.LoraConfig(r=8, target_modules=["query", "key", "value"], task_type="SEQ_CLS")
    adapted = peft.get_peft_model(model, config)
    frozen = {n: p.detach().clone() for n, p in adapted.named_parameters() if not p.requires_grad}
    trained = [p for p in adapted.parameters() if p.requires_grad]
    compiled = torch.compile(adapted, backend="distr", options=OPTIONS)
    optimizer, data = torch.optim.AdamW(trained, 2e-2), texts()
    ids = torch.stack([each["input_ids"] for each in data])
    labels = torch.tensor([each["labels"] for each in data])
    losses = []
    for _ in range(30):
        loss = compiled(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    now = dict(adapted.named_parameters())
    assert frozen
    assert all(torch.equal(now[name], before) for name, before in frozen.items())
    adapters = [p.grad for name, p in now.items() if "lora_B" in name]
    assert len(adapters) == 6
    assert all(grad is not None and grad.norm() > 0 for grad in adapters)
    assert is_approximated_both_ways(compiled)


def test_lightning(tmp_path: Path) -> None:
    """A LightningModule whose network is compiled: the loss falls."""
    lightning: Any = importlib.import_module("lightning")
    losses: list[float] = []

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = layers()
            self.network.compile(backend="distr", options=OPTIONS)

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            loss: Tensor = (self.network(batch) - 0.3).square().mean()
            losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), 1e-2)

    module, x = Module(), tokens(8)
    trainer = lightning.Trainer(
        max_epochs=20,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, torch.utils.data.DataLoader(x, batch_size=4))
    assert losses[-1] < 0.5 * losses[0]
    assert is_approximated_both_ways(module.network)
