"""One call of a model: its arguments, and the right answers where they are known."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """Arguments of one call of a model, and labels for the metrics that need them.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments; a mask called ``attention_mask`` also tells the metrics which
            positions count.
        labels: what the metric makes of it; the metrics here take a tensor of the classes of the
            output, of its shape without the last dimension, -100 where nothing is asked. The model
            does not see it.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    labels: Any = None

    @classmethod
    def of(cls, item: Any) -> Batch:
        """``item`` as a batch.

        Args:
            item: a batch; a mapping of keyword arguments, such as a tokenizer's encoding; a tuple
                of positional arguments; or one argument.
        """
        if isinstance(item, Batch):
            return item
        if isinstance(item, Mapping):
            return cls(kwargs=dict(item))
        return cls(args=item if isinstance(item, tuple) else (item,))

    def call(self, model: Callable[..., Any]) -> Any:
        """The output of ``model`` for the arguments."""
        return model(*self.args, **self.kwargs)

    def to(self, device: torch.device | str) -> Batch:
        """A copy with the tensors of the arguments on ``device``; labels stay where they are."""
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
        ValueError: ``batches`` is an iterator, which could be walked only once.
    """
    items = batches() if callable(batches) and not isinstance(batches, Iterable) else batches
    if items is batches and isinstance(items, Iterator):
        raise ValueError(
            f"batches: got {type(items).__name__}, which can be walked only once; accepted: a "
            "list, a data loader, or a function that returns an iterable; give list(batches) or a "
            "function"
        )
    assert isinstance(items, Iterable)
    for item in islice(items, limit):
        yield Batch.of(item)


class Digest(Protocol):
    """What ``hashlib`` makes."""

    def update(self, data: bytes, /) -> None:
        """Add bytes."""


def add_to_digest(digest: Digest, value: Any) -> None:
    """Add a batch, or any part of one, to a digest.

    Of integers every bit counts, of floating-point tensors the norm to four digits: resampled
    pictures differ in their last bits from one library to the next.
    """
    if isinstance(value, Batch):
        value = (value.args, value.kwargs, value.labels)
    if isinstance(value, Tensor):
        digest.update(f"{tuple(value.shape)} {value.dtype}\n".encode())
        if value.is_floating_point():
            digest.update(f"{value.detach().cpu().double().norm().item():.4g}\n".encode())
        else:
            digest.update(value.cpu().contiguous().numpy().tobytes())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(f"{key}\n".encode())
            add_to_digest(digest, value[key])
    elif isinstance(value, tuple | list):
        digest.update(f"{len(value)}\n".encode())
        for part in value:
            add_to_digest(digest, part)
    else:
        digest.update(f"{value!r}\n".encode())
