"""Models of diffusers with random weights: every size in the config is made tiny by hand.

A class has the variant "sdpa", which is what diffusers runs by itself, and where its attention is
the library's ``Attention`` also "eager": softmax spelled out, by the processors that diffusers
keeps for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .autoencoders import AUTOENCODERS
from .spec import DiffusersSpec
from .transformers import TRANSFORMERS
from .unets import CONTROLNETS, UNETS

DIFFUSERS: dict[str, DiffusersSpec] = {**UNETS, **CONTROLNETS, **AUTOENCODERS, **TRANSFORMERS}


def build_diffusers(name: str, variant: str) -> tuple[nn.Module, dict[str, Any]]:
    """The model, and its inputs by keyword."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    spec = DIFFUSERS[name]
    torch.manual_seed(0)
    model = getattr(diffusers, name)(**spec.config)
    if variant == "eager":
        spell_out(model)
    generator = torch.Generator().manual_seed(1)
    inputs = {key: _draw(key, value, generator) for key, value in spec.inputs.items()}
    return model, inputs


def spell_out(model: nn.Module) -> None:
    """Give every ``Attention`` of diffusers the processor that spells its softmax out."""
    from diffusers.models import attention_processor as processors

    spelled = {
        processors.AttnProcessor2_0: processors.AttnProcessor,
        processors.AttnAddedKVProcessor2_0: processors.AttnAddedKVProcessor,
    }
    for module in model.modules():
        if isinstance(module, processors.Attention):
            module.set_processor(spelled[type(module.processor)]())


def _draw(name: str, value: Any, generator: torch.Generator) -> Any:
    if callable(value):
        return value()
    if not isinstance(value, tuple):
        return value
    if "mask" in name:
        mask = torch.ones(value, dtype=torch.long)
        mask[-1, -7:] = 0  # padding
        return mask
    if name.endswith(("_ids", "labels")):
        return torch.randint(0, 8, value, generator=generator)
    if name.startswith("timestep"):
        return torch.linspace(7, 500, value[0]).round()
    return torch.randn(value, generator=generator)
