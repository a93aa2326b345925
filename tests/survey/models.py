"""The zoo: tiny real models with random weights, each buildable offline in about a second.

They are listed in ``timm_models.py``, ``hf_models.py`` and ``diffusion/``. ``enliven`` then redraws
the weights, because at their own initialisation (std 0.02, layer scales of 1e-5) attention is
nearly uniform or nearly switched off, and a wrong rewrite would hide in the rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .diffusion import DIFFUSERS, build_diffusers
from .hf_models import HF, build_hf
from .timm_models import SAME_WHEN_FUSED, TIMM, build_timm

BUILD: dict[str, Callable[[str, str], tuple[nn.Module, dict[str, Any]]]] = {
    "timm": build_timm,
    "hf": build_hf,
    "diffusers": build_diffusers,
}


@dataclass(frozen=True)
class Case:
    """One model in one spelling of its attention: ``variant`` is "eager", "fused", "sdpa", ..."""

    source: str
    name: str
    variant: str

    @property
    def key(self) -> str:
        """The name a user selects it by, as in ``timm:beit_base_patch16_224:fused``."""
        return f"{self.source}:{self.name}:{self.variant}"

    def build(self) -> tuple[nn.Module, dict[str, Any]]:
        """The model in eval mode and its inputs (positional ones under "0", "1", ...)."""
        model, inputs = BUILD[self.source](self.name, self.variant)
        enliven(model.eval())
        calibrate(model, inputs)
        return model, inputs


def cases() -> Iterator[Case]:
    """Every case of the survey: timm, transformers, diffusers."""
    for name in TIMM:
        yield Case("timm", name, "eager")
        if name not in SAME_WHEN_FUSED:
            yield Case("timm", name, "fused")
    for name, spec in HF.items():
        for variant in spec.variants:
            yield Case("hf", name, variant)
    for name, entry in DIFFUSERS.items():
        for variant in entry.variants:
            yield Case("diffusers", name, variant)


def enliven(model: nn.Module, seed: int = 0) -> None:
    """Redraw weights so that scores have a spread near one and no gate is closed.

    Matrices get variance 1 / fan_in; every other floating parameter gets noise of 0.1 on top.
    """
    generator = torch.Generator().manual_seed(seed)
    matrices = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding)
    drawn: set[int] = set()
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) in drawn or not parameter.is_floating_point():
                    continue
                drawn.add(id(parameter))
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                if isinstance(module, matrices) and name == "weight":
                    fan_in = parameter.numel() // max(parameter.shape[0], 1)
                    parameter.copy_(noise / math.sqrt(max(fan_in, 1)))
                else:
                    parameter.add_(0.1 * noise)


def calibrate(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Set the statistics of the batch norms over images from these inputs.

    Untrained ones (mean 0, variance 1) let redrawn convolutions grow from layer to layer until the
    scores are in the thousands, and rounding alone then changes the outputs.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    args, kwargs = split(inputs)
    with torch.no_grad():
        model(*args, **kwargs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval()
        norm.momentum = momentum


def split(inputs: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword arguments out of a case's inputs."""
    args = [value for key, value in inputs.items() if key.isdigit()]
    return args, {key: value for key, value in inputs.items() if not key.isdigit()}
