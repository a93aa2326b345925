"""Q, K, V and sinks as the matcher wants them: layout, scale, repeated heads, dtype taken apart.

The product's factors come in every layout (a transposed K, an einsum's axis order), with the scale
multiplied in, upcast, or with key heads repeated for grouped-query attention. Each function here
undoes one of these and returns an :class:`Operand`; none changes the graph.
"""

from __future__ import annotations

import string
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from distr_compile.passes import vocabulary as voc
from distr_compile.passes.site import Factor, Operand, RefusedError
from distr_compile.passes.vocabulary import read, same_shape, same_size, shape_of, target_name


def operand(node: fx.Node, rank: int, *, transposed: bool) -> Operand:
    """A factor as (lead..., rows, width) at the rank of its product."""
    own = len(shape_of(node))
    if own < 2:
        raise RefusedError("layout", "a factor of the product is a vector")
    dims = list(range(own))
    if transposed:
        dims[-1], dims[-2] = dims[-2], dims[-1]
    return peel(node, tuple([-1] * (rank - own) + dims))


def peel(node: fx.Node, dims: tuple[int, ...]) -> Operand:
    """Take permutations and copies off a node and keep them as the operand's axis order."""
    while True:
        op = read(node)
        if isinstance(op, voc.Permute):
            dims = tuple(d if d < 0 else op.dims[d] for d in dims)
            node = op.x
        elif isinstance(op, voc.Identity) and target_name(node) in {"contiguous", "dropout"}:
            node = op.x
        else:
            break
    shape = shape_of(node)
    return Operand(node, dims, tuple(1 if d < 0 else shape[d] for d in dims))


# -- einsum -------------------------------------------------------------------------------------


def _labels(op: voc.Product) -> tuple[str, str, str]:
    left, arrow, out = (op.equation or "").partition("->")
    first, _, second = left.partition(",")
    if not arrow or any(
        len(set(x.replace(".", ""))) < len(x.replace(".", "")) for x in (first, second, out)
    ):
        raise RefusedError("layout", f"einsum {op.equation!r} is not read")
    # An ellipsis stands for axes that broadcast from the right; give them labels of their own.
    spare = [letter for letter in string.ascii_uppercase if letter not in left + out]
    widths = [
        len(shape_of(node)) - len(labels.replace("...", ""))
        for node, labels in ((op.a, first), (op.b, second))
        if "..." in labels
    ]
    hidden = "".join(spare[: max(widths, default=0)])

    def spelled(labels: str, rank: int) -> str:
        width = rank - len(labels.replace("...", ""))
        return labels.replace("...", hidden[len(hidden) - width :] if width else "")

    rank = len(out.replace("...", "")) + len(hidden)
    return (
        spelled(first, len(shape_of(op.a))),
        spelled(second, len(shape_of(op.b))),
        spelled(out, rank),
    )


def einsum_scores(op: voc.Product) -> tuple[Operand, Operand]:
    """Q and K of ``einsum("...", a, b)`` whose output ends in (query, key)."""
    first, second, out = _labels(op)
    summed = [label for label in first if label in second and label not in out]
    lost = [x for x in first + second if x not in out and x not in summed]
    if len(summed) != 1 or lost or len(out) < 2:
        raise RefusedError("layout", f"einsum {op.equation!r} does not contract one axis")
    sides = ((first, op.a), (second, op.b))
    (q_labels, q_node), (k_labels, k_node) = sides if out[-1] in second else sides[::-1]
    if out[-1] in q_labels or out[-2] in k_labels:
        raise RefusedError("layout", f"einsum {op.equation!r}: the output is not (..., query, key)")
    q_dims = [q_labels.find(x) for x in (*out[:-1], summed[0])]
    k_dims = [k_labels.find(x) for x in (*out[:-2], out[-1], summed[0])]
    return peel(q_node, tuple(q_dims)), peel(k_node, tuple(k_dims))


