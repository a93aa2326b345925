"""Recognise a causal mask where the graph builds one; never guess from values or names."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from distr_compile.passes import vocabulary as voc
from distr_compile.passes.vocabulary import same_size, shape_of, target_name

_VIEWS = frozenset("to expand unsqueeze view reshape contiguous bool expand_as clone".split())
_NOT = frozenset({"logical_not", "bitwise_not", "invert", "inv"})
_AND = frozenset({"and_", "logical_and", "bitwise_and", "iand", "__and__"})
_COMPARE = {
    "le": "le",
    "lt": "lt",
    "ge": "ge",
    "gt": "gt",
    "less_equal": "le",
    "greater_equal": "ge",
}
_MIRROR = {"le": "ge", "ge": "le", "lt": "gt", "gt": "lt"}
_ONES = frozenset({"ones", "new_ones", "ones_like"})


def is_causal_mask(node: fx.Node, rows: Any, columns: Any, *, hidden: bool = False) -> bool:
    """Whether a boolean node says exactly "query i sees keys j <= i" (top-left aligned).

    Args:
        node: the mask, broadcastable to (..., rows, columns).
        rows, columns: N_q and N_k, ints or SymInts.
        hidden: True where the mask marks what is hidden instead of what is seen.
    """
    node = _through_views(node)
    name = target_name(node)
    if name in _NOT and isinstance(node.args[0], fx.Node):
        return is_causal_mask(node.args[0], rows, columns, hidden=not hidden)
    if name in _AND and not hidden:
        parts = [p for p in node.args[:2] if isinstance(p, fx.Node)]
        causal = [is_causal_mask(p, rows, columns) for p in parts]
        return (
            len(parts) == 2
            and any(causal)
            and all(c or _is_ones(p) for c, p in zip(causal, parts, strict=True))
        )
    if name == "tril" and not hidden:
        return _diagonal(node) == 0 and _is_ones(node.args[0]) and _covers(node, rows, columns)
    if name == "triu" and hidden:
        return _diagonal(node) == 1 and _is_ones(node.args[0]) and _covers(node, rows, columns)
    if name in _COMPARE:
        return _is_comparison(node, _COMPARE[name], rows, columns, hidden)
    return False


def is_causal_bias(node: fx.Node, rows: Any, columns: Any) -> bool:
    """Whether a float node adds 0 where j <= i and -inf (or a huge negative number) elsewhere."""
    node = _through_views(node)
    if target_name(node) == "triu":
        value = voc.constant(node.args[0])
        huge = value is not None and value <= voc.HIDING
        return huge and _diagonal(node) == 1 and _covers(node, rows, columns)
    if target_name(node) == "where" and node.op == "call_function" and len(node.args) == 3:
        condition, a, b = node.args
        if not isinstance(condition, fx.Node):
            return False
        first, second = _number(a), _number(b)
        if first == 0 and second is not None and second <= voc.HIDING:
            return is_causal_mask(condition, rows, columns)
        if second == 0 and first is not None and first <= voc.HIDING:
            return is_causal_mask(condition, rows, columns, hidden=True)
    return False


def _number(arg: Any) -> float | None:
    if isinstance(arg, fx.Node) and target_name(arg) in {"zeros", "new_zeros"}:
        return 0.0
    return voc.constant(arg)


def _through_views(node: fx.Node) -> fx.Node:
    while True:
        name = target_name(node)
        is_view = name in _VIEWS or (
            node.target is operator.getitem and isinstance(voc.read(node), voc.Reshape)
        )
        if not is_view or not voc.is_tensor(node.args[0]):
            return node
        node = node.args[0]  # type: ignore[assignment]


def _is_ones(arg: Any) -> bool:
    if not isinstance(arg, fx.Node):
        return False
    node = _through_views(arg)
    if target_name(node) in _ONES:
        return True
    return target_name(node) in {"full", "new_full"} and any(
        a is True or (isinstance(a, int | float) and a == 1)
        for a in (*node.args[1:], *node.kwargs.values())
    )


def _diagonal(node: fx.Node) -> Any:
    return node.args[1] if len(node.args) > 1 else node.kwargs.get("diagonal", 0)


def _covers(node: fx.Node, rows: Any, columns: Any) -> bool:
    shape = shape_of(node)
    return len(shape) >= 2 and same_size(shape[-2], rows) and same_size(shape[-1], columns)


def _is_comparison(node: fx.Node, name: str, rows: Any, columns: Any, hidden: bool) -> bool:
    if len(node.args) < 2:
        return False
    left, right = (_index_role(a, rows, columns) for a in node.args[:2])
    if (left, right) == ("row", "column"):
        name = _MIRROR[name]
    elif (left, right) != ("column", "row"):
        return False
    return name == ("gt" if hidden else "le")  # column <= row: seen


def _index_role(arg: Any, rows: Any, columns: Any) -> str | None:
    """Whether a node counts 0, 1, 2, ... along the queries ("row") or the keys ("column")."""
    if not voc.is_tensor(arg):
        return None
    shape = shape_of(arg)
    node = _through_views(arg)
    while target_name(node) == "add" and 0 in node.args[:2]:
        node = _through_views(next(a for a in node.args[:2] if isinstance(a, fx.Node)))
    value = voc.tensor_of(node)
    starts_at_zero = len(node.args) == 1 or (len(node.args) == 2 and node.args[0] == 0)
    if node.target is not torch.arange or not starts_at_zero or value is None:
        return None
    length = value.shape[0]
    others = [*shape[:-2]]
    if any(not same_size(s, 1) for s in others):
        return None
    if len(shape) >= 2 and same_size(shape[-2], length) and same_size(shape[-1], 1):
        return "row" if same_size(length, rows) else None
    if same_size(shape[-1], length) and (len(shape) == 1 or same_size(shape[-2], 1)):
        return "column" if same_size(length, columns) else None
    return None
