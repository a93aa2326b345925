"""Where values and axes come from: unit tests on small Dynamo graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from distr_compile.passes.origin import (
    BATCH,
    CHANNEL,
    INPUT,
    PROJECTION,
    TABLE,
    TOKEN,
    Flow,
    _reshaped_axis,
    axis_origin,
)
from distr_compile.passes.vocabulary import target_name


def graph_of(function: Callable[..., Any], *inputs: Tensor) -> fx.Graph:
    torch._dynamo.reset()
    graphs: list[fx.Graph] = []

    def backend(gm: fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(gm.graph)
        return gm.forward

    with torch.no_grad():
        torch.compile(function, backend=backend)(*inputs)
    return graphs[0]


def result(graph: fx.Graph) -> fx.Node:
    output = next(n for n in graph.nodes if n.op == "output")
    node = output.args[0][0]
    assert isinstance(node, fx.Node)
    return node


def first(graph: fx.Graph, name: str) -> fx.Node:
    return next(n for n in graph.nodes if target_name(n) == name)


# -- axes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "shape", "axis", "expected"),
    [
        ((2, 17, 96), (2, 17, 3, 32), 3, 2),  # the width of a head lies in the channels
        ((2, 17, 96), (2, 17, 3, 32), 2, 2),
        ((2, 17, 96), (2, 17, 3, 32), 1, 1),
        ((2, 3, 17, 32), (6, 17, 32), 1, 2),  # the largest share: 3 heads of 6
        ((2, 3, 17, 32), (6, 17, 32), 0, 1),
        ((2, 96, 4, 5), (2, 96, 20), 2, 3),  # an image's columns, 5 of 20
        ((2, 96, 20), (2, 96, 4, 5), 2, 2),
        ((4, 7), (28,), 0, 1),
        ((2, 1, 5), (2, 5), 1, 2),
        ((2, 5), (2, 1, 5), 1, None),  # an axis of size 1 is made of nothing
        ((0, 5), (5, 0), 0, None),
    ],
)
def test_reshaped_axis(
    source: tuple[int, ...], shape: tuple[int, ...], axis: int, expected: int | None
) -> None:
    assert _reshaped_axis(source, shape, axis) == expected


LINEAR = nn.Linear(96, 96)
PACKED = nn.Linear(96, 3 * 96)
CONV = nn.Conv2d(3, 96, 1)
EMBEDDING = nn.Embedding(10, 96)

TOKENS = torch.randn(2, 17, 96)
IMAGE = torch.randn(2, 3, 4, 5)


AXES: dict[str, tuple[Callable[[Tensor], Tensor], Tensor, dict[int, str | None]]] = {
    "a linear layer": (lambda x: LINEAR(x), TOKENS, {0: None, 1: TOKEN, 2: CHANNEL, -1: CHANNEL}),
    "heads": (
        lambda x: LINEAR(x).view(2, 17, 3, 32).transpose(1, 2),
        TOKENS,
        {1: CHANNEL, 2: TOKEN, 3: CHANNEL},
    ),
    "packed and unbound": (
        lambda x: PACKED(x).view(2, 17, 3, 3, 32).permute(2, 0, 3, 4, 1).unbind(0)[1],
        TOKENS,
        {1: CHANNEL, 2: CHANNEL, 3: TOKEN},
    ),
    "packed and chunked": (
        lambda x: PACKED(x).chunk(3, dim=-1)[2].transpose(1, 2),
        TOKENS,
        {1: CHANNEL, 2: TOKEN},
    ),
    "a convolution": (
        lambda x: CONV(x).flatten(2).transpose(1, 2),
        IMAGE,
        {0: BATCH, 1: TOKEN, 2: CHANNEL},
    ),
    "a convolution with the batch in front of the tokens": (
        lambda x: CONV(x).flatten(2).permute(2, 0, 1),
        IMAGE,
        {0: TOKEN, 1: BATCH, 2: CHANNEL},
    ),
    "windows folded into the batch": (
        lambda x: CONV(x).flatten(2).transpose(1, 2).reshape(32, 5, 96),
        torch.randn(8, 3, 4, 5),
        {0: None, 1: TOKEN, 2: CHANNEL},
    ),
    "an embedding": (
        lambda x: EMBEDDING(x.long().abs().clamp(max=9)),
        torch.randn(2, 17),
        {0: None, 2: CHANNEL},
    ),
    "pointwise operations and a normalisation": (
        lambda x: F.normalize(LINEAR(x).relu() + 1.0, dim=-1) * 2.0,
        TOKENS,
        {1: TOKEN, 2: CHANNEL},
    ),
    "a bias broadcast": (lambda x: torch.ones(1, 17, 1) * LINEAR(x), TOKENS, {2: CHANNEL}),
    "indexed": (lambda x: LINEAR(x)[:, 1:, None, :48], TOKENS, {1: TOKEN, 2: None, 3: CHANNEL}),
    "a class token in front": (
        lambda x: torch.cat([torch.zeros(2, 1, 96), LINEAR(x)], dim=1),
        TOKENS,
        {1: TOKEN},
    ),
    "an einsum": (
        lambda x: torch.einsum("bnc,cd->dbn", LINEAR(x), torch.ones(96, 4)),
        TOKENS,
        {2: TOKEN},
    ),
    "nothing but an input": (lambda x: x * 2.0, TOKENS, {0: None, 1: None, 2: None}),
}


@pytest.mark.parametrize("name", AXES)
def test_axis_origin(name: str) -> None:
    function, x, expected = AXES[name]
    node = result(graph_of(function, x))
    assert {axis: axis_origin(node, axis, {}) for axis in expected} == expected
    known: dict[Any, Any] = {}
    for _ in range(2):  # the second round answers from what the first one left behind
        assert {axis: axis_origin(node, axis, known) for axis in expected} == expected


# -- values ---------------------------------------------------------------------------------------


class Sources(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(17, 32))
        self.register_buffer("positions", torch.randn(17, 32))
        self.linear = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (
            x.cos(),
            self.table.sin(),
            self.positions.exp(),
            self.linear(self.table).tan(),
            x.sigmoid() + self.table,
            torch.ones(3).log(),
            (x @ self.table.t()).abs(),
        )


@pytest.mark.parametrize(
    ("name", "origins"),
    [
        ("cos", {INPUT}),
        ("sin", {TABLE}),
        ("exp", {TABLE}),
        ("tan", {PROJECTION}),
        ("add", {INPUT, TABLE}),
        ("log", set()),
        ("abs", {PROJECTION}),  # an activation times parameters is a projection
    ],
)
def test_origins(name: str, origins: set[str]) -> None:
    graph = graph_of(Sources(), torch.randn(17, 32))
    assert Flow(graph).origins[first(graph, name)] == origins


def test_scores_are_products_of_two_activations() -> None:
    table = nn.Parameter(torch.randn(32, 33))

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        weights = (q @ k.t() * 0.5 + 1.0).softmax(-1)
        return weights @ v, q @ table

    graph = graph_of(function, torch.randn(17, 32), torch.randn(33, 32), torch.randn(33, 40))
    flow = Flow(graph)
    qk, pv, projection = (n for n in graph.nodes if target_name(n) == "matmul")
    assert flow.is_scores(qk)
    assert not flow.is_scores(projection)
    softmax = first(graph, "softmax")
    assert flow.chained[softmax.args[0]] == {qk}  # type: ignore[index]
    assert not flow.chained[pv]  # what follows attention are no scores
    assert not flow.behind[pv]


def test_a_layer_ends_the_way_back_to_scores() -> None:
    def function(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return F.layer_norm(q @ k.t(), (33,)).tanh(), torch.relu(q @ k.t())[:, :17].sin()

    graph = graph_of(function, torch.randn(17, 32), torch.randn(33, 32))
    flow = Flow(graph)
    qk = [n for n in graph.nodes if target_name(n) == "matmul"]
    assert flow.behind[first(graph, "sin")] == {qk[1]}
    assert not flow.chained[first(graph, "sin")]


@pytest.mark.parametrize("name", ["chunk", "split", "unbind"])
def test_several_tensors_have_no_axes(name: str) -> None:
    graph = graph_of(lambda x: getattr(x, name)(*() if name == "unbind" else (1,))[0], TOKENS)
    assert axis_origin(first(graph, name), 0, {}) is None
