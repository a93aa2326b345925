"""What counts as a product, a softmax, a cast, a view: nodes read as a few kinds of operation.

Dynamo keeps the spelling of the source: ``q @ k``, ``torch.matmul``, ``Tensor.matmul`` and ``bmm``
are four targets with one meaning. :func:`read` maps a node to one small record per meaning, or
``None`` when the node is outside the vocabulary. Everything else in ``passes`` speaks in these
records only.
"""

from __future__ import annotations

import inspect
import operator
import string
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

Scalar = int | float | fx.Node
"""A number, or the node of a symbolic one."""

HIDING = -1.0e4
"""A score this low (or lower) hides its key: after the softmax nothing of it is left."""

ABSORBING = -1.0e30
"""Added to a score of any precision but fp16, this leaves nothing of the score."""

HIDDEN = -1.0e3
"""Where such a score may end up after a division by sqrt(d)."""


class Op:
    """What a node means: one of the records below."""


@dataclass(frozen=True)
class Unary(Op):
    """An operation on ``x`` with nothing else to know of it here."""

    x: fx.Node


@dataclass(frozen=True)
class Product(Op):
    """``alpha * (a @ b) + beta * addend``; with ``equation`` the einsum ``equation(a, b)``."""

    a: fx.Node
    b: fx.Node
    equation: str | None = None
    alpha: Scalar = 1
    addend: fx.Node | None = None
    beta: Scalar = 1

    @property
    def labels(self) -> tuple[str, str, str]:
        """The equation's labels of a, of b and of the result, which may be left out: ``""``."""
        factors, _, out = (self.equation or "").partition("->")
        first, _, second = factors.partition(",")
        return first, second, out


@dataclass(frozen=True)
class Softmax(Unary):
    """``softmax(sign * x, dim)``, computed in ``dtype`` if given.

    ``inner`` are the nodes between x and the result where it is spelled out: the exponentials and
    their sum, or a ``log_softmax`` that is exponentiated.
    """

    dim: int
    dtype: torch.dtype | None = None
    sign: int = 1
    inner: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class Scale(Unary):
    """``x * factor``, or ``x / factor`` if ``divide``; the factor is a number or a tensor node."""

    factor: Scalar
    divide: bool = False


@dataclass(frozen=True)
class Add(Unary):
    """``x + alpha * y``; ``y`` may be a number."""

    y: Scalar
    alpha: Scalar = 1


@dataclass(frozen=True)
class Fill(Unary):
    """``where(condition, value, x)``; with ``keep`` the condition says where ``x`` stays.

    Also ``x[condition] = value``, which returns nothing: the result is what x holds then.
    """

    condition: fx.Node
    value: Any
    keep: bool = False


@dataclass(frozen=True)
class Clamp(Unary):
    """``clamp(x, low, high)``; a bound is a number, a node, or ``None``."""

    low: Any
    high: Any


class Tanh(Unary):
    """``tanh(x)``, as in a soft cap ``c * tanh(x / c)``."""


@dataclass(frozen=True)
class Append(Unary):
    """``x`` with one more column, of a sink: ``cat([x, column], -1)``; ``front``: before x."""

    column: fx.Node
    front: bool


class Cast(Unary):
    """The same values in another dtype (or on another device)."""


class Reshape(Unary):
    """The same elements in the same order under another shape."""


@dataclass(frozen=True)
class Permute(Unary):
    """Output axis ``i`` is input axis ``dims[i]``."""

    dims: tuple[int, ...]


class Identity(Unary):
    """The same values: ``contiguous``, ``clone``, a dropout that does not drop."""


class Expand(Unary):
    """``expand``, ``repeat`` and their like: the values of ``x``, some of them several times."""


@dataclass(frozen=True)
class Dropout(Unary):
    """A dropout that drops: training, ``p > 0`` (or ``p`` not known while compiling)."""

    p: Scalar


@dataclass(frozen=True)
class Sdpa(Op):
    """A call of ``F.scaled_dot_product_attention``: its arguments, so that it is its own reader."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    attn_mask: fx.Node | None = None
    dropout_p: Scalar = 0.0
    is_causal: Any = False
    scale: Scalar | None = None
    enable_gqa: Any = False


MOVED = Cast | Reshape | Permute | Identity
"""The values of x in another place, shape or dtype."""

ONE_TO_ONE = Fill | Clamp | MOVED | Dropout
"""Each number of the result comes of one of x: of scores or of weights."""

ON_SCORES = ONE_TO_ONE | Tanh | Append
"""What scores may pass on the way to their softmax, besides scales and terms."""


def value_of(node: Any) -> Any:
    """The fake value Dynamo kept for a node, if any; arguments that are no nodes are returned."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else node


