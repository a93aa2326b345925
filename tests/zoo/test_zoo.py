"""The zoo has the skill it is there for, on data it was not trained on."""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch
from safetensors import safe_open

import distr_compile
from distr_compile.accuracy.metrics import as_metric
from tests.zoo import RECIPES, TRAINED, ZOO, digits, load, minilm, rank, tagger, texts
from tests.zoo.train import skill

LARGEST_FILE = 2_000_000  # bytes
HALF = {"default": {"group_size": 2, "min_seq_len": 0}}
ATTENTIONS = {"t5": 7}  # two in each layer of a decoder

zoo = cache(load)


@pytest.mark.parametrize("name", {**ZOO, **TRAINED})
def test_the_model_reaches_its_floor(name: str) -> None:
    value, metric = skill(zoo(name)), as_metric(zoo(name).metrics[0])
    at_least = metric.better == "higher"
    assert value >= zoo(name).floor if at_least else value <= zoo(name).floor, value
    if name in TRAINED:
        with safe_open(TRAINED[name].weights, "pt") as file:
            recorded = file.metadata()
        assert recorded["metric"] == metric.name
        if recorded["data_digest"] == zoo(name).data_digest:
            assert value == pytest.approx(float(recorded["skill"]), rel=0.01)


@pytest.mark.parametrize("name", ZOO)
def test_every_attention_is_found_and_can_be_approximated(name: str) -> None:
    batch = zoo(name).batches[-1]
    report = distr_compile.explain(zoo(name).model, *batch.args, policy=HALF, **batch.kwargs)
    assert len(report.rows) == ATTENTIONS.get(name, zoo(name).num_layers)
    assert {row.decision for row in report.rows} == {"distr"}, report
    assert {row.shapes["q"][-1] for row in report.rows} == {zoo(name).head_dim}


def test_key_heads_are_shared_in_llama_only() -> None:
    def heads(name: str) -> list[tuple[object, object]]:
        batch = zoo(name).batches[0]
        rows = distr_compile.explain(zoo(name).model, policy=HALF, **batch.kwargs).rows
        return [(row.shapes["q"][1], row.shapes["k"][1]) for row in rows]

    assert heads("llama") == [(2, 1)] * 4
    assert heads("gpt2") == [(2, 2)] * 4


def test_t5_needs_its_cross_attention() -> None:
    blind = load("t5")
    with torch.no_grad():
        for name, parameter in blind.model.named_parameters():
            if "EncDecAttention.q" in name:
                parameter.zero_()  # every byte of the copy looks alike
    assert skill(blind) > 9 > zoo("t5").floor


@pytest.mark.parametrize("name", ZOO)
def test_there_is_enough_data_with_labels(name: str) -> None:
    batches = zoo(name).batches
    assert all(batch.labels is not None for batch in batches)
    assert len(zoo(name).train_batches) >= 2
    # Tokens with their padding: MiniLM's texts are as long as docstrings are.
    tokens = sum(batch.kwargs["input_ids"].numel() for batch in batches if batch.kwargs)
    assert tokens >= 2**14 or sum(len(batch.labels) for batch in batches) >= 256


@pytest.mark.parametrize("name", RECIPES)
def test_the_weights_are_small(name: str) -> None:
    path = RECIPES[name].weights
    assert path.stat().st_size <= LARGEST_FILE
    with safe_open(path, "pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F16"}  # noqa: SIM118
        assert {"seed", "steps", "seconds", "torch", "python"} <= file.metadata().keys()


# --- evaluation data were not trained on --------------------------------------------------------


def test_no_held_out_digit_was_trained_on() -> None:
    known, unknown = (digits.digits(held_out=held_out)[0].flatten(1) for held_out in (False, True))
    assert (len(known), len(unknown)) == (1797 - digits.HELD_OUT, digits.HELD_OUT)
    assert torch.cdist(unknown, known).min() > 0


def test_no_held_out_text_is_in_a_module_to_train_on() -> None:
    modules = texts.modules(held_out=False)
    assert not set(modules) & set(texts.HELD_OUT)
    trained_on = "\n".join(" ".join(texts.source(module).split()) for module in modules)
    for name in ("llama", "gpt2", "tagger", "t5"):
        for batch in zoo(name).batches:
            for row in batch.kwargs["input_ids"]:
                text = re.sub(r"[^\x01-\x7f]", "", "".join(map(chr, row.tolist())))
                assert " ".join(text.split()) not in trained_on


def test_minilm_is_calibrated_with_other_docstrings_than_it_is_asked_for() -> None:
    pairs = minilm.pairs()
    assert len(pairs) >= minilm.PAIRS + minilm.TRAINED_ON
    assert len({summary for summary, _ in pairs}) == len(pairs)


# --- the data and the tools ---------------------------------------------------------------------


def test_the_classes_of_bytes() -> None:
    text = (
        'def f(a, *, b=1):\n    """Doc."""\n    c = a.x  # why\n    return g(c, b=f"{a}", n="s")\n'
    )
    expected = {
        "def": "keyword",
        "f(": "definition",
        "a,": "parameter",
        '"""Doc."""': "docstring",
        "c = ": "local",
        "a.x": "parameter",
        "x  #": "attribute",
        "# why": "comment",
        "g(": "global",
        "b=f": "argument",
        'f"{a}"': "string",
        '"s"': "string",
        "1)": "number",
    }
    found = tagger.classes(text)
    assert len(found) == len(text)
    names = {part: tagger.CLASSES[int(found[text.index(part)])] for part in expected}
    assert names == expected
    assert found[text.index("{a}") + 1] == tagger.CLASSES.index("string")
    assert {int(found[i]) for i, character in enumerate(text) if character.isspace()} == {-100}


def test_the_mean_reciprocal_rank() -> None:
    sides = torch.eye(3, dtype=torch.float64)
    numbers = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
    asked = torch.stack([sides[0], sides[1], 0.9 * sides[2] + sides[0]])
    rows = torch.cat([torch.cat([asked, -numbers], -1), torch.cat([sides, numbers], -1)])
    assert minilm.RETRIEVAL.result(rows) == pytest.approx((1 + 1 + 1 / 2) / 3)
    assert minilm.RETRIEVAL.result(rows[:5]) == pytest.approx(1)  # the third body is missing


def test_effective_ranks() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.linalg.qr(torch.randn(2, 1, 1, 40, 8, generator=generator)).Q
    strengths = torch.tensor([10.0, 10.0, 10.0, 0.1, 0.1, 0.1, 0.1, 0.1])
    assert rank.effective_ranks(q * strengths, k).flatten().tolist() == [3, 3]
    assert rank.effective_ranks(q, k).flatten().tolist() == [8, 8]


def test_unknown_weights_are_refused() -> None:
    other = RECIPES["gpt2"].build()
    from tests.zoo.recipe import load_weights

    with pytest.raises(ValueError, match="other parameters"):
        load_weights(other, RECIPES["llama"].weights)
