"""What counts as a product, a softmax, a cast, a view: Dynamo nodes read as a few kinds of
operation.

Dynamo keeps the spelling of the source: ``q @ k``, ``torch.matmul``, ``Tensor.matmul`` and ``bmm``
are four targets with one meaning. :func:`read` maps a node to one small record per meaning, or
``None`` when the node is outside the vocabulary. Everything else in ``passes`` speaks in these
records only.
"""

from __future__ import annotations

import math
import operator
import string
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

Scalar = int | float | fx.Node
"""A number, or the node of a symbolic one."""

INFINITE = -math.inf

HIDING = -1.0e4
"""A score this low (or lower) hides its key: after the softmax nothing of it is left."""

ABSORBING = -1.0e30
"""Added to a score of any precision but fp16, this leaves nothing of the score."""

HIDDEN = -1.0e3
"""Where such a score may end up after a division by sqrt(d)."""


@dataclass(frozen=True)
class Product:
    """``alpha * (a @ b) + beta * addend``; with ``equation`` the einsum ``equation(a, b)``."""

    a: fx.Node
    b: fx.Node
    equation: str | None = None
    alpha: Scalar = 1
    addend: fx.Node | None = None
    beta: Scalar = 1


@dataclass(frozen=True)
class Softmax:
    """``softmax(sign * x, dim)``, computed in ``dtype`` if given.

    ``inner`` are the nodes between x and the result where it is spelled out: the exponentials and
    their sum, or a ``log_softmax`` that is exponentiated.
    """

    x: fx.Node
    dim: int
    dtype: torch.dtype | None = None
    sign: int = 1
    inner: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class Scale:
    """``x * factor``, or ``x / factor`` if ``divide``; the factor is a number or a tensor node."""

    x: fx.Node
    factor: Scalar
    divide: bool = False


@dataclass(frozen=True)
class Add:
    """``x + alpha * y``; ``y`` may be a number."""

    x: fx.Node
    y: Scalar
    alpha: Scalar = 1


@dataclass(frozen=True)
class Fill:
    """``where(condition, value, x)``; with ``keep`` the condition says where ``x`` stays.

    Also ``x[condition] = value``, which returns nothing: the result is what x holds then.
    """

    x: fx.Node
    condition: fx.Node
    value: Any
    keep: bool = False


@dataclass(frozen=True)
class Clamp:
    """``clamp(x, low, high)``; a bound is a number, a node, or ``None``."""

    x: fx.Node
    low: Any
    high: Any


@dataclass(frozen=True)
class Tanh:
    """``tanh(x)``, as in a soft cap ``c * tanh(x / c)``."""

    x: fx.Node


@dataclass(frozen=True)
class Append:
    """``x`` with one more column, of a sink: ``cat([x, column], -1)``; ``front``: before x."""

    x: fx.Node
    column: fx.Node
    front: bool


@dataclass(frozen=True)
class Cast:
    """The same values in another dtype (or on another device)."""

    x: fx.Node


@dataclass(frozen=True)
class Reshape:
    """The same elements in the same order under another shape."""

    x: fx.Node


@dataclass(frozen=True)
class Permute:
    """Output axis ``i`` is input axis ``dims[i]``."""

    x: fx.Node
    dims: tuple[int, ...]


@dataclass(frozen=True)
class Identity:
    """The same values: ``contiguous``, ``clone``, a dropout that does not drop."""

    x: fx.Node


@dataclass(frozen=True)
class Expand:
    """``expand``, ``repeat`` and their like: the values of ``x``, some of them several times."""

    x: fx.Node


@dataclass(frozen=True)
class Dropout:
    """A dropout that drops: training, ``p > 0`` (or ``p`` not known while compiling)."""

    x: fx.Node
    p: Scalar


@dataclass(frozen=True)
class Sdpa:
    """A call of ``F.scaled_dot_product_attention``; fields as its arguments."""

    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None = None
    dropout_p: Scalar = 0.0
    is_causal: Any = False
    scale: Scalar | None = None
    enable_gqa: Any = False