def tensor_of(node: Any) -> torch.Tensor | None:
    """The fake tensor of a node, or ``None`` if its value is no tensor."""
    value = value_of(node)
    return value if isinstance(value, torch.Tensor) else None


def fake(node: Any) -> torch.Tensor:
    """The fake tensor of a node that has one."""
    value = tensor_of(node)
    assert value is not None
    return value


def is_tensor(arg: Any) -> bool:
    """Whether an argument is a node whose value is a tensor."""
    return tensor_of(arg) is not None


def shape_of(node: Any) -> tuple[Any, ...]:
    """Sizes of a node's tensor; ints or SymInts. ``()`` if it is no tensor."""
    value = tensor_of(node)
    return tuple(map(_settled, value.shape)) if value is not None else ()


def _settled(size: Any) -> Any:
    """The number that a symbol was found to be meanwhile, by a guard that is there already."""
    number = size.node.maybe_as_int() if isinstance(size, torch.SymInt) else None
    return size if number is None else number


def hint(size: Any) -> int:
    """A size as an int: itself, or the value a symbolic size had when the graph was traced."""
    if isinstance(size, int):
        return size
    value = getattr(getattr(size, "node", None), "hint", None)
    return int(value) if value is not None else -1


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are the same expression. Asks nothing that would add a guard."""
    if isinstance(a, int) or isinstance(b, int):
        return isinstance(a, int) and isinstance(b, int) and a == b
    return bool(a.node.expr == b.node.expr)


def same_shape(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Whether two shapes are equal, size by size."""
    return len(a) == len(b) and all(same_size(x, y) for x, y in zip(a, b, strict=True))


def target_name(node: fx.Node) -> str:
    """The bare name of what a call node calls, without an overload; ``""`` for other nodes.

    What is neither PyTorch's nor Python's is named with its home: a custom op ``mine::exp`` or a
    function ``mine.exp`` is no ``exp``.
    """
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    home = str(getattr(node.target, "__module__", None) or "builtins")
    if isinstance(node.target, torch._ops.OpOverload):
        name = node.target._schema.name.rpartition("::")[2]
    else:
        name = str(getattr(node.target, "__name__", node.target))
    if home.startswith(_OPS) and home != f"{_OPS}aten":
        return f"{home.removeprefix(_OPS)}::{name}"
    return name if home.partition(".")[0] in _HOMES else f"{home}.{name}"


_OPS, _HOMES = "torch._ops.", frozenset("torch _operator operator builtins math".split())


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, by its place or by its name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _may_be_number(arg: Any) -> bool:
    """Whether an argument is a number or a tensor filled with one: which, its value will tell."""
    if not isinstance(arg, fx.Node):
        return isinstance(arg, int | float)
    if target_name(arg) in {"to", "type_as", "type", "float", "half"} and arg.args:
        return _may_be_number(arg.args[0])
    made = {"tensor", "scalar_tensor", "as_tensor", "full", "full_like", "new_full"}
    return target_name(arg) in made or shape_of(arg) == ()


# -- readers: each answers a record or None ------------------------------------------------------

Reader = Callable[..., Op | None]


@cache
def _parameters(reader: Reader) -> tuple[int | None, frozenset[str]]:
    """How many positional arguments a reader takes (None: all there are), and all the names."""
    parameters = inspect.signature(reader).parameters.values()
    by_place = [p.kind for p in parameters if p.kind is not p.KEYWORD_ONLY]
    takes_all = inspect.Parameter.VAR_POSITIONAL in by_place
    return None if takes_all else len(by_place), frozenset(p.name for p in parameters)


_HARMLESS = frozenset(
    "out inplace memory_format _stacklevel copy non_blocking layout device pin_memory".split()
)
"""Keywords that change no value of a result."""


def _ask(reader: Reader, node: fx.Node) -> Op | None:
    """What a reader answers, given those arguments of a node that it has a parameter for.

    The parameters have the names of what is read; ``node`` is the node, and ``x`` a tensor that is
    read by its place only: rewriting may repeat such a call over another one.
    """
    count, names = _parameters(reader)
    is_told = "node" in names or reader in _READ_BY_SIZES  # it looks at them itself
    if not is_told and node.kwargs.keys() - names - _HARMLESS:
        return None
    if not is_told and count is not None and len(node.args) > count:
        return None  # as of the overload add(input, alpha, other)
    named = {"node": node, **node.kwargs}
    try:
        op = reader(*node.args[:count], **{k: v for k, v in named.items() if k in names})
    except (IndexError, TypeError, ValueError):  # its tensor is given by keyword, or no tensor is
        return None
    read_of = [op.x] if isinstance(op, Unary) else [op.a, op.b] if isinstance(op, Product) else []
    return op if all(map(is_tensor, read_of)) else None


