"""``distr regress``: what a policy costs a model on data, and whether that is as it was."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from distr_compile.commands import data
from distr_compile.commands.common import (
    FOUND_ERROR,
    OK,
    USAGE,
    CommandError,
    add_idle_argument,
    add_parser,
    amount,
    check_files,
    idle,
)
from distr_compile.policy import Policy


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the subcommand."""
    parser = add_parser(
        commands,
        common,
        "regress",
        help="measure what a policy costs a model on data, and compare with a baseline",
        more='"auto" in a policy counts as 0 here: a number does not hang on the machine.',
        example="distr regress mine:model --data mine:data --policy distr.toml "
        "--baseline baseline.json",
    )
    parser.set_defaults(run=run)
    data.add_arguments(parser)
    parser.add_argument(
        "--policy",
        metavar="FILE",
        action="append",
        help="policy file; may be repeated (default: $DISTR_POLICY)",
    )
    parser.add_argument("--baseline", metavar="FILE", help="JSON file to compare with")
    parser.add_argument(
        "--update-baseline", action="store_true", help="write that file instead of comparing"
    )
    parser.add_argument(
        "--tolerance",
        type=amount,
        metavar="SHARE",
        help="of the loss that may come or go where data and weights are the baseline's",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="also write the numbers; FILE.progress makes it resumable"
    )
    add_idle_argument(parser)
    data.add_run_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Print the table, and what is not as it was; the exit code says whether anything is not."""
    if options.update_baseline and not options.baseline:
        raise CommandError("--update-baseline: got no --baseline to write; add one", USAGE)
    paths = options.policy or [None]
    # A wrong policy is told at once, before a model is built.
    policies = {Path(path or "policy").stem: Policy.from_any(path) for path in paths}
    if len(policies) < len(paths):
        raise CommandError("--policy: got two files of one name; rename one", USAGE)
    if options.baseline and not options.update_baseline and not Path(options.baseline).is_file():
        raise CommandError(
            f"--baseline: got {options.baseline!r}, there is no file of that name; accepted: one "
            "that --update-baseline wrote; add that to write it"
        )
    check_files(json=options.json, baseline=options.baseline)
    subject = data.load(options)

    from dataclasses import replace

    from distr_compile.accuracy.baseline import SAME
    from distr_compile.accuracy.regress import regress

    same = SAME if options.tolerance is None else replace(SAME, relative=options.tolerance)
    with data.in_its_own_words(subject, options):
        result = regress(
            subject.model,
            subject.batches,
            policies,
            metrics=subject.metrics,
            name=subject.name,
            baseline=options.baseline,
            update_baseline=options.update_baseline,
            tolerance=same,
            compiler=options.compiler,
            limit=options.limit,
            out=options.json,
            resume=not options.no_resume,
        )
    print(result)
    if not result.passed:
        return FOUND_ERROR
    found = result.result.policies
    in_vain = [
        label
        for label, policy in policies.items()
        if policy.forces_approximation and not found[label].approximated
    ]
    return idle(in_vain) if in_vain and not options.allow_exact else OK
