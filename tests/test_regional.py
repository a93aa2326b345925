"""``compile_blocks``: equal blocks by one graph, with the numbers of the whole model's compile."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import distr_compile
from distr_compile import regional
from distr_compile.policy import PolicyError

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

POLICY: dict[str, Any] = {"default": {"group_size": 2, "min_seq_len": 0}}
EAGER = {"compiler": "eager"}


class Block(nn.Module):
    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, 64)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / 8).softmax(-1)
        return x + self.out((weights @ v).transpose(1, 2).flatten(2))


class Net(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def net(blocks: int) -> Net:
    torch.manual_seed(0)  # each block has weights of its own
    return Net(blocks).eval()


def inputs(tokens: int = 40) -> Tensor:
    return torch.randn(2, tokens, 128, generator=torch.Generator().manual_seed(1))


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def rules(*each: dict[str, Any]) -> dict[str, Any]:
    return {**POLICY, "rule": list(each)}


EXACT = {"layers": "blocks.[0-3]", "group_size": 1}


@pytest.mark.parametrize(
    ("blocks", "policy", "sizes"),
    [(12, POLICY, [12]), (12, rules(EXACT), [4, 8]), (20, POLICY, [20])],
)
def test_a_graph_for_each_kind_of_block(
    blocks: int, policy: dict[str, Any], sizes: list[int]
) -> None:
    model, x = net(blocks), inputs()
    whole = torch.compile(
        copy.deepcopy(model), backend="distr", options={"policy": policy, **EAGER}
    )
    with torch.no_grad():
        exact, wanted = model(x), whole(x)
        groups = distr_compile.compile_blocks(model, policy, options=EAGER)
        counters.clear()
        got = model(x)
    assert [len(names) for names in groups] == sizes
    assert graphs() == len(sizes)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    assert (wanted - exact).abs().max() > 1e-3, "nothing was approximated"
    rows = distr_compile.report(model).rows
    assert [row.layer for row in rows] == [f"blocks.{i}" for i in range(blocks)]
    number = sizes[0] if len(sizes) > 1 else 0
    assert [row.decision for row in rows] == ["exact"] * number + ["distr"] * (blocks - number)


def test_the_weights_are_those_of_each_block() -> None:
    """Changed after the graph was compiled, as well."""
    model, x = net(3), inputs()
    with torch.no_grad():
        distr_compile.compile_blocks(model, POLICY, options=EAGER)
        before = model(x)
        model.blocks[2].out.weight.mul_(2)
        after = model(x)
        fresh = Net(3).eval()
        fresh.load_state_dict(model.state_dict())
        wanted = torch.compile(fresh, backend="distr", options={"policy": POLICY, **EAGER})(x)
    assert (after - before).abs().max() > 1e-2
    torch.testing.assert_close(after, wanted, rtol=0, atol=1e-5)


def test_other_shapes_get_graphs_and_each_layer_one_row_for_each() -> None:
    model = net(4)
    with torch.no_grad():
        distr_compile.compile_blocks(model, POLICY, options=EAGER, dynamic=False)
        model(inputs(40))
        model(inputs(48))
        model(inputs(40))
    assert graphs() == 2
    rows = distr_compile.report(model).rows
    assert [row.layer for row in rows] == 2 * [f"blocks.{i}" for i in range(4)]


def test_compiled_by_inductor() -> None:
    model, x = net(3), inputs()
    whole = torch.compile(copy.deepcopy(model), backend="distr", options={"policy": POLICY})
    with torch.no_grad():
        wanted = whole(x)
        distr_compile.compile_blocks(model, POLICY, fullgraph=True)
        torch.testing.assert_close(model(x), wanted, rtol=0, atol=1e-5)


def test_blocks_by_class_or_by_name() -> None:
    for blocks in ("Block", "blocks.*", ["blocks.0", "blocks.1", "blocks.2"]):
        model = net(3)
        assert distr_compile.compile_blocks(model, POLICY, blocks=blocks) == [
            ["blocks.0", "blocks.1", "blocks.2"]
        ]


def test_other_sizes_are_other_groups() -> None:
    model = net(3)
    model.blocks[1].out = nn.Linear(128, 128, bias=False)
    groups = distr_compile.compile_blocks(model, POLICY)
    assert groups == [["blocks.0", "blocks.2"], ["blocks.1"]]


def twice(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return 2 * out


@pytest.mark.parametrize("hooked", [(1,), (0, 2), (0, 1, 2)])
def test_blocks_with_other_hooks_are_other_groups(hooked: tuple[int, ...]) -> None:
    model, x = net(3), inputs()
    for i in hooked:
        model.blocks[i].out.register_forward_hook(twice)  # type: ignore[union-attr]
    options = {"policy": POLICY, **EAGER}
    with torch.no_grad():
        wanted = torch.compile(copy.deepcopy(model), backend="distr", options=options)(x)
        groups = distr_compile.compile_blocks(model, POLICY, options=EAGER)
        torch.testing.assert_close(model(x), wanted, rtol=0, atol=1e-5)
    names = [f"blocks.{i}" for i in range(3)]
    those = [name for i, name in enumerate(names) if i in hooked]
    assert sorted(groups) == sorted(
        part for part in (those, [name for name in names if name not in those]) if part
    )


class Numbered(Block):
    """Dynamo guards the number, as that of a layer in models of transformers: a graph for each."""

    number = 0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.number / 100


def numbered(blocks: int) -> Net:
    model = net(blocks)
    for i, block in enumerate(model.blocks):
        block.__class__, block.number = Numbered, i
    return model


@pytest.mark.parametrize("by", ["limit", "guards"])
def test_more_different_blocks_than_graphs_of_one_code(
    by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a limit of their own, or, where PyTorch takes none, by guards that Dynamo counts apart."""
    if by == "guards":
        monkeypatch.setattr(regional, "_limits", lambda blocks: {})
    model, x = numbered(12), inputs()
    options = {"policy": POLICY, **EAGER}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        wanted = torch.compile(copy.deepcopy(model), backend="distr", options=options)(x)
        torch._dynamo.reset()
        distr_compile.compile_blocks(model, POLICY, options=EAGER)
        for _ in range(2):
            torch.testing.assert_close(model(x), wanted, rtol=0, atol=1e-5)
    rows = distr_compile.report(model).rows
    assert [(row.layer, row.decision, row.runtime_calls) for row in rows] == [
        (f"blocks.{i}", "distr", 2) for i in range(12)
    ]