def _product(input: Any, other: Any = None, *, mat2: Any = None) -> Op | None:
    return Product(input, mat2 if other is None else other)


def linear_product(node: fx.Node) -> Op | None:
    """``F.linear(a, b)`` without a bias, as the product of two activations that it may be."""
    a, b = argument(node, 0, "input"), argument(node, 1, "weight")
    is_bare = argument(node, 2, "bias") is None and is_tensor(a)
    return _inner(a, b) if is_bare and len(shape_of(b)) == 2 else None


def _inner(input: Any, other: Any) -> Op | None:
    """``inner(a, b)`` sums over the last axes: ``a`` of F.linear, ``b`` as its weight."""
    return _tensordot(input, other, ([-1], [-1]))


def _tensordot(a: Any, b: Any, dims: Any = 2) -> Op | None:
    """The product that sums one over the axes of the other, as an einsum."""
    ranks = len(shape_of(a)), len(shape_of(b))
    if isinstance(dims, int):
        dims = (list(range(ranks[0] - dims, ranks[0])), list(range(dims)))
    over_a, over_b = ([d] if isinstance(d, int) else d for d in dims)
    first = list(string.ascii_letters[: ranks[0]])
    second = list(string.ascii_letters[ranks[0] : sum(ranks)])
    for i, j in zip(over_a, over_b, strict=True):
        second[j] = first[i]
    out = [x for x in first + second if not (x in first and x in second)]
    return Product(a, b, equation=f"{''.join(first)},{''.join(second)}->{''.join(out)}")


def _einsum(equation: Any, *operands: Any) -> Op | None:
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    a, b = operands
    if not isinstance(equation, str):
        return None
    op = Product(a, b, equation=equation.replace(" ", ""))
    first, second, out = op.labels
    is_outer = out and not set(first) & set(second) - set(out)  # as of two masks: nothing is summed
    return None if is_outer else op


def _baddbmm(input: Any, batch1: Any, batch2: Any, *, alpha: Any = 1, beta: Any = 1) -> Op | None:
    return Product(batch1, batch2, alpha=alpha, beta=beta, addend=None if beta == 0 else input)


def _softmax(
    input: Any, dim: Any = None, *more: Any, axis: Any = None, dtype: Any = None
) -> Op | None:
    if dtype is None:
        dtype = next((a for a in more if isinstance(a, torch.dtype)), None)
    dim, rank = axis if dim is None else dim, len(shape_of(input))
    if dim is None:  # what PyTorch takes then
        dim = 0 if rank in (0, 1, 3) else 1
    return Softmax(input, dim % max(rank, 1), dtype) if isinstance(dim, int) else None


def _softmin(*, node: fx.Node) -> Op | None:
    op = _ask(_softmax, node)
    return replace(op, sign=-1) if isinstance(op, Softmax) else None


def _exp(x: Any, /) -> Op | None:
    """``exp(log_softmax(x))``, ``exp(x - logsumexp(x))``: softmax."""
    if not isinstance(x, fx.Node):
        return None
    if target_name(x) in {"log_softmax", "_log_softmax"}:
        op = _ask(_softmax, x)
        return replace(op, inner=(x,)) if isinstance(op, Softmax) else None
    shift = read(x)
    if not isinstance(shift, Add) or shift.alpha != -1 or not isinstance(shift.y, fx.Node):
        return None
    is_ours = target_name(shift.y) == "logsumexp" and shift.y.args[0] is shift.x
    dim = _kept_axis(shift.y) if is_ours else None
    return None if dim is None else Softmax(shift.x, dim, inner=(x, shift.y))


def _kept_axis(node: fx.Node) -> int | None:
    """The one axis that ``sum`` or ``logsumexp`` goes over with ``keepdim=True``."""
    if not fake(node).dtype.is_floating_point:
        return None  # sum(x, dim, dtype=torch.int64) adds up what is left of x without fractions
    dim = argument(node, 1, "dim")
    dim = dim[0] if isinstance(dim, list | tuple) and len(dim) == 1 else dim
    is_kept = argument(node, 2, "keepdim", False) is True and isinstance(dim, int)
    return dim % len(shape_of(node)) if is_kept and shape_of(node) else None


def _multiply(input: Any, other: Any) -> Op | None:
    return Scale(input, other) if is_tensor(input) else Scale(other, input)


