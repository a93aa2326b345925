"""``attn_implementation="distr"``: every model is given masks that its code can read.

The layers are exact here: the numbers are those of "eager", or the model is refused.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import distr_compile
from distr_compile import masks
from tests.survey.hf_models import build_hf
from tests.survey.models import enliven

TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISTR_POLICY", raising=False)
    distr_compile.transformers.register()
    torch._dynamo.reset()


def with_ours(model: Any) -> Any:
    """The same weights, loaded for our attention; "auto" is exact where nothing was measured."""
    config = copy.deepcopy(model.config)
    twin = type(model)._from_config(config, attn_implementation="distr")
    twin.load_state_dict(model.state_dict())
    return twin.eval()


def both(name: str) -> tuple[Any, Any, dict[str, Any]]:
    model, inputs = build_hf(name, "eager")
    enliven(model.eval())
    return model, with_ours(model), inputs


def far(wanted: Tensor, got: Tensor) -> float:
    return float((wanted - got).norm() / wanted.norm())


DEAF = ("bloom", "gpt_neox_japanese", "megatron-bert", "mpnet", "mpt", "roformer", "xglm")
"""Their code does not look at the interface: it adds the mask to its scores."""

WITHOUT_SDPA = ("bigbird_pegasus", "deepseek_v4", "nllb-moe", "pegasus_x", "splinter")
"""Their code calls our attention, and counts on the masks of "eager"."""

AS_SDPA = ("bert", "gemma2", "gpt_oss", "llama", "t5", "whisper")


@pytest.mark.parametrize("name", [*DEAF, *WITHOUT_SDPA, *AS_SDPA])
def test_the_numbers_are_those_of_eager(name: str) -> None:
    """With padding on the right, where the model takes it, and without."""
    usual, ours, inputs = both(name)
    for given in (inputs, {k: v for k, v in inputs.items() if k != "attention_mask"}):
        with torch.no_grad():
            assert far(usual(**given)[0], ours(**given)[0]) < TOLERANCE


def test_an_empty_text_beside_a_position_bias_is_that_of_eager() -> None:
    """Its rows, and those of the decoder that read it, see no key; a finite fill shows them all."""
    usual, ours, inputs = both("t5")
    mask = torch.ones_like(inputs["input_ids"])
    mask[-1] = 0
    with torch.no_grad():
        wanted, got = (m(**{**inputs, "attention_mask": mask})[0] for m in (usual, ours))
    assert far(wanted[-1], got[-1]) < TOLERANCE
    assert far(wanted, got) < TOLERANCE


def test_a_later_token_changes_no_earlier_row() -> None:
    _, ours, inputs = both("bloom")
    tokens = inputs["input_ids"]
    other = torch.cat([tokens[:, :-1], tokens[:, -1:] + 1], 1)
    with torch.no_grad():
        before, after = ours(tokens)[0], ours(other)[0]
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])


def test_a_part_of_a_model_that_looks_at_nothing_is_exact() -> None:
    config = transformers.TrOCRConfig(
        vocab_size=100, d_model=64, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=64
    )
    torch.manual_seed(0)
    usual: Any = transformers.TrOCRForCausalLM._from_config(config, attn_implementation="eager")
    enliven(usual.eval())
    ours, tokens = with_ours(usual), torch.randint(3, 100, (2, 24))
    with torch.no_grad():
        assert far(usual(tokens).logits, ours(tokens).logits) < TOLERANCE


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_rows_that_are_cut_out_of_a_mask_stay_causal(kept: int) -> None:
    """Layers of Gemma 4 that share keys and values see the queries of the kept logits only."""
    kind: Any = transformers.Gemma4TextConfig
    config = kind(
        vocab_size=128,
        vocab_size_per_layer_input=128,
        hidden_size=64,
        hidden_size_per_layer_input=16,
        intermediate_size=64,
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        global_head_dim=32,
    )
    torch.manual_seed(0)
    usual: Any = transformers.Gemma4ForCausalLM._from_config(config, attn_implementation="eager")
    enliven(usual.eval())
    ours = with_ours(usual)
    tokens = torch.randint(3, 100, (2, 24))
    given = {"input_ids": tokens, "logits_to_keep": kept}
    with torch.no_grad():
        assert far(usual(**given).logits, ours(**given).logits) < TOLERANCE


def test_which_configs_have_models_that_read_the_masks_of_sdpa() -> None:
    for name in (*AS_SDPA, *DEAF, *WITHOUT_SDPA):
        config = transformers.CONFIG_MAPPING[name]
        assert transformers.MODEL_MAPPING[config] is not None  # it is loaded
        assert masks.reads_those_of_sdpa(config) is (name in AS_SDPA), name
    assert masks.reads_those_of_sdpa(type(None)) is None

    alias, part = (transformers.CONFIG_MAPPING[name] for name in ("exaone", "t5gemma"))
    for config in (alias, type(part().encoder)):  # a Llama; half of a T5Gemma, which has soft caps
        assert transformers.MODEL_MAPPING[part] is not None
        assert masks.reads_those_of_sdpa(config) is True

    class Mine(transformers.LlamaConfig):
        """One that somebody derived has the models of what it is derived from."""

    assert masks.reads_those_of_sdpa(Mine) is True


@pytest.mark.parametrize("name", ["bert", "bloom", "splinter"])
def test_masks_are_made_in_a_trace(name: str) -> None:
    _, ours, inputs = both(name)
    masks._reads_those_of_sdpa.cache_clear()
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    with torch.no_grad():
        got, wanted = compiled(**inputs)[0], ours(**inputs)[0]
    torch.testing.assert_close(got, wanted)


# --- what is refused -----------------------------------------------------------------------------


def attended(**options: Any) -> Tensor:
    x = torch.randn(1, 2, 20, 32, generator=torch.Generator().manual_seed(0))
    out: Tensor = distr_compile.transformers.attend(torch.nn.Identity(), x, x, x, None, **options)[
        0
    ]
    return out


@pytest.mark.parametrize("name", ["indices", "block_indices", "sinks"])
def test_what_would_change_the_result_and_is_not_heeded(name: str) -> None:
    message = f'{name}: got a Tensor; accepted: None; load the model with "sdpa" or "eager" and'
    with pytest.raises(ValueError, match=message):
        attended(**{name: torch.zeros(1, dtype=torch.long)})
    with torch.no_grad():
        assert torch.equal(attended(**{name: None}), attended())


def test_what_says_no_more_than_the_mask() -> None:
    harmless = dict.fromkeys(("cu_seq_lens_q", "num_items_in_batch"), torch.tensor([0, 20]))
    with torch.no_grad():
        assert torch.equal(attended(**harmless, sliding_window=4, deterministic=True), attended())


def test_a_model_with_keys_that_an_indexer_chose_is_refused() -> None:
    _, ours, inputs = both("deepseek_v32")
    with torch.no_grad(), pytest.raises(ValueError, match="indices: got a Tensor; accepted: None"):
        ours(**inputs)
