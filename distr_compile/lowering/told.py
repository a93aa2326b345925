"""Who is told that a site ran otherwise than planned: exactly, or by another implementation."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from weakref import WeakValueDictionary

from distr_compile.reporting import Handover

Sink = Callable[[int, Handover | None], object]
"""Is given the number of a site, and why and by what it was computed; None says it was short."""


class Listener:
    """Who hears of calls; by its number also where its context was left, as in a backward.

    Attributes:
        hear: is called with the number of a site, and a :class:`Handover` or None.
        number: from 1 on, of this listener only.
    """

    def __init__(self, hear: Sink) -> None:
        self.hear = hear
        self.number = next(_numbers)
        _listeners[self.number] = self


_numbers = itertools.count(1)
_listeners: WeakValueDictionary[int, Listener] = WeakValueDictionary()
_current: ContextVar[Listener | None] = ContextVar("distr_listener", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Let ``listener`` hear whenever the op runs otherwise than planned.

    That is exactly, for short sequences or where an input carries a tangent, and by another
    implementation than the first, where that does not compile or start. It hears of what happens in
    the thread or task that entered this context and of backwards of these calls wherever they run,
    but of no replay of a recorded CUDA graph, and of no backward of what was recomputed outside of
    this context. Contexts nest; the innermost listener hears.
    """
    token = _current.set(listener)
    try:
        yield
    finally:
        _current.reset(token)


def current() -> Listener | None:
    """The innermost listener, if there is any."""
    return _current.get()


def numbered(number: int) -> Listener | None:
    """The listener of a number, as long as it lives."""
    return _listeners.get(number)


def tell(site: int, handover: Handover | None) -> None:
    """Tell the innermost listener of one call, if there is any."""
    listener = _current.get()
    if listener is not None:
        listener.hear(site, handover)
