"""Who is told that a site ran exactly at run time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

ExactSink = Callable[[int, str | None], None]
"""Is given the number of a site, and what failed if the device could not run its kernel."""

_exact_sink: ContextVar[ExactSink | None] = ContextVar("distr_exact_sink", default=None)


@contextmanager
def count_exact_calls(sink: ExactSink) -> Iterator[None]:
    """Call ``sink(site, failure)`` whenever the op turns to exact attention at run time.

    That happens for short sequences (``failure`` is None) and where a kernel does not compile or
    start (a text), and is told only in the thread or task that entered this context, and not when a
    recorded CUDA graph is replayed. Contexts nest; the innermost sink is called.
    """
    token = _exact_sink.set(sink)
    try:
        yield
    finally:
        _exact_sink.reset(token)


def tell_exact(site: int, failure: str | None) -> None:
    """Tell the innermost sink of one call, if there is any."""
    sink = _exact_sink.get()
    if sink is not None:
        sink(site, failure)
