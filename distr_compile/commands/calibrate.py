"""``distr calibrate``: run a model over data and write the bases of estimator "calibrated"."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from distr_compile.commands import data
from distr_compile.commands.common import OK, USAGE, CommandError, add_parser, check_files
from distr_compile.policy import Policy


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the subcommand."""
    parser = add_parser(
        commands,
        common,
        "calibrate",
        help='run a model over data and write the bases for estimator = "calibrated"',
        more="The model runs exactly, once; the lines that a policy needs are printed.",
        example="distr calibrate mine:model --data mine:data --out bases.safetensors",
    )
    parser.set_defaults(run=run)
    data.add_arguments(parser, metric=False)
    parser.add_argument("--out", metavar="FILE", required=True, help="bases.safetensors")
    parser.add_argument("--policy", metavar="FILE", help="layers to calibrate (default: all)")
    parser.add_argument(
        "--write", action="store_true", help="also write the table [bases] into that policy"
    )


def _calibrates(policy: Policy) -> bool:
    estimators = [policy.default.estimator]
    estimators += [str(dict(rule.fields).get("estimator")) for rule in policy.rule]
    return "calibrated" in estimators


def run(options: argparse.Namespace) -> int:
    """Write the bases and print what a policy needs to name them."""
    if options.write and not options.policy:
        raise CommandError("--write: got no --policy to write into; add --policy FILE", USAGE)
    # A wrong policy is told at once, before a model is built.
    policy = Policy.load(options.policy) if options.policy else None
    if policy is not None and not _calibrates(policy):
        raise CommandError(
            f'--policy: got {options.policy}, which gives no layer estimator = "calibrated"; '
            "accepted: a policy that does in [default] or a rule; write it there, or leave "
            "--policy out for bases of all layers"
        )
    check_files(out=options.out)
    subject = data.load(options)

    from distr_compile.tuning.calibrate import calibrate

    with data.in_its_own_words(subject, options):
        result = calibrate(
            subject.model, subject.batches, policy, path=options.out, limit=options.limit
        )
    for name, layer in result.bases.layers.items():
        heads, width = layer.singular_values.shape
        print(f"{name or '(root)'}: {layer.rows} rows, {heads} key heads of width {width}")
    for name, reason in result.refused.items():
        print(f"{name or '(root)'}: no bases: {reason}")
    folder = Path(options.policy).parent if options.policy else Path()
    print(f"\n{result.policy_lines(folder)}", end="")
    if policy is not None and options.write:
        policy.with_bases(result.path, result.sha256).save(options.policy)
    return OK