def _divide(input: Any, other: Any, *, rounding_mode: Any = None) -> Op | None:
    """Also ``exp(x) / exp(x).sum(dim, keepdim=True)``: softmax, spelled out."""
    if not is_tensor(input) or rounding_mode is not None:
        return None
    is_sum = isinstance(other, fx.Node) and target_name(other) == "sum" and other.args
    if target_name(input) == "exp" and input.args and is_sum and other.args[0] is input:
        x, dim = input.args[0], _kept_axis(other)
        if is_tensor(x) and dim is not None:
            return Softmax(x, dim, inner=(input, other))
    return Scale(input, other, divide=True)


def _add(input: Any, other: Any, *, alpha: Any = 1) -> Op | None:
    if is_tensor(input):
        return Add(input, other, alpha)
    return Add(other, input) if alpha == 1 else None


def _subtract(input: Any, other: Any, *, alpha: Any = 1) -> Op | None:
    return Add(input, other, -alpha)  # a TypeError if alpha is a node


def _masked_fill(input: Any, mask: Any, value: Any) -> Op | None:
    return Fill(input, mask, value) if is_tensor(mask) else None


def _where(condition: Any, input: Any, other: Any) -> Op | None:
    if not is_tensor(condition):
        return None
    if len(shape_of(input)) >= 2 and _may_be_number(other):
        return Fill(input, condition, other, keep=True)
    if len(shape_of(other)) >= 2 and _may_be_number(input):
        return Fill(other, condition, input)
    return None


def _setitem(x: Any, index: Any, value: Any, /) -> Op | None:
    """``x[condition] = value``, with a boolean mask of the very shape of x."""
    mask = tensor_of(index)
    is_mask = mask is not None and mask.dtype is torch.bool
    is_fill = is_mask and same_shape(shape_of(index), shape_of(x)) and _may_be_number(value)
    return Fill(x, index, value) if is_fill else None


def _clamp(x: Any, /, min: Any = None, max: Any = None) -> Op | None:
    is_read = all(bound is None or _may_be_number(bound) for bound in (min, max))
    return Clamp(x, min, max) if is_read else None


def _clamp_min(input: Any, other: Any = None, *, min: Any = None) -> Op | None:
    low = min if other is None else other
    return None if isinstance(low, int | None) else _clamp(input, low)  # max(x), max(x, dim)


def _clamp_max(input: Any, other: Any = None, *, max: Any = None) -> Op | None:
    high = max if other is None else other
    return None if isinstance(high, int | None) else _clamp(input, None, high)


def _append(tensors: Any, dim: Any = None, *, axis: Any = 0, node: fx.Node) -> Op | None:
    dim, rank = axis if dim is None else dim, len(shape_of(node))
    first, second = tensors
    if not is_tensor(first) or not is_tensor(second):
        return None
    if rank < 2 or not isinstance(dim, int) or dim % rank != rank - 1:
        return None
    if same_size(shape_of(second)[-1], 1):
        return Append(first, second, front=False)
    return Append(second, first, front=True) if same_size(shape_of(first)[-1], 1) else None


def _cast(x: Any, /, *, node: fx.Node) -> Op | None:
    source, result = tensor_of(x), tensor_of(node)
    if source is None or result is None or source.device != result.device:
        return None
    # Eight bits quantise: that is no rounding.
    is_wide = result.dtype.is_floating_point and result.dtype.itemsize >= 2
    return Cast(x) if source.dtype.is_floating_point and is_wide else None


def _view(x: Any, /, dtype: Any = None, *sizes: Any) -> Op | None:
    return None if isinstance(dtype, torch.dtype) else Reshape(x)  # else its bits, read anew


def _permute(x: Any, /, *axes: Any, dims: Any = ()) -> Op | None:
    dims = axes or dims
    if len(dims) == 1 and isinstance(dims[0], list | tuple):
        dims = dims[0]
    rank = len(shape_of(x))
    is_read = rank > 0 and all(isinstance(d, int) for d in dims)
    return Permute(x, tuple(d % rank for d in dims)) if is_read else None


def _transpose(input: Any, dim0: Any, dim1: Any) -> Op | None:
    rank = len(shape_of(input))
    if rank == 0 or not isinstance(dim0, int) or not isinstance(dim1, int):
        return None
    dims = list(range(rank))
    dims[dim0 % rank], dims[dim1 % rank] = dims[dim1 % rank], dims[dim0 % rank]
    return Permute(input, tuple(dims))


def _getattr(x: Any, name: Any, /) -> Op | None:
    """``x.mT``, and ``x.T`` of a matrix: of others it reverses all axes."""
    rank = len(shape_of(x))
    is_transpose = (name == "mT" and rank >= 2) or (name == "T" and rank == 2)
    return _transpose(x, -2, -1) if is_transpose else None


