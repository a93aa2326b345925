"""The policy that ``tune`` found, as a file for people: rules with the evidence as comments."""

from __future__ import annotations

import importlib.metadata
import os
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import tomlkit
import torch

from distr_compile.policy import Policy
from distr_compile.policy.plan import OPTIONS

WIDTH = 110

AS_GIVEN = ("causal", "exact", "training")
"""Fields that only the given policy sets; its [default] and rules stay in the file."""

TUNED = tuple(name for name in OPTIONS if name not in AS_GIVEN)
"""What a rule that was tuned sets, the width by group_size or by rank."""


def versions() -> str:
    """The versions of this package and of torch."""
    own = importlib.metadata.version("distr-compile")
    return f"distr-compile {own}, torch {torch.__version__}"


def fields_of(policy: Policy, layer: str) -> dict[str, int | str]:
    """The fields of a layer's plan that a rule has to set."""
    plan = policy.resolve(layer)
    fields = {name: getattr(plan, name) for name in TUNED}
    return {name: value for name, value in fields.items() if value is not None}


def policy_text(
    base: Policy,
    chosen: Mapping[str, Mapping[str, int | str]],
    about: Sequence[str],
    evidence: Mapping[str, str],
    *,
    folder: str | os.PathLike[str] = os.curdir,
    keep_rules: bool = True,
) -> str:
    """The TOML text.

    Args:
        base: its rules stay in front of the new ones, its [default] but for the group size.
        chosen: layer -> fields; the layers that are not here are exact.
        about: paragraphs for the top of the file.
        evidence: layer -> one line.
        folder: where the file will be; the path of the bases is relative to it.
        keep_rules: False leaves the base's rules out.
    """
    lines = [f"# {line}".rstrip() for text in about for line in (*_wrapped(text), "")]
    lines[-1:] = [""] if lines else []
    default = {**base.to_dict()["default"], "group_size": 1}
    default.pop("rank", None)
    # What LayerPlan has anyway would only be noise; what the base chose stays.
    usual = Policy().to_dict()["default"]
    default = {k: v for k, v in default.items() if k == "group_size" or v != usual[k]}
    lines += tomlkit.dumps({"default": default}).splitlines()
    if keep_rules:
        for rule in base.rule:
            lines += ["", "# from the policy that was given", *_rule(rule.to_dict())]
    for layers, fields in _grouped(chosen):
        lines += ["", *(f"# {evidence[layer]}" for layer in layers)]
        lines += _rule({"layers": pattern(layers), **fields})
    if base.bases is not None and base.bases_path is not None:
        file = Path(os.path.relpath(base.bases_path, folder)).as_posix()
        lines += [
            "",
            *tomlkit.dumps({"bases": {"file": file, "sha256": base.bases.sha256}}).splitlines(),
        ]
    return "\n".join(lines) + "\n"


def _wrapped(text: str) -> list[str]:
    return [
        part
        for line in text.split("\n")
        for part in textwrap.wrap(line, WIDTH, break_long_words=False) or [""]
    ]


def _rule(fields: Mapping[str, object]) -> list[str]:
    text: list[str] = tomlkit.dumps({"rule": [dict(fields)]}).strip().splitlines()
    if "\\\\" in text[1]:  # a regular expression reads better without doubled backslashes
        layers = str(fields["layers"])
        if "'" not in layers:
            text[1] = f"layers = '{layers}'"
    return text


def _grouped(
    chosen: Mapping[str, Mapping[str, int | str]],
) -> list[tuple[list[str], Mapping[str, int | str]]]:
    """Layers of equal plans whose names differ in one number only, together."""
    alike: dict[tuple[object, ...], list[str]] = {}
    for layer, fields in chosen.items():
        alike.setdefault((*_NUMBER.split(layer)[::2], *fields.items()), []).append(layer)
    groups = [group for layers in alike.values() for group in _by_one_number(layers)]
    order = {layer: place for place, layer in enumerate(chosen)}
    return [(group, chosen[group[0]]) for group in sorted(groups, key=lambda g: order[g[0]])]


_NUMBER = re.compile(r"(?<![^.])(\d+)(?![^.])")


def _by_one_number(layers: Sequence[str]) -> list[list[str]]:
    """Names that are alike but for numbers, in as few groups as one number that differs gives."""

    def grouped(place: int) -> list[list[str]]:
        groups: dict[tuple[str, ...], list[str]] = {}
        for layer in layers:
            parts = _NUMBER.split(layer)
            del parts[place]
            groups.setdefault(tuple(parts), []).append(layer)
        return list(groups.values())

    places = range(1, len(_NUMBER.split(layers[0])), 2)
    return min(map(grouped, places), key=len, default=[list(layers)])


def pattern(layers: Iterable[str]) -> str:
    """A pattern for a rule that names these layers and no others; they differ in one number."""
    names = list(layers)
    if names == [""]:
        return "re:()"  # the root; an empty pattern is refused
    if len(names) == 1:
        return names[0] if _is_literal(names[0]) else f"re:{re.escape(names[0])}"
    parts = zip(*map(_NUMBER.split, names), strict=True)
    columns = [list(dict.fromkeys(column)) for column in parts]
    return "re:" + "".join(
        _escaped(column[0]) if len(column) == 1 else f"({'|'.join(column)})" for column in columns
    )


def _is_literal(name: str) -> bool:
    return not set(name) & set("*?[") and not name.startswith("re:")


def _escaped(text: str) -> str:
    # re.escape also escapes what needs none, such as "-" and "_" of older versions.
    return re.sub(r"([.^$*+?{}\[\]|()\\])", r"\\\1", text)
