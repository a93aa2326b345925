"""Which implementation computes a call: the first in order that refuses nothing and does not fail.

An implementation is a module of this folder that is named in :data:`ORDER` and makes one
:class:`Implementation`; a new device is such a module and a line here.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from distr_compile.kernels.plan import Plans
from distr_compile.lowering import sdpa
from distr_compile.lowering.call import Approximation, Call, Shape
from distr_compile.reporting import Handover, Reason
from distr_compile.reporting.rows import Way

ORDER = ("cuda", "cpu_fused", "cpu")
"""Modules of this folder whose ``IMPLEMENTATION`` is asked in turn, before exact attention."""

EXACT = "sdpa"
"""The name of what computes a call where every implementation refused or failed, exactly."""


class KernelWarning(RuntimeWarning):
    """A kernel did not compile or run, and another computes the call."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute a call.

    Attributes:
        name: as the report shows it.
        refuses: says of a shape and an approximation why they cannot be computed, or None.
        run: computes a call: writes all of ``out``. It may raise whatever its compiler does.
        fallback: the same kernels in another form, which is asked where ``run`` fails.
    """

    name: str
    refuses: Callable[[Shape, Approximation], str | None]
    run: Callable[[Call], object]
    fallback: Implementation | None = None


plans = Plans()
"""What repeats a call, by its ``key``: implementations put it here, and the op looks here first. It
takes q, k, v, mask, sinks, bases and out of such a call; see ``kernels/plan.py``."""

PLANNED = {"cuda"}
"""Types of devices for which an implementation makes plans."""


@functools.cache
def implementations() -> tuple[Implementation, ...]:
    """All of :data:`ORDER`, loaded."""
    modules = (importlib.import_module(f"distr_compile.lowering.{name}") for name in ORDER)
    return tuple(module.IMPLEMENTATION for module in modules)


def willing(shape: Shape, approximation: Approximation) -> Iterator[Implementation]:
    """The ones that do not refuse, in order."""
    return (each for each in implementations() if each.refuses(shape, approximation) is None)


def refusals(shape: Shape, approximation: Approximation) -> dict[str, str]:
    """Why each of those that come before the one that would run refuses, by name."""
    said: dict[str, str] = {}
    for each in implementations():
        why = each.refuses(shape, approximation)
        if why is None:
            break
        said[each.name] = why
    return said


def name_of(shape: Shape, approximation: Approximation) -> str:
    """The name of the implementation that would run."""
    return next((each.name for each in willing(shape, approximation)), EXACT)


class Done(NamedTuple):
    """What computed a call.

    Attributes:
        by: its name.
        failures: what failed before, a sentence each.
    """

    by: str
    failures: list[str]

    def handover(self, way: Way = "forward", *, is_exact: bool = False) -> Handover | None:
        """What the report is told, where something failed; ``is_exact`` as of the handover."""
        if not self.failures:
            return None
        text = f"{'; '.join(self.failures)}; {self.by} computed the call"
        return Handover(Reason("kernel-failed", text), self.by, way, is_exact)


_failed: dict[tuple[object, ...], str] = {}


def run(call: Call) -> Done:
    """Fill ``call.out``; exactly, if nothing else can.

    An implementation that fails is not asked again for calls of its kind: the same variant, with
    strides and addresses of the same divisibility, which is what a kernel is compiled for. What the
    device reports at a launch is no such failure, and the next call tries again: it may be the
    fault of an earlier kernel, of anybody's.

    Returns:
        What computed it; where that is :data:`EXACT`, there is always something that failed.

    Raises:
        torch.OutOfMemoryError: as from any op, and the RuntimeError of the CPU's allocator; exact
            attention is not the answer to it.
    """
    runs = ((each.name, each.run) for each in _attempts(call.shape, call.approximation))
    done = attempt(call, runs, (EXACT, _exactly))
    if done.by == EXACT and not done.failures:
        return Done(EXACT, ["no implementation takes the call"])
    return done


def _exactly(call: Call) -> None:
    call.out.copy_(sdpa.attention(call.q, call.k, call.v, call.mask, **call.softmax))


Run = tuple[str, Callable[[Call], object]]
"""A name, and what computes a call."""


def attempt(call: Call, runs: Iterable[Run], last: Run) -> Done:
    """Compute a call by the first of ``runs`` that does not fail, or else by ``last``.

    Raises:
        torch.OutOfMemoryError: as ``run``.
    """
    shape, failures = call.shape, list[str]()
    for name, compute in runs:
        failure = _failed.get(_kind(name, call, shape)) if _failed else None
        if failure is None:
            try:
                compute(call)
                return Done(name, failures)
            except Exception as error:  # what compilers raise has no common base class
                if is_out_of_memory(error):
                    raise
                failure = _said(name, call, error)
                if not is_from_device(error):
                    _failed[_kind(name, call, shape)] = failure
                text = "distr.attention: a kernel failed, the next one computes the call"
                warnings.warn(f"{text}: {failure}", KernelWarning, stacklevel=3)
        failures.append(failure)
    name, compute = last
    compute(call)
    return Done(name, failures)


def _attempts(shape: Shape, approximation: Approximation) -> Iterator[Implementation]:
    """The ones that do not refuse, each before its fallback."""
    for each in willing(shape, approximation):
        yield each
        other = each.fallback
        if other is not None and other.refuses(shape, approximation) is None:
            yield other


def is_from_device(error: Exception) -> bool:
    """Whether a device reported it, perhaps late, and no compiler before the launch."""
    texts = ("CUDA error", "HIP error", "Triton Error [CUDA]", "Triton Error [HIP]")
    return isinstance(error, torch.AcceleratorError) or any(text in str(error) for text in texts)


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory could not be had; on a CPU that has no class of its own."""
    is_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return is_cpu or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def _said(failed: str, call: Call, error: Exception) -> str:
    why = str(error).strip().partition("\n")[0] or "no message"
    widths = f"d = {call.q.shape[3]}, r = {call.approximation.rank}, d_v = {call.v.shape[3]}"
    where = f"{failed}, {call.q.device}, {call.q.dtype}, {widths}"
    return f"{where}: {type(error).__name__}: {why}"


def _kind(name: str, call: Call, shape: Shape) -> tuple[object, ...]:
    """What a failure holds for: a kernel is compiled for no less."""
    tensors = [t for t in (call.q, call.k, call.v, call.mask, call.out) if t is not None]
    return (
        name,
        shape.device,
        shape.dtype,
        shape.head_dim,
        shape.value_dim,
        shape.is_causal,
        None if shape.mask is None else shape.mask[1],
        shape.softcap,
        shape.sinks,
        shape.dropout,
        call.approximation,
        *((s == 1, s % 16 == 0) for t in tensors for s in t.stride()),
        *(t.data_ptr() % 16 == 0 for t in tensors),
    )
