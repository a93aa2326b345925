"""The accuracy benchmark: its metrics against numbers worked out by hand, and what it writes."""

from __future__ import annotations

import json
import math
import re
from dataclasses import astuple
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import error_metrics, error_models, error_plots, estimator_error, projection_choices
from benchmarks.error_inputs import DRAWS, Inputs, draw
from benchmarks.error_metrics import SVD_LIMIT, methods, svd_limit
from benchmarks.estimator_error import GROUP_SIZES, PUBLISHED, Sizes
from distr_compile.kernels.roles import Block
from tests.regression.gate import BASELINE
from tests.zoo import load

TINY = Sizes(paper_trials=2, trials=1, tokens=32, layer_texts=1, texts=3, images=4, pieces=1)


def matrix(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)[None, None]


# --- metrics -----------------------------------------------------------------------------------

# S is diag(1, 2), Shat diag(1, 0).
INPUTS = Inputs(matrix([1, 0], [0, 2]), matrix([1, 0], [0, 1]), matrix([1], [0]))
FACTORS = [Block(0, 2, matrix([1], [0]), matrix([1], [0]))]


def weight(score: float, other: float) -> float:
    """Of two keys the weight of the first, at d = 2."""
    return 1 / (1 + math.exp((other - score) / math.sqrt(2)))


def test_errors_against_numbers_by_hand() -> None:
    first, second = weight(1, 0), weight(0, 2)
    found = error_metrics.errors(INPUTS, FACTORS)
    kl = second * math.log(second / 0.5) + (1 - second) * math.log((1 - second) / 0.5)
    assert found.scores == pytest.approx(2 / math.sqrt(5))
    assert found.output == pytest.approx((0.5 - second) / math.hypot(first, second))
    assert found.kl == pytest.approx(kl / 2)


def test_errors_with_causality_look_at_the_keys_before_the_end_of_a_block() -> None:
    causal = Inputs(INPUTS.Q, INPUTS.K, INPUTS.V, is_causal=True)
    second = weight(0, 2)
    one_block = error_metrics.errors(causal, FACTORS)
    assert one_block.scores == pytest.approx(2 / math.sqrt(5))
    assert one_block.output == pytest.approx((0.5 - second) / math.hypot(1, second))

    # Of the first of two blocks the second key is no part: what Shat says there is no error.
    first = Block(0, 1, matrix([1]), matrix([1], [7]))
    two_blocks = [first, Block(1, 2, matrix([1]), matrix([0], [2]))]
    assert astuple(error_metrics.errors(causal, two_blocks)) == pytest.approx((0, 0, 0))
    assert error_metrics.errors(INPUTS, two_blocks).scores == pytest.approx(7 / math.sqrt(5))


@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_is_that_of_the_errors(is_causal: bool) -> None:
    i = draw("Gaussian", trials=2, tokens=24, head_dim=16)
    i = Inputs(i.Q, i.K, i.V, is_causal)
    exact = error_models.exact_attention(i)
    blocks = svd_limit(i.Q, i.K, rank=8, grouping_block=16, is_causal=is_causal)
    off = (error_metrics.attention(i, blocks) - exact).flatten(1).norm(dim=1)
    expected = (off / exact.flatten(1).norm(dim=1)).mean().item()
    assert error_metrics.errors(i, blocks).output == pytest.approx(expected)


def test_the_metrics_of_the_papers_tables() -> None:
    S, Shat = torch.tensor([[[1.0, 2, 4]], [[1, 1, 2]]]), torch.tensor([[[1.0, 3, 3]], [[2, 1, 2]]])
    element_wise = error_metrics.element_wise(S, Shat)
    assert astuple(element_wise) == pytest.approx((0, 100, (50 + 25 + 100) / 6))
    assert astuple(error_metrics.of_the_sum(S, Shat)) == pytest.approx((0, 25, 12.5))


def test_rank_correlation() -> None:
    a = torch.tensor([0.1, 0.5, 0.2, 0.9])
    assert error_models.spearman(a, a**3) == pytest.approx(1)
    assert error_models.spearman(a, -a) == pytest.approx(-1)
    # Ranks 0 2 1 3 and 0 1 2 3: 1 - 6 (1 + 1) / (4 (16 - 1)).
    assert error_models.spearman(a, torch.arange(4.0)) == pytest.approx(0.8)


# --- the limit ---------------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_limit_is_the_truncated_svd(is_causal: bool) -> None:
    i = draw("Gaussian", trials=2, tokens=40, head_dim=16)
    for block in svd_limit(i.Q, i.K, rank=8, grouping_block=16, is_causal=is_causal):
        keys = block.stop if is_causal else 40
        S = i.Q[:, :, block.start : block.stop] @ i.K[:, :, :keys].mT
        left_out = torch.linalg.svdvals(S)[..., 8:].square().sum(-1).sqrt()
        error = (block.Qhat @ block.Khat[:, :, :keys].mT - S).norm(dim=(-2, -1))
        torch.testing.assert_close(error, left_out)


