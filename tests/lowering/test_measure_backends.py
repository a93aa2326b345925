"""What is faster on a device with several backends of SDPA, which is faked: how it is measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from distr_compile.lowering import measure, sdpa
from distr_compile.lowering.call import Approximation, Shape
from distr_compile.lowering.clock import EventClock, HostClock, clock_of
from distr_compile.lowering.measure import DISTR, EXACT, SDPA, Measured, Race

CPU = torch.device("cpu")
ONE_HEAD = Shape(1, 1, 1, 200, 160, 64, 48, False, None, torch.float32, CPU)
HALF = Approximation("projection", 32)


class FakeDevice:
    """Its clock tells for each kind of call what was scripted, round by round.

    It also says how often each was called to be timed.
    """

    least_s = 0.0

    def __init__(self, times: dict[str, list[float]]) -> None:
        self.times, self.calls = times, dict.fromkeys(times, 0)
        self.running = ""

    def runs(self, name: str) -> Callable[..., None]:
        def run(*_: Any, **__: Any) -> None:
            if name not in self.times:
                raise RuntimeError(f"{name} does not take it")
            self.running = name

        return run

    def seconds(self, run: Callable[[], Any], repeats: int) -> float:
        assert repeats == 1, "events need no repetition"
        run()
        name = self.running
        self.calls[name] += 1
        return self.times[name][self.calls[name] % len(self.times[name])]

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        backends = {name: name for name in ("flash", "cudnn", "efficient")}
        monkeypatch.setattr(measure, "SEVERAL", {"cpu"})
        monkeypatch.setattr(measure, "clock_of", lambda device: self)
        monkeypatch.setattr(measure.sdpa, "switched_on", lambda: backends)
        monkeypatch.setattr(measure.sdpa, "by", lambda backend, run: self.runs(backend)())
        monkeypatch.setattr(
            measure, "arms", lambda *_: {arm: self.runs(arm) for arm in (SDPA, EXACT, DISTR)}
        )
        monkeypatch.setattr(measure.choose, "name_of", lambda *_: "distr-triton")


def test_the_fastest_backend_is_to_beat(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its median; a lucky round of another does not count."""
    times = {"flash": [4e-3], "cudnn": [2e-3, 2.1e-3], "efficient": [9e-3], DISTR: [1e-3]}
    device = FakeDevice(times | {"efficient": [9e-3] * 6 + [1e-6]})
    device.install(monkeypatch)
    found = measure.race(ONE_HEAD, HALF)
    assert isinstance(found, Race)
    assert found.backend == "cudnn"
    assert found.rounds == measure.ROUNDS == 7
    assert list(found.seconds) == [SDPA, DISTR]
    assert found.seconds[SDPA] == pytest.approx(2e-3, rel=0.06)
    assert 2.0 <= found.gain <= 2.1
    assert found.is_won
    assert len(set(device.calls.values())) == 1, "all take turns"
    assert "sdpa (cudnn)" in str(Measured(None, found))

    device = FakeDevice(times | {DISTR: [1.95e-3]})  # faster than flash, as fast as cuDNN
    device.install(monkeypatch)
    lost = measure.race(ONE_HEAD, HALF)
    assert isinstance(lost, Race)
    assert not lost.is_won


def test_backends_that_refuse_or_are_off_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice({"flash": [3e-3], DISTR: [1e-3], SDPA: [5e-3]})
    device.install(monkeypatch)
    found = measure.race(ONE_HEAD, HALF)
    assert isinstance(found, Race)
    assert (found.backend, found.seconds[SDPA]) == ("flash", pytest.approx(3e-3))
    monkeypatch.setattr(measure.sdpa, "switched_on", dict)
    alone = measure.race(ONE_HEAD, HALF)
    assert isinstance(alone, Race)
    assert (alone.backend, alone.seconds[SDPA]) == ("", pytest.approx(5e-3))
    monkeypatch.undo()
    device = FakeDevice({EXACT: [3e-3], DISTR: [1e-3]})
    device.install(monkeypatch)
    against_ours = measure.race(ONE_HEAD, HALF, EXACT)
    assert isinstance(against_ours, Race)
    assert (against_ours.backend, list(against_ours.seconds)) == ("", [EXACT, DISTR])


def test_memory_that_a_backend_lacks_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeDevice({DISTR: [1e-3]}).install(monkeypatch)

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(measure.sdpa, "by", fail)
    with pytest.raises(torch.OutOfMemoryError):
        measure.race(ONE_HEAD, HALF)


def test_a_backend_is_switched_off_by_pytorchs_switches() -> None:
    was = torch.backends.cuda.flash_sdp_enabled()
    try:
        for is_on in (True, False):
            torch.backends.cuda.enable_flash_sdp(is_on)
            assert ("flash" in sdpa.switched_on()) == is_on
    finally:
        torch.backends.cuda.enable_flash_sdp(was)
    q, k, v = (torch.randn(1, 2, 20, 32) for _ in "qkv")
    got = sdpa.by(sdpa.BACKENDS["flash"], lambda: F.scaled_dot_product_attention(q, k, v))
    wanted = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)


def test_events_time_calls_on_a_flushed_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            assert (clock.flush == 0).all() or order[-1] == "run"
            order.append("event")

        def elapsed_time(self, later: Any) -> float:
            return 3.0

    properties = SimpleNamespace(L2_cache_size=500)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append("wait"))
    clock = EventClock(CPU)
    assert clock.flush.numel() == 1000

    def run() -> None:
        clock.flush.fill_(1)
        order.append("run")

    assert clock.seconds(run, 2) == pytest.approx(3e-3)
    assert order == ["event", "run", "event"] * 2 + ["wait"]
    assert isinstance(clock_of(CPU), HostClock)
    assert HostClock().seconds(lambda: time.sleep(0.002), 3) >= 0.002


class Memory:
    """The counters of an allocator whose blocks are freed at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, allocated: int, peak: int) -> None:
        self.allocated, self.peak, self.resets = allocated, peak, 0
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: self.allocated)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peak)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)

    def reset(self, device: torch.device) -> None:
        self.peak, self.resets = self.allocated, self.resets + 1

    def use(self, size: int, *, dtype: Any = None, device: Any = None) -> None:
        self.peak = max(self.peak, self.allocated + -(-size // 512) * 512)


@pytest.mark.parametrize("peak", [1 << 20, 5 << 20, (5 << 20) + 100])
def test_the_peak_of_memory_is_the_callers_own(monkeypatch: pytest.MonkeyPatch, peak: int) -> None:
    memory = Memory(monkeypatch, allocated=1 << 20, peak=peak)
    monkeypatch.setattr(torch, "empty", memory.use)
    with measure.peak_kept(torch.device("cuda")):
        memory.use(64 << 20)
    assert memory.resets == 1
    assert peak - 512 < memory.peak <= peak


def test_a_peak_that_was_not_reached_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(monkeypatch, allocated=1 << 20, peak=5 << 20)
    with measure.peak_kept(torch.device("cuda")):
        memory.use(2 << 20)
    assert (memory.resets, memory.peak) == (0, 5 << 20)


def test_without_cuda_no_counter_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(monkeypatch, 0, 0)
    with measure.peak_kept(torch.device("cpu")):
        memory.use(1 << 20)
    assert (memory.resets, memory.peak) == (0, 1 << 20)
