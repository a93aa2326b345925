"""``compile_blocks`` and the rest of the model: rules, names and rows of what no block holds."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import distr_compile
from distr_compile.policy import PolicyError
from distr_compile.reporting import Report
from tests.test_regional import EAGER, POLICY, Block, graphs, inputs, rules

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Pre(Block):
    """Attention before the blocks, of a class of its own."""


class Around(nn.Module):
    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.pre = Pre()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.post = nn.ModuleDict({"last": nn.TransformerEncoderLayer(128, 2, batch_first=True)})
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.pre(x)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.post["last"](x)
        return out


class Held(nn.Module):
    """A model in a container, as training code has it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Around()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


def made(kind: type[nn.Module]) -> Any:
    torch.manual_seed(0)
    return kind().eval()


def decisions(report: Report) -> list[tuple[str, str]]:
    return [(row.layer, row.decision) for row in report.rows]


BLOCKS = [f"blocks.{i}" for i in range(3)]
ROWS = [("pre", "exact"), *((name, "distr") for name in BLOCKS), ("post.last", "exact")]


def exact_around(policy: dict[str, Any]) -> dict[str, Any]:
    """A policy of the whole model that does what the blocks alone do."""
    outside = [{"layers": name, "group_size": 1} for name in ("pre", "post.last*")]
    return {**policy, "rule": [*policy.get("rule", ()), *outside]}


# --- rows of what stands outside -----------------------------------------------------------------


def test_attention_outside_of_the_blocks_has_rows() -> None:
    model, x = made(Around), inputs()
    options: dict[str, Any] = {"policy": exact_around(POLICY), **EAGER}
    whole = torch.compile(copy.deepcopy(model), backend="distr", options=options)
    with torch.no_grad():
        wanted = whole(x)
        distr_compile.compile_blocks(model, POLICY, options=EAGER)
        counters.clear()
        got, again = model(x), model(x)
    assert graphs() == 1, "what only was looked at is no graph"
    assert model.calls == 2, "nothing runs twice"
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(again, wanted, rtol=0, atol=1e-5)
    report = distr_compile.report(model)
    assert decisions(report) == ROWS
    pre, last = report.rows[0], report.rows[-1]
    for row in (pre, last):
        assert [reason.code for reason in row.reasons] == ["outside-blocks"]
        assert "compile_blocks" in row.reasons[0].text
        assert (row.kernel, row.runtime_calls) == (None, None)
    assert pre.shapes["q"] == (2, 2, 40, 64)
    assert pre.flops == last.flops == report.rows[1].flops == 2 * 2 * 2 * 40 * 40 * 128
    assert report.flops_approximated_percent == pytest.approx(60)
    assert report.summary().startswith("5 attentions in 1 graph; 3 distr, 2 exact; 60.0 %")
    assert Report.from_json(report.to_json()).summary() == report.summary()


def test_the_report_file_has_them(tmp_path: Path) -> None:
    model, path = made(Around), tmp_path / "report.json"
    distr_compile.compile_blocks(model, POLICY, options={**EAGER, "report": path})
    with torch.no_grad():
        model(inputs())
    assert decisions(Report.from_json(path.read_text())) == ROWS


def test_training_has_the_gradients_of_eager() -> None:
    """What stands outside is captured with its gradients."""
    model, x = made(Around), inputs()
    twin = copy.deepcopy(model)
    policy = {"default": {"group_size": 1}}
    distr_compile.compile_blocks(model, policy, options=EAGER)
    twin(x).sum().backward()
    model(x).sum().backward()
    for (name, one), (_, other) in zip(
        model.named_parameters(), twin.named_parameters(), strict=True
    ):
        assert one.grad is not None, name
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)
    assert {row.mode for row in distr_compile.report(model).rows} == {"eval, grad"}


