"""How many directions the scores of each layer need: the effective rank of Q K^T.

    python -m tests.zoo.rank [NAME ...]

The effective rank of a head, for one example, is the least number of singular values of Q K^T that
hold 99 % of its squared Frobenius norm; 99.9 % is stated beside it. It is at most the head width.
Where a policy leaves so many columns the best approximation of the scores is all but exact, and a
test with such a model proves little. Padding is part of Q K^T here, and so is what causality hides.
"""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from tabulate import tabulate
from torch import Tensor, nn

from distr_compile.accuracy.batch import Batch
from distr_compile.accuracy.instrument import Call, Instrument
from tests.zoo import ZOO, load

SHARES = (0.99, 0.999)
EXAMPLES = 8  # of each batch that is looked at
BATCHES = 2


class Ranks(NamedTuple):
    """Of one layer, over all heads and examples."""

    mean: float
    largest: int
    mean_of_more: float  # at the greater share


def effective_ranks(q: Tensor, k: Tensor) -> Tensor:
    """``(shares, B, H)`` int64, for ``q`` and ``k`` of shape ``(B, H, N, d)``."""
    # Q K^T = Qo Rq (Ko Rk)^T has the singular values of the small Rq Rk^T.
    Rq, Rk = (torch.linalg.qr(x.double(), mode="r").R for x in (q, k))
    power = torch.linalg.svdvals(Rq @ Rk.mT).square().cumsum(-1)
    return torch.stack([(power < share * power[..., -1:]).sum(-1) + 1 for share in SHARES])


def ranks(model: nn.Module, batches: Sequence[Batch]) -> dict[str, Ranks]:
    """The ranks of every attention of a model, by the name of its site."""
    found: defaultdict[str, list[Tensor]] = defaultdict(list)

    def look(call: Call) -> Tensor:
        q, k = call.q[:EXAMPLES], call.k[:EXAMPLES]
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        found[call.site.name].append(effective_ranks(q, k).flatten(1))
        return call.exact()

    step = max(1, len(batches) // BATCHES)
    with Instrument(look).on(model) as run:
        for batch in batches[::step][:BATCHES]:
            batch.call(run)
    joined = {name: torch.cat(parts, 1).double() for name, parts in found.items()}
    return {
        name: Ranks(some.mean().item(), int(some.max()), more.mean().item())
        for name, (some, more) in joined.items()
    }


def table(names: Iterable[str]) -> str:
    """Model by model and layer by layer."""
    rows = []
    for name in names:
        zoo = load(name)
        for site, found in ranks(zoo.model, zoo.batches).items():
            rows.append((name, zoo.head_dim, site, *found))
    headers = ("model", "head width", "layer", "99 %: mean", "largest", "99.9 %: mean")
    return tabulate(rows, headers, tablefmt="github", floatfmt=".1f")


def main() -> None:
    parser = argparse.ArgumentParser(description="the effective ranks of Q K^T in the zoo")
    parser.add_argument("names", nargs="*", help="of models; all by default")
    print(table(parser.parse_args().names or ZOO))


if __name__ == "__main__":
    main()
