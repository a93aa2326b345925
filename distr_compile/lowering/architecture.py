"""The name of a GPU's architecture, as the table of tiles uses it."""

from __future__ import annotations

import functools

import torch

NEAREST = {
    "sm_87": "sm_86",
    "sm_88": "sm_86",
    "sm_103": "sm_100",
    # Consumer Blackwell has the shared memory and the matrix instructions of Ada.
    "sm_120": "sm_89",
    "sm_121": "sm_89",
    "gfx950": "gfx942",
}
"""Architectures that share the entries of another."""


@functools.lru_cache
def architecture(device: torch.device) -> str:
    """Such as "sm_90" or "gfx942"; the nearest one in the tables where there is no own entry.

    Args:
        device: a CUDA or ROCm device; any other is "default".
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return "default"
    if torch.version.hip is not None:
        name = str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    else:
        major, minor = torch.cuda.get_device_capability(device)
        name = f"sm_{major}{minor}"
    return NEAREST.get(name, name)
