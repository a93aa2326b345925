"""Names and identity of layers, seen from inside a real Dynamo backend call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, fx, nn

from distr_compile import identity
from distr_compile.identity import FrameModule, Layer, Root

WIDTH = 4


@dataclass
class Call:
    """One backend call: what identity.py said about each softmax of the graph."""

    root: Root
    frame: FrameModule
    layers: list[Layer | None]
    shared: list[tuple[str, ...]]


@dataclass
class Backend:
    """A backend that runs the graph as it is and asks for the layer of every softmax."""

    calls: list[Call] = field(default_factory=list)
    runs: int = 0

    def __call__(self, gm: fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        nodes = [
            n
            for m in gm.modules()
            if isinstance(m, fx.GraphModule)
            for n in m.graph.nodes
            if n.target in ("softmax", torch.softmax, torch.nn.functional.softmax)
        ]
        root = identity.find_root()
        assert root is not None
        frame = identity.guard_frame_module(nodes)
        layers = [identity.layer_of(n, root, frame) for n in nodes]
        calls = [n for n in gm.graph.nodes if n.target is torch.ops.higher_order.invoke_subgraph]
        shared = [identity.shared_by(x, root, frame, calls) for x in layers if x is not None]
        if nodes:
            self.calls.append(Call(root, frame, layers, shared))

        def run(*inputs: Tensor) -> object:
            self.runs += 1
            return gm.forward(*inputs)

        return run

    @property
    def names(self) -> list[str | None]:
        return [x.name if x else None for call in self.calls for x in call.layers]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).softmax(-1)


class Broken(nn.Module):
    """The softmax stands at the top of a resumed frame, where Dynamo records no stack."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        torch._dynamo.graph_break()
        return self.linear(x.softmax(-1))


