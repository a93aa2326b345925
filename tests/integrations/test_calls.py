"""``attn_implementation="distr"``: the report of what became of the calls."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import distr_compile
from distr_compile import calls
from distr_compile.lowering import cpu_backward, cpu_fused
from distr_compile.reporting import SiteRow
from tests.integrations.classifier import trainer_losses
from tests.kernels.cpu_kernel import require_kernel

SIZES = {
    "vocab_size": 100,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
POLICY = {
    "default": {"group_size": 2, "min_seq_len": 0},
    "rule": [
        {"layers": "model.layers.0.self_attn", "group_size": 1},
        {"layers": "model.layers.2.self_attn", "group_size": 4},
    ],
}


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISTR_POLICY", raising=False)
    distr_compile.transformers.register()
    torch._dynamo.reset()
    torch.manual_seed(0)


def llama(policy: Any = POLICY) -> Any:
    config = transformers.LlamaConfig(**SIZES)
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="distr")
    distr_compile.transformers.apply(model, policy)
    return model.eval()


def ids(tokens: int = 40) -> torch.Tensor:
    return torch.randint(1, 100, (2, tokens))


def said(row: SiteRow) -> tuple[str, str, Any, list[str]]:
    codes = [reason.code for reason in row.reasons]
    return row.layer.removeprefix("model.layers."), row.decision, row.shapes["q"][2], codes


def test_each_outcome_of_a_layer_is_a_row() -> None:
    model = llama()
    model.generate(ids(), max_new_tokens=6, do_sample=False)
    report = distr_compile.report(model)
    assert [said(row) for row in report.rows] == [
        ("0.self_attn", "exact", 40, ["group-size-1"]),
        ("1.self_attn", "distr", 40, []),
        ("1.self_attn", "exact", 1, ["decode"]),
        ("2.self_attn", "exact", 40, ["rank"]),
        ("2.self_attn", "exact", 1, ["rank", "decode"]),
    ]
    row = report.rows[1]
    assert (row.group_size, row.rank, row.estimator, row.mask) == (2, 16, "projection", "causal")
    assert row.flops == 2 * 2 * 4 * 40 * 40 * (32 + 32)
    assert "must leave at least 16 columns" in str(report)
    assert "5 attentions called without a graph; 1 distr, 4 exact" in str(report)


def test_graphs_and_calls_are_told_apart() -> None:
    model = llama()
    with pytest.raises(LookupError, match="none of its attention was called yet"):
        distr_compile.report(model)
    model.set_attn_implementation("sdpa")
    options = {"policy": {"default": {"group_size": 1}}, "compiler": "eager"}
    with torch.no_grad():
        torch.compile(model, backend="distr", options=options)(ids())
        model.set_attn_implementation("distr")
        model(ids())
    told = distr_compile.report(model).summary()
    assert told.startswith("6 attentions in 1 graph, 3 of them called without a graph; ")


@pytest.mark.parametrize("tokens", [40, 70])
def test_rows_say_what_those_of_the_backend_say(tokens: int) -> None:
    policy = {"default": {"group_size": 2, "min_seq_len": 64}}
    ours = llama(policy)
    usual = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    options = {"policy": policy, "compiler": "eager"}
    compiled = torch.compile(usual, backend="distr", options=options)
    with torch.no_grad():
        ours(ids(tokens))
        compiled(ids(tokens))
    first, second = (
        [
            (*said(row), row.group_size, row.sees, row.flops, row.mask, row.reasons)
            for row in distr_compile.report(model).rows
        ]
        for model in (ours, compiled)
    )
    assert first == second
    assert first[0][1] == ("distr" if tokens == 70 else "exact")


def test_a_row_names_the_backward_of_a_mask_that_is_trained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A mask that heads share gets its gradient from products, and the row says so."""
    require_kernel()
    path = tmp_path / "distr.toml"
    path.write_text('[default]\ngroup_size = 2\nmin_seq_len = 0\ntraining = "approximate"\n')
    monkeypatch.setenv("DISTR_POLICY", str(path))
    ran: list[str] = []
    for module, name in ((cpu_backward, "run"), (cpu_fused, "backward")):
        own = getattr(module, name)
        label = module.__name__.rpartition(".")[2]
        spy = partial(lambda label, own, *given: (ran.append(label), own(*given)), label, own)
        monkeypatch.setattr(module, name, spy)
    module = torch.nn.Module()
    q, k, v = (torch.randn(2, heads, 40, 64, requires_grad=True) for heads in (4, 2, 2))
    for is_trained in (False, True, True):
        mask = torch.randn(2, 1, 40, 40, requires_grad=is_trained)
        out, _ = distr_compile.transformers.attend(module, q, k, v, mask)
        out.sum().backward()
        assert (mask.grad is not None) == is_trained
    assert ran == ["cpu_fused", "cpu_backward", "cpu_backward"]
    first, second = distr_compile.report(module).rows
    assert (first.backward, dict(first.refused)) == ("distr-cpu", {})
    assert second.backward == "torch-products"
    assert second.refused["distr-cpu, backward"].endswith("no gradient to a mask that heads share")


def test_a_second_plan_begins_anew() -> None:
    model = llama()
    with torch.no_grad():
        model(ids())
        distr_compile.transformers.apply(model, {"default": {"group_size": 1}})
        model(ids())
    rows = distr_compile.report(model).rows
    assert [said(row)[3] for row in rows] == [["group-size-1"]] * 3


def test_a_copy_has_rows_of_its_own() -> None:
    model = llama()
    with torch.no_grad():
        model(ids())
        other = copy.deepcopy(model)
        with pytest.raises(LookupError, match="nothing was compiled for it"):
            distr_compile.report(other)
        other(ids())
    assert len(distr_compile.report(other).rows) == len(distr_compile.report(model).rows) == 3


def test_the_trainer_of_transformers_trains_through_it(tmp_path: Path) -> None:
    policy = {"default": {"group_size": 2, "min_seq_len": 0, "training": "approximate"}}
    model = llama(policy)
    texts = [{"input_ids": x, "labels": x} for x in torch.randint(1, 20, (16, 40))]
    losses = trainer_losses(
        model, texts, tmp_path, max_steps=12, per_device_train_batch_size=8, logging_steps=2
    )
    assert losses[-1] < 0.9 * losses[0]
    rows = distr_compile.report(model).rows
    assert {(row.decision, row.mode) for row in rows} == {("distr", "train, grad")}
    assert all(row.backward for row in rows)


def test_nothing_is_kept_in_a_trace() -> None:
    model = llama()
    with torch.no_grad():
        torch.compile(model, backend="eager")(ids())
    assert not any(calls.ATTRIBUTE in vars(module) for module in model.modules())
