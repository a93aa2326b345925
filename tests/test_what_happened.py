"""The report says what happened in a compile, whatever that was."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

import distr_compile
from distr_compile import Report, explain, report

WIDTH, HEADS, TOKENS = 64, 2, 32
FORCED = {"default": {"min_seq_len": 0}}
EXACT = {"default": {"group_size": 1}}


class Attention(nn.Module):
    """``(B, N, width)`` in and out."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind()
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Blocks(nn.Module):
    def __init__(self, depth: int = 3, width: int = WIDTH) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Attention(width) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def compiled(
    model: Any, policy: dict[str, Any] = FORCED, dynamic: bool | None = None, **options: Any
) -> Any:
    options = {"policy": policy, "compiler": "eager"} | options
    return torch.compile(model, backend="distr", dynamic=dynamic, options=options)


def tokens(batch: int = 2, length: int = TOKENS, width: int = WIDTH) -> Tensor:
    return torch.randn(batch, length, width)


def decisions(of: Report) -> dict[str, str]:
    return {row.layer: row.decision for row in of.rows}


# --- without attention ---------------------------------------------------------------------------


def test_a_compile_without_attention_has_a_report_that_says_so(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    path = tmp_path / "report.json"
    function = compiled(model, report=str(path))
    with pytest.raises(LookupError, match="call it once with real inputs"):
        report(function)
    function(torch.randn(2, 8))
    for found in (report(function), report(model), Report.from_json(path.read_text())):
        assert str(found) == "Sequential\n\nno attention in 1 compiled graph"
        assert (found.graphs, found.found, found.graphs_without_attention) == (0, 0, 1)


def test_graphs_without_attention_do_not_count_beside_those_with() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.rest = Attention(), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            x = self.attention(x)
            torch._dynamo.graph_break()
            return self.rest(x)

    model = Both().eval()
    compiled(model)(tokens())
    found = report(model)
    assert (found.graphs, found.graphs_without_attention) == (1, 1)
    assert "1 attention in 1 graph;" in found.summary()
    assert explain(model, tokens(), policy=FORCED).summary() == found.summary()


def test_explain_says_how_many_graphs_have_no_attention() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval()
    assert explain(model, torch.randn(2, 8)).summary() == "no attention in 1 compiled graph"


# --- several compiles of one module --------------------------------------------------------------


def test_each_compiled_object_has_the_report_of_its_own_policy() -> None:
    model, x = Attention().eval(), tokens()
    exact, forced = compiled(model, EXACT), compiled(model, FORCED)
    exact(x)
    with pytest.raises(LookupError, match="Attention"):
        report(forced)
    forced(x)
    for _ in range(2):
        assert decisions(report(exact)) == {"": "exact"}
        assert decisions(report(forced)) == {"": "distr"}
        assert report(model) == report(forced)
        exact(x)  # nothing compiles
    exact(tokens(batch=3))
    assert [row.decision for row in report(exact).rows] == ["exact", "exact"]
    assert decisions(report(forced)) == {"": "distr"}
    assert report(model) == report(exact)


def test_compiled_functions_have_their_own_report_too() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1)).softmax(-1) @ v

    q, k, v = torch.randn(3, 2, HEADS, TOKENS, 32)
    exact, forced = compiled(attend, EXACT), compiled(attend, FORCED)
    forced(q, k, v), exact(q, k, v)
    assert decisions(report(exact)) == decisions(report(attend)) == {"": "exact"}
    assert decisions(report(forced)) == {"": "distr"}
    assert {row.mode for row in report(forced).rows} == {"no grad"}


def test_an_equal_compile_shares_the_graphs_and_the_report() -> None:
    model = Attention().eval()
    first, second = compiled(model), compiled(model)
    first(tokens())
    assert report(second) == report(first)


def test_an_equal_compile_keeps_its_report_when_the_other_is_gone() -> None:
    model = Attention().eval()
    first = compiled(model)
    first(tokens())
    torch._dynamo.reset()
    second = compiled(model)
    second(tokens(batch=3))
    assert decisions(report(second)) == {"": "distr"}
    del first
    gc.collect()
    assert decisions(report(second)) == {"": "distr"}