class Break(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x


class Block(nn.Module):
    """A break first, then attention in a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x + self.attn(x)


class Model(nn.Module):
    def __init__(self, block: Callable[[], nn.Module], depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


@pytest.fixture
def backend() -> Backend:
    return Backend()


def tokens(rows: int = 3) -> Tensor:
    return torch.randn(rows, WIDTH)


def compiled(model: nn.Module, backend: Backend, **options: bool) -> Callable[..., Tensor]:
    return torch.compile(model, backend=backend, **options)  # type: ignore[call-overload]


def blocks(depth: int, below: str = "") -> list[str]:
    return [f"blocks.{i}{below}" for i in range(depth)]


# ------------------------------------------------------------------------- one graph per layer


@pytest.mark.parametrize(
    ("depth", "block", "below"), [(12, Broken, ""), (12, Block, ".attn"), (40, Broken, "")]
)
def test_equal_blocks_behind_a_break_get_a_graph_and_a_name_each(
    backend: Backend, depth: int, block: Callable[[], nn.Module], below: str
) -> None:
    model = Model(block, depth)
    run = compiled(model, backend)
    x = tokens()
    torch.testing.assert_close(run(x), model(x))

    assert backend.names == blocks(depth, below)
    assert len(backend.calls) == depth
    assert all(call.frame.guarded for call in backend.calls)
    assert [call.shared for call in backend.calls] == [[(n,)] for n in blocks(depth, below)]
    assert all(call.root.module is model for call in backend.calls)

    for _ in range(3):
        run(tokens())
    assert len(backend.calls) == depth, "calling again must not compile again"


def test_a_new_shape_compiles_every_layer_once_more(backend: Backend) -> None:
    run = compiled(Model(Broken, 12), backend)
    for rows in (3, 5, 6, 7):
        run(tokens(rows))
    assert sorted(backend.names) == sorted(2 * blocks(12)), "one static, one dynamic graph each"


def test_dynamic_shapes(backend: Backend) -> None:
    run = compiled(Model(Broken, 12), backend, dynamic=True)
    for rows in (3, 5, 6):
        run(tokens(rows))
    assert backend.names == blocks(12)


def test_the_last_compilation_that_dynamo_allows_is_known(backend: Backend) -> None:
    with torch._dynamo.config.patch(accumulated_recompile_limit=5):
        compiled(Model(Broken, 12), backend)(tokens())
    assert backend.names == blocks(5), "Dynamo runs the rest eagerly"
    assert [call.frame.compiles_left for call in backend.calls] == [4, 3, 2, 1, 0]
    notes = [call.frame.limit_note() for call in backend.calls]
    assert notes[:4] == [""] * 4
    assert "accumulated_recompile_limit" in notes[4]
    assert len({call.frame.code_key for call in backend.calls}) == 1


def test_recompilations_are_counted_per_layer(backend: Backend) -> None:
    run = compiled(Model(Broken, 12), backend, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=3):
        for rows in (3, 5, 6, 7):
            run(tokens(rows))
    assert sorted(backend.names) == sorted(3 * blocks(12))
    assert [call.frame.compiles_left for call in backend.calls] == [2] * 12 + [1] * 12 + [0] * 12


def test_a_second_model_of_the_same_class_gets_its_own_graphs(backend: Backend) -> None:
    first, second = Model(Attention, 2), Model(Attention, 2)
    compiled(first, backend)(tokens())
    compiled(second, backend)(tokens())
    assert [call.root.module for call in backend.calls] == [first, second]
    assert [call.root.key for call in backend.calls] == [first, second]
    assert backend.names == 2 * blocks(2)


def test_modules_that_no_node_belongs_to_are_not_guarded(backend: Backend) -> None:
    class Scored(nn.Module):
        def forward(self, x: Tensor, score: nn.Module) -> Tensor:
            return score(x.softmax(-1))

    run = compiled(Scored(), backend)
    for _ in range(12):  # a new module each time: its identity would compile it each time
        run(tokens(), nn.ReLU())
    (call,) = backend.calls
    assert call.frame.guards == {"self"}
    assert backend.runs == 12


def test_layers_with_a_number_do_not_use_up_the_limit(backend: Backend) -> None:
    """The first half holds no softmax, and Dynamo compiles it once per number."""

    class Numbered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.number = next(numbers)
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            x = self.linear(x) + self.number
            torch._dynamo.graph_break()
            return self.linear(x.softmax(-1))

    numbers = iter(range(20))
    run = compiled(Model(Numbered, 20), backend)
    for _ in range(2):
        run(tokens())
    assert backend.names == blocks(20)
    assert backend.runs == 2 * 2 * 20


# ------------------------------------------------------------------------------------ the root


def test_model_compile_in_place(backend: Backend) -> None:
    model = Model(Attention, 2)
    model.compile(backend=backend)
    model(tokens())
    assert backend.names == blocks(2)
    assert backend.calls[0].root.key is model is identity.key_of(model)


def test_a_compiled_forward(backend: Backend) -> None:
    model = Model(Attention, 2)
    model.forward = torch.compile(model.forward, backend=backend)  # type: ignore[method-assign]
    model(tokens())
    assert backend.names == blocks(2)
    assert backend.calls[0].root.key is model


def test_keys_of_what_torch_compile_returns(backend: Backend) -> None:
    def step(x: Tensor) -> Tensor:
        return x.softmax(-1)

    model = Model(Attention, 2)
    assert identity.key_of(torch.compile(model, backend=backend)) is model
    run = torch.compile(torch.no_grad()(step), backend=backend)
    run(tokens())
    assert identity.key_of(run) is step is backend.calls[0].root.key


def test_a_module_that_calls_a_compiled_one_is_not_the_root(backend: Backend) -> None:
    class Trainer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model(Broken, 2)
            self.run = torch.compile(self.model, backend=backend)

        def forward(self, x: Tensor) -> Tensor:
            return self.run(x)

    trainer = Trainer()
    trainer(tokens())
    assert backend.names == blocks(2)
    assert all(call.root.module is trainer.model for call in backend.calls)


@pytest.mark.parametrize("in_place", [True, False])
def test_submodules_compiled_one_by_one(backend: Backend, in_place: bool) -> None:
    class Layer12(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Attention()

        def forward(self, x: Tensor) -> Tensor:
            return self.attn(x) + x.softmax(-1)

    model = Model(Layer12, 12)
    parts = list(model.blocks)
    for i, part in enumerate(parts):
        if in_place:
            part.compile(backend=backend)
        else:
            model.blocks[i] = torch.compile(part, backend=backend)  # type: ignore[assignment]
    for _ in range(2):
        model(tokens())
    assert [call.root.module for call in backend.calls] == parts
    assert backend.names == 12 * ["attn", ""]


def test_a_model_and_its_submodules_compiled(backend: Backend) -> None:
    model = Model(Block, 2)
    for i, part in enumerate(list(model.blocks)):
        model.blocks[i] = torch.compile(part, backend=backend)  # type: ignore[assignment]
    compiled(model, backend)(tokens())
    expected = [n for n, m in model.named_modules() if isinstance(m, Attention)]
    assert backend.names == expected
    assert expected[0] == "blocks.0._orig_mod.attn"


def test_functions(backend: Backend) -> None:
    model, head = Model(Attention, 2), nn.Linear(WIDTH, WIDTH)

    def given(module: nn.Module, x: Tensor) -> Tensor:
        return head(module(x))

    torch.compile(lambda x: head(model(x)), backend=backend)(tokens())
    torch.compile(given, backend=backend)(model, tokens())
    torch.compile(given, backend=backend)(compiled(model, Backend()), tokens())
    torch.compile(functools.partial(given, model), backend=backend)(tokens())
    assert backend.names == 4 * blocks(2)
    assert [call.root.module for call in backend.calls[:3]] == 3 * [model]
    assert backend.calls[1].root.key is given

    torch.compile(lambda x: x.softmax(-1), backend=backend)(tokens())
    last = backend.calls[-1]
    assert last.root.module is None
    assert last.root.names == {}
    assert last.layers == [None]
    assert last.frame.module is None
    assert not last.frame.guards


def test_a_method_of_an_object_that_holds_the_model(backend: Backend) -> None:
    class Runner:
        def __init__(self) -> None:
            self.model = Model(Broken, 2)

        @torch.no_grad()
        def step(self, x: Tensor) -> Tensor:
            return self.model(x)

    runner = Runner()
    torch.compile(runner.step, backend=backend)(tokens())
    assert backend.names == blocks(2)
    assert backend.calls[0].root.key is runner


def test_a_break_in_a_function_that_calls_the_model(backend: Backend) -> None:
    model = Model(Broken, 3)
    torch.compile(lambda x: model(x) + 1, backend=backend)(tokens())
    assert backend.names == blocks(3)
    assert all(call.frame.guarded for call in backend.calls)


@pytest.mark.parametrize("in_place", [True, False])
def test_sequential(backend: Backend, in_place: bool) -> None:
    model = nn.Sequential(Attention(), nn.Sequential(Broken(), Break(), Broken()), Attention())
    run: Callable[..., Tensor] = model
    if in_place:
        model.compile(backend=backend)
    else:
        run = compiled(model, backend)
    run(tokens())
    assert backend.names == ["0", "1.0", "1.2", "2"]


@pytest.mark.parametrize("in_place", [True, False])
def test_many_sequentials_are_never_left_to_eager(backend: Backend, in_place: bool) -> None:
    """They all run one code object of PyTorch's; guards there must not use its limit up."""
    parts = [nn.Sequential(Attention(), nn.ReLU()) for _ in range(6)]
    with torch._dynamo.config.patch(recompile_limit=3):
        for part in parts:
            if in_place:
                part.compile(backend=backend)
            else:
                part = compiled(part, backend)  # type: ignore[assignment]
            part(tokens())
    assert set(backend.names) <= {"0"}
    assert len(backend.calls) == 6 or not backend.calls[0].frame.guarded
    assert backend.runs == 6


# ------------------------------------------------------------------------------- names of layers


def test_a_module_called_twice(backend: Backend) -> None:
    class Albert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Attention()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(self.layer(x)))

    compiled(Albert(), backend)(tokens())
    layers = [(x.name, x.call) for x in backend.calls[0].layers if x]
    assert layers == [("layer", 0), ("layer", 1), ("layer", 2)]


