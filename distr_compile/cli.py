"""The command ``distr``: what the backend would do with a model, and whether a policy is right."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .policy import Policy, PolicyError

if TYPE_CHECKING:
    from .targets import Target

# Exit codes: fine; an error was found; the command was written wrongly.
OK, FOUND_ERROR, USAGE = 0, 1, 2

TARGET_HELP = "timm:NAME, hf:NAME (model type, config.json or hub name) or pkg.module:factory"


class _CommandError(Exception):
    """A message for the user and the exit code that goes with it."""

    def __init__(self, message: str, code: int = FOUND_ERROR) -> None:
        super().__init__(message)
        self.code = code


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``distr`` with ``argv`` (``sys.argv[1:]`` if None) and return the exit code.

    0 is fine, 1 means that an error was found (invalid policy, unmatched rule, model that cannot be
    built or run), 2 that the command was written wrongly. An error is one message on stderr.
    """
    try:
        options = _parser().parse_args(argv)
    except SystemExit as end:  # argparse has already printed its message, or the help
        return int(end.code or OK)
    try:
        return int(options.run(options))
    except Exception as error:
        if options.debug:
            raise
        print(f"distr: {_message(error)}", file=sys.stderr)
        return error.code if isinstance(error, _CommandError) else FOUND_ERROR


def _message(error: Exception) -> str:
    # Dynamo wraps what a backend raises; the user is to see the error itself.
    cause = getattr(error, "inner_exception", None) or error
    if isinstance(cause, (_CommandError, PolicyError, OSError)):
        return str(cause)
    return f"{type(cause).__name__}: {cause}\n(--debug shows where)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="distr", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")

    explain = commands.add_parser(
        "explain",
        parents=[common],
        help="list every attention of a model and what becomes of it; compiles nothing",
    )
    explain.set_defaults(run=_explain)
    explain.add_argument("target", metavar="TARGET", help=TARGET_HELP)
    explain.add_argument("--shape", type=_shape, help="main input, batch first: 2,3,224,224")
    explain.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="of the model")
    explain.add_argument("--attn", choices=("eager", "sdpa"), help="how the model spells attention")
    explain.add_argument("--policy", metavar="FILE", help="policy file (default: $DISTR_POLICY)")
    explain.add_argument("--json", metavar="FILE", help="also write the report as JSON")
    explain.add_argument("--dynamic", action="store_true", help="symbolic sizes")
    explain.add_argument("--no-fold", action="store_true", help="one line per attention")

    calibrate = commands.add_parser(
        "calibrate",
        parents=[common],
        help='run a model over data and write the bases for estimator = "calibrated"',
    )
    calibrate.set_defaults(run=_calibrate)
    calibrate.add_argument(
        "target",
        metavar="TARGET",
        help=TARGET_HELP + "; only of a factory are the weights those of the model that you use",
    )
    calibrate.add_argument("--out", metavar="FILE", required=True, help="bases.safetensors")
    calibrate.add_argument("--policy", metavar="FILE", help="layers to calibrate (default: all)")
    calibrate.add_argument(
        "--write", action="store_true", help="also write the table [bases] into that policy"
    )
    calibrate.add_argument("--shape", type=_shape, help="main input, batch first: 8,256")
    calibrate.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="of the model"
    )
    calibrate.add_argument("--batches", type=_count, default=8, metavar="N", help="default: 8")
    calibrate.add_argument("--text", metavar="FILE", help="text to feed, of hf: targets that read")

    policy = commands.add_parser("policy", help="check a policy file, print its JSON schema")
    actions = policy.add_subparsers(required=True, metavar="ACTION")
    check = actions.add_parser("check", parents=[common], help="check a policy file")
    check.set_defaults(run=_policy_check)
    check.add_argument("policy", metavar="FILE")
    check.add_argument(
        "--model", metavar="TARGET", help="its rules must name modules of " + TARGET_HELP
    )
    schema = actions.add_parser("schema", parents=[common], help="print the JSON schema")
    schema.set_defaults(run=_policy_schema)
    return parser


def _shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*([,x][1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted: positive sizes such as 2,128")
    return tuple(map(int, re.split("[,x]", text)))


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted: a number of batches >= 1")
    return int(text)


def _build(
    name: str,
    shape: tuple[int, ...] | None = None,
    dtype: str | None = None,
    attn: str | None = None,
) -> Target:
    from . import targets  # loads torch, which checking a policy does not need

    kind = targets.DTYPES[dtype] if dtype else None
    try:
        return targets.build(name, shape=shape, dtype=kind, attn=attn)
    except targets.TargetSyntaxError as error:
        raise _CommandError(str(error), USAGE) from error
    except targets.TargetError as error:
        raise _CommandError(str(error)) from error


def _explain(options: argparse.Namespace) -> int:
    # A wrong policy is told at once, before a model is built.
    policy = Policy.from_any(options.policy)
    target = _build(options.target, options.shape, options.dtype, options.attn)
    problem = target.input_problem()
    if problem:
        raise _CommandError(problem)

    import torch
    import torch._dynamo.config as dynamo

    from .explaining import explain

    sizes = dynamo.patch(assume_static_by_default=False) if options.dynamic else None
    with torch.no_grad(), sizes or contextlib.nullcontext():
        report = explain(target.model, *target.args, policy=policy, **target.kwargs)
    print(report.table(fold=not options.no_fold))
    if options.json:
        report.to_json(options.json)
    if report.unmatched:
        raise _CommandError(
            "no attention is named by " + ", ".join(map(repr, report.unmatched)) + "; see the "
            "layers in the table above"
        )
    return OK


def _calibrate(options: argparse.Namespace) -> int:
    if options.write and not options.policy:
        raise _CommandError("--write: got no --policy to write into; add --policy FILE", USAGE)
    policy = Policy.load(options.policy) if options.policy else None
    target = _build(options.target, options.shape, options.dtype)
    problem = target.input_problem()
    if problem:
        raise _CommandError(problem)

    from .targets import TargetError
    from .tuning import inputs
    from .tuning.calibrate import calibrate

    batches: list[Any]
    try:
        if options.text:
            batches = inputs.text_batches(target, Path(options.text), options.batches)
        else:
            batches = inputs.shuffled_batches(target, options.batches)
    except TargetError as error:
        raise _CommandError(str(error)) from error
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


def _policy_check(options: argparse.Namespace) -> int:
    policy = Policy.load(options.policy)
    if policy.bases is not None:
        policy.read_bases()
    model = _build(options.model).model if options.model else None
    names = [name for name, _ in model.named_modules()] if model is not None else []
    if model is not None:
        policy.check_layers(names)
    fields = policy.to_dict()
    print(f"OK {options.policy}")
    print(f"  default: {_fields(fields['default'])}")
    for number, rule in enumerate(fields["rule"], 1):
        layers = rule.pop("layers")
        line = f"  rule {number}: {layers}: {_fields(rule)}"
        if model is not None:
            named = sum(number - 1 in policy.rules_matching(name) for name in names)
            line += f" ({named} module{'' if named == 1 else 's'})"
        print(line)
    return OK


def _fields(table: dict[str, object]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in table.items())


def _policy_schema(options: argparse.Namespace) -> int:
    print(json.dumps(Policy.json_schema(), indent=2))
    return OK


if __name__ == "__main__":
    sys.exit(main())
