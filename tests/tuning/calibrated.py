"""How the tests of calibrated policies compile a model and compare its outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distr_compile.policy import Policy

FIELDS = {"estimator": "calibrated", "rank": 16, "min_seq_len": 0}


def run(
    model: nn.Module, policy: Policy, *args: Any, compiler: str = "eager", **more: Any
) -> Tensor:
    options = {"policy": policy, "compiler": compiler}
    with torch.no_grad():
        out: Tensor = torch.compile(model, backend="distr", options=options, **more)(*args)
    return out


def relative(got: Tensor, wanted: Tensor) -> float:
    return ((got - wanted).norm() / wanted.norm()).item()
