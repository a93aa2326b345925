"""The perplexity of language models of the zoo, batch by batch.

    python -m tests.zoo.batches gpt2 llama

It shows why the gate, which measures the first batches, gives other values than the zoo's README.
"""

from __future__ import annotations

import argparse
import math

import torch
import torch.nn.functional as F
from tabulate import tabulate

from tests.zoo import load


def losses(name: str) -> list[tuple[float, int]]:
    """Of each batch of the evaluation data: the sum of the cross-entropies, and how many."""
    zoo, found = load(name), []
    with torch.no_grad():
        for batch in zoo.batches:
            logits, labels = zoo.model(**batch.kwargs).logits.float(), batch.labels
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
            found.append((loss.item(), labels.numel()))
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", choices=("gpt2", "llama"), metavar="NAME")
    for name in parser.parse_args().names:
        lines, loss, count = [], 0.0, 0
        for index, (batch_loss, batch_count) in enumerate(losses(name)):
            loss, count = loss + batch_loss, count + batch_count
            lines.append((index, math.exp(batch_loss / batch_count), math.exp(loss / count)))
        print(tabulate(lines, [name, "perplexity", "up to here"], floatfmt=".3f"))


if __name__ == "__main__":
    main()
