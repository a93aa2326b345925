"""Whether a call runs in the forward of a reentrant checkpoint, which records no gradients yet.

``torch.utils.checkpoint(..., use_reentrant=True)`` runs its function without gradients, and once
more with them in the backward. Both must be one function: the first is training, too.
"""

from __future__ import annotations

import sys
from types import FrameType

import torch
from torch.utils.checkpoint import CheckpointFunction

_FORWARD = CheckpointFunction.forward.__code__


def is_recomputed() -> bool:
    """Whether what runs now, without gradients, runs again in a backward, with them."""
    if torch.is_grad_enabled() or torch.compiler.is_dynamo_compiling():
        return False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _FORWARD:
        frame = frame.f_back
    return frame is not None
