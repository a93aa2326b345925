"""Q, K, V and sinks as the matcher wants them: layout, scale, repeated heads, dtype taken apart.

The product's factors come in every layout (a transposed K, an einsum's axis order), with the scale
multiplied in, upcast, or with key heads repeated for grouped-query attention. Each function here
undoes one of these and returns an :class:`Operand`; none changes the graph. They look through a
node only where ``see`` (:meth:`.Flow.through`) lets them: what is read in its stead, later, must
still hold what it held.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from distr_compile.passes import vocabulary as voc
from distr_compile.passes.site import Factor, Operand, RefusedError
from distr_compile.passes.vocabulary import fake, same_shape, same_size, shape_of, target_name

See = Callable[[fx.Node], "voc.Op | None"]


def operand(see: See, node: fx.Node, rank: int, *, transposed: bool) -> Operand:
    """A factor as (lead..., rows, width) at the rank of its product."""
    own = len(shape_of(node))
    if own < 2:
        raise RefusedError("layout", "a factor of the product is a vector")
    dims = list(range(own))
    if transposed:
        dims[-1], dims[-2] = dims[-2], dims[-1]
    return peel(see, node, tuple([-1] * (rank - own) + dims))


def peel(see: See, node: fx.Node, dims: tuple[int, ...]) -> Operand:
    """Take permutations, copies and casts to its own dtype off a node.

    The permutations are kept as the operand's axis order.
    """
    while isinstance(op := see(node), voc.Permute | voc.Identity | voc.Cast):
        if isinstance(op, voc.Permute):
            dims = tuple(d if d < 0 else op.dims[d] for d in dims)
        elif isinstance(op, voc.Cast):
            if fake(node).dtype != fake(op.x).dtype:
                break
        elif target_name(node) not in {"contiguous", "dropout"}:
            break
        node = op.x
    shape = shape_of(node)
    return Operand(node, dims, tuple(1 if d < 0 else shape[d] for d in dims))


# -- einsum -------------------------------------------------------------------------------------


def _labels(op: voc.Product) -> tuple[str, str, str]:
    """The labels of a, b and the result, those that an ellipsis stands for among them."""
    plain = [labels.replace(".", "") for labels in op.labels]
    if "->" not in (op.equation or "") or any(len(set(x)) < len(x) for x in plain):
        raise RefusedError("layout", f"einsum {op.equation!r} is not read")
    # An ellipsis stands for axes that broadcast from the right; give them labels of their own.
    ranks = [len(shape_of(op.a)), len(shape_of(op.b))]
    widths = [r - len(x) for r, x, y in zip(ranks, plain, op.labels, strict=False) if "." in y]
    spare = [letter for letter in string.ascii_uppercase if letter not in "".join(plain)]
    hidden = "".join(spare[: max(widths, default=0)])
    ranks.append(len(plain[2]) + len(hidden))
    first, second, out = (
        y.replace("...", hidden[len(hidden) - (rank - len(x)) :])
        for rank, x, y in zip(ranks, plain, op.labels, strict=True)
    )
    return first, second, out


def einsum_scores(see: See, op: voc.Product, axes: tuple[int, ...]) -> tuple[Operand, Operand]:
    """Q and K of ``einsum("...", a, b)``, whose output's ``axes`` are (lead..., query, key)."""
    first, second, out = _labels(op)
    out = "".join(out[axis] for axis in axes)
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
    return peel(see, q_node, tuple(q_dims)), peel(see, k_node, tuple(k_dims))


def einsum_axes(op: voc.Product, key: int) -> tuple[int, ...]:
    """The axes of an einsum's output as (lead..., query, key), given which are the keys'.

    Where K has no heads, or fewer, other axes are Q's alone, too: the longest is the queries', of
    equal or symbolic ones the last.
    """
    first, second, out = _labels(op)
    other = first if out[key] in second else second
    queries = [i for i, x in enumerate(out) if x in other and not (x in first and x in second)]
    if not queries or key in queries:
        raise RefusedError("layout", f"einsum {op.equation!r}: which axis is the queries'?")
    sizes = shape_of(op.a if other is first else op.b)
    longest = [sizes[other.index(out[i])] for i in queries]
    is_known = all(isinstance(size, int) for size in longest)
    query = max(queries, key=lambda i: (longest[queries.index(i)] if is_known else 0, i))
    lead = [i for i in range(len(out)) if i not in (key, query)]
    return (*lead, query, key)


def einsum_values(
    see: See, op: voc.Product, weights: fx.Node, axes: tuple[int, ...]
) -> tuple[Operand, tuple[int, ...]]:
    """V of ``einsum("...", p, v)``, and its output's axes as a permutation of (lead, row, d_v).

    ``axes`` are those of p as (lead..., query, key).
    """
    first, second, out = _labels(op)
    p, v, value = (first, second, op.b) if op.a is weights else (second, first, op.a)
    p = "".join(p[axis] for axis in axes)
    query, key = p[-2], p[-1]
    if query in out and key in out:
        raise RefusedError("cross-head-mix", f"einsum {op.equation!r} mixes the weights' heads")
    width = [x for x in v if x not in p]
    if key not in v or key in out or query in v or len(width) != 1 or len(out) != len(p):
        raise RefusedError("weights-edited", f"einsum {op.equation!r} does not contract the keys")
    order = (*p[:-2], query, width[0])
    dims = tuple(v.find(x) for x in (*p[:-2], key, width[0]))
    return peel(see, value, dims), tuple(order.index(x) for x in out)


# -- scale --------------------------------------------------------------------------------------


