"""How long calls take on a device, by the host's clock or by events of the device itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

SAMPLE_S = 2e-3
"""Least time of a sample by the host's clock: shorter calls are repeated."""


class Clock(Protocol):
    """Times calls.

    Attributes:
        least_s: least time of a sample that it can be trusted with.
    """

    least_s: float

    def seconds(self, run: Callable[[], Any], repeats: int) -> float:
        """Seconds of a call, the mean of so many one after another."""


class HostClock:
    """A clock for a device on which a call has ended when it returns."""

    least_s = SAMPLE_S

    def seconds(self, run: Callable[[], Any], repeats: int) -> float:
        """See ``Clock``."""
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - start) / repeats


class EventClock:
    """A clock for a GPU: from the call's first work to the end of its last, on the device.

    Before each call a buffer of twice the L2 cache is overwritten, so that no call finds what an
    earlier one has left there. The host queues the call meanwhile: only what it takes longer than
    that counts, as in a model whose device is busy.

    Args:
        device: whose work is timed, on its current stream.
    """

    least_s = 0.0

    def __init__(self, device: torch.device) -> None:
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        self.device = device
        self.flush = torch.empty(size, dtype=torch.int8, device=device)

    def seconds(self, run: Callable[[], Any], repeats: int) -> float:
        """See ``Clock``; it waits for the device once, at the end."""
        events = []
        for _ in range(repeats):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.zero_()
            start.record()
            run()
            stop.record()
            events.append((start, stop))
        torch.cuda.synchronize(self.device)
        milliseconds = sum(float(start.elapsed_time(stop)) for start, stop in events)
        return milliseconds / (1e3 * repeats)


def clock_of(device: torch.device) -> Clock:
    """The clock for work on a device."""
    return EventClock(device) if device.type == "cuda" else HostClock()
