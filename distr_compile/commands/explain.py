"""``distr explain``: every attention of a model, and what becomes of it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from distr_compile.commands import data
from distr_compile.commands.common import (
    OK,
    TARGET_HELP,
    USAGE,
    CommandError,
    add_model_arguments,
    add_parser,
    build_model,
    check_files,
    check_inputs,
    in_its_own_words,
    symbolic_sizes,
)
from distr_compile.policy import Policy

if TYPE_CHECKING:
    from distr_compile.targets import Target


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the subcommand."""
    parser = add_parser(
        commands,
        common,
        "explain",
        help="list every attention of a model and what becomes of it; compiles nothing",
        more="Inputs are guessed for timm: and hf: targets; a factory returns (module, args), or a "
        "module alone beside --data, whose first batch is taken.",
        example="distr explain mine:model --data mine:data --policy distr.toml",
    )
    parser.set_defaults(run=run, metric=None, device="cpu")
    parser.add_argument("target", metavar="TARGET", help=TARGET_HELP)
    add_model_arguments(parser)
    data.add_source(parser)
    parser.add_argument("--json", metavar="FILE", help="also write the report as JSON")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="also run the model in eager and rewritten and compare; exit code 1 if they differ",
    )
    parser.add_argument("--no-fold", action="store_true", help="one line per attention")


def _target(options: argparse.Namespace) -> Target:
    """The model and the arguments of one call, guessed, from its factory, or from the data."""
    if not (options.data or options.text):
        if options.pretrained:
            raise CommandError(
                "--pretrained: got no --data or --text; accepted: with one of them, as where "
                "attention is does not depend on weights; leave it out",
                USAGE,
            )
        if options.batch_size or options.tokens:
            raise CommandError(
                "--batch-size, --tokens: got one without --data or --text; accepted: with one of "
                "them; say sizes of inputs that are guessed by --shape",
                USAGE,
            )
        return build_model(options)
    if options.shape or options.attn:
        raise CommandError(
            "--shape, --attn: got one beside --data or --text; accepted: for inputs that are "
            "guessed; leave it out",
            USAGE,
        )
    subject = data.load(options)

    from distr_compile.accuracy.batch import walk
    from distr_compile.targets import Target

    for batch in walk(subject.batches, 1):
        target = Target(options.target, subject.model, batch.args, dict(batch.kwargs))
        check_inputs(target)
        return target
    raise CommandError("--data: got no batch; accepted: at least one; check the loader")


def run(options: argparse.Namespace) -> int:
    """Print the report."""
    # A wrong policy is told at once, before a model is built.
    policy = Policy.from_any(options.policy)
    check_files(json=options.json)
    target = _target(options)

    import torch

    from distr_compile.explaining import explain

    verification = None
    own_words = in_its_own_words(
        target.name,
        target.model,
        lambda: [("these inputs", target.args, target.kwargs)],
        "give other sizes (--shape), or another batch (--data)",
        debug=options.debug,
    )
    with own_words, torch.no_grad(), symbolic_sizes(options):
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