def test_a_module_called_twice_with_a_break_is_one_graph(backend: Backend) -> None:
    class Albert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Broken()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    compiled(Albert(), backend)(tokens())
    assert backend.names == ["layer"]


@pytest.mark.parametrize("broken", [False, True])
def test_two_parents(backend: Backend, broken: bool) -> None:
    class Parent(nn.Module):
        def __init__(self, child: nn.Module) -> None:
            super().__init__()
            self.child = child

        def forward(self, x: Tensor) -> Tensor:
            if broken:
                torch._dynamo.graph_break()
            return self.child(x)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            shared = Attention()
            self.a, self.b = Parent(shared), Parent(shared)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    compiled(Tied(), backend)(tokens())
    layers = [x.names for call in backend.calls for x in call.layers if x]
    assert layers == [("a.child", "b.child"), ("b.child", "a.child")]


def test_the_root_itself_a_dict_and_a_module_that_is_not_registered(backend: Backend) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleDict({"a b": Attention()})
            self.hidden = [Attention()]

        def forward(self, x: Tensor) -> Tensor:
            return self.hidden[0](self.heads["a b"](x.softmax(-1)))

    compiled(Mixed(), backend)(tokens())
    assert backend.names == ["", "heads.a b", "hidden.0"]


def test_common_layer() -> None:
    module = Model(Block, 2)
    root = Root(module, {id(m): (n,) for n, m in module.named_modules()}, module)
    block, attn = module.blocks[1], module.blocks[1].attn
    graph = fx.Graph()
    inner, outer, top = (graph.placeholder(n) for n in ("inner", "outer", "top"))
    outer.meta["nn_module_stack"] = {str(id(block)): ("L['self'].blocks.1", Block)}
    inner.meta["nn_module_stack"] = {
        **outer.meta["nn_module_stack"],
        f"{id(attn)}@2": ("L['self'].blocks.1.attn", Attention),
    }
    frame = FrameModule(module, "self", "forward")

    def layer(*nodes: fx.Node) -> tuple[str, int] | None:
        found = identity.common_layer(nodes, root, frame)
        return (found.name, found.call) if found else None

    assert layer(inner, inner) == ("blocks.1.attn", 2)
    assert layer(inner, outer) == ("blocks.1", 0)
    assert layer(inner, outer, top) == ("", 0)
    assert identity.layer_of(top, root) is None