def test_run_time_counters_are_those_of_the_compiled_object() -> None:
    model = Attention().eval()
    policy = {"default": {"min_seq_len": 24}}
    changed = {**policy, "rule": [{"layers": "qkv", "group_size": 2}]}
    one = compiled(model, policy, dynamic=True)
    other = compiled(model, changed, dynamic=True)
    with pytest.warns(distr_compile.DistrWarning, match="'qkv'"):
        one(tokens()), other(tokens())
    one(tokens(length=20))
    assert [r.rows[0].runtime_exact_calls for r in map(report, (one, other))] == [1, 0]


def test_reports_of_compiles_that_are_gone_are_dropped() -> None:
    from distr_compile.reporting.registry import _ENTRIES

    model = Attention().eval()
    for group_size in (1, 2, 1):
        torch._dynamo.reset()
        compiled(model, {"default": {"group_size": group_size, "min_seq_len": 0}})(tokens())
    assert len(_ENTRIES[id(model)].graphs) == 1


# --- training and evaluation ---------------------------------------------------------------------


def test_rows_of_training_are_kept_after_evaluation() -> None:
    model, x = Attention(), tokens()
    function = compiled(model)
    with torch.enable_grad():
        function(x).sum().backward()
    model.eval()
    function(x)
    found = report(function)
    assert [(row.mode, row.decision) for row in found.rows] == [
        ("train", "exact"),
        ("eval", "distr"),
    ]
    table = found.table()
    assert table.splitlines()[2].split()[:2] == ["mode", "layer"]
    assert max(map(len, table.splitlines())) <= 132
    assert Report.from_json(found.to_json()) == found


def test_the_mode_is_a_column_only_where_it_differs() -> None:
    function = compiled(Blocks().eval())
    function(tokens())
    assert {row.mode for row in report(function).rows} == {"eval"}
    assert "mode" not in str(report(function))


# --- DDPOptimizer --------------------------------------------------------------------------------


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_gloo_available()):
        pytest.skip("this PyTorch has no gloo")
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_all_pieces_of_a_graph_that_ddp_cuts_are_listed(compiler: str) -> None:
    # A layer of this width is larger than the first bucket, 1 MiB: a piece for each.
    model = nn.parallel.DistributedDataParallel(Blocks(3, width=256), bucket_cap_mb=1)
    function = compiled(model, compiler=compiler)
    layers = [f"blocks.{i}" for i in range(3)]
    with torch.enable_grad():
        function(tokens(width=256)).sum().backward()
    assert [row.layer for row in report(function).rows] == layers
    assert {row.mode for row in report(function).rows} == {"train"}
    assert report(model).graphs == 3
    model.eval()
    function(tokens(width=256))
    found = report(function)
    assert [row.layer for row in found.rows] == layers * 2
    assert [row.decision for row in found.rows] == ["exact"] * 3 + ["distr"] * 3
    torch._dynamo.reset()
    function(tokens(width=256))  # the same graphs again: they replace their reports
    assert report(function).graphs == found.graphs == 6


# --- graph breaks --------------------------------------------------------------------------------


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5


class Cut(nn.Module):
    """A break between Q K^T and the softmax."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = scores_of(q, k)
        torch._dynamo.graph_break()
        return scores.softmax(-1) @ v


class CutBefore(nn.Module):
    """The softmax is in a function that is entered as a frame, since a break follows in it."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_and_break(scores_of(q, k), v)


def attend_and_break(scores: Tensor, v: Tensor) -> Tensor:
    x = scores.softmax(-1) @ v
    torch._dynamo.graph_break()
    return x + 1


def line_of(function: Any, text: str = "graph_break()") -> str:
    lines, first = inspect.getsourcelines(function)
    return f"{__file__}:{first + next(i for i, line in enumerate(lines) if text in line)}"


@pytest.mark.parametrize(
    ("module", "function"), [(Cut, Cut.forward), (CutBefore, attend_and_break)]
)
def test_a_row_that_a_graph_break_cut_says_where_and_how_to_avoid_it(
    module: type[nn.Module], function: Any
) -> None:
    model = module().eval()
    q, k, v = torch.randn(3, 2, HEADS, TOKENS, 32)
    compiled(model)(q, k, v)
    for found in (report(model), explain(model, q, k, v, policy=FORCED)):
        (reason,) = found.rows[0].reasons
        assert reason.code == "graph-break"
        assert reason.text.startswith("QK^T and the softmax are in different graphs.")
        assert f"is at {line_of(function)}: Call to `torch._dynamo.graph_break()`" in reason.text
        assert "Remove the `torch._dynamo.graph_break()` call." in reason.text
        assert 'TORCH_LOGS="graph_breaks"' in reason.text
        assert "fullgraph=True" in reason.text


