"""peft: names without its wrappers, the numbers of the merged model, and a training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import AdaptionPromptConfig, LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import distr_compile
from tests.integrations.classifier import OPTIONS, classifier, is_approximated_both_ways, texts
from tests.kernels.cpu_kernel import require_kernel

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
WHOLE = "base_model.model.model.layers.0.self_attn"
SHORT = "model.layers.0.self_attn"


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def adapted() -> nn.Module:
    """With adapters that do something."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model: nn.Module = get_peft_model(LlamaForCausalLM(LlamaConfig(**SIZES)), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.5)
    return model


def ids() -> Tensor:
    return torch.randint(1, 100, (2, 40), generator=torch.Generator().manual_seed(0))


def compiled(model: nn.Module, layers: str) -> tuple[Tensor, list[tuple[str, str]]]:
    rule = [{"layers": layers, "group_size": 1}]
    policy = {"default": {"group_size": 2, "min_seq_len": 0}, "rule": rule}
    called = torch.compile(model, backend="distr", options={"policy": policy, "compiler": "eager"})
    with torch.no_grad():
        logits = called(input_ids=ids()).logits
    return logits, [(row.layer, row.decision) for row in distr_compile.report(called).rows]


@pytest.mark.parametrize("layers", [SHORT, WHOLE])
def test_numbers_and_names_are_those_of_the_merged_model(layers: str) -> None:
    model = adapted()
    merged = copy.deepcopy(model).merge_and_unload()  # type: ignore[operator]
    got, rows = compiled(model, layers)
    wanted, named = compiled(merged, SHORT)
    assert rows == named == [(SHORT, "exact"), ("model.layers.1.self_attn", "distr")]
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        exact = model(input_ids=ids()).logits
        with model.disable_adapter():  # type: ignore[operator]
            base = model(input_ids=ids()).logits
    assert (got - exact).abs().max() > 1e-3, "nothing was approximated"
    assert (exact - base).abs().max() > 1e-1, "adapters did nothing"


def test_adaption_prompts_have_the_names_of_the_model() -> None:
    torch.manual_seed(0)
    config = AdaptionPromptConfig(adapter_len=4, adapter_layers=1, task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**SIZES)), config).eval()
    _, rows = compiled(model, SHORT)
    assert (SHORT, "exact") in rows
    assert {name for name, _ in rows} == {SHORT, "model.layers.1.self_attn"}


def test_adapters_learn_and_frozen_weights_stay() -> None:
    require_kernel()
    config = LoraConfig(r=8, target_modules=["query", "key", "value"], task_type="SEQ_CLS")
    adapted = get_peft_model(classifier(), config)
    frozen = {n: p.detach().clone() for n, p in adapted.named_parameters() if not p.requires_grad}
    trained = [p for p in adapted.parameters() if p.requires_grad]
    compiled = torch.compile(adapted, backend="distr", options=OPTIONS)
    optimizer, data = torch.optim.AdamW(trained, 2e-2), texts()
    ids = torch.stack([each["input_ids"] for each in data])
    labels = torch.tensor([each["labels"] for each in data])
    losses = []
    for _ in range(30):
        loss = compiled(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    now = dict(adapted.named_parameters())
    assert frozen
    assert all(torch.equal(now[name], before) for name, before in frozen.items())
    adapters = [p.grad for name, p in now.items() if "lora_B" in name]
    assert len(adapters) == 6
    assert all(grad is not None and grad.norm() > 0 for grad in adapters)
    assert is_approximated_both_ways(compiled)