def _getitem(x: Any, index: Any, /) -> Op | None:
    """Indexing that only inserts axes of size 1 (``x[:, None]``) or takes everything (``x[:]``)."""
    entries = index if isinstance(index, tuple) else (index,)
    whole = slice(None, None, None)
    return Reshape(x) if all(e is None or e is Ellipsis or e == whole for e in entries) else None


def _dropout(
    input: Any, p: Any = 0.5, training: Any = True, inplace: Any = False, *, train: Any = True
) -> Op | None:
    is_idle = training is False or train is False or (isinstance(p, int | float) and p == 0)
    return Identity(input) if is_idle else Dropout(input, p)


_TABLE: tuple[tuple[Reader, str, str, str], ...] = (
    # Reader, methods and ATen's operations, functions, operations of ATen that are no method.
    (_product, "matmul bmm mm __matmul__", "matmul bmm mm", "linalg_matmul"),
    (_inner, "inner", "inner", ""),
    (_tensordot, "", "tensordot", "tensordot"),
    (_einsum, "", "einsum", "einsum"),
    (_baddbmm, "baddbmm baddbmm_", "baddbmm", ""),
    (_softmax, "softmax", "softmax", "_softmax special_softmax"),
    (_softmin, "", "softmin", ""),
    (_exp, "exp", "exp", ""),
    (_multiply, "mul mul_ multiply", "mul imul multiply", ""),
    (_divide, "div div_ divide true_divide", "div divide true_divide truediv itruediv", ""),
    (_add, "add add_", "add iadd", ""),
    (_subtract, "sub sub_ subtract", "sub isub subtract", ""),
    (_masked_fill, "masked_fill masked_fill_", "masked_fill", ""),
    (lambda x, mask, /, other: _where(mask, x, other), "where", "", ""),
    (_where, "", "where", "where"),
    (_setitem, "", "setitem", ""),
    (_clamp, "clamp clamp_ clip", "clamp clip", ""),
    (_clamp_min, "clamp_min", "max maximum clamp_min", ""),
    (_clamp_max, "clamp_max", "min minimum clamp_max", ""),
    (lambda input: Tanh(input), "tanh tanh_", "tanh tanh_", ""),
    (_append, "", "cat concat concatenate", "cat concat"),
    (_cast, "to type type_as float half bfloat16 double", "", "_to_copy"),
    (Reshape, "reshape flatten unsqueeze squeeze", "reshape flatten unsqueeze squeeze", ""),
    (Reshape, "unflatten view_as reshape_as", "", ""),
    (_view, "view", "", ""),
    (Identity, "contiguous clone detach", "clone detach", "alias lift_fresh_copy"),
    (Expand, "broadcast_to repeat_interleave", "broadcast_to repeat_interleave", ""),
    (Expand, "expand expand_as repeat", "", ""),
    (_permute, "permute", "permute", ""),
    (_transpose, "transpose swapaxes swapdims", "transpose swapaxes swapdims", ""),
    (lambda x, /: _getattr(x, "mT"), "", "", "mT"),
    (lambda x, /: _getattr(x, "T"), "", "", "t numpy_T"),
    (_getitem, "", "getitem", ""),
    (_dropout, "", "dropout", "dropout"),
    (Sdpa, "", "scaled_dot_product_attention", "scaled_dot_product_attention"),
)
_READ_BY_SIZES = (Reshape, Expand, Identity)
"""Readers of calls whose keywords the sizes of their results tell."""

_NAMESPACES = (torch, F, torch.special, torch.linalg, operator)

_METHODS = {name: reader for reader, names, _, _ in _TABLE for name in names.split()}
_FUNCTIONS = {
    getattr(namespace, name): reader
    for reader, _, names, _ in _TABLE
    for name in names.split()
    for namespace in _NAMESPACES
    if hasattr(namespace, name)
} | {getattr: _getattr}
# Of an exported program: overloads, by their name without the overload's.
_ATEN = _METHODS | {name: reader for reader, _, _, names in _TABLE for name in names.split()}


def read(node: Any) -> Op | None:
    """What a node means in this vocabulary, or ``None``."""
    if not isinstance(node, fx.Node):
        return None
    reader: Reader | None = None
    if node.op == "call_method":
        reader = _METHODS.get(str(node.target))
    elif node.op == "call_function":
        reader = _FUNCTIONS.get(node.target)
        if reader is None and str(node.target).startswith("aten."):
            reader = _ATEN.get(target_name(node))
    return None if reader is None else _ask(reader, node)