@pytest.mark.usefixtures("process_group")
def test_a_cut_of_ddp_is_named_as_such() -> None:
    class Biased(nn.Module):
        """The bias of the scores fills a bucket, so that the cut is between them and Q K^T."""

        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.bias = nn.Linear(64, 192), nn.Parameter(torch.randn(512, 512))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
            return (scores_of(q, k) + self.bias).softmax(-1) @ v

    model = nn.parallel.DistributedDataParallel(Biased().eval(), bucket_cap_mb=1)
    compiled(model)(torch.randn(1, 512, 64))
    (reason,) = report(model).rows[0].reasons
    assert reason.code == "graph-break"
    assert "DDPOptimizer intentional graph-break" in reason.text
    assert "optimize_ddp = False" in reason.text


def test_the_break_that_counts_is_not_the_latest() -> None:
    model = nn.ModuleDict({"a": Cut(), "b": CutBefore()}).eval()
    q, k, v = torch.randn(3, 2, HEADS, TOKENS, 32)
    functions = {name: compiled(child) for name, child in model.items()}
    for batch in (2, 3):
        for function in functions.values():
            function(q[:, :1].expand(-1, batch, -1, -1), k[:, :1], v[:, :1])
    for name, code in (("a", Cut.forward), ("b", attend_and_break)):
        texts = [r.text for row in report(functions[name]).rows for r in row.reasons]
        assert texts
        assert all(line_of(code) in text for text in texts)


# --- what Dynamo skipped -------------------------------------------------------------------------


@torch.compiler.disable
def disabled(x: Tensor) -> Tensor:
    return x.softmax(-1)


class CallsDisabled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x + 1
        return disabled(y) * 2


class Disabled(Attention):
    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class GivenUp(nn.Module):
    """Dynamo resumes in no loop: it gives up the frame."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(1):
            x = x + 1
            torch._dynamo.graph_break()
            x = self.attention(x)
        return x


def test_disabled_functions_are_named() -> None:
    model = CallsDisabled().eval()
    compiled(model)(tokens())
    found = report(model)
    at = line_of(CallsDisabled.forward, "disabled(y)")
    assert found.summary() == "no attention in 2 compiled graphs"
    assert f"note: {at} calls disabled(), which is marked with" in " ".join(str(found).split())
    assert Report.from_json(found.to_json()) == found


def test_layers_with_a_disabled_forward_are_named_once() -> None:
    model = nn.Sequential(Attention(), Disabled(), Disabled()).eval()
    wrapper = nn.ModuleDict({"model": model})
    compiled(model)(tokens())
    notes = [note for note in report(model).notes if "disable" in note]
    assert [note.partition(";")[0] for note in notes] == [
        "1, 2: Disabled.forward() is marked with torch.compiler.disable"
    ]
    assert [n.partition(":")[0] for n in report(wrapper).notes] == ["model.1, model.2"]


def test_a_frame_that_dynamo_gave_up_is_named() -> None:
    model = GivenUp().eval()
    compiled(model)(tokens())
    found = report(model)
    assert decisions(found) == {"attention": "distr"}
    (note,) = found.notes
    assert note.startswith("Dynamo gave up GivenUp.forward() (")
    assert f"at {line_of(GivenUp.forward)}: Call to `torch._dynamo.graph_break()`." in note
    assert "What it computes itself runs as it is, exactly" in note


def test_the_recompile_limit_is_named() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, factor: int) -> Tensor:
            return (x @ x.transpose(-2, -1) * factor).softmax(-1) @ x

    model, x = Scaled().eval(), torch.randn(1, 2, 32, 64)
    function = compiled(model, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=2):
        function(x, 1), function(x, 2)
        assert not any("reached" in note for note in report(function).notes)
        function(x, 3)
    (note,) = [note for note in report(function).notes if "reached" in note]
    assert note.startswith("Dynamo reached a recompile limit in Scaled.forward() (")


def test_the_error_says_why_nothing_was_compiled() -> None:
    class Hopeless(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = (x @ x.transpose(-2, -1)).softmax(-1) @ x
                torch._dynamo.graph_break()
            return x

    disabled_model, hopeless = Disabled().eval(), Hopeless().eval()
    compiled(disabled_model)(tokens()), compiled(hopeless)(tokens())
    with pytest.raises(LookupError, match=r"Disabled\.forward\(\) is marked with torch.compiler"):
        report(disabled_model)
    with pytest.raises(LookupError, match=r"Dynamo gave up Hopeless\.forward\(\) .*graph_break"):
        report(hopeless)
    with pytest.raises(LookupError) as raised:
        report(Attention())
    assert "PyTorch tells" not in str(raised.value)
    off = torch._dynamo.config.patch(disable=True)
    with off, pytest.raises(LookupError, match="TORCH_COMPILE_DISABLE=1"):
        report(Attention())


def test_the_error_names_classes_of_torch_that_some_versions_do_not_compile_in_place() -> None:
    """In torch 2.11 ``model.compile()`` of a class of ``torch.nn`` compiles nothing."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    model.compile(backend="distr", options={"policy": FORCED, "compiler": "eager"})
    with pytest.raises(LookupError, match=r"TransformerEncoder is a class of torch\.nn, and"):
        report(model)  # was not called: nothing is compiled in any version
    model(tokens())
    if not torch.__version__.startswith("2.11"):
        assert len(report(model).rows) == 2
    wrapped = compiled(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval())
    wrapped(tokens())
    assert len(report(wrapped).rows) == 2


