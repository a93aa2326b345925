"""The report says what happened in a compile, whatever that was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

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


def test_an_equal_compile_shares_the_graphs_and_the_report() -> None:
    model = Attention().eval()
    first, second = compiled(model), compiled(model)
    first(tokens())
    assert report(second) == report(first)


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
    layers = [f"module.blocks.{i}" for i in range(3)]
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
