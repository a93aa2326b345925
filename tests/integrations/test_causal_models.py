"""What transformers makes of a mask in a compile, and what the pass reads in it.

Models of two small layers with random weights; the masks are those of the installed transformers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import distr_compile

TOKENS = 48
EXACT = {"default": {"group_size": 1}}
SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 64}
CONFIGS: dict[str, dict[str, Any]] = {
    "Llama": {"num_key_value_heads": 1},
    "Mistral": {"num_key_value_heads": 1, "sliding_window": 16},
    "Bert": {},
}


def build(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    given = {**SMALL, "num_hidden_layers": 2, **CONFIGS[name], **options}
    config = getattr(transformers, f"{name}Config")(**given)
    return getattr(transformers, f"{name}Model")(config).eval()


def texts(batch: int = 2, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    """Tokens, and the mask of a tokenizer: the first text ends seven tokens before the others."""
    ids = torch.randint(64, (batch, tokens), generator=torch.Generator().manual_seed(tokens))
    mask = torch.ones_like(ids)
    mask[0, -7:] = 0
    return ids, mask


@pytest.mark.parametrize(
    ("name", "kind"), [("Llama", "causal+bool"), ("Mistral", "causal+bool"), ("Bert", "bool")]
)
def test_padding_is_beside_what_is_causal(name: str, kind: str) -> None:
    """Later calls have other sizes: automatic dynamic shapes."""
    torch._dynamo.reset()
    model = build(name)
    compiled = torch.compile(model, backend="distr", options={"policy": EXACT, "compiler": "eager"})
    for batch, tokens in ((2, TOKENS), (3, 70), (4, 70), (5, 81)):
        ids, mask = texts(batch, tokens)
        with torch.no_grad():
            got, wanted = (f(ids, attention_mask=mask)[0] for f in (compiled, model))
        assert (got - wanted)[mask.bool()].abs().max() < 1e-5
    assert {row.mask for row in distr_compile.report(compiled).rows} == {kind}


@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_the_rewrite_is_right_beside_padding(name: str) -> None:
    ids, mask = texts()
    forced = {"default": {"group_size": 2, "min_seq_len": 0}}
    with torch.no_grad():
        found = distr_compile.verify(build(name), ids, attention_mask=mask, policy=forced)
    assert found.ok, found


def test_a_long_mask_without_a_cache_is_known_to_be_causal() -> None:
    """transformers counts the texts of a row, if there is no cache: a mask of 4,500 x 4,500."""
    model = build("Llama", max_position_embeddings=4500)
    ids = texts(1, 4500)[0]
    with torch.no_grad():
        report = distr_compile.explain(model, ids, policy=EXACT, use_cache=False)
    assert [(row.mask, row.kernel) for row in report.rows] == [("causal", "sdpa")] * 2