class Odd(Around):
    """The part before the blocks is nothing that Dynamo captures, and raises what it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.pre = Breaks()  # type: ignore[assignment]


class Breaks(Block):
    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        if len(x) == 1:
            raise KeyError("one")
        return super().forward(x)


def test_it_runs_where_eager_runs_and_fails_as_eager_fails() -> None:
    model, x = made(Odd), inputs()
    twin = copy.deepcopy(model)
    distr_compile.compile_blocks(model, {"default": {"group_size": 1}}, options=EAGER)
    with torch.no_grad():
        with pytest.raises(KeyError, match="one"):
            model(x[:1])
        torch.testing.assert_close(model(x), twin(x), rtol=0, atol=1e-5)


def test_a_model_that_is_compiled_or_exported_afterwards() -> None:
    """Before its first call, too: then somebody else captures all of it."""
    model, x = made(Around), inputs()
    wanted = copy.deepcopy(model)(x)
    distr_compile.compile_blocks(model, {"default": {"group_size": 1}}, options=EAGER)
    with torch.no_grad():
        whole = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(whole(x), wanted, rtol=0, atol=1e-5)
        program = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(program(x), wanted, rtol=0, atol=1e-5)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Linear(128, 128)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x)
        for block in self.blocks:
            x = block(x)
        return F.scaled_dot_product_attention(x, x, x)


def test_attention_in_the_code_around_the_blocks_is_noted() -> None:
    model = made(Own)
    distr_compile.compile_blocks(model, POLICY, options=EAGER)
    with torch.no_grad():
        model(inputs())
    (note,) = distr_compile.report(model).notes
    assert note.startswith("Own.forward() has scaled_dot_product_attention in its own code, around")
    model = made(Around)
    distr_compile.compile_blocks(model, POLICY, options=EAGER)
    with torch.no_grad():
        model(inputs())
    assert distr_compile.report(model).notes == ()


# --- rules ---------------------------------------------------------------------------------------


def test_a_rule_that_only_names_what_stands_outside() -> None:
    model = made(Around)
    for layers in ("pre", "p*", "blocks"):
        with pytest.raises(PolicyError) as caught:
            distr_compile.compile_blocks(model, rules({"layers": layers, "group_size": 4}))
        said = str(caught.value)
        assert said.startswith(
            f'rule 1: layers: got "{layers}", which names modules outside of the blocks only'
        )
        assert "accepted: a pattern for modules within the blocks, such as blocks.0" in said
        assert 'compile the whole model with backend="distr"' in said
    assert all(module._compiled_call_impl is None for module in model.modules())


@pytest.mark.parametrize(
    "rule", [{"layers": "pre", "group_size": 1}, {"layers": "*", "group_size": 4}]
)
def test_a_rule_that_is_kept_is_accepted(rule: dict[str, Any]) -> None:
    model = made(Around)
    groups = distr_compile.compile_blocks(model, rules(rule), options=EAGER)
    assert groups == [BLOCKS]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        model(inputs())
    assert decisions(distr_compile.report(model)) == ROWS


@pytest.mark.parametrize("fields", [{"rank": 64}, {"group_size": 64}])
@pytest.mark.parametrize("layers", ["*", "blocks.1"])
def test_a_rank_that_fits_no_layer_is_an_error(layers: str, fields: dict[str, Any]) -> None:
    model, x, policy = made(Around), inputs(), rules({"layers": layers, **fields})
    options: dict[str, Any] = {"policy": policy, **EAGER}
    whole = torch.compile(copy.deepcopy(model), backend="distr", options=options)
    distr_compile.compile_blocks(model, policy, options=EAGER)
    with torch.no_grad():
        with pytest.raises(Exception, match="PolicyError") as wanted:
            whole(x)
        inner = getattr(wanted.value, "inner_exception", None)
        for _ in range(2):
            with pytest.raises(PolicyError) as caught:
                model(x)
            assert str(caught.value) == str(inner)
    assert str(inner).endswith(f"no layer of {layers!r}")


def test_a_rank_that_fits_some_layers_is_none() -> None:
    """Which is known when all blocks that the rule names were compiled, not before."""
    model, x = made(Around), inputs()
    model.blocks[2] = Wide().eval()
    rule = {"layers": "blocks.*", "rank": 64}
    distr_compile.compile_blocks(model, rules(rule), options=EAGER, blocks="blocks.*")
    with torch.no_grad():
        model(x)
    assert decisions(distr_compile.report(model))[1:4] == [
        ("blocks.0", "exact"),
        ("blocks.1", "exact"),
        ("blocks.2", "distr"),
    ]


class Wide(Block):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 1, 128)).permute(2, 0, 3, 1, 4)
        out: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + out


# --- names ---------------------------------------------------------------------------------------


def test_names_begin_at_the_root() -> None:
    """In rules, in what is returned, and in the report: as where the whole model is compiled."""
    model, x = made(Held), inputs()
    policy = rules({"layers": "blocks.1", "group_size": 1})
    options = {"root": "net", **EAGER}
    of_whole: dict[str, Any] = {"policy": exact_around(policy), **options}
    whole = torch.compile(copy.deepcopy(model), backend="distr", options=of_whole)
    with torch.no_grad():
        wanted = whole(x)
        groups = distr_compile.compile_blocks(model, policy, options=options)
        got = model(x)
    assert groups == [["blocks.0", "blocks.2"], ["blocks.1"]]
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    found = decisions(distr_compile.report(model))
    assert sorted(found) == sorted(decisions(distr_compile.report(whole)))
    assert dict(found) == {**dict(ROWS), "blocks.1": "exact"}


def test_whole_names_and_patterns_of_blocks_under_a_root() -> None:
    policy = rules({"layers": "net.blocks.1", "group_size": 1})
    options = {"root": "net", **EAGER}
    for blocks in ("blocks.*", "net.blocks.*", "Block"):
        model = made(Held)
        groups = distr_compile.compile_blocks(model, policy, blocks=blocks, options=options)
        assert groups == [["blocks.0", "blocks.2"], ["blocks.1"]]


def test_a_wrapper_within_a_block_hides_no_rule() -> None:
    model, x = made(Around), inputs()
    for i in range(3):
        model.blocks[i] = nn.Sequential(checkpoint_wrapper(model.blocks[i]))
    policy = rules({"layers": "blocks.1.0", "group_size": 1})
    groups = distr_compile.compile_blocks(model, policy, options=EAGER)
    assert groups == [["blocks.0", "blocks.2"], ["blocks.1"]]
    with torch.no_grad():
        model(x)
    found = {row.layer: row.decision for row in distr_compile.report(model).rows}
    assert found["blocks.1.0"] == "exact"
    assert found["blocks.0.0"] == found["blocks.2.0"] == "distr"


def test_wrong_roots() -> None:
    for root, message in (
        ("nat", "root: got 'nat', which names no module of the model; accepted: a name as in"),
        ("net.blocks.0", "root: got a module of a block; accepted: a module that holds blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            distr_compile.compile_blocks(made(Held), POLICY, options={"root": root})
    two = nn.ModuleDict({"net": nn.Sequential(Block()), "0": Block()})
    with pytest.raises(ValueError, match="blocks: got two blocks that are called 0; accepted"):
        distr_compile.compile_blocks(two, POLICY, blocks="Block", options={"root": "net"})
