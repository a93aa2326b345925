"""Lightning takes a network that was compiled in place, or a compiled module: the same numbers.

A real training is in ``tests/test_training_loops.py``.
"""

from __future__ import annotations

from pathlib import Path

import lightning
import pytest
import torch
from torch import Tensor, nn

import distr_compile
from tests.integrations.classifier import TRAINED, classifier, inputs


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


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
