"""Models whose ``forward`` is decorated: Dynamo compiles ``wrapped(*args)``, not the method."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

import distr_compile
from distr_compile.lowering.exactly import computing_exactly

FORCED: dict[str, Any] = {"default": {"group_size": 2, "min_seq_len": 0}}
FIRST_EXACT = {**FORCED, "rule": [{"layers": "layers.0.*", "group_size": 1}]}


def decorated(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Tensor:
        return function(*args, **kwargs) + 0

    return wrapped


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(64, 192)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    @decorated
    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(x)


class Model(nn.Module):
    def __init__(self, count: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer() for _ in range(count))

    @decorated
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Broken(Model):
    """Each layer is a graph of its own, of one code."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            torch._dynamo.graph_break()
            x = layer(x)
        return x


def tokens() -> Tensor:
    return torch.randn(2, 24, 64, generator=torch.Generator().manual_seed(1))


def decisions(report: distr_compile.Report) -> dict[str, str]:
    return {row.layer: row.decision for row in report.rows}


@pytest.mark.parametrize("kind", [Model, Broken])
@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_each_layer_has_its_plan(kind: type[Model], compiler: str, fresh_dynamo: None) -> None:
    model = kind().eval()
    options = {"policy": FIRST_EXACT, "compiler": compiler}
    run = torch.compile(model, backend="distr", options=options)
    with torch.no_grad():
        got = run(tokens())
        x = wanted = tokens()
        for number, layer in enumerate(model.layers):
            torch._dynamo.reset()
            plan = {"default": {"group_size": 2 if number else 1, "min_seq_len": 0}}
            alone = torch.compile(
                layer, backend="distr", options={"policy": plan, "compiler": "eager"}
            )
            x = alone(x)
        wanted = x
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    assert decisions(distr_compile.report(run)) == {
        "layers.0.attn": "exact",
        "layers.1.attn": "distr",
        "layers.2.attn": "distr",
    }


def test_other_models_of_the_code_have_their_plans(fresh_dynamo: None) -> None:
    """The code of ``wrapped`` is one for all; a graph serves one model where plans differ."""
    with torch.no_grad(), computing_exactly():
        for count in (2, 3, 4):
            model = Model(count).eval()
            options = {"policy": FIRST_EXACT, "compiler": "eager"}
            run = torch.compile(model, backend="distr", options=options)
            torch.testing.assert_close(run(tokens()), model(tokens()))
            found = decisions(distr_compile.report(run))
            wanted = {f"layers.{i}.attn": "distr" if i else "exact" for i in range(count)}
            assert found == wanted


def test_equal_models_share_graphs_before_the_limit(fresh_dynamo: None) -> None:
    """Dynamo counts what it compiles of all of them together."""
    options = {"policy": FORCED, "compiler": "eager"}
    counters.clear()
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=6), computing_exactly():
        for _ in range(9):
            model = Model(1).eval()
            run = torch.compile(model, backend="distr", options=options)
            torch.testing.assert_close(run(tokens()), model(tokens()))
    assert counters["stats"]["unique_graphs"] < 6
    assert counters["distr"]["found"] == counters["distr"]["distr"] < 6


@pytest.mark.parametrize("rules", [False, True])
def test_many_layers_behind_breaks_are_never_left_to_eager(
    rules: bool, fresh_dynamo: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without rules one graph serves them all; with rules the last ones share, and say so."""
    counters.clear()
    ran: list[int] = []
    attend = Attention.forward

    def counted(self: Attention, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            ran.append(1)
        return attend(self, x)

    monkeypatch.setattr(Attention, "forward", counted)
    model = Broken(12).eval()
    options = {"policy": FIRST_EXACT if rules else FORCED, "compiler": "eager"}
    run = torch.compile(model, backend="distr", options=options)
    with torch.no_grad():
        run(tokens())
        ran.clear()
        run(tokens())
    assert ran == []
    found = decisions(distr_compile.report(run))
    if rules:
        assert found["layers.0.attn"] == "exact"
        assert found["layers.1.attn"] == found["layers.2.attn"] == "distr"
        codes = {r.code for row in distr_compile.report(run).rows for r in row.reasons}
        assert codes == {"group-size-1", "shared-graph"}
    else:
        assert set(found.values()) == {"distr"}
        assert counters["stats"]["unique_graphs"] == 1
