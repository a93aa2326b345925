"""How far one tensor, or all tensors of a nested value, are from another, and what is rounding."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

BOUNDS: Mapping[torch.dtype, float] = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
"""The largest relative error that counts as rounding, by the lowest precision that took part."""


def named_tensors(value: Any, name: str = "out") -> Iterator[tuple[str, Tensor]]:
    """Every floating tensor in a nested value, with where it stands.

    Looked through are lists, tuples, mappings, dataclasses and objects with attributes, such as a
    cache; each object once.
    """
    yield from _named(value, name, set())


def _named(value: Any, name: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.layout is torch.strided and not value.is_nested:
            yield name, value
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    for part, item in _parts(value):
        yield from _named(item, name + part, seen)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((f"[{key!r}]", item) for key, item in value.items())
    elif isinstance(value, (list, tuple)):
        fields = getattr(value, "_fields", range(len(value)))
        yield from (
            (f".{key}" if isinstance(key, str) else f"[{key}]", item)
            for key, item in zip(fields, value, strict=True)
        )
    elif hasattr(value, "__dict__") and not isinstance(value, nn.Module) and not callable(value):
        yield from ((f".{key}", item) for key, item in vars(value).items())


def relative_error(want: Tensor, got: Tensor) -> float:
    """The norm of the difference over the norm of ``want``; infinite where they cannot be compared.

    That is where shapes differ, or where infinities and NaN do not stand in the same places. The
    difference itself where ``want`` is 0.
    """
    pair = _finite(want, got)
    if pair is None:
        return math.inf
    norm, difference = float(pair[0].norm()), float((pair[0] - pair[1]).norm())
    return difference / norm if norm else difference


def row_error(want: Tensor, got: Tensor) -> float:
    """The largest norm of the difference of two rows (vectors along the last axis), relative.

    Relative to the norm of that row of ``want``, but at least to the root mean square of the norms
    of all its rows. One wrong row among thousands shows as it would alone.
    """
    pair = _finite(want, got)
    if pair is None:
        return math.inf
    if want.dim() == 0 or want.numel() == 0:
        return relative_error(want, got)
    norms, differences = pair[0].norm(dim=-1), (pair[0] - pair[1]).norm(dim=-1)
    typical = float(norms.square().mean().sqrt())
    if typical:
        differences = differences / norms.clamp_min(typical)
    return float(differences.max())


def _finite(want: Tensor, got: Tensor) -> tuple[Tensor, Tensor] | None:
    """Both in the widest dtype, with 0 where both are the same infinity or NaN; None if not."""
    if want.shape != got.shape:
        return None
    dtype = torch.float32 if want.device.type == "mps" else torch.float64
    a, b = want.detach().to(dtype), got.detach().to(dtype)
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()):
        return None
    if not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return None
    return a.where(finite, 0.0), b.where(finite, 0.0)


def without_nan(want: Tensor, got: Tensor) -> Tensor:
    """``got`` with NaN where ``want`` has it: a row that sees no key has no value to compare."""
    return got.masked_fill(want.isnan(), torch.nan) if want.shape == got.shape else got


def bound_of(dtypes: set[torch.dtype]) -> float:
    """The widest of their bounds; 0 if none of them is a floating dtype with a bound."""
    return max((BOUNDS[dtype] for dtype in dtypes if dtype in BOUNDS), default=0.0)


def unlike(want: Tensor, got: Tensor) -> str:
    """What else but their values differs between two tensors; empty if nothing does."""
    for what in ("shape", "dtype", "requires_grad"):
        a, b = getattr(want, what), getattr(got, what)
        if a != b:
            a, b = (str(tuple(x) if what == "shape" else x) for x in (a, b))
            return f"{what} is {b} where the model has {a}"
    return ""


def is_equal(a: Tensor, b: Tensor) -> bool:
    """Whether every value is the same, NaN included."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