def einsum_values(
    op: voc.Product, weights: fx.Node, transposed: bool
) -> tuple[Operand, tuple[int, ...]]:
    """V of ``einsum("...", p, v)``, and its output's axes as a permutation of (lead, row, d_v)."""
    first, second, out = _labels(op)
    p, v, value = (first, second, op.b) if op.a is weights else (second, first, op.a)
    query, key = (p[-1], p[-2]) if transposed else (p[-2], p[-1])
    width = [x for x in v if x not in p]
    if key not in v or key in out or query in v or len(width) != 1 or len(out) != len(p):
        raise RefusedError("weights-edited", f"einsum {op.equation!r} does not contract the keys")
    axes = (*p[:-2], query, width[0])
    dims = tuple(v.find(x) for x in (*p[:-2], key, width[0]))
    return peel(value, dims), tuple(axes.index(x) for x in out)


# -- scale --------------------------------------------------------------------------------------


def take_scale(x: Operand) -> tuple[Operand, tuple[Factor, ...]]:
    """Take numbers multiplied into Q or K out, also from under reshapes; they go into the scale."""
    factors: list[Factor] = []
    while True:
        path: list[fx.Node] = []
        node = x.node
        while isinstance(op := read(node), voc.Reshape | voc.Permute | voc.Identity):
            path.append(node)
            node = op.x
        if not isinstance(op, voc.Scale) or voc.is_tensor(op.factor):
            return x, tuple(factors)
        if voc.written(node) is not None or not isinstance(op.factor, int | float | fx.Node):
            return x, tuple(factors)  # q *= c: what stood there before is gone
        if not _floating(op.x):
            return x, tuple(factors)
        if isinstance(op.factor, int | float) and op.factor <= 0:
            return x, tuple(factors)
        factors.append(Factor(op.factor, op.divide))
        if path:
            x = replace(x, node=op.x, replay=(*reversed(path), *x.replay))
        elif x.replay:
            x = replace(x, node=op.x)
        else:
            x = peel(op.x, x.dims)


def taken_off(node: fx.Node) -> fx.Node | None:
    """What a node reads, if it is one of those that this module looks through."""
    op = read(node)
    if isinstance(op, voc.Reshape | voc.Permute | voc.Identity | voc.Scale | voc.Cast):
        return op.x
    if target_name(node) in {"expand", "repeat_interleave"} and isinstance(node.args[0], fx.Node):
        return node.args[0]
    return None


def _floating(node: fx.Node) -> bool:
    value = voc.tensor_of(node)
    return value is not None and value.dtype.is_floating_point


# -- sinks --------------------------------------------------------------------------------------


def per_head(column: fx.Node) -> fx.Node | None:
    """The numbers, one per head, that were expanded to a column ``(..., H, N, 1)`` of scores.

    Returns:
        A node with H elements in the order of the heads (a parameter, as a rule); None where the
        column may hold anything else.
    """
    heads = shape_of(column)[-3:-2]
    node = column
    while not (heads and _thin(shape_of(node), heads[0])):
        op = read(node)
        if isinstance(op, voc.Cast | voc.Identity):
            node = op.x
        elif target_name(node) in {"expand", "expand_as", "broadcast_to", "repeat"}:
            if not voc.is_tensor(node.args[0]):
                return None
            node = node.args[0]  # type: ignore[assignment]
        else:
            return None
    while isinstance(op := read(node), voc.Reshape):
        node = op.x
    return node


def _thin(shape: tuple[Any, ...], heads: Any) -> bool:
    """Whether a shape is (1, ..., heads, 1, 1)."""
    others = (*shape[:-3], *shape[-2:])
    return len(shape) > 2 and same_size(shape[-3], heads) and all(same_size(s, 1) for s in others)


# -- repeated heads -----------------------------------------------------------------------------


def unrepeated(x: Operand) -> tuple[Operand, Any] | None:
    """The operand before its key heads were repeated, and how often; ``None`` if not repeated."""
    if len(x.dims) < 3 or x.dims[-3] < 0 or x.replay:
        return None
    head = x.dims[-3]
    base = _before_interleave(x.node, head) or _before_expand(x.node, head)
    if base is None:
        return None
    source, repeats = base
    shape = list(x.shape)
    shape[-3] = shape_of(source)[head]
    return peel_same(source, x.dims, tuple(shape)), repeats


