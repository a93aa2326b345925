"""Accuracy of every estimator beside the best that any factors of the same rank could do.

    python -m benchmarks.estimator_error                 # measure, print, write the results
    python -m benchmarks.estimator_error --show          # print the tables of the results
    python -m benchmarks.estimator_error --plot [DIR]    # draw the results, and heat maps of S

Everything is computed by the definition, ``kernels/attention/reference.py``. Ranks from 8 on are
measured; a policy may only ask for 16 and more.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, replace
from functools import partial
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from tabulate import tabulate
from torch import Tensor

from benchmarks import error_models
from benchmarks.error_inputs import DRAWS, Inputs, draw
from benchmarks.error_metrics import (
    Errors,
    Method,
    attention,
    element_wise,
    errors,
    mean,
    methods,
    of_the_sum,
    scores,
)
from benchmarks.error_models import Subject, exact_attention
from benchmarks.store import describe
from distr_compile.estimators import ESTIMATORS, auto_grouping_block
from distr_compile.kernels.attention import reference

RESULTS = Path(__file__).with_name("results") / "estimator_error.json"
PLOTS = Path(__file__).parents[1] / "build" / "estimator_error"
COMMAND = "python -m benchmarks.estimator_error"
SOURCES = (
    "distr_compile/estimators.py",
    "distr_compile/kernels/attention/reference.py",
    "distr_compile/kernels/lsh/reference.py",
    "distr_compile/kernels/projection/reference.py",
    "distr_compile/kernels/random.py",
    "distr_compile/kernels/rows.py",
)

GROUP_SIZES, MIN_RANK = (2, 4, 8), 8
BLOCKS = (16, 64, 256)  # query rows; and all of them

PUBLISHED = {
    (2, 1): (4e-4, 3.45, 0.9),
    (2, 2): (2e-3, 3.4, 0.87),
    (2, 4): (2e-3, 3.4, 0.87),
    (2, 8): (1e-3, 3.4, 0.87),
    (4, 2): (4e-2, 5.4, 1.73),
    (8, 2): (7e-2, 9.25, 2.48),
    (16, 2): (6e-3, 16.5, 4.96),
}
"""Tables 3 and 4 of the paper: (G, l) -> least, greatest and mean error in percent."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        paper_trials: for the paper's tables.
        trials: batch elements of every drawn set.
        tokens: of every drawn set.
        layer_texts: inputs whose Q and K, in every layer, are compared.
        texts: of MiniLM.
        images: of the vision transformer.
        pieces: of each language model's text.
    """

    paper_trials: int = 100
    trials: int = 4
    tokens: int = 512
    layer_texts: int = 4
    texts: int = 64
    images: int = 256
    pieces: int = 16


# --- measuring ---------------------------------------------------------------------------------


def measure_paper(sizes: Sizes) -> Iterator[Row]:
    """The errors of Tables 3 and 4, N = d = 64, by both of the metrics that could be meant."""
    i = draw("uniform(0, 1)", trials=sizes.paper_trials, tokens=64, head_dim=64)
    S = i.Q @ i.K.mT
    for group_size, block in PUBLISHED:
        for name, method in methods().items():
            Shat = scores(i, method(i.Q, i.K, rank=64 // group_size, grouping_block=block))
            yield {
                "G": group_size,
                "block": block,
                "method": name,
                "element-wise": astuple(element_wise(S, Shat)),
                "sum": astuple(of_the_sum(S, Shat)),
            }


def measure_sets(names: Iterable[str], sizes: Sizes) -> Iterator[Row]:
    """The errors on drawn inputs of head width 64."""
    for name in names:
        inputs = draw(name, trials=sizes.trials, tokens=sizes.tokens, head_dim=64)
        yield from _errors(name, [inputs], 64)


def measure_layers(subject: Subject, sizes: Sizes) -> Iterator[Row]:
    """The mean errors over the layers of a model, each given what the exact model gives it."""
    yield from _errors(subject.name, subject.layers(sizes.layer_texts), subject.head_dim)


def _errors(name: str, calls: list[Inputs], head_dim: int) -> Iterator[Row]:
    tokens = calls[0].Q.shape[2]
    for group_size, block in combinations(head_dim, tokens, BLOCKS):
        each: dict[str, list[Errors]] = {}
        for title, method in methods().items():
            options = {"rank": head_dim // group_size, "grouping_block": block}
            each[title] = [
                errors(i, method(i.Q, i.K, is_causal=i.is_causal, **options)) for i in calls
            ]
        row = {"set": name, "G": group_size, "block": block if block < tokens else "all"}
        row["errors"] = {title: astuple(mean(found)) for title, found in each.items()}
        if len(calls) > 1:
            outputs = {title: [e.output for e in found] for title, found in each.items()}
            row["output error of each layer"] = outputs
        yield row


def measure_model(subject: Subject, blocks: Iterable[int]) -> Iterator[Row]:
    """What becomes of a model's results when all of its layers are approximated.

    ``uniform`` is what it makes of scores that are all 0: how much it needs them.
    """
    exact = subject.results(exact_attention)
    unchanged = subject.compare(exact, exact)
    uniform = subject.results(lambda i: exact_attention(replace(i, Q=torch.zeros_like(i.Q))))
    ends = {
        "exact": list(unchanged.values()),
        "uniform": list(subject.compare(exact, uniform).values()),
    }
    tokens = subject.layers(1)[0].Q.shape[2]
    auto = {name: auto_grouping_block(tokens, name) for name in ESTIMATORS}
    for group_size, block in combinations(subject.head_dim, tokens, blocks):
        rank = subject.head_dim // group_size
        found = dict(ends)
        for title, method in methods().items():
            attend = partial(approximate, method, rank, block)
            found[title] = list(subject.compare(exact, subject.results(attend)).values())
        yield {
            "model": subject.name,
            "figures": list(unchanged),
            "G": group_size,
            "block": block if block < tokens else "all",
            "auto for": [name for name in auto if auto[name] == block],
            "results": found,
        }


STRICT = tuple(product((2, 4), (64, 128), (1, 2)))
"""Group size, grouping block and rounds of the strict form's table."""