def assert_within_the_limit(rows: list[estimator_error.Row]) -> None:
    for row in rows:
        scores = {title: found[0] for title, found in row["errors"].items()}
        # What is exact is so up to rounding.
        assert scores[SVD_LIMIT] <= min(scores.values()) + 1e-6, row


def test_no_estimator_passes_the_limit() -> None:
    sizes = Sizes(trials=1, tokens=40)
    assert_within_the_limit(list(estimator_error.measure_sets(DRAWS, sizes)))


# --- models ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("digits-vit", (3, 2, 197, 64)),
        ("gpt2", (3, 2, 256, 64)),
        ("llama", (3, 2, 512, 128)),
    ],
)
def test_all_attention_of_a_model_is_replaced(name: str, shape: tuple[int, ...]) -> None:
    subject = error_models.from_zoo(name, 5)
    exact = subject.results(error_models.exact_attention, batch=2)
    with torch.no_grad():
        torch.testing.assert_close(exact, subject.run(subject.inputs))
    none = subject.results(lambda i: torch.zeros_like(i.V))
    assert not torch.allclose(none, exact, atol=1e-2)
    assert [tuple(i.Q.shape) for i in subject.layers(count=3)] == [shape] * load(name).num_layers


# --- the whole ---------------------------------------------------------------------------------


def test_a_tiny_run_writes_prints_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimator_error, "GROUP_SIZES", (2,))
    monkeypatch.setattr(estimator_error, "BLOCKS", (64,))
    monkeypatch.setattr(estimator_error, "STRICT", ((2, 64, 1),))
    monkeypatch.setattr(error_plots, "CURVES", error_plots.CURVES[:1])
    monkeypatch.setattr(error_plots, "HEAT_MAPS", error_plots.HEAT_MAPS[:1])
    path = tmp_path / "results.json"
    estimator_error.write(estimator_error.measure(TINY), path)
    check_results(json.loads(path.read_text()), TINY.tokens, (2,))

    estimator_error.main(["--results", str(path), "--show"])
    printed = capsys.readouterr().out
    # The paper's, one for each metric, one for each model, that of the strict form.
    assert printed.count("\n\n|") == 1 + 3 + 4 + 1
    estimator_error.main(["--results", str(path), "--plot", str(tmp_path / "plots")])
    drawn = {Path(line).name for line in capsys.readouterr().out.split()}
    assert drawn == {file.name for file in (tmp_path / "plots").iterdir()}
    assert {"figure-7-lsh-sample.png", "heat-maps-uniform.png"} <= drawn


def test_committed_results_are_complete() -> None:
    results = json.loads(estimator_error.RESULTS.read_text())
    assert results["sizes"] == vars(Sizes())
    check_results(results, Sizes().tokens, GROUP_SIZES)


def check_results(results: estimator_error.Row, tokens: int, group_sizes: tuple[int, ...]) -> None:
    names = list(methods())
    paper = [(row["G"], row["block"], row["method"]) for row in results["paper"]]
    assert paper == [(*setting, name) for setting in PUBLISHED for name in names]
    drawn = [row for row in results["errors"] if row["set"] in DRAWS]
    blocks = [*(block for block in estimator_error.BLOCKS if block < tokens), "all"]
    settings = [(row["set"], row["G"], row["block"]) for row in drawn]
    assert settings == [(s, g, b) for s in DRAWS for g in group_sizes for b in blocks]
    models = {"digits-vit", "gpt2", "llama", "MiniLM"}
    with_masks = {"digits-deit", "digits-swin", "tagger", "t5"}
    assert {row["set"] for row in results["errors"]} - set(DRAWS) == models | with_masks
    assert {row["model"] for row in results["models"]} == models
    assert all(list(row["errors"]) == names for row in results["errors"])
    assert all(list(row["results"]) == ["exact", "uniform", *names] for row in results["models"])
    assert_within_the_limit(results["errors"])
    strict = [(row["model"], row["G"], row["block"], row["rounds"]) for row in results["strict"]]
    settings = [(model, *of) for model in ("gpt2", "llama") for of in estimator_error.STRICT]
    assert strict == settings
    assert all(row["strict"] != row["not strict"] for row in results["strict"])


def test_the_document_shows_the_committed_results() -> None:
    results = json.loads(estimator_error.RESULTS.read_text())
    printed = " ".join("\n".join(table for _, table in estimator_error.tables(results)).split())
    choices = json.loads(estimator_error.RESULTS.with_name("projection_choices.json").read_text())
    models = json.loads(BASELINE.read_text())["models"]
    exact = {
        name: models[name]["policies"]["exact"]["metrics"][task]["exact"]
        for name, task in {row["model"]: row["metric"] for row in choices}.items()
    }
    printed += " ".join(projection_choices.document(choices, exact))
    docs = estimator_error.RESULTS.parents[2] / "docs"
    text = (docs / "estimator-tables.md").read_text("utf-8")
    rows = [line for line in text.splitlines() if re.match(r"\| .* \d\.\d{3}\b.* \|$", line)]
    assert len(rows) > 40
    assert [row for row in rows if row not in printed] == []
