"""``distr policy``: whether a policy file is right, and the schema of such files."""

from __future__ import annotations

import argparse
import json
from typing import Any

from distr_compile.commands.common import OK, TARGET_HELP, add_parser, build
from distr_compile.naming import canonical
from distr_compile.policy import Policy


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the subcommand and its two actions."""
    parser = add_parser(
        commands,
        argparse.ArgumentParser(add_help=False),
        "policy",
        help="check a policy file, print its JSON schema",
        more="Neither loads torch, unless --model asks for a model.",
        example="distr policy check distr.toml --model timm:vit_base_patch16_224",
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    check = add_parser(
        actions,
        common,
        "check",
        help="check a policy file",
        more="It prints what each rule sets. A wrong file is told with its lines, all errors at "
        "once; with --model, so are rules that name no module of that model.",
        example="distr policy check distr.toml --model timm:vit_base_patch16_224",
    )
    check.set_defaults(run=run_check)
    check.add_argument("policy", metavar="FILE", help="in TOML")
    check.add_argument(
        "--model", metavar="TARGET", help="its rules must name modules of " + TARGET_HELP
    )
    schema = add_parser(
        actions,
        common,
        "schema",
        help="print the JSON schema",
        more="Editors that know schemas of TOML complete and check policy files by it.",
        example="distr policy schema > distr.schema.json",
    )
    schema.set_defaults(run=run_schema)


def run_check(options: argparse.Namespace) -> int:
    """Print what the policy says, if it is right."""
    policy = Policy.load(options.policy)
    if policy.bases is not None:
        policy.read_bases()
    model = build(options.model).model if options.model else None
    shown = canonical(model) if model is not None else {}
    names = sorted({*shown, *shown.values()})
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


def run_schema(options: argparse.Namespace) -> int:
    """Print the JSON schema."""
    print(json.dumps(Policy.json_schema(), indent=2))
    return OK
