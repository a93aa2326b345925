"""Writes and aliases, learnt by running graphs on fake tensors; state is left as it was."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from distr_compile.passes import memory as memory_module
from distr_compile.passes.memory import Memory
from distr_compile.passes.vocabulary import target_name, value_of


def graph_of(function: Callable[..., Any], *inputs: Any, **options: Any) -> fx.Graph:
    torch._dynamo.reset()
    graphs: list[fx.Graph] = []

    def backend(gm: fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(gm.graph)
        return gm.forward

    dynamic_shapes = torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
    with torch.no_grad(), dynamic_shapes:
        torch.compile(function, backend=backend, **options)(*inputs)
    return graphs[0]


def named(graph: fx.Graph, name: str) -> fx.Node:
    return next(n for n in graph.nodes if target_name(n) == name)


def placeholder(graph: fx.Graph, name: str) -> fx.Node:
    return next(n for n in graph.nodes if n.op == "placeholder" and name in str(n.target))


@torch.library.custom_op("distr_tests::negate_", mutates_args=("x",))
def negate_(x: Tensor) -> None:
    x.neg_()


@torch.library.custom_op("distr_tests::fill_second", mutates_args={"second"})
def fill_second(first: Tensor, second: Tensor) -> Tensor:
    second.zero_()
    return first + 1


@fill_second.register_fake
def _(first: Tensor, second: Tensor) -> Tensor:
    return torch.empty_like(first)


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "mul_": lambda x: x.mul_(2.0),
    "setitem": lambda x: x.__setitem__((0, 0), 1.0),
    "out": lambda x: torch.add(x, 1.0, out=x),
    "relu_": lambda x: torch.relu_(x),
    "relu inplace": lambda x: F.relu(x, inplace=True),
    "__iadd__": lambda x: x.__iadd__(1.0),
    "iadd": lambda x: operator.iadd(x, 1.0),
    "foreach": lambda x: torch._foreach_add_([x], 1.0),
    "custom op": lambda x: negate_(x),
    "aten": lambda x: torch.ops.aten.mul_.Tensor(x, x),
    "index_copy_": lambda x: x.index_copy_(0, torch.tensor([0]), x[:1] + 1),
    "copy into real part": lambda x: torch.view_as_complex(x.view(-1, 2)).mul_(1j),
    "set by mask": lambda x: x.__setitem__(x > 0, 0.0),
    "diagonal": lambda x: x.diagonal().fill_(0.0),
    "unfold": lambda x: x.unfold(1, 2, 2).add_(1.0),
    "chunk": lambda x: x.chunk(2, -1)[1].zero_(),
    "data": lambda x: x.detach().zero_(),
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_write_is_seen_through_views(name: str, dynamic: bool) -> None:
    def function(x: Tensor) -> Tensor:
        WRITES[name](x.view(-1, 4)[1:])
        return x + 1.0

    graph = graph_of(function, torch.randn(4, 4), dynamic=dynamic)
    memory, x = Memory(graph), placeholder(graph, "x")
    writers = [n for n in graph.nodes if memory.writes_into(n, x)]
    assert len(writers) == 1
    last = list(graph.nodes)[-1]
    assert memory.writers(x, x, last) == writers
    assert memory.definition(x, last) is None  # only some of its elements


@pytest.mark.parametrize(
    "read_only",
    [
        lambda x: (x > 0) & (x < 1),
        lambda x: F.relu(x, inplace=False),
        lambda x: x.__add__(1.0),
        lambda x: fill_second(x, torch.ones(4)),
        lambda x: x.nonzero() + 1,
    ],
)
def test_a_read_is_no_write(read_only: Callable[[Tensor], Any]) -> None:
    graph = graph_of(read_only, torch.randn(3, 4))
    memory = Memory(graph)
    assert not [n for n in graph.nodes if memory.writes_into(n, placeholder(graph, "x"))]


def test_a_copy_shares_nothing_and_a_view_does() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        return x.clone(), x.contiguous(), x.mT.contiguous(), x.to(torch.float64), x.reshape(-1)

    graph = graph_of(function, torch.randn(3, 4))
    memory = Memory(graph)
    own = memory.storages(placeholder(graph, "x"))
    outputs: Any = next(n for n in graph.nodes if n.op == "output").args[0]
    assert [memory.storages(n) == own for n in outputs] == [False, True, False, False, True]


def test_the_last_whole_write_defines_a_value() -> None:
    def function(x: Tensor) -> Tensor:
        y = x * 2
        y.add_(1.0)
        y.view(3, 4).mul_(3.0)
        z = y + 0
        y[0] = 0.0
        return z + y

    graph = graph_of(function, torch.randn(3, 4))
    memory = Memory(graph)
    y, z = named(graph, "mul"), [n for n in graph.nodes if target_name(n) == "add"]
    assert memory.definition(y, named(graph, "add_")) is y
    assert memory.definition(y, z[0]) is named(graph, "mul_")
    assert memory.definition(y, z[1]) is None


def test_inputs_that_share_memory() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        y.zero_()
        return x + 1

    x = torch.randn(4, 4)
    graph = graph_of(function, x, x[:2])
    memory = Memory(graph)
    assert memory.writes_into(named(graph, "zero_"), placeholder(graph, "x"))


def test_dead_values_and_effects() -> None:
    def function(x: Tensor) -> Tensor:
        x.exp().sum()
        torch.rand(3).sum()
        negate_(x.clone())
        x.numel()
        return x + 1

    graph = graph_of(function, torch.randn(3, 4))
    dead = {target_name(n) for n in Memory(graph).dead if n.op.startswith("call")}
    assert {"exp", "sum"} <= dead
    assert not {"rand", "clone", "negate_", "add"} & dead


def transforms() -> dict[str, Callable[[Tensor], Any]]:
    def square(x: Tensor) -> Tensor:
        return (x * x).sum()

    return {
        "vmap": lambda x: torch.vmap(square)(x),
        "grad": lambda x: torch.func.grad(square)(x),
        "jvp": lambda x: torch.func.jvp(square, (x,), (x,)),
        "jacrev": lambda x: torch.func.jacrev(lambda y: y * y)(x),
        "checkpoint": lambda x: checkpoint(lambda y: y.sin(), x, use_reentrant=False),
        "cond": lambda x: torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,)),
        "autocast": lambda x: _autocast(x),
        "no tensors": lambda x: torch.ones(3) * 2,
        "unbacked": lambda x: x[x > 0].sum(),
    }


def _autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return x @ x


@pytest.mark.parametrize("name", transforms())
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_state_is_left_as_it_was(
    name: str, dynamic: bool, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where every node raises half-way."""
    graph = graph_of(transforms()[name], torch.randn(4, 4), dynamic=dynamic)
    has_tensors = any(value_of(n) is not None for n in graph.nodes)
    if fails:
        monkeypatch.setattr(memory_module, "_storage", _fail)
    modes = [value_of(n) for n in graph.nodes if isinstance(value_of(n), Tensor)]
    shapes = next((x.fake_mode.shape_env for x in modes if hasattr(x, "fake_mode")), None)
    guards = len(shapes.guards) if shapes else 0
    before = _state()
    with pytest.raises(RuntimeError) if fails and has_tensors else contextlib.nullcontext():
        Memory(graph)
    assert _state() == before
    assert (len(shapes.guards) if shapes else 0) == guards
    assert not shapes or not shapes.pending_fresh_unbacked_symbols


def _fail(_: Tensor) -> int:
    raise RuntimeError("a storage that cannot be named")


def _state() -> tuple[Any, ...]:
    return (
        torch._C._functorch.get_dynamic_layer_stack_depth(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch._C._is_fwd_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_cache_enabled(),
        torch._C._len_torch_dispatch_stack(),
        torch._C._len_torch_function_stack(),
    )


@pytest.mark.parametrize("name", ["vmap", "grad", "jvp", "jacrev"])
def test_nodes_of_a_transform_are_known(name: str) -> None:
    graph = graph_of(transforms()[name], torch.randn(4, 4))
    inside = {target_name(n) for n in Memory(graph).transformed}
    assert "mul" in inside


def test_a_node_that_is_not_run_may_write_all_it_is_given() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        z = checkpoint(lambda a: a.sin(), x, use_reentrant=False)
        return z + y

    graph = graph_of(function, torch.randn(4), torch.randn(4))
    memory = Memory(graph)
    body = next(n for n in graph.nodes if memory.writes(n))
    assert memory.writes_into(body, placeholder(graph, "x"))
    assert not memory.writes_into(body, placeholder(graph, "y"))
