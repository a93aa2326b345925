"""One call of a model: its arguments, and the right answers where they are known."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from types import GeneratorType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from distr_compile.accuracy.given import check_limit
from distr_compile.policy.errors import check_type, sentence, shown


@dataclass(frozen=True, eq=False)
class Batch:
    """Arguments of one call of a model, and labels for the metrics that need them.

    Attributes:
        args: positional arguments, a tuple or a list of them.
        kwargs: keyword arguments, a mapping; a mask called ``attention_mask`` also tells the
            metrics which positions count.
        labels: what the metric makes of it; the metrics here take a tensor of the classes of the
            output, of its shape without the last dimension, -100 where nothing is asked. The model
            does not see it.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    labels: Any = None

    def __post_init__(self) -> None:
        """Refuse arguments that are none.

        Raises:
            TypeError: ``args`` is no tuple or list, or ``kwargs`` no mapping.
        """
        advice = "one argument is written (x,), with a comma"
        check_type("args", self.args, (tuple, list), "a tuple or list of arguments", advice)
        accepted = "a mapping of names to arguments"
        check_type("kwargs", self.kwargs, Mapping, accepted, "give a dict")
        object.__setattr__(self, "args", tuple(self.args))

    @classmethod
    def of(cls, item: Any) -> Batch:
        """Take ``item`` as a batch.

        Args:
            item: a batch; a mapping of keyword arguments, such as a tokenizer's encoding; a tuple
                or a list of positional arguments, as a ``DataLoader`` over a ``TensorDataset``
                gives; or one argument.
        """
        if isinstance(item, Batch):
            return item
        if isinstance(item, Mapping):
            return cls(kwargs=dict(item))
        return cls(args=tuple(item) if isinstance(item, tuple | list) else (item,))

    def call(self, model: Callable[..., Any]) -> Any:
        """Call ``model`` with the arguments and return its output."""
        return model(*self.args, **self.kwargs)

    def to(self, device: torch.device | str) -> Batch:
        """Return a copy with the arguments' tensors on ``device``; labels stay where they are."""
        args = tuple(_moved(value, device) for value in self.args)
        return Batch(args, _moved(dict(self.kwargs), device), self.labels)


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(_moved(part, device) for part in value)
    if type(value) is dict:
        return {key: _moved(part, device) for key, part in value.items()}
    return value


Batches = Iterable[Any] | Callable[[], Iterable[Any]]
"""What can be walked more than once: a list, a data loader, or a function that gives an iterable.
Each item is anything ``Batch.of`` takes."""


def walk(batches: Batches, limit: int | None = None) -> Iterator[Batch]:
    """The batches from the first on, ``limit`` of them at most.

    Raises:
        ValueError: ``batches`` is an iterator, which could be walked only once, or gives the same
            one as before, or is nothing that can be walked; or ``limit`` is less than 0.
        TypeError: ``limit`` is no integer.
    """
    limit = check_limit(limit, least=0)
    items = batches() if callable(batches) and not isinstance(batches, Iterable) else batches
    accepted = "a list, a data loader, or a function that returns an iterable"
    if items is batches and isinstance(items, Iterator):
        got = f"{type(items).__name__}, which can be walked only once"
        raise ValueError(sentence("batches", got, accepted, "give list(batches) or a function"))
    if not isinstance(items, Iterable):
        raise ValueError(sentence("batches", shown(items), accepted, "return the batches there"))
    walked = iter(items)
    if not isinstance(items, list | tuple) and _begins_once(walked):
        if any(before() is walked for before in _WALKED):
            got = f"the same {type(walked).__name__} once more, which can be walked only once"
            raise ValueError(sentence("batches", got, accepted, "return a new one in each call"))
        _WALKED.append(_reference(walked))
    for item in islice(walked, limit):
        yield Batch.of(item)


_WALKED: deque[Callable[[], Any]] = deque(maxlen=2)
"""The iterators that were walked last, of those that nobody can set back."""


def _begins_once(walked: Iterator[Any]) -> bool:
    """Whether an iterator is Python's own; others may begin anew, as of workers that persist."""
    return isinstance(walked, GeneratorType) or type(walked).__module__ in {"builtins", "itertools"}


def _reference(walked: Iterator[Any]) -> Callable[[], Any]:
    """What gives an iterator while somebody holds it; one that takes no weak reference is held."""
    try:
        return weakref.ref(walked)
    except TypeError:
        return lambda: walked


class Digest(Protocol):
    """What ``hashlib`` makes."""

    def update(self, data: bytes, /) -> None:
        """Add bytes."""


def add_to_digest(digest: Digest, value: Any, *, tolerant: bool = False) -> None:
    """Add a batch, or any part of one, to a digest.

    Args:
        digest: what is added to.
        value: tensors, arrays, mappings, tuples and lists of such, and what has a ``repr``.
        tolerant: for numbers that are to be compared with those of another machine or library:
            pictures that were resampled there differ in their last bits. Of a floating-point tensor
            only the norm, to three digits, and four projections on fixed random signs, in units of
            the norm to three decimals, are added. They notice order and sign. A relative change of
            1e-6 changes the digest about once in a hundred times, one of more than 1e-2 always.
            Else every bit counts.
    """
    if isinstance(value, Batch):
        value = (value.args, value.kwargs, value.labels)
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        value = torch.from_numpy(np.array(value, order="C"))
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        digest.update(f"{tuple(value.shape)} {value.dtype}\n".encode())
        if tolerant and value.is_floating_point():
            value = _sketched(digest, value.double().flatten())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(f"{key}\n".encode())
            add_to_digest(digest, value[key], tolerant=tolerant)
    elif isinstance(value, tuple | list):
        digest.update(f"{len(value)}\n".encode())
        for part in value:
            add_to_digest(digest, part, tolerant=tolerant)
    else:
        digest.update(f"{value!r}\n".encode())


def _sketched(digest: Digest, x: Tensor) -> Tensor:
    """Add what is finite, roughly; answer with what is to be added exactly, the rest.

    ``x`` is flat, fp64.
    """
    finite = x.isfinite()
    rest = x.new_empty(0) if finite.all() else torch.where(finite, 0, x)
    x = torch.where(finite, x, 0)
    scale = x.abs().max().item() if len(x) else 0.0  # masks may be so large that squares overflow
    if scale == 0:
        digest.update(b"0\n")
        return rest
    x = x / scale
    norm = x.norm().item()
    digest.update(f"{scale * norm:.3g}\n".encode())
    # NumPy promises these bits to be the same everywhere, as torch does not of torch.randn.
    bits = np.random.PCG64(0).random_raw(len(x))
    for k in range(4):
        signs = torch.from_numpy(1.0 - 2.0 * ((bits >> np.uint64(k)) & np.uint64(1)))
        # Plus 0, so that there is no -0.
        digest.update(f"{round((x @ signs).item() / norm, 3) + 0.0:.3f}\n".encode())
    return rest