def take_scale(see: See, x: Operand) -> tuple[Operand, tuple[Factor, ...]]:
    """Take numbers multiplied into Q or K out, also from under reshapes; they go into the scale."""
    factors: list[Factor] = []
    while True:
        path, node = [], x.node
        while isinstance(op := see(node), voc.Reshape | voc.Permute | voc.Identity):
            path.append(node)
            node = op.x
        if not isinstance(op, voc.Scale) or not _goes_into_scale(op):
            return x, tuple(factors)
        factors.append(Factor(op.factor, op.divide))
        if path or x.replay:
            x = replace(x, node=op.x, replay=(*reversed(path), *x.replay))
        else:
            x = peel(see, op.x, x.dims)


def _goes_into_scale(op: voc.Scale) -> bool:
    value, factor = voc.tensor_of(op.x), op.factor
    is_number = isinstance(factor, int | float) and not factor <= 0
    is_symbol = isinstance(factor, fx.Node) and not voc.is_tensor(factor)
    return (is_number or is_symbol) and value is not None and value.dtype.is_floating_point


# -- sinks --------------------------------------------------------------------------------------


def per_head(see: See, column: fx.Node) -> fx.Node | None:
    """The numbers, one per head, that were expanded to a column ``(..., H, N, 1)`` of scores.

    Returns:
        A node with H elements in the order of the heads (a parameter, as a rule); None where the
        column may hold anything else.
    """
    heads = shape_of(column)[-3:-2]
    node = column
    while not (heads and _thin(shape_of(node), heads[0])):
        op = see(node)
        if not isinstance(op, voc.Cast | voc.Identity | voc.Expand):
            return None
        node = op.x
    while isinstance(op := see(node), voc.Reshape):
        node = op.x
    return node


def _thin(shape: tuple[Any, ...], heads: Any) -> bool:
    """Whether a shape is (1, ..., heads, 1, 1)."""
    others = (*shape[:-3], *shape[-2:])
    return len(shape) > 2 and same_size(shape[-3], heads) and all(same_size(s, 1) for s in others)


# -- repeated heads -----------------------------------------------------------------------------


def unrepeated(see: See, x: Operand) -> tuple[Operand, Any] | None:
    """The operand before its key heads were repeated, and how often; ``None`` if not repeated."""
    if len(x.dims) < 3 or x.dims[-3] < 0 or x.replay:
        return None
    head = x.dims[-3]
    base = _before_interleave(see, x.node, head) or _before_expand(see, x.node, head)
    if base is None:
        return None
    source, repeats = base
    shape = (*x.shape[:-3], shape_of(source)[head], *x.shape[-2:])
    found = peel(see, source, x.dims)
    is_same = same_shape(found.shape, shape)
    return (found if is_same else Operand(source, x.dims, shape)), repeats


def _before_interleave(see: See, node: fx.Node, head: int) -> tuple[fx.Node, int] | None:
    op = see(node)
    if not isinstance(op, voc.Expand) or target_name(node) != "repeat_interleave":
        return None
    repeats, dim = voc.argument(node, 1, "repeats"), voc.argument(node, 2, "dim")
    is_known = isinstance(repeats, int) and isinstance(dim, int)
    return (op.x, repeats) if is_known and dim % len(shape_of(node)) == head else None


def _before_expand(see: See, node: fx.Node, head: int) -> tuple[fx.Node, int] | None:
    """``reshape(expand(x[:, :, None], ...))``: heads (Hk, 1) -> (Hk, repeats) -> Hk * repeats."""
    merged = see(node)
    expanded = see(merged.x) if isinstance(merged, voc.Reshape) else None
    inserted = see(expanded.x) if isinstance(expanded, voc.Expand) else None
    if not isinstance(inserted, voc.Reshape):
        return None
    source, result = inserted.x, shape_of(node)
    thin, wide = shape_of(expanded.x), shape_of(merged.x)  # type: ignore[union-attr]
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


def common_dtype(
    see: See,
    q: Operand,
    k: Operand,
    v: Operand,
    product: fx.Node,
    out: fx.Node,
    *,
    keeps_upcast: bool = False,
) -> tuple[Operand, Operand, torch.dtype | None]:
    """Q and K without an upcast that changed no value, and the dtype to compute the call in.

    That is None where Q, K, V and the output have one dtype already, or autocast gives them one. A
    model that computes its scores in fp32 (rotary tables, QK norm) and has a half V gets fp32: its
    scores are worth more than half precision to it. ``keeps_upcast`` says that they would be, as a
    tensor multiplies them, which goes into Q.
    """
    if not keeps_upcast:
        q, k = (_without_upcast(see, x, fake(v.node).dtype) for x in (q, k))
    own = fake(out).dtype
    dtypes = {fake(x.node).dtype for x in (q, k, v)}
    if dtypes == {own}:
        return q, k, None
    # Low precision out of full and low precision in: nothing but autocast gives that.
    is_low = fake(product).dtype == own and own.itemsize < 4
    is_mixed = torch.float32 in dtypes and dtypes <= {torch.float32, own}
    if is_low and (is_mixed or own not in {fake(q.node).dtype, fake(k.node).dtype}):
        return q, k, own if len(dtypes) > 1 else None  # as autocast casts them
    if all(d.is_floating_point for d in dtypes) and torch.float64 not in dtypes:
        return q, k, torch.float32
    names = ", ".join(sorted(str(d)[6:] for d in dtypes | {own}))
    raise RefusedError("mixed-dtype", f"Q, K, V and the output have different dtypes: {names}")


def _without_upcast(see: See, x: Operand, dtype: torch.dtype) -> Operand:
    while fake(x.node).dtype != dtype:
        op = see(x.node)
        source = voc.tensor_of(op.x) if isinstance(op, voc.Cast) else None
        if source is None or source.dtype.itemsize > fake(x.node).dtype.itemsize or x.replay:
            return x
        x = peel(see, op.x, x.dims)  # type: ignore[union-attr]
    return x
