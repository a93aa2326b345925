"""Calls whose tensors are DTensors: each process computes its heads, or its part of the batch.

An attention is a heap of independent ones, one for each entry of the batch and each key head with
the query heads that share it; no estimator looks beyond these. So a call that is sharded there is
computed where it lies. What is sharded otherwise is gathered first: along tokens or width, where
the sizes do not divide, or partial sums. Plain tensors beside DTensors are the same everywhere.

The rules are put in place when the first DTensor comes by, so that nobody else loads them.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distr_compile.lowering.registering import LIBRARY

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

BATCH, HEADS, WHOLE = "batch", "heads", "whole"

_RESULTS = {
    "attention": ("out",),
    "attention_recorded": ("out", "lse", "basis_q", "basis_k", "note"),
    "attention_backward": ("q", "k", "v", "mask", "sinks"),
}
"""What the ops give, by the names of the operands that it is like, or the gradient of."""


def is_sharded(x: Any) -> bool:
    """Whether a value is a DTensor, asked without loading what they need."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, getattr(module, "DTensor", ()))


def prepare(tensors: Sequence[Any]) -> None:
    """Put the rules in place if one of the tensors is a DTensor."""
    if any(map(is_sharded, tensors)):
        _register()


@functools.cache
def _register() -> None:
    from torch.distributed.tensor import DTensor

    for name in _RESULTS:
        rule = functools.partial(_run, name)
        torch.library.register_torch_dispatch(f"distr::{name}", DTensor, rule, lib=LIBRARY)


def told(q: Tensor, k: Tensor, v: Tensor) -> str:
    """How a call is computed by the processes of its mesh; nothing without a DTensor.

    Args:
        q: ``(B, H, N, d)``, as the op takes it.
        k: likewise.
        v: likewise.
    """
    if not any(map(is_sharded, (q, k, v))):
        return ""
    mesh = _mesh((q, k, v))
    parts = []
    for axis, (kind, why) in enumerate(_kinds(q, k, v)):
        if kind == WHOLE:
            parts.append(why)
        else:
            parts.append(f"{kind} sharded over {mesh.size(axis)} processes")
    return "; ".join(parts)


def _mesh(tensors: Sequence[Any]) -> Any:
    meshes = [t.device_mesh for t in tensors if is_sharded(t)]
    if any(mesh != meshes[0] for mesh in meshes):
        raise ValueError(
            f"distr.attention: got DTensors on {len(meshes)} different meshes; accepted: one mesh; "
            "redistribute them"
        )
    return meshes[0]


def _kinds(q: Tensor, k: Tensor, v: Tensor) -> list[tuple[str, str]]:
    """What is divided along each axis of the mesh; for ``WHOLE`` also why."""
    mesh, kinds = _mesh((q, k, v)), []
    left = {BATCH: q.shape[0], HEADS: k.shape[1]}
    for axis in range(mesh.ndim):
        placements = [t.placements[axis] for t in (q, k, v) if is_sharded(t)]  # type: ignore[attr-defined]
        dims = {getattr(p, "dim", None) for p in placements if not p.is_replicate()}
        parts, kind, why = mesh.size(axis), WHOLE, "replicated"
        for wish, dim in ((HEADS, 1), (BATCH, 0)):
            if dim not in dims or kind != WHOLE:
                continue
            if left[wish] % parts == 0:
                kind = wish
                left[wish] //= parts
            else:
                what = "key heads" if wish == HEADS else "entries of the batch"
                why = f"gathered: {left[wish]} {what} over {parts} processes do not divide"
        if kind == WHOLE and dims & {2, 3}:
            why = f"gathered: sharded along {'tokens' if 2 in dims else 'width'}"
        elif kind == WHOLE and None in dims:
            why = "gathered: partial sums"
        kinds.append((kind, why))
    return kinds


def _axes(name: str, shape: Sequence[int]) -> dict[str, int]:
    """Which axis of an operand or result is the batch, and which the heads; none if it has none."""
    if name == "sinks":
        return {HEADS: 0} if math.prod(shape) else {}
    if name.startswith("basis") and len(shape) == 3:
        return {HEADS: 0}
    if name == "mask":
        right = {HEADS: len(shape) - 3, BATCH: len(shape) - 4}
        return {kind: axis for kind, axis in right.items() if axis >= 0 and shape[axis] > 1}
    if len(shape) < 3:  # what was not asked for, or is not there
        return {}
    has_batch = name in ("q", "out", "grad", "lse") or shape[0] > 1  # of K and V it may be 1
    return {HEADS: 1, BATCH: 0} if has_batch else {HEADS: 1}


def _run(name: str, cls: type, func: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
    """Compute this process's part of a call, or all of it.

    Raises:
        NotImplementedError: the weights are dropped out: processes would have to agree on a seed.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    if dropout_p := (kwargs or {}).get("dropout_p"):
        raise NotImplementedError(
            f"dropout_p: got {dropout_p!r} with DTensors; accepted: 0; use local heads, whose "
            "processes draw for themselves"
        )
    names = [a.name for a in func._schema.arguments if not a.kwarg_only]
    given = dict(zip(names, args, strict=False))
    q, k, v = (given[each] for each in "qkv")
    present = {n: t for n, t in given.items() if t is not None}
    mesh = _mesh(list(present.values()))
    if not any(map(is_sharded, (q, k, v))):
        q = DTensor.from_local(q, mesh, [Replicate()] * mesh.ndim, run_check=False)
    kinds = [kind for kind, _ in _kinds(q, k, v)]

    def placed(axes: dict[str, int], missing: Any) -> list[Placement]:
        """Where an operand lies; a kind that it lacks the axis of is ``missing``."""
        return [
            Replicate() if kind == WHOLE else Shard(axes[kind]) if kind in axes else missing
            for kind in kinds
        ]

    def local(operand: str, t: Tensor) -> Tensor:
        t = t.detach()
        if not is_sharded(t):
            t = DTensor.from_local(t, mesh, [Replicate()] * mesh.ndim, run_check=False)
        where = placed(_axes(operand, t.shape), Replicate())
        here: Tensor = t.redistribute(mesh, where).to_local()  # type: ignore[attr-defined]
        return here

    with torch.no_grad():
        mine = [None if t is None else local(operand, t) for operand, t in given.items()]
        found = func(*mine, **(kwargs or {}))
        results = (found,) if isinstance(found, Tensor) else found
        wrapped = []
        for result, t in zip(_RESULTS[name], results, strict=True):
            is_gradient = name == "attention_backward"
            axes = _axes(result, given[result].shape if is_gradient and t.numel() else t.shape)
            # Of what many processes had the same of, each has a part of the gradient.
            missing = Partial() if is_gradient and t.numel() else Replicate()
            whole: DTensor = DTensor.from_local(t, mesh, placed(axes, missing), run_check=False)
            is_plain = is_gradient and given[result] is not None and not is_sharded(given[result])
            wrapped.append(whole.full_tensor() if is_plain else whole)
    return wrapped[0] if isinstance(found, Tensor) else tuple(wrapped)