def measure_strict(subject: Subject, sizes: Sizes) -> Iterator[Row]:
    """``projection`` of a causal model, in the form that sees no later rows and in the other."""
    calls, exact = subject.layers(sizes.layer_texts), subject.results(exact_attention)
    for group_size, block, rounds in STRICT:
        rank = subject.head_dim // group_size
        row: Row = {"model": subject.name, "G": group_size, "block": block, "rounds": rounds}
        for title, is_strict in (("not strict", False), ("strict", True)):
            method = partial(
                reference.estimate, estimator="projection", rounds=rounds, strict=is_strict
            )
            options = {"rank": rank, "grouping_block": block, "is_causal": True}
            found = mean([errors(i, method(i.Q, i.K, **options)) for i in calls])
            ours = subject.results(partial(approximate, method, rank, block))
            row[title] = [*astuple(found), *subject.compare(exact, ours).values()]
        yield row


def approximate(method: Method, rank: int, block: int, i: Inputs) -> Tensor:
    """softmax(Shat / sqrt(d)) V of one call."""
    return attention(i, method(i.Q, i.K, rank=rank, grouping_block=block, is_causal=i.is_causal))


def combinations(head_dim: int, tokens: int, blocks: Iterable[int]) -> Iterator[tuple[int, int]]:
    """(G, grouping block) of the tables, in the end all rows in one block."""
    for group_size in GROUP_SIZES:
        if head_dim // group_size >= MIN_RANK:
            for block in blocks:
                if block < tokens:
                    yield group_size, block
            yield group_size, tokens


def measure(sizes: Sizes) -> dict[str, Any]:
    """All results; says on stderr how far it is."""
    begin = time.perf_counter()

    def told(what: str, rows: Iterable[Row]) -> list[Row]:
        rows = list(rows)
        print(f"{time.perf_counter() - begin:6.0f} s  {what}", file=sys.stderr, flush=True)
        return rows

    paper = told("paper's tables", measure_paper(sizes))
    found = told("drawn inputs", measure_sets(DRAWS, sizes))
    models, strict = [], []
    for make in (
        lambda: error_models.from_zoo("digits-vit", sizes.images),
        lambda: error_models.from_zoo("gpt2", sizes.pieces),
        lambda: error_models.from_zoo("llama", sizes.pieces),
        lambda: error_models.minilm(sizes.texts),
    ):
        subject = make()
        found += told(f"{subject.name}, layers", measure_layers(subject, sizes))
        models += told(f"{subject.name}, results", measure_model(subject, (64, 128)))
        if subject.layers(1)[0].is_causal:
            strict += told(f"{subject.name}, strict", measure_strict(subject, sizes))
    for name in ("digits-deit", "digits-swin", "tagger", "t5"):
        head_dim, calls = error_models.layers_of_zoo(name, sizes.layer_texts)
        found += told(f"{name}, layers", _errors(name, calls, head_dim))
    environment = describe("cpu", SOURCES)
    told_of = ("device", "torch", "python", "sources", "commit")
    return {
        "command": COMMAND,
        "environment": {
            **{name: environment[name] for name in told_of},
            "transformers": metadata.version("transformers"),
            "timm": metadata.version("timm"),
            "scikit-learn": metadata.version("scikit-learn"),
            "threads": torch.get_num_threads(),
        },
        "sizes": vars(sizes),
        "errors are": ["scores", "output", "kl"],
        "paper": paper,
        "errors": found,
        "models": models,
        "strict": strict,
    }


