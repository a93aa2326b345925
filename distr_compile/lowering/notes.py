"""What a forward notes for its backward, which may run in another graph, thread or context."""

from __future__ import annotations

import torch
from torch import Tensor

from distr_compile.lowering import exactly, told
from distr_compile.lowering.told import Listener


def write(like: Tensor) -> Tensor:
    """A note on the device of ``like``: whether this call computes exactly, and who listens.

    Returns:
        ``()`` int64: twice the number of the listener, 0 for none, and 1 more if exactly.
    """
    listener = told.current()
    number = 0 if listener is None else listener.number
    return like.new_full((), 2 * number + exactly.is_computing_exactly(), dtype=torch.int64)


def is_exact(note: Tensor) -> bool:
    """Whether the forward that wrote a note computed exactly.

    It waits for the device only in a process that has entered ``computing_exactly``, and not
    while a CUDA graph is recorded, which does not obey that context.
    """
    if not exactly.was_entered() or _is_recorded(note):
        return False
    return bool(int(note) & 1)


def listener(note: Tensor) -> Listener | None:
    """Who listened to the forward that wrote a note; it waits for the device."""
    return None if _is_recorded(note) else told.numbered(int(note) >> 1)


def _is_recorded(note: Tensor) -> bool:
    return note.is_cuda and torch.cuda.is_current_stream_capturing()
