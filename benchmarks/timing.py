"""Time of several calls that are to be compared, taken in turn in one run.

On a GPU a time is that of the device alone, between two events. Before each call

- a buffer larger than the L2 cache is overwritten, so that no call finds its inputs there;
- the device is put to sleep for longer than the host needs to queue the call, so that the host's
  time is not in the figure, however many kernels the call has.

Every round runs each call once, in an order that turns from round to round: what slows the device
for a while (clocks, heat) slows all of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Calls = Mapping[str, Callable[[], Any]]

FLUSH_BYTES = 256 << 20
CYCLES_PER_S = 2e9  # at least the highest clock there is: a slower one sleeps longer
MAX_ROUNDS = 100
MIN_ROUNDS = {"cuda": 8, "cpu": 3}


def time_calls(
    device: str, calls: Calls, *, seconds: float, tick: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Milliseconds of each call in every round.

    Args:
        device: "cuda" or "cpu".
        calls: what to compare; each has been called before, so that nothing is compiled now.
        seconds: how long to go on, between ``MIN_ROUNDS`` and ``MAX_ROUNDS``.
        tick: is called once a round, a sign of life.
    """
    names = list(calls)
    if not names:
        return {}
    if device == "cuda":
        flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
        naps = {name: int(1.5 * _queueing_s(calls[name]) * CYCLES_PER_S) for name in names}

    def one_round(order: list[str]) -> dict[str, float]:
        if device == "cpu":
            return {name: _wall_ms(calls[name]) for name in order}
        events = {}
        for name in order:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            torch.cuda._sleep(naps[name])
            start.record()
            calls[name]()
            stop.record()
            events[name] = (start, stop)
        torch.cuda.synchronize()
        return {name: start.elapsed_time(stop) for name, (start, stop) in events.items()}

    begin = time.perf_counter()
    one_round(names)
    rounds = int(seconds / (time.perf_counter() - begin))
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(min(max(rounds, MIN_ROUNDS[device]), MAX_ROUNDS)):
        tick()
        first = turn % len(names)
        for name, ms in one_round(names[first:] + names[:first]).items():
            times[name].append(ms)
    return times


def time_host(device: str, calls: Calls, *, repeats: int, rounds: int) -> dict[str, list[float]]:
    """Microseconds of the host per call, in every round: queued one after another, not waited for.

    Only for calls that keep the device busy for less time than the host.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            times[name].append(1e6 * (time.perf_counter() - start) / repeats)
    return times


def summary(times: list[float], unit: str = "ms") -> dict[str, Any]:
    """Median, quartiles and number of the times."""
    lower, median, upper = statistics.quantiles(times, n=4, method="inclusive")
    return {f"median_{unit}": median, f"quartiles_{unit}": [lower, upper], "rounds": len(times)}


def _queueing_s(call: Callable[[], Any]) -> float:
    longest = 0.0
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        longest = max(longest, time.perf_counter() - start)
    torch.cuda.synchronize()
    return longest


def _wall_ms(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)