def test_an_error_is_reported_only_where_dynamo_suppressed_it() -> None:
    model, wrong = Attention().eval(), {"rule": [{"layers": "nothing", "group_size": 2}]}
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed):
        compiled(model, wrong)(tokens())
    with pytest.raises(LookupError) as raised:
        report(model)
    assert "PyTorch tells" not in str(raised.value)
    with torch._dynamo.config.patch(suppress_errors=True):
        compiled(model, wrong)(tokens())
        with pytest.raises(LookupError, match='raised: PolicyError: rule 1: layers: got "nothing"'):
            report(model)


def test_reports_do_without_what_pytorch_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.randn(3, 2, HEADS, TOKENS, 32)
    for name in ("graph_break_reasons", "get_compilation_metrics"):
        monkeypatch.delattr(f"torch._dynamo.utils.{name}")
    cut, given_up = Cut().eval(), GivenUp().eval()
    compiled(cut)(q, k, v), compiled(given_up)(tokens())
    (reason,) = report(cut).rows[0].reasons
    assert reason.text.startswith("QK^T and the softmax are in different graphs. A graph break ")
    assert "fullgraph=True" in reason.text
    assert report(given_up).notes == ()
    with pytest.raises(LookupError):
        report(Attention())


# --- several graphs of one module that live ------------------------------------------------------


class Switched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.is_causal = nn.Linear(64, 192), False

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 1, 64)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)
        return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("what", ["frozen", "input", "flag", "autocast"])
@torch.enable_grad()
def test_a_graph_that_may_run_again_keeps_its_row(what: str) -> None:
    torch._dynamo.reset()
    counters.clear()
    model, x = Switched().requires_grad_(False).eval(), torch.randn(2, 48, 64)
    options = {"policy": {"default": {"min_seq_len": 0}}, "compiler": "eager"}
    compiled = torch.compile(model, backend="distr", options=options)
    compiled(x)
    model.requires_grad_(what == "frozen")
    model.is_causal = what == "flag"
    with torch.autocast("cpu", torch.bfloat16, enabled=what == "autocast"):
        compiled(x.clone().requires_grad_(what == "input"))
    rows = distr_compile.report(compiled).rows
    # Dynamo of torch 2.11 does not look at whether parameters require gradients.
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 2 or what == "frozen"
    second = {
        "frozen": ("none", "float32", "exact"),
        "input": ("none", "float32", "exact"),
        "flag": ("causal", "float32", "distr"),
        "autocast": ("none", "bfloat16", "distr"),
    }
    found = [(row.mask, row.dtype, row.decision) for row in rows]
    assert found == [("none", "float32", "distr"), second[what]][:graphs]
