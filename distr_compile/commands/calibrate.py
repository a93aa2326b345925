"""``distr calibrate``: run a model over data and write the bases of estimator "calibrated"."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from distr_compile.commands.common import (
    DTYPES,
    OK,
    TARGET_HELP,
    USAGE,
    CommandError,
    build,
    check_inputs,
    count,
    shape,
)
from distr_compile.policy import Policy


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "calibrate",
        parents=[common],
        help='run a model over data and write the bases for estimator = "calibrated"',
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "target",
        metavar="TARGET",
        help=TARGET_HELP + "; only of a factory are the weights those of the model that you use",
    )
    parser.add_argument("--out", metavar="FILE", required=True, help="bases.safetensors")
    parser.add_argument("--policy", metavar="FILE", help="layers to calibrate (default: all)")
    parser.add_argument(
        "--write", action="store_true", help="also write the table [bases] into that policy"
    )
    parser.add_argument("--shape", type=shape, help="main input, batch first: 8,256")
    parser.add_argument("--dtype", choices=DTYPES, help="of the model")
    parser.add_argument("--batches", type=count, default=8, metavar="N", help="default: 8")
    parser.add_argument("--text", metavar="FILE", help="text to feed, of hf: targets that read")


def run(options: argparse.Namespace) -> int:
    """Write the bases and print what a policy needs to name them."""
    if options.write and not options.policy:
        raise CommandError("--write: got no --policy to write into; add --policy FILE", USAGE)
    policy = Policy.load(options.policy) if options.policy else None
    target = build(options.target, options.shape, options.dtype)
    check_inputs(target)

    from distr_compile.targets import TargetError
    from distr_compile.tuning import inputs
    from distr_compile.tuning.calibrate import calibrate

    batches: list[Any]
    try:
        if options.text:
            batches = inputs.text_batches(target, Path(options.text), options.batches)
        else:
            batches = inputs.shuffled_batches(target, options.batches)
    except TargetError as error:
        raise CommandError(str(error)) from error
    result = calibrate(target.model, batches, policy, path=options.out)
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