Op = (
    Product
    | Softmax
    | Scale
    | Add
    | Fill
    | Clamp
    | Tanh
    | Append
    | Cast
    | Reshape
    | Permute
    | Identity
    | Expand
    | Dropout
    | Sdpa
)


def value_of(node: Any) -> Any:
    """The fake value Dynamo kept for a node, if any; arguments that are no nodes are returned."""
    if isinstance(node, fx.Node):
        return node.meta.get("example_value")
    return node


def tensor_of(node: Any) -> torch.Tensor | None:
    """The fake tensor of a node, or ``None`` if its value is no tensor."""
    value = value_of(node)
    return value if isinstance(value, torch.Tensor) else None


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """Sizes of a node's tensor; ints or SymInts. ``()`` if it is no tensor."""
    value = tensor_of(node)
    return tuple(value.shape) if value is not None else ()


def hint(size: Any) -> int:
    """A size as an int: itself, or the value a symbolic size had when the graph was traced."""
    if isinstance(size, int):
        return size
    node = getattr(size, "node", None)
    value = getattr(node, "hint", None) if node is not None else None
    return int(value) if value is not None else -1


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are the same expression. Asks nothing that would add a guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    if isinstance(a, int) or isinstance(b, int):
        return False
    return bool(a.node.expr == b.node.expr)