# --- results on disk and on the screen ---------------------------------------------------------


def write(results: dict[str, Any], path: Path) -> None:
    """JSON, one line per row, four digits of every number."""
    parts = []
    for name, value in results.items():
        text = json.dumps(_short(value))
        if isinstance(value, list) and isinstance(value[0], dict):
            text = "[\n" + ",\n".join(f"  {json.dumps(_short(row))}" for row in value) + "\n ]"
        parts.append(f" {json.dumps(name)}: {text}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _short(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_short(inner) for inner in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def tables(results: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(what it is, the table in Markdown)"""
    yield "Tables 3 and 4 of the paper, in percent: min / max / mean", _paper_table(results)
    for which, metric in enumerate(results["errors are"]):
        rows = [
            [row["set"], row["G"], row["block"]]
            + [_number(found[which]) for found in row["errors"].values()]
            for row in results["errors"]
        ]
        names = list(results["errors"][0]["errors"])
        title = {"kl": "KL divergence of the attention rows, nats"}.get(
            metric, f"relative error of the {metric}"
        )
        yield title, _table(rows, ["inputs", "G", "l", *names])
    for model in dict.fromkeys(row["model"] for row in results["models"]):
        of_it = [row for row in results["models"] if row["model"] == model]
        rows = [
            [row["G"], row["block"]]
            + [_figures(title, found, row["auto for"]) for title, found in row["results"].items()]
            for row in of_it
        ]
        figures = " / ".join(of_it[0]["figures"])
        title = f"{model}, all layers approximated (bold: the block of `auto`): {figures}"
        yield title, _table(rows, ["G", "l", *of_it[0]["results"]])
    title = 'projection with causal = "block" / "strict"; in the end the task\'s metric'
    yield title, _strict_table(results)


def _strict_table(results: dict[str, Any]) -> str:
    rows = [
        [row["model"], row["G"], row["block"], row["rounds"]]
        + [
            f"{_number(a)} / {_number(b)}"
            for a, b in zip(row["not strict"], row["strict"], strict=True)
        ]
        for row in results["strict"]
    ]
    return _table(rows, ["model", "G", "l", "rounds", *results["errors are"], "cosine", "metric"])


def _paper_table(results: dict[str, Any]) -> str:
    def text(spread: Iterable[float]) -> str:
        return " / ".join(f"{x:.2g}" if x < 0.1 else f"{x:.2f}" for x in spread)

    shown = [row for row in results["paper"] if row["method"].startswith("lsh")]
    rows = []
    for (group_size, block), published in PUBLISHED.items():
        own = [row for row in shown if (row["G"], row["block"]) == (group_size, block)]
        spreads = [text(row[metric]) for metric in ("element-wise", "sum") for row in own]
        rows.append([group_size, block, text(published), *spreads])
    names = list(dict.fromkeys(row["method"] for row in shown))
    header = [f"{name}, {metric}" for metric in ("element-wise", "sum") for name in names]
    return _table(rows, ["G", "l", "published", *header])


def _figures(title: str, found: list[float], auto_for: list[str]) -> str:
    text = " / ".join(f"{x:.3f}" for x in found)
    return f"**{text}**" if title.partition(",")[0] in auto_for else text


def _number(x: float) -> str:
    return "0" if x < 1e-5 else f"{x:.3f}" if x >= 0.01 else f"{x:.2g}"


def _table(rows: list[list[Any]], header: list[str]) -> str:
    return str(tabulate(rows, header, tablefmt="pipe", disable_numparse=True))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="accuracy of the estimators")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"default: {RESULTS}")
    parser.add_argument("--show", action="store_true", help="print the results, measure nothing")
    parser.add_argument(
        "--plot", type=Path, nargs="?", const=PLOTS, help=f"draw the results into ({PLOTS})"
    )
    options = parser.parse_args(argv)
    if not options.show and options.plot is None:
        write(measure(Sizes()), options.results)
    results = json.loads(options.results.read_text(encoding="utf-8"))
    if options.plot is not None:
        from benchmarks.error_plots import plot

        for path in plot(results, options.plot):
            print(path)
        return
    for title, table in tables(results):
        print(f"\n{title}\n\n{table}")


if __name__ == "__main__":
    main()
