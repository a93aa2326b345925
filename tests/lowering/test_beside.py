"""The order of work on two streams, without a GPU: what is recorded says what waits for what."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from distr_compile.kernels.attention import reference
from distr_compile.lowering import beside, cuda
from tests.walk import by_kernels

GPU = torch.device("cuda", 0)


class Streams:
    """Stands where ``torch.cuda`` stands; each piece of work knows all that it comes after."""

    def __init__(self) -> None:
        self.main, self.current = Stream(self), None
        self.made = [self.main]
        self.before: dict[str, set[str]] = {}

    def current_stream(self, device: torch.device) -> Stream:
        assert device == GPU
        return self.current or self.main

    def Stream(self, device: torch.device) -> Stream:  # noqa: N802
        assert device == GPU
        self.made.append(Stream(self))
        return self.made[-1]

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self.current, before = stream, self.current
        yield
        self.current = before

    def work(self, name: str) -> None:
        stream = self.current or self.main
        self.before[name] = set(stream.done)
        stream.done.add(name)


class Stream:
    def __init__(self, streams: Streams) -> None:
        self.streams = streams
        self.done: set[str] = set()

    def record_event(self) -> frozenset[str]:
        return frozenset(self.done)

    def wait_event(self, event: frozenset[str]) -> None:
        self.done |= event


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    fake = Streams()
    for name in ("current_stream", "Stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    return fake


def run(streams: Streams, items: int) -> None:
    streams.work("inputs")

    def make(item: int) -> str:
        streams.work(f"make {item}")
        return f"made {item}"

    def use(item: int, made: str) -> None:
        assert made == f"made {item}"
        streams.work(f"use {item}")

    beside.one_ahead(range(items), make, use, GPU)


@pytest.mark.parametrize("items", [2, 3, 7])
def test_what_waits_for_what(items: int, streams: Streams) -> None:
    run(streams, items)
    before = streams.before
    for i in range(items):
        assert {"inputs", f"make {i}"} <= before[f"use {i}"]
        assert "inputs" in before[f"make {i}"]
        later = {f"use {j}" for j in range(max(0, i - 1), items)}
        assert not before[f"make {i}"] & later, "made beside the use of the one before"
        if i >= 2:  # whose memory it may get
            assert f"use {i - 2}" in before[f"make {i}"]


def test_the_streams_are_one_again_at_the_end(streams: Streams) -> None:
    run(streams, 3)
    everything = set(streams.before)
    assert len(streams.made) == 2
    for stream in streams.made:
        assert stream.done == everything


@pytest.mark.parametrize("items", [0, 1])
def test_one_item_needs_no_other_stream(items: int, streams: Streams) -> None:
    run(streams, items)
    assert len(streams.made) == 1


def test_nothing_that_was_made_is_kept(streams: Streams) -> None:
    """At most two at a time, and none of them after its use."""
    alive: list[int] = []

    class Made:
        def __init__(self, item: int) -> None:
            self.item = item
            alive.append(item)

        def __del__(self) -> None:
            alive.remove(self.item)

    def use(item: int, made: Made) -> None:
        assert alive == [item, item + 1][: 5 - item]

    beside.one_ahead(range(5), Made, use, GPU)
    assert not alive


@pytest.mark.parametrize("estimator", ["projection", "lsh-mean"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_bits_are_the_same_beside_and_in_turn(
    estimator: str, is_causal: bool, streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels, interpreted on the CPU, in the order in which a GPU's streams are given them."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 60, 32, generator=generator).half() for _ in "qkv")
    options: dict[str, Any] = {
        "scale": 32**-0.5, "is_causal": is_causal, "rank": 16, "estimator": estimator,
        "grouping_block": 30,
    }  # fmt: skip

    def run(workspace: int = 1) -> torch.Tensor:
        return by_kernels(q, k, v, out=torch.empty_like(q), workspace=workspace, **options)

    in_turn, whole = run(), run(workspace=2**24)
    seen: list[int] = []

    def one_ahead(items: Any, make: Any, use: Any, device: torch.device) -> None:
        seen.append(len(items))
        beside.one_ahead(items, make, use, GPU)

    monkeypatch.setattr(cuda, "one_ahead", one_ahead)
    together = run()
    assert seen == [4]
    assert len(streams.made) == 2
    assert torch.equal(together, in_turn)
    assert torch.equal(together, whole)
    want = reference.attention(*(t.double() for t in (q, k, v)), **options)
    assert (together - want).abs().max() < 0.02