def same_shape(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Whether two shapes are equal, size by size."""
    return len(a) == len(b) and all(same_size(x, y) for x, y in zip(a, b, strict=True))


def is_tensor(arg: Any) -> bool:
    """Whether an argument is a node whose value is a tensor."""
    return tensor_of(arg) is not None


def _may_be_number(arg: Any) -> bool:
    """Whether an argument is a number or a tensor filled with one: which, its value will tell."""
    if not isinstance(arg, fx.Node):
        return isinstance(arg, int | float)
    if target_name(arg) in {"to", "type_as", "type", "float", "half"} and arg.args:
        return _may_be_number(arg.args[0])
    made = {"tensor", "scalar_tensor", "as_tensor", "full", "full_like", "new_full"}
    return target_name(arg) in made or shape_of(arg) == ()


def target_name(node: fx.Node) -> str:
    """The bare name of what a call node calls, without an overload; ``""`` for other nodes."""
    if node.op == "call_method":
        return str(node.target)
    if node.op == "call_function":
        if isinstance(node.target, torch._ops.OpOverload):
            return node.target._schema.name.rpartition("::")[2]
        name = getattr(node.target, "__name__", None)
        return str(name if name is not None else node.target)
    return ""


def _option(node: fx.Node, name: str, default: Any = None) -> Any:
    return node.kwargs.get(name, default)


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


# -- readers: one per meaning; each gets the node and answers a record or None ------------------


def _product(node: fx.Node) -> Op | None:
    a, b = _argument(node, 0, "input"), _argument(node, 1, "other")
    b = _option(node, "mat2", b) if b is None else b
    return Product(a, b) if is_tensor(a) and is_tensor(b) else None


_LETTERS = string.ascii_letters


def linear_product(node: fx.Node) -> Op | None:
    """``F.linear(a, b)`` without a bias, as the product of two activations that it may be."""
    a, b = _argument(node, 0, "input"), _argument(node, 1, "weight")
    if _argument(node, 2, "bias") is not None or not is_tensor(a) or not is_tensor(b):
        return None
    return _inner(node) if len(shape_of(b)) == 2 else None


def _inner(node: fx.Node) -> Op | None:
    """``inner(a, b)`` sums over the last axes: ``a`` of F.linear, ``b`` as its weight."""
    a, b = _argument(node, 0, "input"), _argument(node, 1, "other", node.kwargs.get("weight"))
    if not is_tensor(a) or not is_tensor(b):
        return None
    return _contracted(a, b, [len(shape_of(a)) - 1], [len(shape_of(b)) - 1])


def _tensordot(node: fx.Node) -> Op | None:
    a, b = _argument(node, 0, "a"), _argument(node, 1, "b")
    dims: Any = _argument(node, 2, "dims", 2)
    if not is_tensor(a) or not is_tensor(b):
        return None
    if isinstance(dims, int):
        rank = len(shape_of(a))
        dims = (list(range(rank - dims, rank)), list(range(dims)))
    if not isinstance(dims, list | tuple) or len(dims) != 2:
        return None
    sides = [[d] if isinstance(d, int) else list(d) for d in dims]
    return _contracted(a, b, *sides)


def _contracted(a: fx.Node, b: fx.Node, over_a: list[int], over_b: list[int]) -> Op:
    """The product that sums one over the axes of the other, as an einsum."""
    ranks = len(shape_of(a)), len(shape_of(b))
    first = list(_LETTERS[: ranks[0]])
    second = list(_LETTERS[ranks[0] : sum(ranks)])
    for i, j in zip(over_a, over_b, strict=True):
        second[j] = first[i]
    out = [x for x in first + second if not (x in first and x in second)]
    return Product(a, b, equation=f"{''.join(first)},{''.join(second)}->{''.join(out)}")


def _einsum(node: fx.Node) -> Op | None:
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2:
        return None
    a, b = operands
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
        return None
    equation = equation.replace(" ", "")
    factors, _, out = equation.partition("->")
    first, _, second = factors.partition(",")
    if out and not set(first) & set(second) - set(out):
        return None  # nothing is summed: an outer product, as of two masks
    return Product(a, b, equation=equation)


def _baddbmm(node: fx.Node) -> Op | None:
    addend = _argument(node, 0, "input")
    a, b = _argument(node, 1, "batch1"), _argument(node, 2, "batch2")
    if not (isinstance(addend, fx.Node) and isinstance(a, fx.Node) and isinstance(b, fx.Node)):
        return None
    alpha, beta = _option(node, "alpha", 1), _option(node, "beta", 1)
    return Product(a, b, alpha=alpha, beta=beta, addend=None if beta == 0 else addend)


def _softmax(node: fx.Node) -> Op | None:
    x, dim = _argument(node, 0, "input"), _argument(node, 1, "dim")
    dtype = _option(node, "dtype")
    if dtype is None:
        dtype = next((a for a in node.args[2:] if isinstance(a, torch.dtype)), None)
    if not isinstance(x, fx.Node) or not isinstance(dim, int):
        return None
    return Softmax(x, dim % max(len(shape_of(x)), 1), dtype)


def _softmin(node: fx.Node) -> Op | None:
    op = _softmax(node)
    return replace(op, sign=-1) if isinstance(op, Softmax) else None


def _exp(node: fx.Node) -> Op | None:
    """``exp(log_softmax(x))``, ``exp(x - logsumexp(x))``: softmax."""
    inner: Any = node.args[0] if node.args else None
    if not isinstance(inner, fx.Node):
        return None
    if target_name(inner) in {"log_softmax", "_log_softmax"}:
        op = _softmax(inner)
        return replace(op, inner=(inner,)) if isinstance(op, Softmax) else None
    shift = read(inner)
    if not isinstance(shift, Add) or shift.alpha != -1 or not isinstance(shift.y, fx.Node):
        return None
    if target_name(shift.y) != "logsumexp" or shift.y.args[0] is not shift.x:
        return None
    dim = _kept_axis(shift.y)
    return None if dim is None else Softmax(shift.x, dim, inner=(inner, shift.y))


def _kept_axis(node: fx.Node) -> int | None:
    """The one axis that ``sum`` or ``logsumexp`` goes over with ``keepdim=True``."""
    dim: Any = _argument(node, 1, "dim")
    dim = dim[0] if isinstance(dim, list | tuple) and len(dim) == 1 else dim
    is_kept = _argument(node, 2, "keepdim", False) is True and isinstance(dim, int)
    return dim % len(shape_of(node)) if is_kept and shape_of(node) else None


def _normalised(a: Any, b: Any) -> Op | None:
    """``exp(x) / exp(x).sum(dim, keepdim=True)``: softmax, spelled out."""
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or target_name(a) != "exp":
        return None
    dim = _kept_axis(b) if target_name(b) == "sum" and b.args and b.args[0] is a else None
    x: Any = a.args[0] if a.args else None
    return Softmax(x, dim, inner=(a, b)) if dim is not None and is_tensor(x) else None


def _multiply(node: fx.Node) -> Op | None:
    a, b = _argument(node, 0, "input"), _argument(node, 1, "other")
    if is_tensor(a):
        return Scale(a, b)
    return Scale(b, a) if is_tensor(b) else None


def _divide(node: fx.Node) -> Op | None:
    a, b = _argument(node, 0, "input"), _argument(node, 1, "other")
    if not is_tensor(a) or _option(node, "rounding_mode") is not None:
        return None
    return _normalised(a, b) or Scale(a, b, divide=True)


def _add(node: fx.Node) -> Op | None:
    a, b = _argument(node, 0, "input"), _argument(node, 1, "other")
    alpha = _option(node, "alpha", 1)
    if is_tensor(a):
        return Add(a, b, alpha)
    return Add(b, a) if is_tensor(b) and alpha == 1 else None


def _subtract(node: fx.Node) -> Op | None:
    a, b = _argument(node, 0, "input"), _argument(node, 1, "other")
    alpha = _option(node, "alpha", 1)
    if not is_tensor(a) or isinstance(alpha, fx.Node):
        return None
    return Add(a, b, -alpha)


def _masked_fill(node: fx.Node) -> Op | None:
    x, condition = _argument(node, 0, "input"), _argument(node, 1, "mask")
    if not is_tensor(x) or not is_tensor(condition):
        return None
    return Fill(x, condition, _argument(node, 2, "value"))


def _where(node: fx.Node) -> Op | None:
    condition, a, b = (_argument(node, i, n) for i, n in enumerate(("condition", "input", "other")))
    if node.op == "call_method":  # x.where(condition, other)
        a, condition = condition, a
    if not is_tensor(condition):
        return None
    a_rank, b_rank = (len(shape_of(x)) if is_tensor(x) else 0 for x in (a, b))
    if a_rank >= 2 and _may_be_number(b):
        return Fill(a, condition, b, keep=True)
    if b_rank >= 2 and _may_be_number(a):
        return Fill(b, condition, a)
    return None


def _setitem(node: fx.Node) -> Op | None:
    """``x[condition] = value``, with a boolean mask of the very shape of x."""
    x, index, value = node.args
    if not is_tensor(x) or not is_tensor(index) or not _may_be_number(value):
        return None
    mask = tensor_of(index)
    is_mask = mask is not None and mask.dtype is torch.bool
    return Fill(x, index, value) if is_mask and same_shape(shape_of(index), shape_of(x)) else None  # type: ignore[arg-type]


def _clamp(node: fx.Node) -> Op | None:
    x = node.args[0]
    low, high = _argument(node, 1, "min"), _argument(node, 2, "max")
    return _bounded(x, low, high)


def _clamp_min(node: fx.Node) -> Op | None:
    x, low = _argument(node, 0, "input"), _argument(node, 1, "other")
    low = node.kwargs.get("min", low) if low is None else low
    if low is None or (not is_tensor(low) and isinstance(low, int)):
        return None  # max(x) or max(x, dim)
    return _bounded(x, low, None)


def _clamp_max(node: fx.Node) -> Op | None:
    x, high = _argument(node, 0, "input"), _argument(node, 1, "other")
    high = node.kwargs.get("max", high) if high is None else high
    if high is None or (not is_tensor(high) and isinstance(high, int)):
        return None
    return _bounded(x, None, high)


def _bounded(x: Any, low: Any, high: Any) -> Op | None:
    is_read = all(bound is None or _may_be_number(bound) for bound in (low, high))
    return Clamp(x, low, high) if is_tensor(x) and is_read else None


def _tanh(node: fx.Node) -> Op | None:
    x = _argument(node, 0, "input")
    return Tanh(x) if is_tensor(x) else None


def _append(node: fx.Node) -> Op | None:
    parts: Any = _argument(node, 0, "tensors")
    dim = _argument(node, 1, "dim", _option(node, "axis", 0))
    if not isinstance(parts, list | tuple) or len(parts) != 2 or not all(map(is_tensor, parts)):
        return None
    rank = len(shape_of(node))
    if rank < 2 or not isinstance(dim, int) or dim % rank != rank - 1:
        return None
    first, second = parts
    if same_size(shape_of(second)[-1], 1):
        return Append(first, second, front=False)
    return Append(second, first, front=True) if same_size(shape_of(first)[-1], 1) else None


def _cast(node: fx.Node) -> Op | None:
    source, result = tensor_of(node.args[0]), tensor_of(node)
    if source is None or result is None:
        return None
    if not (source.dtype.is_floating_point and result.dtype.is_floating_point):
        return None
    if result.dtype.itemsize < 2:
        return None  # eight bits quantise: that is no rounding
    return Cast(node.args[0]) if source.device == result.device else None  # type: ignore[arg-type]


def _reshape(node: fx.Node) -> Op | None:
    return Reshape(node.args[0]) if is_tensor(node.args[0]) else None  # type: ignore[arg-type]


def _view(node: fx.Node) -> Op | None:
    if isinstance(_argument(node, 1, "dtype"), torch.dtype):
        return None  # a reinterpretation of bits
    return _reshape(node)


def _identity(node: fx.Node) -> Op | None:
    return Identity(node.args[0]) if is_tensor(node.args[0]) else None  # type: ignore[arg-type]


def _expand(node: fx.Node) -> Op | None:
    return Expand(node.args[0]) if is_tensor(node.args[0]) else None  # type: ignore[arg-type]


def _transpose(node: fx.Node) -> Op | None:
    x, i, j = _argument(node, 0, "input"), _argument(node, 1, "dim0"), _argument(node, 2, "dim1")
    rank = len(shape_of(x)) if is_tensor(x) else 0
    if rank == 0 or not isinstance(i, int) or not isinstance(j, int):
        return None
    dims = list(range(rank))
    dims[i % rank], dims[j % rank] = dims[j % rank], dims[i % rank]
    return Permute(x, tuple(dims))


def _permute(node: fx.Node) -> Op | None:
    x: Any = node.args[0]
    dims: list[Any] = list(node.args[1:])
    if not dims and "dims" in node.kwargs:
        dims = [node.kwargs["dims"]]
    if len(dims) == 1 and isinstance(dims[0], list | tuple):
        dims = list(dims[0])
    rank = len(shape_of(x)) if is_tensor(x) else 0  # type: ignore[arg-type]
    if rank == 0 or not all(isinstance(d, int) for d in dims):
        return None
    return Permute(x, tuple(d % rank for d in dims))


def _matrix_transpose(node: fx.Node) -> Op | None:
    rank = len(shape_of(node.args[0])) if is_tensor(node.args[0]) else 0  # type: ignore[arg-type]
    if rank < 2:
        return None
    return Permute(node.args[0], (*range(rank - 2), rank - 1, rank - 2))  # type: ignore[arg-type]


def _getattr(node: fx.Node) -> Op | None:
    name = node.args[1] if len(node.args) > 1 else None
    return _matrix_transpose(node) if name == "mT" else _plain_t(node) if name == "T" else None


def _plain_t(node: fx.Node) -> Op | None:
    """``x.T`` reverses all axes; of a matrix it is the transpose."""
    rank = len(shape_of(node.args[0])) if is_tensor(node.args[0]) else 0  # type: ignore[arg-type]
    return _matrix_transpose(node) if rank == 2 else None


def _getitem(node: fx.Node) -> Op | None:
    """Indexing that only inserts axes of size 1 (``x[:, None]``) or takes everything (``x[:]``)."""
    x, index = node.args
    if not is_tensor(x):
        return None
    entries = index if isinstance(index, tuple) else (index,)
    whole = slice(None, None, None)
    if all(e is None or e is Ellipsis or e == whole for e in entries):
        return Reshape(x)  # type: ignore[arg-type]
    return None


def _dropout(node: fx.Node) -> Op | None:
    x, p = _argument(node, 0, "input"), _argument(node, 1, "p", 0.5)
    training = _argument(node, 2, "training", True)
    if not is_tensor(x):
        return None
    if training is False or (isinstance(p, int | float) and p == 0):
        return Identity(x)
    return Dropout(x, p)


def _sdpa(node: fx.Node) -> Op | None:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    defaults = (None, None, None, None, 0.0, False)
    q, k, v, mask, dropout_p, is_causal = (
        _argument(node, i, n, d) for i, (n, d) in enumerate(zip(names, defaults, strict=True))
    )
    scale, gqa = _option(node, "scale"), _option(node, "enable_gqa", False)
    return Sdpa(q, k, v, mask, dropout_p, is_causal, scale, gqa)


Reader = Callable[[fx.Node], Op | None]

METHODS: dict[str, Reader] = {
    **dict.fromkeys(("matmul", "bmm", "mm", "__matmul__"), _product),
    "inner": _inner,
    **dict.fromkeys(("baddbmm", "baddbmm_"), _baddbmm),
    "softmax": _softmax,
    "exp": _exp,
    **dict.fromkeys(("mul", "mul_", "multiply"), _multiply),
    **dict.fromkeys(("div", "div_", "divide", "true_divide"), _divide),
    **dict.fromkeys(("add", "add_"), _add),
    **dict.fromkeys(("sub", "sub_", "subtract"), _subtract),
    **dict.fromkeys(("masked_fill", "masked_fill_"), _masked_fill),
    "where": _where,
    **dict.fromkeys(("clamp", "clamp_", "clip"), _clamp),
    "clamp_min": _clamp_min,
    "clamp_max": _clamp_max,
    **dict.fromkeys(("tanh", "tanh_"), _tanh),
    **dict.fromkeys(("to", "type", "type_as", "float", "half", "bfloat16", "double"), _cast),
    "view": _view,
    **dict.fromkeys(
        ("reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "view_as", "reshape_as"),
        _reshape,
    ),
    **dict.fromkeys(("contiguous", "clone", "detach"), _identity),
    **dict.fromkeys(
        ("expand", "expand_as", "broadcast_to", "repeat", "repeat_interleave"), _expand
    ),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), _transpose),
    "permute": _permute,
}

FUNCTIONS: dict[Any, Reader] = {
    **dict.fromkeys(
        (torch.matmul, operator.matmul, torch.bmm, torch.mm, torch.linalg.matmul), _product
    ),
    torch.inner: _inner,
    **dict.fromkeys((torch.tensordot, torch.functional.tensordot), _tensordot),
    torch.functional.einsum: _einsum,
    torch.einsum: _einsum,
    torch.baddbmm: _baddbmm,
    **dict.fromkeys((torch.softmax, F.softmax, torch.special.softmax), _softmax),
    F.softmin: _softmin,
    torch.exp: _exp,
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, torch.multiply), _multiply),
    **dict.fromkeys(
        (operator.truediv, operator.itruediv, torch.div, torch.divide, torch.true_divide), _divide
    ),
    **dict.fromkeys((operator.add, operator.iadd, torch.add), _add),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, torch.subtract), _subtract),
    torch.masked_fill: _masked_fill,
    torch.where: _where,
    **dict.fromkeys((torch.clamp, torch.clip), _clamp),
    **dict.fromkeys((torch.max, torch.maximum, torch.clamp_min), _clamp_min),
    **dict.fromkeys((torch.min, torch.minimum, torch.clamp_max), _clamp_max),
    **dict.fromkeys((torch.tanh, torch.tanh_, F.tanh), _tanh),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), _append),
    **dict.fromkeys((torch.reshape, torch.flatten, torch.unsqueeze, torch.squeeze), _reshape),
    **dict.fromkeys((torch.clone, torch.detach), _identity),
    **dict.fromkeys((torch.broadcast_to, torch.repeat_interleave), _expand),
    **dict.fromkeys((torch.transpose, torch.swapaxes, torch.swapdims), _transpose),
    torch.permute: _permute,
    getattr: _getattr,  # x.mT and x.T, as older torch spells them
    operator.getitem: _getitem,
    operator.setitem: _setitem,
    **dict.fromkeys((F.dropout, torch.dropout), _dropout),
    F.scaled_dot_product_attention: _sdpa,
}

ATEN: dict[str, Reader] = {
    **METHODS,
    **dict.fromkeys(("_softmax", "special_softmax"), _softmax),
    **dict.fromkeys(("cat", "concat"), _append),
    **dict.fromkeys(("alias", "lift_fresh_copy"), _identity),
    "linalg_matmul": _product,
    "einsum": _einsum,
    "tensordot": _tensordot,
    "_to_copy": _cast,
    **dict.fromkeys(("t", "numpy_T"), _plain_t),
    "mT": _matrix_transpose,
    "dropout": _dropout,
    "scaled_dot_product_attention": _sdpa,
}
"""Overloads of ATen, of an exported program, by their name without the overload's."""


def read(node: Any) -> Op | None:
    """What a node means in this vocabulary, or ``None``."""
    if not isinstance(node, fx.Node):
        return None
    if node.op == "call_method":
        reader = METHODS.get(str(node.target))
    elif node.op == "call_function":
        reader = FUNCTIONS.get(node.target)
        if reader is None and str(node.target).startswith("aten."):
            reader = ATEN.get(target_name(node))
    else:
        return None
    if reader is None:
        return None
    try:
        return reader(node)
    except (IndexError, TypeError, ValueError):  # its tensor is given by keyword, or no tensor is
        return None


# -- nodes that are attention, or may be, for the report ----------------------------------------

ENCODER_LAYER = getattr(torch, "_transformer_encoder_layer_fwd", None)
_SOFTMAX = frozenset({"softmax", "_softmax", "special_softmax", "softmin"})


def anchor_kind(node: fx.Node) -> str | None:
    """``"softmax"``, ``"sdpa"``, ``"mha"``, ``"encoder"`` or ``"flex"``: what a report counts."""
    if node.op not in ("call_function", "call_method"):
        return None
    name = target_name(node)
    if name in _SOFTMAX or (
        name in {"exp", "div", "truediv", "divide", "true_divide"}
        and isinstance(read(node), Softmax)
    ):
        return "softmax"
    if name == "scaled_dot_product_attention":
        return "sdpa"
    if node.target is F.multi_head_attention_forward:
        return "mha"
    if node.target is ENCODER_LAYER:
        return "encoder"
    return "flex" if name in {"flex_attention", "flex_attention_hop"} else None


_SHAPE_READERS = frozenset({"reshape_as", "view_as", "expand_as", "type_as"})


def reads_shape_only(user: fx.Node, node: fx.Node) -> bool:
    """Whether ``user`` looks at the shape or dtype of ``node``, not at its values."""
    is_reader = user.op == "call_method" and user.target in _SHAPE_READERS
    return is_reader and user.args[0] is not node
