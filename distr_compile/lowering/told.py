"""Who is told that a site ran exactly at run time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from distr_compile.reporting import Reason

ExactSink = Callable[[int, Reason | None], None]
"""Is given the number of a site, and why its call was exact if not because it was short."""

_exact_sink: ContextVar[ExactSink | None] = ContextVar("distr_exact_sink", default=None)


@contextmanager
def count_exact_calls(sink: ExactSink) -> Iterator[None]:
    """Call ``sink(site, reason)`` whenever the op turns to exact attention at run time.

    That happens for short sequences (``reason`` is None), where a kernel does not compile or start,
    and where an input carries a tangent. It is told only in the thread or task that entered this
    context, and not when a recorded CUDA graph is replayed. Contexts nest; the innermost sink is
    called.
    """
    token = _exact_sink.set(sink)
    try:
        yield
    finally:
        _exact_sink.reset(token)


def tell_exact(site: int, reason: Reason | None) -> None:
    """Tell the innermost sink of one call, if there is any."""
    sink = _exact_sink.get()
    if sink is not None:
        sink(site, reason)
