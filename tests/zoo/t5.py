"""A T5 that writes down Python's documentation from a copy in which much is blotted out.

The positions of a T5 are relative, and only within the encoder and within the decoder. So the
decoder has to find by what it has written where in the copy it stands: a task for cross-attention.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from distr_compile.accuracy.batch import Batch
from tests.zoo import texts
from tests.zoo.recipe import Recipe, batched

LENGTH = 256  # bytes of a text
BLOTS, BLOT = 16, 3  # in every sixteenth of a text so many bytes cannot be read
START, BLOTTED = 0, texts.VOCABULARY
EVALUATED = 64  # examples


def blotted(pieces: Tensor, generator: Generator) -> list[Batch]:
    """Batches of texts ``(n, 256)`` and copies of them with blots."""
    parts = pieces.view(-1, BLOTS, LENGTH // BLOTS)
    width = parts.shape[-1]
    starts = torch.randint(width - BLOT + 1, (*parts.shape[:2], 1), generator=generator)
    places = torch.arange(width)
    under = (places >= starts) & (places < starts + BLOT)
    seen = parts.masked_fill(under, BLOTTED).flatten(1)
    said = torch.cat([torch.full_like(pieces[:, :1], START), pieces[:, :-1]], -1)
    return batched(8, {"input_ids": seen, "decoder_input_ids": said}, pieces)


def _sample(generator: Generator, progress: float) -> Batch:
    found: list[Tensor] = []
    while len(found) < 8:
        text = texts.documentation(texts.draw(generator, 1)[0])
        if len(text) >= LENGTH:
            start = int(torch.randint(len(text) - LENGTH + 1, (), generator=generator))
            found.append(texts.as_bytes(text[start : start + LENGTH]))
    return blotted(torch.stack(found), generator)[0]


def _evaluation() -> list[Batch]:
    text = "\n\n".join(map(texts.documentation, texts.modules(held_out=True)))
    pieces = texts.windows(texts.as_bytes(text), LENGTH, EVALUATED)
    return blotted(pieces, Generator().manual_seed(1))


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=texts.VOCABULARY + 8,
            d_model=128,
            d_kv=64,
            d_ff=256,
            num_layers=3,
            num_decoder_layers=2,
            num_heads=2,
            relative_attention_num_buckets=32,
            relative_attention_max_distance=128,
            dropout_rate=0.0,
            feed_forward_proj="relu",
            decoder_start_token_id=START,
            pad_token_id=0,
            eos_token_id=None,
        )
    )
    slopes = torch.tensor([1.0, 0.3])  # heads that look near begin to learn at once
    with torch.no_grad():
        for stack, per_side in ((model.encoder, 16), (model.decoder, 32)):
            bias = stack.block[0].layer[0].SelfAttention.relative_attention_bias
            distance = torch.arange(per_side).repeat(32 // per_side)
            bias.weight.copy_(-distance[:, None] * slopes)
    return model


RECIPES = (
    Recipe(
        "t5",
        "transformers T5, writes 256 bytes of documentation from a copy with 16 blots",
        ("perplexity", "kl"),
        head_dim=64,
        num_layers=5,
        floor=5.6,
        build=_t5,
        sample=_sample,
        evaluation=_evaluation,
        steps=1000,
        rate=3e-3,
    ),
)
