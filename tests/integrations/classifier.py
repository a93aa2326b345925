"""A small BERT that training loops take, its inputs, and how it is compiled in place before."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

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
