"""accelerate takes a model that was compiled in place, and keeps its gradients."""

from __future__ import annotations

import accelerate
import pytest
import torch
from torch import Tensor, nn

import distr_compile
from tests.integrations.classifier import OPTIONS, classifier, inputs


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


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


def test_its_own_setting_does_not_know_the_backend() -> None:
    with pytest.raises(ValueError, match="'DISTR' is not a valid DynamoBackend"):
        accelerate.Accelerator(cpu=True, dynamo_backend="distr")
