"""``distr tune``: find the cheapest policy whose loss is within a budget, and write it."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import math
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from distr_compile.commands import data
from distr_compile.commands.common import (
    OK,
    USAGE,
    CommandError,
    add_idle_argument,
    add_parser,
    check_files,
    idle,
)
from distr_compile.policy import Policy


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the subcommand."""
    parser = add_parser(
        commands,
        common,
        "tune",
        help="find the cheapest policy whose loss on data is within a budget, and write it",
        more="Half of the data chooses, the other half has a veto.",
        example="distr tune mine:model --data mine:data --metric cosine --budget 0.01 "
        "--out distr.toml",
    )
    parser.set_defaults(run=run)
    data.add_arguments(parser)
    parser.add_argument(
        "--budget",
        type=budget,
        required=True,
        metavar="LOSS",
        help="largest loss: 1%% or 0.01 of the exact value of top1, top5, perplexity, f1 or your "
        "own metric; an amount of the others, which compare with the exact model",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        required=True,
        help="policy file to write; FILE.state.json beside it makes it resumable",
    )
    parser.add_argument("--policy", metavar="FILE", help="what is settled: rules that stay, bases")
    parser.add_argument(
        "--time",
        choices=("measure", "model", "products"),
        default="measure",
        help="costs: timed on the device, operations counted, or those of the two products alone "
        "(default: measure)",
    )
    parser.add_argument("--held-out", type=float, default=0.5, metavar="SHARE", help="default: 0.5")
    parser.add_argument(
        "--confidence", type=float, default=0.95, metavar="SHARE", help="default: 0.95"
    )
    parser.add_argument("--plot", metavar="FILE", help="also draw the frontier: .png, .svg, .pdf")
    parser.add_argument("--json", metavar="FILE", help="also write all numbers")
    add_idle_argument(parser)
    data.add_run_arguments(parser)


def budget(text: str) -> float:
    """A loss, written 0.01 or 1%."""
    if not re.fullmatch(r"[\d.]+(e-?\d+)?%?", text):
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted: a loss such as 0.01 or 1%")
    try:
        number = float(text.removesuffix("%"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted: 0.01 or 1%") from error
    return number / 100 if text.endswith("%") else number


def run(options: argparse.Namespace) -> int:
    """Write the policy and print the frontier."""
    # What is wrong with the policy is told at once, before a model is built.
    policy = Policy.load(options.policy) if options.policy else None
    if options.metric and len(options.metric) > 1:
        raise CommandError("--metric: got several; accepted: one, which the budget is of", USAGE)

    from distr_compile.accuracy.batch import walk
    from distr_compile.tuning.tune import tune

    check_files(out=options.out, plot=options.plot, json=options.json)
    if options.plot:
        _check_plot(options.plot)
    subject = data.load(options)

    with data.in_its_own_words(subject, options):
        result = tune(
            subject.model,
            functools.partial(walk, subject.batches, options.limit),
            options.budget,
            metric=subject.metrics[0] if subject.metrics else "kl",
            path=options.out,
            policy=policy,
            time=options.time,
            held_out=options.held_out,
            confidence=options.confidence,
            compiler=options.compiler,
            command=_command(),
            resume=not options.no_resume,
        )
    print(result)
    print(f"\nwritten: {options.out}")
    if options.plot:
        result.plot(options.plot)
    if options.json:
        text = json.dumps(_finite(result.to_dict()), indent=1) + "\n"
        Path(options.json).write_text(text, "utf-8")
    asks = [each for each in (policy, result.policy) if each is not None]
    in_vain = result.held_out is None and any(each.forces_approximation for each in asks)
    return idle([options.policy or options.out]) if in_vain and not options.allow_exact else OK


def _check_plot(path: str) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise CommandError(
            "--plot: got no matplotlib; install it: pip install 'distr-compile[plots]'", USAGE
        )
    from matplotlib.backend_bases import FigureCanvasBase

    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if Path(path).suffix[1:].lower() not in known:
        accepted = ", ".join(f".{suffix}" for suffix in known)
        raise CommandError(
            f"--plot: got {path!r}; accepted: a file whose name ends with {accepted}; name it so",
            USAGE,
        )


def _command() -> str:
    """The command line, where this is a program of its own."""
    program = Path(sys.argv[0])
    if program.stem in {"distr", "cli"}:
        return shlex.join(["distr", *sys.argv[1:]])
    if (program.parent.name, program.stem) != ("distr_compile", "__main__"):
        return ""
    from distr_compile.accuracy.ranks import world

    start = f"torchrun --nproc-per-node {world()}" if world() > 1 else "python"
    return f"{start} -m distr_compile {shlex.join(sys.argv[1:])}"


def _finite(value: Any) -> Any:
    """JSON knows no infinities."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
