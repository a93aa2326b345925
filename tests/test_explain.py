"""``explain``: what a compile would do, without compiling and without a trace left behind."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import flex_attention

import distr_compile
from distr_compile import PolicyError, Report, explain

WIDTH, HEADS, TOKENS = 64, 2, 32
FORCED = {"default": {"min_seq_len": 0}}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, scale: float = 0.2) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.attend(q, k, v, scale).transpose(1, 2).flatten(2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return (q @ k.mT * scale).softmax(-1) @ v


class Skipped(Attention):
    """Dynamo is told to leave the attention alone."""

    @torch.compiler.disable
    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return super().attend(q, k, v, scale)


class SkippedSdpa(Attention):
    @torch.compiler.disable
    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)


class Broken(nn.Module):
    """Equal layers behind graph breaks: they resume in the same code."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            torch._dynamo.graph_break()
            x = layer(x)
        return x


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def two_layers() -> nn.Sequential:
    return nn.Sequential(Attention(), Attention()).eval()


def tokens(batch: int = 2, length: int = TOKENS) -> Tensor:
    return torch.randn(batch, length, WIDTH)


def decisions(report: Report) -> list[tuple[str, str]]:
    return [(row.layer, row.decision) for row in report.rows]


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="distr", options={"policy": FORCED, "compiler": "eager"})


def says_the_same(one: Report, other: Report) -> bool:
    """Whether two reports agree in all that a compile could have changed."""
    return [(r.layer, r.form, r.shapes, r.decision, r.reasons) for r in one.rows] == [
        (r.layer, r.form, r.shapes, r.decision, r.reasons) for r in other.rows
    ]


# --- what it says --------------------------------------------------------------------------------


def test_says_what_the_compile_then_does() -> None:
    for model in (two_layers(), Broken(3).eval()):
        policy = {**FORCED, "rule": [{"layers": "re:(layers\\.)?1", "group_size": 1}]}
        said = explain(model, tokens(), policy=policy)
        function = torch.compile(
            model, backend="distr", options={"policy": policy, "compiler": "eager"}
        )
        with torch.no_grad():
            function(tokens())
        assert says_the_same(said, distr_compile.report(function))
        assert {d for _, d in decisions(said)} == {"distr", "exact"}


def test_default_policy_and_its_environment_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (row,) = explain(Attention().eval(), tokens()).rows
    assert [reason.code for reason in row.reasons] == ["not-measured"]
    path = tmp_path / "distr.toml"
    path.write_text("[default]\nmin_seq_len = 0\n")
    monkeypatch.setenv("DISTR_POLICY", str(path))
    assert decisions(explain(Attention().eval(), tokens())) == [("", "distr")]
    assert decisions(explain(Attention().eval(), tokens(), policy={})) == [("", "exact")]


def test_training_mode_records_gradients() -> None:
    model = two_layers().train()
    rows = explain(model, tokens(), policy=FORCED).rows
    assert [[r.code for r in row.reasons] for row in rows] == [["gradients"]] * 2
    with torch.no_grad():
        rows = explain(model, tokens(), policy=FORCED).rows
    assert [row.decision for row in rows] == ["distr"] * 2
    assert model.training


def test_keyword_arguments_reach_the_model() -> None:
    report = explain(Attention().eval(), scale=0.5, x=tokens(3), policy=FORCED)
    assert decisions(report) == [("", "distr")]
    assert report.rows[0].shapes["q"] == (3, HEADS, TOKENS, WIDTH // HEADS)


def test_functions_and_methods() -> None:
    def attend(q: Tensor) -> Tensor:
        return (q @ q.mT).softmax(-1) @ q

    report = explain(attend, torch.randn(2, HEADS, TOKENS, 32), policy=FORCED)
    assert (report.name, decisions(report)) == ("attend", [("", "distr")])
    layer = Attention().eval()
    report = explain(layer.forward, tokens(), policy=FORCED)
    assert decisions(report) == [("", "distr")]  # no gradients: its module is in eval mode


def test_compiled_objects() -> None:
    model = two_layers()
    in_place = two_layers()
    in_place.compile(backend="distr", options={"policy": FORCED, "compiler": "eager"})
    for one in (compiled(model), in_place):
        assert decisions(explain(one, tokens(), policy=FORCED)) == [("0", "distr"), ("1", "distr")]
    assert counters["distr"] == {}


# --- errors of the policy ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"layers": "0", "group_size": 0}, "rule 1: group_size: got 0"),
        ({"layers": "blocks.*", "group_size": 4}, 'got "blocks..", which names no module'),
        ({"layers": "*.qkv", "group_size": 4}, "names modules without attention; .* one of 0, 1"),
        ({"layers": "*", "group_size": 5}, "rule 1: group_size: got 5 for head width 32"),
    ],
    ids=str,
)
@pytest.mark.parametrize("model", [two_layers(), nn.Sequential(Broken(2), nn.ReLU()).eval()])
def test_errors(model: nn.Module, rule: dict[str, Any], message: str) -> None:
    if isinstance(model[0], Broken):  # type: ignore[index]
        message = message.replace("one of 0, 1", r"one of 0.layers.0, 0.layers.1")
    with pytest.raises(PolicyError, match=message):
        explain(model, tokens(), policy={**FORCED, "rule": [rule]})


