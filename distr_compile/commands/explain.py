"""``distr explain``: every attention of a model, and what becomes of it."""

from __future__ import annotations

import argparse
from typing import Any

from distr_compile.commands.common import (
    OK,
    TARGET_HELP,
    CommandError,
    add_model_arguments,
    build_model,
    symbolic_sizes,
)
from distr_compile.policy import Policy


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "explain",
        parents=[common],
        help="list every attention of a model and what becomes of it; compiles nothing",
    )
    parser.set_defaults(run=run)
    parser.add_argument("target", metavar="TARGET", help=TARGET_HELP)
    add_model_arguments(parser)
    parser.add_argument("--json", metavar="FILE", help="also write the report as JSON")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="also run the model in eager and rewritten and compare; exit code 1 if they differ",
    )
    parser.add_argument("--no-fold", action="store_true", help="one line per attention")


def run(options: argparse.Namespace) -> int:
    """Print the report."""
    # A wrong policy is told at once, before a model is built.
    policy = Policy.from_any(options.policy)
    target = build_model(options)

    import torch

    from distr_compile.explaining import explain

    verification = None
    with torch.no_grad(), symbolic_sizes(options):
        report = explain(target.model, *target.args, policy=policy, **target.kwargs)
        print(report.table(fold=not options.no_fold))
        if options.verify:
            from distr_compile.verifying import verify

            verification = verify(target.model, *target.args, policy=policy, **target.kwargs)
            print(f"\nverification: {verification}")
    if options.json:
        report.to_json(options.json)
    if report.unmatched:
        raise CommandError(
            "no attention is named by " + ", ".join(map(repr, report.unmatched)) + "; see the "
            "layers in the table above"
        )
    if verification is not None and not verification.ok:
        raise CommandError(verification.summary())
    return OK
