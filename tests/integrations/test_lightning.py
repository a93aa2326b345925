"""Lightning takes a network compiled in place, or a compiled module: its numbers, a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn

import distr_compile
from tests.integrations.classifier import (
    OPTIONS,
    TRAINED,
    classifier,
    inputs,
    is_approximated_both_ways,
)
from tests.kernels.cpu_kernel import require_kernel
from tests.test_training import layers, tokens

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


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
    trainer = lightning.Trainer(default_root_dir=tmp_path, **QUIET)
    data = torch.utils.data.TensorDataset(ids)
    (got,) = trainer.predict(module, torch.utils.data.DataLoader(data, batch_size=8))
    rows = distr_compile.report(owner).rows
    assert [(row.layer, row.decision) for row in rows] == [
        (layers[0], "exact"),
        (layers[1], "distr"),
    ]
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_lightning_trains_through_it(tmp_path: Path) -> None:
    """A LightningModule whose network is compiled: the loss falls."""
    require_kernel()
    losses: list[float] = []

    class Trained(lightning.LightningModule):
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

    module, x = Trained(), tokens(8)
    trainer = lightning.Trainer(max_epochs=20, default_root_dir=tmp_path, **QUIET)
    trainer.fit(module, torch.utils.data.DataLoader(x, batch_size=4))
    assert losses[-1] < 0.5 * losses[0]
    assert is_approximated_both_ways(module.network)
