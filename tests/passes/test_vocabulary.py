"""What single nodes are read as: every name of the table is one of torch's, keywords count too."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from distr_compile.passes import vocabulary as voc


def test_every_name_is_known_to_torch() -> None:
    for _, methods, functions, aten in voc._TABLE:
        for name in methods.split():
            assert hasattr(Tensor, name)
        for name in functions.split():
            assert any(hasattr(namespace, name) for namespace in voc._NAMESPACES)
        assert all(hasattr(torch.ops.aten, name) for name in aten.split())


def node(target: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> fx.Node:
    graph = fx.Graph()

    def place(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        made = graph.placeholder(f"x{len(graph.nodes)}")
        made.meta["example_value"] = x
        return made

    args, kwargs = fx.node.map_aggregate(args, place), fx.node.map_aggregate(kwargs, place)  # type: ignore[assignment]
    kind = "call_method" if isinstance(target, str) else "call_function"
    return graph.create_node(kind, target, args, kwargs)


X, Y = torch.empty(2, 3, 4, device="meta"), torch.empty(2, 4, 3, device="meta")
HIDDEN = torch.empty(2, 3, 4, dtype=torch.bool, device="meta")


@pytest.mark.parametrize(
    ("by_place", "by_name"),
    [
        (node(torch.bmm, X, Y), node(torch.bmm, input=X, mat2=Y)),
        (node("matmul", X, Y), node("matmul", X, other=Y)),
        (node(torch.softmax, X, -1), node(torch.softmax, input=X, dim=2)),
        (node(F.softmax, X, 1, 3, torch.float32), node("softmax", X, dim=1, dtype=torch.float32)),
        (node("masked_fill", X, HIDDEN, -1e9), node("masked_fill", X, mask=HIDDEN, value=-1e9)),
        (node("clamp", X, -1.0, None), node("clamp_min", X, min=-1.0)),
        (node("transpose", X, 1, 2), node(torch.transpose, input=X, dim1=-1, dim0=-2)),
        (node("permute", X, 0, 2, 1), node("permute", X, dims=(0, -1, 1))),
        (node(F.dropout, X, 0.1, False), node(F.dropout, input=X, training=False)),
        (node(torch.where, HIDDEN, X, -1e9), node("where", X, HIDDEN, other=-1e9)),
        (node(operator.sub, X, Y), node("sub", X, other=Y, alpha=1)),
        (node("softmax", X, 2), node(torch.ops.aten._softmax.default, X, -1, False)),
    ],
)
def test_reads_arguments_by_place_and_by_name(by_place: fx.Node, by_name: fx.Node) -> None:
    op = voc.read(by_place)
    assert op is not None
    assert repr(voc.read(by_name)).split("(")[0] == repr(op).split("(")[0]
    fields = {k: v for k, v in vars(op).items() if not isinstance(v, fx.Node)}
    assert fields == {k: v for k, v in vars(voc.read(by_name)).items() if k in fields}


@pytest.mark.parametrize(
    "call",
    [
        node("view", X, torch.int32),  # other bits
        node("div", X, 2.0, rounding_mode="floor"),
        node("max", X),
        node(torch.max, X, 1),  # of an axis, not of two
        node("gumbel_softmax", X),
        node("sub", X),
        node(torch.einsum, "bij,kl->bijkl", X, Y),  # an outer product
    ],
)
def test_reads_nothing_else(call: fx.Node) -> None:
    assert voc.read(call) is None
