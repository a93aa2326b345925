"""What the tests of calibrated policies begin with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from distr_compile.policy import Policy
from distr_compile.tuning.calibrate import Calibration, calibrate
from tests.tiny_models import noise, stack
from tests.tuning.calibrated import FIELDS


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.compiler.reset()


@pytest.fixture
def calibrated(tmp_path: Path) -> tuple[nn.Module, Calibration, Policy]:
    model = stack()
    batches = [noise(1, 2, 64), noise(2, 3, 40)]
    result = calibrate(model, batches, path=tmp_path / "b.safetensors", progress=False)
    policy = Policy({**FIELDS, "causal": "strict"}).with_bases(result.path, result.sha256)
    return model, result, policy
