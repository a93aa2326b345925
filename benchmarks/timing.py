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
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

Calls = Mapping[str, Callable[[], Any]]

FLUSH_BYTES = 256 << 20
CYCLES_PER_S = 2e9  # at least the highest clock there is: a slower one sleeps longer
MAX_ROUNDS = 100
WHOLE = "whole call"  # beside the names of its kernels
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


def time_launches(
    device: str, call: Callable[[], Any], *, rounds: int, tick: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Milliseconds of each Triton kernel that a call launches, and of all of it, in every round.

    A kernel that is launched several times in a call counts with all of them. What PyTorch launches
    is in ``WHOLE`` only.

    Args:
        device: "cuda" or "cpu", where the interpreter is timed.
        call: has been called before, so that nothing is compiled now.
        rounds: how often.
        tick: is called once a round, a sign of life.
    """
    times: dict[str, list[float]] = defaultdict(list)
    nap = int(3 * _queueing_s(call) * CYCLES_PER_S) if device == "cuda" else 0
    for _ in range(rounds):
        tick()
        if nap:
            torch.cuda._sleep(nap)
        stop = _watch(device)
        with _seen_launches(device) as seen:
            call()
        seen.append((WHOLE, stop()))
        if device == "cuda":
            torch.cuda.synchronize()
        total: dict[str, float] = defaultdict(float)
        for name, milliseconds in seen:
            total[name] += milliseconds()
        for name, ms in total.items():
            times[name].append(ms)
    return dict(times)


Milliseconds = Callable[[], float]


def _watch(device: str) -> Callable[[], Milliseconds]:
    """Start a watch; what is returned stops it, and gives what reads it when the work is done."""
    if device == "cpu":
        start = time.perf_counter()

        def stop_wall() -> Milliseconds:
            ms = 1e3 * (time.perf_counter() - start)
            return lambda: ms

        return stop_wall
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()

    def stop_events() -> Milliseconds:
        last.record()
        return lambda: first.elapsed_time(last)

    return stop_events


@contextmanager
def _seen_launches(device: str) -> Iterator[list[tuple[str, Milliseconds]]]:
    """The kernels that are launched inside by name, each with its time."""
    from distr_compile.kernels.attention.triton_fwd import _attention_fwd

    kind: Any = type(_attention_fwd)  # compiled or interpreted, as Triton was imported
    run, seen = kind.run, []

    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        stop = _watch(device)
        result = run(self, *args, **kwargs)
        seen.append((self.fn.__name__, stop()))
        return result

    with mock.patch.object(kind, "run", timed):
        yield seen


def sustained_ms(call: Callable[[], Any], seconds: float) -> float:
    """Milliseconds a call on a GPU, one after another for some seconds: hot, without any flush."""
    torch.cuda.synchronize()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin, calls = time.perf_counter(), 0
    start.record()
    while time.perf_counter() - begin < seconds:
        for _ in range(8):  # in pieces, so that the queue stays short
            call()
        calls += 8
        torch.cuda.synchronize()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / calls


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
