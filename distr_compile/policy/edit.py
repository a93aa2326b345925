"""Changes to the text of a policy that keep its comments and layout."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import tomlkit
from tomlkit.items import Array

from distr_compile.policy.plan import INSTEAD
from distr_compile.policy.source import HEADER, Source, bare_lines, split_key


def text_with_default(text: str, fields: Mapping[str, object]) -> str:
    """The text with fields of ``[default]`` set: in their lines, or new ones below the header."""
    text = _with_keys_renamed(text, fields)
    # with a line end, because tables in mixed order are written back in another order
    document: Any = tomlkit.parse(text if text.endswith("\n") else text + "\n")
    if "default" not in document:
        return _appended(text, {"default": fields})
    table = document["default"]
    table.update({key: value for key, value in fields.items() if key in table})
    new = {key: value for key, value in fields.items() if key not in table}
    lines = tomlkit.dumps(document).split("\n")
    for number, line in enumerate(bare_lines("\n".join(lines)), 1):
        if (header := HEADER.match(line)) and split_key(header[1]) == ("default",):
            # right below the header: at the table's end they would part the next table's comment
            # from that table
            lines[number:number] = tomlkit.dumps(new).splitlines()
            return "\n".join(lines)
    table.update(new)  # default = {...} or default.key = ...
    return tomlkit.dumps(document)


def _with_keys_renamed(text: str, fields: Mapping[str, object]) -> str:
    """The text with the default's ``group_size`` called ``rank`` or the other way, if that changed.

    The line keeps its place and comment; its value is replaced next.
    """
    old = next((INSTEAD[name] for name in fields if name in INSTEAD), None)
    if old is None or old not in tomlkit.parse(text).get("default", {}):
        return text
    line = Source("", text).line_of(("default", old))
    assert line is not None
    lines = text.split("\n")
    lines[line - 1] = re.sub(rf"\b{old}\b", INSTEAD[old], lines[line - 1], count=1)
    return "\n".join(lines)


def text_with_rule(text: str, rule: Mapping[str, object]) -> str:
    """The text with one more rule at the end."""
    document: Any = tomlkit.parse(text)
    if not isinstance(document.get("rule"), Array):
        return _appended(text, {"rule": [rule]})
    table = tomlkit.inline_table()  # rule = [{...}, {...}]
    table.update(rule)
    document["rule"].append(table)
    return tomlkit.dumps(document)


def text_with_bases(text: str, fields: Mapping[str, object]) -> str:
    """The text with the table ``[bases]`` set, in its place or at the end."""
    document: Any = tomlkit.parse(text)
    if "bases" not in document:
        return _appended(text, {"bases": fields})
    document["bases"].update(fields)
    return tomlkit.dumps(document)


def _appended(text: str, tables: Mapping[str, Any]) -> str:
    """``text`` with tables after its end; what was there is untouched."""
    gap = "" if not text else "\n" if text.endswith("\n") else "\n\n"
    return text + gap + tomlkit.dumps(tables)
