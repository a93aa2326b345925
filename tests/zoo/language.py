"""Two causal language models of bytes: one continues Python's sources, one its documentation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor, nn

from distr_compile.accuracy.batch import Batch
from tests.zoo import texts
from tests.zoo.recipe import Recipe, batched

EVALUATED = 2**14  # tokens


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=texts.VOCABULARY,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=128,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=0.06,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=texts.VOCABULARY,
            n_positions=256,
            n_embd=128,
            n_layer=4,
            n_head=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            initializer_range=0.06,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def _recipe(name: str, read: Callable[[str], str], length: int, **options: Any) -> Recipe:
    def pieces(x: Tensor) -> list[Batch]:
        return batched(2048 // length, {"input_ids": x[:, :-1]}, x[:, 1:])

    def sample(generator: Generator, progress: float) -> Batch:
        found: list[Tensor] = []
        while len(found) < 2048 // length:
            text = read(texts.draw(generator, 1)[0])
            if len(text) > length:
                start = int(torch.randint(len(text) - length, (), generator=generator))
                found.append(texts.as_bytes(text[start : start + length + 1]))
        return pieces(torch.stack(found))[0]

    def evaluation() -> list[Batch]:
        text = "\n\n".join(read(name) for name in texts.modules(held_out=True))
        return pieces(texts.windows(texts.as_bytes(text), length + 1, EVALUATED // length))

    return Recipe(
        name, metrics=("perplexity", "kl"), sample=sample, evaluation=evaluation, **options
    )


RECIPES = (
    _recipe(
        "llama",
        texts.source,
        512,
        build=_llama,
        description="transformers Llama, 512 bytes of Python source, grouped heads, rotary",
        head_dim=128,
        num_layers=4,
        floor=5.0,
        steps=800,
        rate=3e-3,
    ),
    _recipe(
        "gpt2",
        texts.documentation,
        256,
        build=_gpt2,
        description="transformers GPT-2, 256 bytes of documentation, learned positions",
        head_dim=64,
        num_layers=4,
        floor=5.8,
        steps=1200,
        rate=3e-3,
    ),
)