def test_blocks_that_no_graph_is_made_for_are_warned_of_once() -> None:
    model, x = numbered(6), inputs()
    distr_compile.compile_blocks(model, POLICY, options=EAGER)
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch._dynamo.config.patch(accumulated_recompile_limit=4):
            model(x)
            model(x)
    said = [str(each.message) for each in caught if "compile_blocks" in str(each.message)]
    assert [text.partition(" was called")[0] for text in said] == [
        "compile_blocks: blocks.4",
        "compile_blocks: blocks.5",
    ]
    rows = distr_compile.report(model).rows
    assert [row.runtime_calls for row in rows] == [2, 2, 2, 2, 0, 0]


class Part(Block):
    """Dynamo makes one body of all such layers in a graph."""

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Region(nn.Module):
    def __init__(self, part: type[nn.Module] = Part) -> None:
        super().__init__()
        self.first, self.second = part(), part()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


@pytest.mark.parametrize("differ", [False, True])
def test_one_body_of_two_layers_of_a_block(differ: bool) -> None:
    """It cannot follow two plans: both layers stay exact, those of other blocks do not."""
    torch.manual_seed(0)
    model, x = nn.Sequential(Region(), Region()).eval(), inputs()
    twin = nn.Sequential(Region(Block), Region(Block)).eval()
    twin.load_state_dict(model.state_dict())
    one, all_of_it = ({"layers": name, "group_size": 1} for name in ("0.second", "0.*"))
    options = {"policy": rules(all_of_it) if differ else POLICY, **EAGER}
    with torch.no_grad():
        wanted = torch.compile(twin, backend="distr", options=options)(x)
        distr_compile.compile_blocks(model, rules(one) if differ else POLICY, options=EAGER)
        torch.testing.assert_close(model(x), wanted, rtol=0, atol=1e-5)
    rows = distr_compile.report(model).rows
    assert [(row.layer, row.decision, row.runtime_calls) for row in rows] == [
        (f"{i}.{name}", "exact" if differ and i == 0 else "distr", 1)
        for i in range(2)
        for name in ("first", "second")
    ]


def test_blocks_of_which_nothing_was_compiled_are_warned_of_once() -> None:
    """torch 2.11 compiles no module in place whose class is of ``torch.nn``."""
    layer = nn.TransformerEncoderLayer(64, 2, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    distr_compile.compile_blocks(model, POLICY, options=EAGER)
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch._dynamo.config.patch(disable=True):
            model(torch.randn(1, 40, 64))
            model(torch.randn(1, 40, 64))
    said = [str(each.message) for each in caught if "compile_blocks" in str(each.message)]
    assert len(said) == 1
    assert "nothing was compiled of layers.0, layers.1, layers.2" in said[0]
    assert "TORCH_COMPILE_DISABLE" in said[0]
    assert "TransformerEncoderLayer is a class of torch.nn" in said[0]


def test_the_policy_may_be_an_option() -> None:
    x = inputs()
    models = [net(2), net(2)]
    with torch.no_grad():
        distr_compile.compile_blocks(models[0], POLICY, options=EAGER)
        distr_compile.compile_blocks(models[1], options={"policy": POLICY, **EAGER})
        wanted, got = (model(x) for model in models)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    assert [row.decision for row in distr_compile.report(models[1]).rows] == ["distr"] * 2
    with pytest.raises(ValueError, match="policy: got one as an argument and another in options"):
        distr_compile.compile_blocks(net(2), POLICY, options={"policy": POLICY})


def test_what_is_wrong() -> None:
    model = net(2)
    with pytest.raises(TypeError, match=r"model: got None \(NoneType\); accepted: a torch.nn.Mod"):
        distr_compile.compile_blocks(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"blocks: got 3 \(int\); accepted: a name, a list of"):
        distr_compile.compile_blocks(torch.nn.Linear(3, 3), blocks=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="blocks: got 'Nothing'; accepted: names of classes, or"):
        distr_compile.compile_blocks(model, POLICY, blocks="Nothing")
    with pytest.raises(ValueError, match="blocks: got no list of modules of one class"):
        distr_compile.compile_blocks(nn.Linear(2, 2), POLICY)
    with pytest.raises(PolicyError, match="names no module of the model"):
        distr_compile.compile_blocks(model, rules({"layers": "layers.3", "group_size": 1}))
    with pytest.raises(ValueError, match="options: got unknown key 'compilr'"):
        distr_compile.compile_blocks(model, POLICY, options={"compilr": "eager"})


class Stages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.ModuleList(Block() for _ in range(2)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return x


def test_of_lists_of_lists_the_modules_are_blocks() -> None:
    """Nobody calls a list: compiled, it would stay as it is."""
    model = Stages().eval()
    names = distr_compile.compile_blocks(model, POLICY, options=EAGER)
    assert names == [["stages.0.0", "stages.0.1", "stages.1.0", "stages.1.1"]]
    with torch.no_grad():
        model(inputs())
    assert distr_compile.report(model).distr == 4
