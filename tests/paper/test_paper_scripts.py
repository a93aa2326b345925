"""The scripts of the paper's tables: what they keep, what they say of it, and their page."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.axes import Axes

from benchmarks import error_metrics, finetune, finetune_plot
from benchmarks.error_inputs import Inputs, uniform
from benchmarks.paper import (
    attention_time,
    exact_time,
    figures,
    grouping_share,
    hard_patterns,
    score_errors,
    without_tuning,
)
from benchmarks.paper.__main__ import PAGES, SCRIPTS, TRAINED
from benchmarks.paper.bootstrap import paired
from benchmarks.paper.page import PAGE, filled, table_of
from benchmarks.paper.script import NOT_MEASURED, Cells, Script, UnavailableError
from benchmarks.store import MEASURED, ROOT, Cell
from distr_compile.accuracy.batch import Batch
from tests.zoo.minilm import RETRIEVAL

EVERY = (*SCRIPTS, *TRAINED)


def numbers(value: Any) -> Iterator[float]:
    """Every number in a cell."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from numbers(each)
    elif isinstance(value, int | float):
        yield value


def test_every_script_runs_two_cells_and_keeps_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.paper", "--quick"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [len(cells) for cells in found] == [2] * len(EVERY)
    assert all(math.isfinite(x) for x in numbers(found))
    written = re.findall(r": (\S+\.json)$", done.stderr, re.MULTILINE)
    assert len(written) == len(EVERY)
    assert not any(Path(path).is_relative_to(ROOT) or Path(path).exists() for path in written)


# --- cells and tables --------------------------------------------------------------------------


def counting(asked: list[str], source: str) -> Script:
    def cells(quick: bool) -> Cells:
        def measured(key: str) -> Cell:
            asked.append(key)
            return {"value": 1.0}

        return {key: (lambda key=key: measured(key)) for key in ("a", "b")}

    return Script("script", "of a test", cells, str, (source,))


def test_cells_are_measured_once_and_again_when_a_source_changes(tmp_path: Path) -> None:
    asked: list[str] = []
    path = tmp_path / "results.json"
    script = counting(asked, "benchmarks/paper/page.py")
    store = script.run(path)
    assert asked == ["a", "b"]
    assert set(store.cells["a"]) == {"environment", "value", "load", "seconds"}
    assert store.environments[store.id].keys() >= {"cpu", "threads", "torch", "commit", "python"}
    script.run(path)
    assert asked == ["a", "b"]
    counting(asked, "benchmarks/paper/bootstrap.py").run(path)
    assert asked == ["a", "b", "a", "b"]


