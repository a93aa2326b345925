"""Trainer, accelerate and Lightning take a model that was compiled in place, and keep its numbers.

Losses of real trainings are in ``tests/test_training_loops.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import lightning
import pytest
import torch
import transformers
from torch import Tensor, nn

import distr_compile

TRAINED = {"default": {"min_seq_len": 0, "training": "approximate"}}
OPTIONS = {"policy": TRAINED, "compiler": "eager"}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


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


def gradients(model: nn.Module) -> list[Tensor]:
    found = [p.grad for p in model.parameters()]
    return [grad for grad in found if grad is not None]


def test_accelerate() -> None:
    exact, alone, model = classifier(), classifier(), classifier()
    exact(**inputs()).loss.backward()
    alone.compile(backend="distr", options=OPTIONS)
    alone(**inputs()).loss.backward()
    model.compile(backend="distr", options=OPTIONS)
    accelerator = accelerate.Accelerator(cpu=True)
    prepared = accelerator.prepare(model)
    accelerator.backward(prepared(**inputs()).loss)
    assert {row.decision for row in distr_compile.report(model).rows} == {"distr"}
    torch.testing.assert_close(gradients(prepared), gradients(alone))
    pairs = zip(gradients(alone), gradients(exact), strict=True)
    assert max((a - b).norm() / b.norm() for a, b in pairs if b.norm() > 1e-4) > 1e-3


def test_a_trainer_predicts_what_the_model_does(tmp_path: Path) -> None:
    model, given = classifier().eval(), inputs()
    with torch.no_grad():
        exact = model(**given).logits
        model.compile(backend="distr", options=OPTIONS)
        wanted = model(**given).logits
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = transformers.Trainer(model=model, args=arguments)
    rows = [dict(zip(given, row, strict=True)) for row in zip(*given.values(), strict=True)]
    got = torch.from_numpy(trainer.predict(rows).predictions)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    assert (wanted - exact).abs().max() > 1e-4, "nothing was approximated"


class Module(lightning.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def predict_step(self, batch: list[Tensor]) -> Tensor:
        found: Tensor = self.net(batch[0]).logits
        return found


@pytest.mark.parametrize("whole", [False, True])
def test_lightning_predicts_what_the_model_does(whole: bool, tmp_path: Path) -> None:
    """The network compiled, or the module around it with names that begin at the network."""
    ids = inputs()["input_ids"]
    layers = [f"bert.encoder.layer.{i}.attention.self" for i in range(2)]
    rule = [{"layers": layers[0], "group_size": 1}]
    given = {"policy": {**TRAINED, "rule": rule}, "compiler": "eager"}
    alone = classifier().eval()
    alone.compile(backend="distr", options=given)
    with torch.no_grad():
        wanted = alone(ids).logits
    module = Module(classifier()).eval()
    owner = module.net
    if whole:
        owner = module = torch.compile(module, backend="distr", options={**given, "root": "net"})
    else:
        module.net.compile(backend="distr", options=given)
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    data = torch.utils.data.TensorDataset(ids)
    (got,) = trainer.predict(module, torch.utils.data.DataLoader(data, batch_size=8))
    rows = distr_compile.report(owner).rows
    assert [(row.layer, row.decision) for row in rows] == [
        (layers[0], "exact"),
        (layers[1], "distr"),
    ]
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_their_own_settings_do_not_know_the_backend(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'DISTR' is not a valid DynamoBackend"):
        accelerate.Accelerator(cpu=True, dynamo_backend="distr")
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, torch_compile_backend="distr"
    )
    with pytest.raises(ValueError, match="'DISTR' is not a valid DynamoBackend"):
        transformers.Trainer(model=classifier(), args=arguments)
