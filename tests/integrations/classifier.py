"""A small BERT that training loops take, its data, and what becomes of it in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import distr_compile

TRAINED = {"default": {"min_seq_len": 0, "training": "approximate"}}
OPTIONS = {"policy": TRAINED, "compiler": "eager"}


def classifier() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        attention_probs_dropout_prob=0.0,
        hidden_dropout_prob=0.0,
    )
    model = transformers.BertForSequenceClassification(config)
    with torch.no_grad():  # scores that are not all alike
        for name, parameter in model.named_parameters():
            if "query.weight" in name or "key.weight" in name:
                parameter.mul_(15)
    return model


def inputs() -> dict[str, Tensor]:
    ids = torch.randint(0, 64, (8, 48), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": (ids[:, 0] > 31).long()}


def texts() -> list[dict[str, Any]]:
    """Rows to train on: whether the first token is of the upper half."""
    ids = torch.randint(0, 64, (64, 48), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": int(row[0] > 31)} for row in ids]


def trainer_losses(
    model: nn.Module, rows: list[dict[str, Any]], folder: Path, **options: Any
) -> list[float]:
    """The losses that the Trainer of transformers logs while it trains a model in place."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        learning_rate=3e-3,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    data: Any = rows
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def is_approximated_both_ways(model: nn.Module) -> bool:
    """Whether forward and backward of every attention ran through the approximation on a CPU."""
    rows = distr_compile.report(model).rows
    return {(row.decision, row.backward) for row in rows} == {("distr", "distr-cpu")}