def test_an_error_of_the_model_is_its_own() -> None:
    with pytest.raises(TypeError, match=r"model: got 3 \(int\); accepted: a module or a function"):
        distr_compile.explain(3)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"must have same reduction dim|cannot be multiplied"):
        explain(Attention().eval(), torch.randn(2, TOKENS, 3))


# --- no trace left behind ------------------------------------------------------------------------


def test_compiles_nothing_and_changes_no_output(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import compile_fx

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("explain called Inductor")

    monkeypatch.setattr(compile_fx, "compile_fx", refuse)
    outs: list[Tensor] = []
    model, x = two_layers(), tokens()
    with torch.no_grad():
        exact = model(x)
    model.register_forward_hook(lambda _, args, out: outs.append(out))
    explain(model, x, policy=FORCED)
    assert all(torch.equal(out, exact) for out in outs)
    with torch.no_grad():
        assert torch.equal(model(x), exact)
    assert counters["distr"] == {}
    with pytest.raises(LookupError, match="nothing was compiled"):
        distr_compile.report(model)


def compile_counts(make: Any, explains: int) -> list[tuple[int, int]]:
    """(graphs compiled, attention found) by each of three calls, with explains in between."""
    torch._dynamo.reset()
    counters.clear()
    model = make()
    function = compiled(model)
    counts = []
    for batch in (2, 3, 4):
        for i in range(explains):
            explain(model, tokens(batch=2 + i % 3, length=TOKENS + i), policy=FORCED)
        before = counters["stats"]["unique_graphs"], counters["distr"]["found"]
        with torch.no_grad():
            function(tokens(batch))
        after = counters["stats"]["unique_graphs"], counters["distr"]["found"]
        counts.append((after[0] - before[0], after[1] - before[1]))
    return counts


@pytest.mark.parametrize(
    "make", [lambda: Attention().eval(), lambda: Broken(1).eval()], ids=["whole", "broken"]
)
def test_many_explains_leave_dynamo_as_it_was(make: Any) -> None:
    with torch._dynamo.config.patch(recompile_limit=3):
        alone = compile_counts(make, explains=0)
        between = compile_counts(make, explains=4)
    assert [found for _, found in alone] == [1, 1, 0]  # static, then dynamic, then nothing new
    assert between[0] == alone[0]
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        assert between == alone
    else:  # the model's graphs were dropped together with those of explain, hence compiled again
        assert [found for _, found in between] == [1, 1, 1]


def test_each_of_many_explains_says_the_same() -> None:
    model = Broken(2).eval()
    with torch._dynamo.config.patch(recompile_limit=3, accumulated_recompile_limit=6):
        reports = [explain(model, tokens(), policy=FORCED) for _ in range(8)]
    assert all(says_the_same(reports[0], report) for report in reports)
    assert len(reports[0].rows) == 2


# --- attention that no graph holds ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "op"), [(Skipped(), "softmax"), (SkippedSdpa(), "softmax|scaled_dot_product")]
)
def test_attention_outside_of_graphs_is_reported(layer: nn.Module, op: str) -> None:
    model = nn.Sequential(Attention(), layer, Attention()).eval()
    report = explain(model, tokens(), policy=FORCED)
    assert decisions(report) == [("0", "distr"), ("2", "distr")]
    (entry,) = report.not_attention
    assert (entry.layer, entry.reason.code) == ("1", "outside-graph")
    assert any(name in entry.op for name in op.split("|"))
    assert "outside-graph" in report.to_json()


def test_nothing_but_attention_outside_of_graphs() -> None:
    report = explain(nn.ModuleList([Skipped()])[0].eval(), tokens())
    assert [entry.reason.code for entry in report.not_attention] == ["outside-graph"]


class Flex(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return flex_attention(q, k, v, scale=scale)  # type: ignore[return-value]


class SkippedFlex(Flex):
    @torch.compiler.disable
    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return super().attend(q, k, v, scale)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_higher_order_ops_run_while_we_watch() -> None:
    report = explain(nn.Sequential(Flex(), SkippedFlex()).eval(), tokens())
    assert [(row.layer, row.reasons[0].code) for row in report.rows] == [("0", "flex")]
    assert [(e.layer, e.op) for e in report.not_attention] == [("1", "flex_attention")]
