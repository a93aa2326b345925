"""Tables 3 and 4, Figure 7: how far Shat is from S, over the block l and the group size G.

    python -m benchmarks.paper.score_errors

N = d = 64, every number of Q and K uniform in (0, 1), 100 trials as in section 4.2, for each of
five seeds. "Relative to the true value" may mean every score, or the sum of all scores of a trial;
the paper's numbers fit the second. The whole distribution of both is kept.
"""

from __future__ import annotations

import statistics
from functools import partial

import torch
from torch import Generator, Tensor

from benchmarks.error_inputs import Inputs, uniform
from benchmarks.error_metrics import SVD_LIMIT, methods, scores
from benchmarks.estimator_error import PUBLISHED, SOURCES
from benchmarks.paper.script import NOT_MEASURED, Cells, Script, markdown
from benchmarks.store import Cell

TRIALS, SEEDS, SIZE = 100, 5, 64
QUICK_TRIALS, QUICK_SEEDS = 4, 2
QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
SHOWN = ("lsh-sample", "lsh-mean", "projection, rounds = 1", SVD_LIMIT)


def cells(quick: bool) -> Cells:
    settings = list(PUBLISHED)[: 2 if quick else None]
    trials, seeds = (QUICK_TRIALS, QUICK_SEEDS) if quick else (TRIALS, SEEDS)
    return {f"G={g}, l={block}": partial(cell, g, block, trials, seeds) for g, block in settings}


def cell(group_size: int, block: int, trials: int, seeds: int) -> Cell:
    options = {"rank": SIZE // group_size, "grouping_block": block}
    measured = {name: methods()[name] for name in SHOWN}
    found: dict[str, dict[str, list[Tensor]]] = {
        name: {"element-wise": [], "sum": []} for name in measured
    }
    for seed in range(seeds):
        Q, K = (t[:, None] for t in uniform(trials, SIZE, SIZE, Generator().manual_seed(seed)))
        S = Q @ K.mT
        for name, method in measured.items():
            Shat = scores(Inputs(Q, K, K), method(Q, K, **options))
            of_all, of_sums = (
                100 * relative(a, b) for a, b in ((S, Shat), (_sums(S), _sums(Shat)))
            )
            found[name]["element-wise"].append(of_all.flatten())
            found[name]["sum"].append(of_sums)
    return {
        "trials": trials,
        "seeds": seeds,
        "quantiles": list(QUANTILES),
        "percent": {
            name: {metric: _described(parts) for metric, parts in of.items()}
            for name, of in found.items()
        },
    }


def relative(S: Tensor, Shat: Tensor) -> Tensor:
    """|Shat - S| / |S|."""
    return (Shat - S).abs() / S.abs()


def _sums(t: Tensor) -> Tensor:
    return t.flatten(1).sum(1)


def _described(parts: list[Tensor]) -> dict[str, object]:
    means = [part.mean().item() for part in parts]
    values = torch.cat(parts).sort().values
    places = [round(q * (len(values) - 1)) for q in QUANTILES]
    return {
        "mean": statistics.mean(means),
        "seeds' deviation": statistics.stdev(means),
        "at quantiles": values[places].tolist(),
    }


def table(found: dict[str, Cell]) -> str:
    rows = []
    for (g, block), published in PUBLISHED.items():
        c = found.get(f"G={g}, l={block}")
        row: list[object] = [g, block, " / ".join(_number(x) for x in published)]
        for metric, name in ((m, n) for m in ("sum", "element-wise") for n in SHOWN):
            row.append(_cell(c["percent"][name][metric]) if c else NOT_MEASURED)
        rows.append(row)
    header = [f"{name.partition(',')[0]}, {m}" for m in ("sum", "element-wise") for name in SHOWN]
    return markdown(rows, ["G", "l", "paper", *header])


def distribution(found: dict[str, Cell]) -> str:
    """The quantiles of every setting and method."""
    rows = []
    for (g, block), (name, metric) in (
        (setting, which)
        for setting in PUBLISHED
        for which in [(n, m) for n in SHOWN[:3] for m in ("sum", "element-wise")]
    ):
        c = found.get(f"G={g}, l={block}")
        values = c["percent"][name][metric]["at quantiles"] if c else None
        shown = map(_number, values) if values else [NOT_MEASURED] * len(QUANTILES)
        rows.append([g, block, name.partition(",")[0], metric, *shown])
    return markdown(rows, ["G", "l", "estimator", "error", *(f"{q:.0%}" for q in QUANTILES)])


def _cell(of: dict[str, object]) -> str:
    values = of["at quantiles"]
    assert isinstance(values, list)
    mean, deviation = (_number(of[name]) for name in ("mean", "seeds' deviation"))  # type: ignore
    return f"{_number(values[0])} / {_number(values[-1])} / {mean} ± {deviation}"


def _number(x: float) -> str:
    return f"{x:.1g}" if abs(x) < 0.01 else f"{x:.2f}"


SCRIPT = Script(
    "score_errors",
    "Tables 3 and 4, in percent: min / max / mean (± the deviation of five seeds' means)",
    cells,
    lambda found: f"{table(found)}\n\n{distribution(found)}",
    SOURCES,
)

if __name__ == "__main__":
    SCRIPT.main()
