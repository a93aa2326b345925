"""``distr measure``: time every attention of a model, and keep or pin what is faster here."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from distr_compile.commands.common import (
    OK,
    TARGET_HELP,
    USAGE,
    CommandError,
    add_model_arguments,
    add_parser,
    build_model,
    check_files,
    symbolic_sizes,
)
from distr_compile.policy import Policy


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the subcommand."""
    parser = add_parser(
        commands,
        common,
        "measure",
        help='time every attention of a model here, for "auto" in policies; keep the answers',
        more="A compile asks the same, within a time limit; here there is none.",
        example="distr measure timm:vit_base_patch16_224 --pin distr.toml",
    )
    parser.set_defaults(run=run)
    what = parser.add_argument_group("what is timed")
    what.add_argument("target", nargs="?", metavar="TARGET", help=TARGET_HELP)
    what.add_argument(
        "--call",
        action="append",
        default=[],
        metavar="TEXT",
        help="a call as a report's not-measured reason spells it; may be repeated, needs no TARGET",
    )
    model = parser.add_argument_group("model and inputs")
    add_model_arguments(model)
    model.add_argument("--device", default="cpu", help="default: cpu")
    written = parser.add_argument_group("what is written")
    written.add_argument(
        "--pin",
        metavar="POLICY",
        help="write the answers into this policy file as min_seq_len; without --policy it is the "
        "policy too",
    )
    written.add_argument("--json", metavar="FILE", help="also write the times as JSON")


def run(options: argparse.Namespace) -> int:
    """Print the table."""
    if bool(options.target) == bool(options.call):
        got = "both" if options.call else "neither"
        raise CommandError(f"TARGET, --call: got {got}; accepted: one of the two", USAGE)
    if options.pin and not options.target:
        raise CommandError("--pin: got no TARGET; accepted: with one, whose layers it names", USAGE)
    # A wrong policy is told at once, before a model is built.
    is_new = options.pin and not Path(options.pin).exists()
    policy = Policy.from_any(options.policy or (None if is_new else options.pin))

    import torch

    from distr_compile.kernels.attention.cpu import unavailable_reason
    from distr_compile.lowering.spelling import SpellingError, read_call
    from distr_compile.measuring import measure_calls, measure_model, pinned

    check_files(json=options.json)
    if why := unavailable_reason():
        print(f"the fused CPU kernel is not available: {why}\n")
    if options.call:
        try:
            calls = [read_call(text) for text in options.call]
        except SpellingError as error:
            raise CommandError(str(error), USAGE) from None
        found = measure_calls(calls)
    else:
        target = build_model(options)
        model = target.model.to(options.device)
        args, kwargs = torch.utils._pytree.tree_map_only(
            torch.Tensor, lambda t: t.to(options.device), (target.args, target.kwargs)
        )
        with symbolic_sizes(options):
            found = measure_model(model, *args, policy=policy, **kwargs)
    print(found if found.calls else "no attention leaves anything to what is faster here")
    if options.json:
        Path(options.json).write_text(json.dumps(found.to_dict(), indent=1) + "\n", "utf-8")
    if options.pin and found.report is not None:
        pinned(policy, found.report).save(options.pin)
        print(f"\nwritten: {options.pin}")
    return OK