@pytest.mark.parametrize("has_times", [True, False])
def test_times_are_measured_on_each_processor_and_accuracies_on_one(
    has_times: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    script = counting(asked, "benchmarks/paper/page.py")
    script = replace(script, sources=MEASURED) if has_times else script
    script.run(tmp_path / "results.json")
    monkeypatch.setattr("benchmarks.paper.script.cpu_name", lambda: "another processor")
    store = script.run(tmp_path / "results.json")
    assert asked == (["a", "b", "a", "b"] if has_times else ["a", "b"])
    assert {e["cpu"] == "another processor" for e in store.environments.values()} == {has_times}


def test_a_cell_that_cannot_be_measured_here_is_told_and_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> Cell:
        raise UnavailableError("fetch it first")

    script = Script("script", "of a test", lambda quick: {"a": missing, "b": dict}, str, ())
    script = replace(script, sources=("benchmarks/paper/page.py",), name="page")
    assert script.run(tmp_path / "results.json").cells.keys() == {"b"}
    assert "a: fetch it first" in capsys.readouterr().err


@pytest.mark.parametrize("script", EVERY, ids=lambda script: script.name)
def test_what_was_not_run_is_not_measured(script: Script) -> None:
    """With no cell nothing of ours is in the table but the words; one cell takes some away."""
    assert NOT_MEASURED in script.table({})
    results = json.loads(script.results.read_text())["cells"] if script.results.exists() else {}
    for key, cell in results.items():
        assert script.table({key: cell}).count(NOT_MEASURED) < script.table({}).count(NOT_MEASURED)


def test_committed_cells_are_those_of_the_script_and_say_where_from() -> None:
    for script in EVERY:
        if not script.results.exists():
            continue  # its table says that nothing was measured
        data = json.loads(script.results.read_text())
        assert set(data["cells"]) <= set(script.cells(False)), script.name
        for cell in data["cells"].values():
            told = data["environments"][cell["environment"]]
            assert re.fullmatch("[0-9a-f]{40}", told["commit"])
            assert cell["load"] > 0
            assert told.keys() >= {"cpu", "threads", "torch", "python"}


def test_a_table_of_cells_by_hand() -> None:
    of = {"SDPA, d=128": [2.0, 4.0, 3.0], "SDPA, d=64": [1.0] * 3}
    exact = {name.replace("SDPA", "exact"): ms for name, ms in of.items()}
    cell = {"ms": {**of, **exact}, "d=128 over d=64": {"SDPA": 3.0, "exact": 2.5}, "load": 1.5}
    line = next(x for x in exact_time.table({"N=2048": cell}).splitlines() if "2048" in x)
    shown = [part.strip() for part in line.strip("|").split("|")]
    assert shown == "2048 3.19 2.66 1.20 3.0 1.0 3.00 3.0 1.0 2.50 1.5".split()

    shares = {f"{name}, G={g}": [10.0, 30.0, 12.0] for name, g in grouping_share.SETTINGS}
    shown = grouping_share.table({"N=4096": {"percent": shares, "load": 2.0}})
    assert shown.count("12.0 % (10.0 to 30.0)") == len(grouping_share.SETTINGS)

    cell = {"ms": {"SDPA": [5.0]}, "over SDPA": {"Hydra": [2.0, 3.0, 4.0]}, "load": 2.0}
    shown = attention_time.table({"d=64, N=1024": {**cell, attention_time.SHARE: 0.0625}})
    assert "6.2%" in shown
    assert shown.count("3.00 (2.00 to 4.00)") == 1

    cell = {"exact": 0.9, "value": 0.8, "difference": -0.1, "interval": [-0.2, 0.05],
            "seeds' deviation": 0.01}  # fmt: skip
    shown = without_tuning.table({"minilm: Hydra, last two": cell})
    text = "0.8000 (-0.1000: -0.2000 to +0.0500, seeds ± 0.0100, no difference shown)"
    assert text in shown
    assert "| 0.9000" in shown


def test_the_figure_shows_what_was_measured(tmp_path: Path) -> None:
    shown: list[tuple[str, list[float]]] = []

    def look(self: Axes, x: list[int], y: list[float], *args: Any, **options: Any) -> Any:
        shown.append((options["label"], y))
        return drawn(self, x, y, *args, **options)

    drawn = Axes.errorbar
    cell = {"over SDPA": {"SDPA": [1.0] * 3, "Hydra": [2.0, 9.0, 4.0], "exact": [1.0, 1.5, 1.2]}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Axes, "errorbar", look)
        path = figures.draw_times({"d=64, N=1024": cell}, tmp_path)
    assert shown == [("exact", [1.2]), ("Hydra", [4.0])]
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_picture_of_training_shows_what_was_measured(tmp_path: Path) -> None:
    arm = "lsh-sample, G=2"
    found = {
        "tagger: untouched": {"less exact": {arm: {"difference": -9.0}}},
        "tagger, seed 0: exact": {"less exact": {arm: {"difference": -5.0}}},
        "tagger, seed 1: exact": {"less exact": {arm: {"difference": -7.0}}},
        f"tagger, seed 1: {arm}": {"less exact": {"difference": -1.0}},
    }
    values = [finetune_plot.differences(found, "tagger", arm, s) for s in finetune_plot.STYLES]
    assert values == [[-9.0], [-5.0, -7.0], [-1.0]]
    assert finetune_plot.draw(found, tmp_path).read_bytes().startswith(b"\x89PNG")


def test_the_share_of_hits_of_each_digit_over_its_scenes() -> None:
    """Three digits in two scenes each, through the whole evaluation: 2, 1 and 0 are named."""

    class Named(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(x, 5).float()

    labels = torch.tensor([0, 1, 2])
    guesses = [torch.tensor([0, 1, 4]), torch.tensor([0, 3, 4])]
    batches = [Batch((x,), labels=labels) for x in guesses]
    subject = finetune.Subject(Named().eval(), lambda g: batches[0], batches, "top1", scenes=2)
    rows = finetune.rows_of(subject, subject.model, [finetune.EXACT])[finetune.EXACT]
    assert rows.tolist() == [[1.0], [0.5], [0.0]]
    assert subject.value(rows) == 0.5


# --- what is measured --------------------------------------------------------------------------


def test_intervals_of_a_mean_are_those_of_its_standard_error() -> None:
    g = torch.Generator().manual_seed(1)
    exact = torch.randn(500, 1, generator=g, dtype=torch.float64)
    gain = 0.5 + torch.randn(500, 1, generator=g, dtype=torch.float64) / 10
    found = paired(lambda rows: rows.mean().item(), exact + gain, exact)
    error = gain.std().item() / math.sqrt(500)
    assert found.difference == pytest.approx(gain.mean().item())
    assert found.low == pytest.approx(found.difference - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(found.difference + 1.96 * error, abs=0.15 * error)
    same = paired(lambda rows: rows.mean().item(), exact, exact)
    assert (same.difference, same.low, same.high) == (0, 0, 0)
    with pytest.raises(ValueError, match="got 3 and 500; accepted"):
        paired(lambda rows: 0.0, exact[:3], exact)


def test_reciprocal_ranks_are_those_of_the_zoo() -> None:
    g = torch.Generator().manual_seed(0)
    embedding = torch.nn.functional.normalize(torch.randn(40, 6, generator=g).double(), dim=-1)
    number = torch.arange(1, 21).repeat(2) * torch.tensor([-1, 1]).repeat_interleave(20)
    number = number[torch.randperm(40, generator=g)]
    wanted = RETRIEVAL.result(torch.cat([embedding, number[:, None].double()], -1))
    found = without_tuning.reciprocal_ranks(embedding, number)
    assert found.mean().item() == pytest.approx(wanted)
    assert 0.05 < wanted < 0.95


def test_score_errors_are_those_of_the_error_benchmark() -> None:
    cell = score_errors.cell(4, 8, trials=5, seeds=2)
    found: dict[str, list[error_metrics.Spread]] = {"sum": [], "element-wise": []}
    for seed in range(2):
        Q, K = (t[:, None] for t in uniform(5, 64, 64, torch.Generator().manual_seed(seed)))
        blocks = error_metrics.methods()["lsh-mean"](Q, K, rank=16, grouping_block=8)
        S, Shat = Q @ K.mT, error_metrics.scores(Inputs(Q, K, K), blocks)
        found["sum"].append(error_metrics.of_the_sum(S, Shat))
        found["element-wise"].append(error_metrics.element_wise(S, Shat))
    for metric, spreads in found.items():
        of = cell["percent"]["lsh-mean"][metric]
        assert of["mean"] == pytest.approx(sum(s.mean for s in spreads) / 2)
        assert of["seeds' deviation"] == pytest.approx(
            abs(spreads[0].mean - spreads[1].mean) / math.sqrt(2)
        )
        assert of["at quantiles"][0] == pytest.approx(min(s.min for s in spreads))
        assert of["at quantiles"][-1] == pytest.approx(max(s.max for s in spreads))
        assert of["at quantiles"] == sorted(of["at quantiles"])


def test_errors_of_rows_by_hand() -> None:
    exact = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    ours = torch.tensor([[3.0, 4.0], [1.0, 2.0]])
    assert hard_patterns.row_errors(ours, exact).tolist() == [0.0, 0.5]
    cell = hard_patterns.cell("uniform(0, 1)", tokens=64, trials=1, seeds=2)
    errors = {arm: of["at quantiles"] for arm, of in cell["relative error of a row"].items()}
    assert all(0 < each[0] <= each[1] <= each[2] for each in errors.values())
    assert errors["projection, G=2"][0] < errors["lsh-sample, G=2"][0] < errors["Hydra"][0]


# --- the page ----------------------------------------------------------------------------------


def test_the_page_has_the_tables_of_the_results() -> None:
    for page, scripts in PAGES.items():
        text = page.read_text(encoding="utf-8")
        assert filled(text, scripts) == text, "run: python -m benchmarks.paper --docs"


def test_a_page_without_a_place_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"docs/paper.md: got no place for .*; accepted: .*; write"
    ):
        filled("", SCRIPTS)


def prose_and_published(text: str) -> tuple[str, str]:
    """The page without its tables, and the tables of what is the paper's alone."""
    prose = re.sub(r"<!-- table: .*?<!-- end: [a-z_]+ -->", "", text, flags=re.DOTALL)
    pattern = re.compile(r"<!-- published -->.*?<!-- end published -->", re.DOTALL)
    return pattern.sub("", prose), "\n".join(pattern.findall(prose))


def test_every_number_in_the_text_is_in_a_table() -> None:
    """Decimals and percentages, of ours and of the paper alike."""
    prose, published = prose_and_published(PAGE.read_text(encoding="utf-8"))
    prose = re.sub(r"arXiv \S+|[Ss]ection \d+\.\d+", "", prose)
    number = r"(?<![\w.-])\d+\.\d+(?![\w.]*\.\d)"
    tables = "\n".join(table_of(script) for script in PAGES[PAGE]) + published
    known = {x.strip("+-") for x in re.findall(r"[-+]?\d+\.\d+", tables)}
    assert set(re.findall(number, prose)) - known == set()


def test_what_nobody_measured_here_says_so() -> None:
    """The last column of a table of the paper's own numbers is ours."""
    _, published = prose_and_published(PAGE.read_text(encoding="utf-8"))
    lines = [line for line in published.splitlines() if line.startswith("|")]
    rows = [line for line in lines if "---" not in line and not line.endswith("| here |")]
    assert len(rows) > 12
    assert all(row.endswith(f"| {NOT_MEASURED} |") for row in rows)
