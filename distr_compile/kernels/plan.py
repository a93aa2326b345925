"""A launch plan: the launches of a call, kept so that no call like it has to work them out again.

All that a call hands to its kernels, but for addresses, follows from its geometry: the shapes,
strides, dtypes, devices and alignments of its tensors, and its options. So the first call of a
geometry runs as it is written, while :func:`recording` takes down what goes through :func:`launch`
and :func:`new`; the plan then repeats that with other tensors. Nothing in a plan holds a tensor.

For a device with kernels of its own the interface is this:

- host code starts kernels by ``launch(kernel, grid, ...)`` and gets temporaries from ``new``;
- whoever runs a call of known geometry records it: ``with recording(inputs) as recorder``, then
  ``recorder.plan()``, which is None where the call did anything that cannot be repeated: it passed
  on a tensor that is neither an input, from its first element on, nor made by ``new``;
- a plan is called with inputs of the same geometry. It makes temporaries and frees each after the
  last launch that takes it, in the order in which the call did.

What runs between the launches, products of PyTorch for instance, is not seen: such calls must not
be recorded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MOST_PLANS = 1024
"""Plans that are kept; where they are more, all are made anew."""

Descriptor = tuple[type, dict[str, Any]]
"""Its class, and all of its attributes but ``base``."""


@dataclass(frozen=True)
class _Launch:
    """One launch.

    Attributes:
        run: the compiled kernel at its grid.
        arguments: all of them in the kernel's order, None for tensors.
        tensors: place among the arguments and slot of each tensor.
        descriptors: likewise of each tensor descriptor, with what makes it.
        made: slot, shape and dtype of the temporaries that it is the first to take.
        over: slots that no later launch takes.
    """

    run: Callable[..., object]
    arguments: list[Any]
    tensors: list[tuple[int, int]]
    descriptors: list[tuple[int, int, Descriptor]]
    made: list[tuple[int, tuple[int, ...], torch.dtype]]
    over: list[int]


class Plan:
    """Repeats the launches of a call; see the top of the file."""

    def __init__(self, launches: Sequence[_Launch], temporaries: int) -> None:
        self.launches = launches
        self.temporaries = temporaries

    def __call__(self, *inputs: Tensor | None) -> None:
        """Launch on the current stream of the inputs' device.

        Args:
            inputs: as they were recorded, of the same geometry. The first one is a tensor.
        """
        first = inputs[0]
        assert first is not None
        if first.is_cuda and first.get_device() != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                self._run(first, inputs)
        else:
            self._run(first, inputs)

    def _run(self, first: Tensor, inputs: tuple[Tensor | None, ...]) -> None:
        slots: list[Tensor | None] = [*inputs, *[None] * self.temporaries]
        for each in self.launches:
            for slot, shape, dtype in each.made:
                slots[slot] = first.new_empty(shape, dtype=dtype)
            arguments = each.arguments.copy()
            for place, slot in each.tensors:
                arguments[place] = slots[slot]
            for place, slot, (kind, attributes) in each.descriptors:
                # Not by its class, which would check again what was right before.
                descriptor: Any = object.__new__(kind)
                descriptor.__dict__.update(attributes, base=slots[slot])
                arguments[place] = descriptor
            each.run(*arguments)
            for slot in each.over:
                slots[slot] = None


class Recorder:
    """Takes down the launches of one call.

    Args:
        inputs: the tensors of the call, its output among them; None where there is none.
    """

    def __init__(self, inputs: Sequence[Tensor | None]) -> None:
        self.slots: dict[int, tuple[int, torch.dtype]] = {}
        self.is_whole = True
        self.made: dict[int, tuple[tuple[int, ...], torch.dtype]] = {}
        self.kept: list[Tensor] = []
        self.launches: list[tuple[_Launch, list[int]]] = []
        self.num_inputs = len(inputs)
        for slot, t in enumerate(inputs):
            if t is not None:
                self._add(slot, t)

    def _add(self, slot: int, t: Tensor) -> None:
        # Two with one address could not be told apart.
        self.is_whole &= t.numel() > 0 and t.data_ptr() not in self.slots
        self.slots[t.data_ptr()] = slot, t.dtype

    def made_new(self, t: Tensor) -> None:
        """A temporary of the call; it is kept alive, so that its address names it."""
        if not self.is_whole:
            return
        slot = self.num_inputs + len(self.kept)
        self.kept.append(t)
        self._add(slot, t)
        self.made[slot] = tuple(t.shape), t.dtype

    def launched(
        self,
        kernel: Any,
        compiled: Any,
        grid: tuple[int, ...],
        arguments: tuple[Any, ...],
        named: dict[str, Any],
    ) -> None:
        """A launch that was made; ``compiled`` is what Triton returned."""
        if compiled is None:  # the interpreter
            self.give_up()
        if not self.is_whole:
            return
        given = dict(zip(kernel.arg_names, arguments, strict=False)) | named
        values = [given[name] for name in kernel.arg_names]
        tensors, descriptors = [], []
        for place, value in enumerate(values):
            base = value.base if hasattr(value, "block_shape") else value
            if not isinstance(base, Tensor):
                continue
            slot, dtype = self.slots.get(base.data_ptr(), (-1, base.dtype))
            if slot < 0 or dtype != base.dtype:
                self.give_up()
                return
            values[place] = None
            if base is value:
                tensors.append((place, slot))
            else:
                attributes = {k: v for k, v in vars(value).items() if k != "base"}
                descriptors.append((place, slot, (type(value), attributes)))
        used = [slot for _, slot in tensors] + [slot for _, slot, _ in descriptors]
        run = compiled[(*grid, 1, 1)[:3]]
        self.launches.append((_Launch(run, values, tensors, descriptors, [], []), used))

    def give_up(self) -> None:
        """Keep nothing more: the call cannot be repeated."""
        self.is_whole = False
        self.kept.clear()

    def plan(self) -> Plan | None:
        """What repeats the call; None where nothing was launched, or not all can be repeated."""
        if not self.is_whole or not self.launches:
            return None
        seen: set[int] = set()
        for each, used in self.launches:
            for slot in dict.fromkeys(used):
                if slot in self.made and slot not in seen:
                    each.made.append((slot, *self.made[slot]))
                seen.add(slot)
        seen.clear()
        for each, used in reversed(self.launches):
            each.over.extend(s for s in dict.fromkeys(used) if s in self.made and s not in seen)
            seen.update(used)
        return Plan([each for each, _ in self.launches], len(self.made))


_recorder: ContextVar[Recorder | None] = ContextVar("distr_recorder", default=None)


@contextlib.contextmanager
def recording(inputs: Sequence[Tensor | None]) -> Iterator[Recorder]:
    """Take down what is launched inside, in this thread or task."""
    recorder = Recorder(inputs)
    token = _recorder.set(recorder)
    try:
        yield recorder
    finally:
        _recorder.reset(token)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **named: Any) -> None:
    """Start a Triton kernel, as ``kernel[grid](*arguments, **named)`` does."""
    compiled = kernel[grid](*arguments, **named)
    recorder = _recorder.get()
    if recorder is not None:
        recorder.launched(kernel, compiled, grid, arguments, named)


def do_not_repeat() -> None:
    """Say that the call that is recorded, if there is one, does what no plan repeats."""
    recorder = _recorder.get()
    if recorder is not None:
        recorder.give_up()


def new(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """A temporary of a call, without values, on the device of ``like``.

    Args:
        like: a tensor; its dtype is the default.
        shape: sizes; strides are those of a contiguous tensor.
        dtype: of the temporary.
    """
    t = like.new_empty(shape, dtype=dtype or like.dtype)
    recorder = _recorder.get()
    if recorder is not None:
        recorder.made_new(t)
    return t


def geometry(*tensors: Tensor | None) -> tuple[Hashable, ...]:
    """What the launches of a call depend on in its tensors: all but their values and addresses."""
    return tuple(
        None if t is None else (t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % 16)
        for t in tensors
    )


class Plans:
    """Plans by the geometry and the options of their calls."""

    def __init__(self, most: int = MOST_PLANS) -> None:
        self.found: dict[Hashable, Callable[..., object]] = {}
        self.most = most

    def get(self, key: Hashable) -> Callable[..., object] | None:
        """What repeats such a call, if there is something."""
        return self.found.get(key)

    def put(self, key: Hashable, plan: Callable[..., object]) -> None:
        """Keep it; when they are too many, begin anew."""
        if len(self.found) >= self.most:
            self.found.clear()
        self.found[key] = plan