def test_activation_checkpointing(backend: Backend) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = Model(Attention, 2)
    for i in range(2):
        model.blocks[i] = checkpoint_wrapper(model.blocks[i])
    compiled(model, backend)(tokens())
    assert backend.names == blocks(2, "._checkpoint_wrapped_module")


def test_one_body_for_several_layers(backend: Backend) -> None:
    class Region(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Attention()

        @torch.compiler.nested_compile_region
        def forward(self, x: Tensor) -> Tensor:
            return self.attn(x)

    compiled(Model(Region, 3), backend)(tokens())
    (call,) = backend.calls
    assert call.frame.guarded
    assert call.shared[0] == tuple(blocks(3, ".attn"))


# ------------------------------------------------------------------- where no guard can be placed


class Lost(nn.Module):
    """After the break no local variable leads to the module any more."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        torch._dynamo.graph_break()
        return x.softmax(-1)


def attend(x: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return x.softmax(-1)


class Helped(nn.Module):
    """Attention in a function that is given tensors only."""

    def forward(self, x: Tensor) -> Tensor:
        return attend(x) + 1


@pytest.mark.parametrize("block", [Lost, Helped])
def test_layers_that_share_a_graph_are_named(
    backend: Backend, block: Callable[[], nn.Module]
) -> None:
    compiled(Model(block, 3), backend)(tokens())
    (call,) = backend.calls
    assert not call.frame.guarded
    assert "is the module" in call.frame.reason
    assert backend.names == ["blocks.0"]
    assert call.shared == [tuple(blocks(3))]


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ("torch._dynamo.guards.install_guard", "takes no identity guard"),
        ("torch._dynamo.symbolic_convert.InstructionTranslator.current_tx", "does not show"),
    ],
)
def test_a_missing_private_api_is_a_reason(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, missing: str, reason: str
) -> None:
    ask = identity.guard_frame_module

    def without(nodes: list[fx.Node]) -> FrameModule:
        with pytest.MonkeyPatch.context() as patch:
            patch.delattr(missing)
            return ask(nodes)

    monkeypatch.setattr(identity, "guard_frame_module", without)
    compiled(Model(Block, 3), backend)(tokens())
    (call,) = backend.calls
    assert not call.frame.guarded
    assert reason in call.frame.reason
    assert call.shared == [tuple(blocks(3, ".attn"))]


def test_a_guard_filter_is_a_reason(backend: Backend) -> None:
    torch.compile(
        Model(Block, 3),
        backend=backend,
        options={"guard_filter_fn": torch.compiler.skip_all_guards_unsafe},
    )(tokens())
    assert "guard_filter_fn" in backend.calls[0].frame.reason
    assert backend.calls[0].shared == [tuple(blocks(3, ".attn"))]


def test_outside_of_a_backend_call() -> None:
    assert identity.find_root() is None
    assert not identity.guard_frame_module([]).guarded