def peel_same(node: fx.Node, dims: tuple[int, ...], shape: tuple[Any, ...]) -> Operand:
    """An operand over another node with the same axis order."""
    found = peel(node, dims)
    return found if same_shape(found.shape, shape) else Operand(node, dims, shape)


def _before_interleave(node: fx.Node, head: int) -> tuple[fx.Node, int] | None:
    if target_name(node) != "repeat_interleave":
        return None
    x: Any = node.args[0]
    repeats = node.args[1] if len(node.args) > 1 else node.kwargs.get("repeats")
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
    rank = len(shape_of(node))
    if not isinstance(repeats, int) or not isinstance(dim, int) or dim % rank != head:
        return None
    return x, repeats


def _before_expand(node: fx.Node, head: int) -> tuple[fx.Node, int] | None:
    """``reshape(expand(x[:, :, None], ...))``: heads (Hk, 1) -> (Hk, repeats) -> Hk * repeats."""
    merged = read(node)
    if not isinstance(merged, voc.Reshape) or target_name(merged.x) != "expand":
        return None
    wide: tuple[Any, ...] = shape_of(merged.x)
    inner: Any = merged.x.args[0]
    inserted = read(inner)
    if not isinstance(inserted, voc.Reshape):
        return None
    source, thin, result = inserted.x, shape_of(inner), shape_of(node)
    repeats = wide[head + 1] if len(wide) == len(result) + 1 else None
    if not isinstance(repeats, int) or len(thin) != len(wide) or not same_size(thin[head + 1], 1):
        return None
    untouched = (*thin[: head + 1], *thin[head + 2 :])
    is_repeat = (
        same_shape(untouched, shape_of(source))
        and same_shape((*wide[: head + 1], *wide[head + 2 :]), untouched)
        and same_shape((*wide[:head], *wide[head + 2 :]), (*result[:head], *result[head + 1 :]))
    )
    return (source, repeats) if is_repeat else None


# -- dtype --------------------------------------------------------------------------------------


def dtype_of(x: Operand) -> torch.dtype:
    """The operand's dtype."""
    value = voc.tensor_of(x.node)
    assert value is not None
    return value.dtype


def common_dtype(
    q: Operand, k: Operand, v: Operand, product: fx.Node, out: torch.Tensor
) -> tuple[Operand, Operand]:
    """Q and K in V's dtype: an upcast in front of the product is undone, it changed no value.

    Under autocast the operands may differ: the call casts them as the product did.
    """
    product_value = voc.tensor_of(product)
    q, k = (_without_upcast(x, dtype_of(v)) for x in (q, k))
    dtypes = {dtype_of(x) for x in (q, k, v)}
    if len(dtypes) == 1 and out.dtype in dtypes:
        return q, k
    is_autocast = (
        product_value is not None
        and product_value.dtype == out.dtype
        and out.dtype.itemsize < 4
        and out.dtype not in {dtype_of(q), dtype_of(k)}
    )
    if is_autocast or (product_value is not None and _only_autocast(dtypes, out.dtype)):
        return q, k
    names = ", ".join(sorted(str(d)[6:] for d in dtypes | {out.dtype}))
    raise RefusedError("mixed-dtype", f"Q, K, V and the output have different dtypes: {names}")


def _only_autocast(dtypes: set[torch.dtype], out: torch.dtype) -> bool:
    """Low precision out of full and low precision in: nothing but autocast gives that."""
    return out.itemsize < 4 and dtypes <= {torch.float32, out} and torch.float32 in dtypes


def _without_upcast(x: Operand, dtype: torch.dtype) -> Operand:
    while dtype_of(x) != dtype:
        op = read(x.node)
        source = voc.tensor_of(op.x) if isinstance(op, voc.Cast) else None
        if source is None or source.dtype.itemsize > dtype_of(x).itemsize or x.replay:
            return x
        x = peel(op.x, x.dims)  # type: ignore[union-attr]
    return x
