"""What a review of the paper asked for: controlled similarity, and patterns that are hard.

    python -m benchmarks.paper.hard_patterns

Of every query row the error of the attention's output, relative to the exact output's length, and
its distribution over rows, heads and five seeds: the worst row counts, not only the mean. The sets
are those of ``benchmarks/error_inputs.py``: uniform numbers as the paper has them; columns of Q in
clusters with a given correlation; one key for each query; a sliding window; two channels far larger
than the others; rank 1; heavy tails. N = 512, d = 64, fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Generator, Tensor

from benchmarks.error_inputs import DRAWS, Inputs
from benchmarks.error_metrics import attention
from benchmarks.estimator_error import SOURCES
from benchmarks.paper.rivals.hydra import hydra
from benchmarks.paper.rivals.hyper import hyper
from benchmarks.paper.script import NOT_MEASURED, Cells, Script, markdown
from benchmarks.store import Cell
from distr_compile.estimators import auto_grouping_block
from distr_compile.kernels.attention import reference

TOKENS, WIDTH, TRIALS, SEEDS = 512, 64, 4, 5
QUICK = {"tokens": 64, "trials": 1, "seeds": 2}
QUANTILES = (0.5, 0.95, 1.0)

Attend = Callable[[Inputs], Tensor]


def estimated(name: str, group_size: int) -> Attend:
    """Attention by an estimator, as ``kernels/attention/reference.py`` defines it."""

    def attend(i: Inputs) -> Tensor:
        block = auto_grouping_block(i.Q.shape[2], name)
        options = {"rank": WIDTH // group_size, "estimator": name, "grouping_block": block}
        return attention(i, reference.estimate(i.Q, i.K, **options))

    return attend


ARMS: dict[str, Attend] = {
    **{
        f"{name}, G={g}": estimated(name, g)
        for name in ("projection", "lsh-sample", "lsh-mean")
        for g in (2, 4)
    },
    "Hydra": lambda i: hydra(i.Q, i.K, i.V),
    "Hyper": lambda i: hyper(i.Q, i.K, i.V),
}


def cells(quick: bool) -> Cells:
    names = list(DRAWS)[: 2 if quick else None]
    return {name: partial(cell, name, **(QUICK if quick else {})) for name in names}


def cell(name: str, tokens: int = TOKENS, trials: int = TRIALS, seeds: int = SEEDS) -> Cell:
    found: dict[str, list[Tensor]] = {arm: [] for arm in ARMS}
    for seed in range(seeds):
        g = Generator().manual_seed(seed)
        Q, K = DRAWS[name](trials, tokens, WIDTH, g)
        V = torch.randn(trials, tokens, WIDTH, generator=g, dtype=torch.float64)
        inputs = Inputs(Q[:, None], K[:, None], V[:, None])
        exact = torch.softmax(inputs.Q @ inputs.K.mT * WIDTH**-0.5, -1) @ inputs.V
        for arm, attend in ARMS.items():
            found[arm].append(row_errors(attend(inputs), exact).flatten())
    return {
        "quantiles": list(QUANTILES),
        "relative error of a row": {arm: _described(parts) for arm, parts in found.items()},
    }


def row_errors(ours: Tensor, exact: Tensor) -> Tensor:
    """Length of the difference over that of the exact row, ``(B, H, N)``."""
    return (ours - exact).norm(dim=-1) / exact.norm(dim=-1)


def _described(parts: list[Tensor]) -> dict[str, object]:
    values = torch.cat(parts).sort().values
    medians = torch.stack([part.median() for part in parts])
    return {
        "at quantiles": [values[round(q * (len(values) - 1))].item() for q in QUANTILES],
        "seeds' deviation": medians.std().item(),
    }


def table(found: dict[str, Cell]) -> str:
    rows = []
    for name in DRAWS:
        row: list[object] = [name]
        for arm in ARMS:
            c = found.get(name)
            row.append(_text(c["relative error of a row"][arm]) if c else NOT_MEASURED)
        rows.append(row)
    return markdown(rows, ["inputs", *ARMS])


def _text(of: dict[str, list[float]]) -> str:
    return " / ".join(f"{x:.1g}" if x < 0.01 else f"{x:.2f}" for x in of["at quantiles"])


SCRIPT = Script(
    "hard_patterns",
    "Controlled similarity and hard patterns: relative error of a row, median / 95 % / worst",
    cells,
    table,
    (*SOURCES, "benchmarks/error_inputs.py", "benchmarks/paper/rivals"),
)

if __name__ == "__main__":
    SCRIPT.main()
