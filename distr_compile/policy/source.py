"""The text a policy came from: parsed, and searched for the line to name in a message."""

from __future__ import annotations

import bisect
import re
from dataclasses import dataclass
from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError

from distr_compile.policy.errors import KeyPath, PolicyError, place_of, sentence

_MULTILINE_STRING = r"\"{3}(?:\\(?:.|\n)|[^\\])*?\"{3,5}|'{3}(?:.|\n)*?'{3,5}"
_COMMENT_OR_STRING = r"#[^\n]*|\"(?:\\.|[^\"\\\n])*\"|'[^'\n]*'"
_WORDS = re.compile(rf"({_MULTILINE_STRING})|{_COMMENT_OR_STRING}")
HEADER = re.compile(r"\s*\[{1,2}([^\[\]#=]+)\]")
_KEY = re.compile(r"\s*([\w.\-\"' \t]+?)\s*=")


@dataclass(frozen=True)
class Source:
    """The file a policy came from ("" once edited): for messages, and to save it with comments."""

    name: str
    text: str

    def line_of(self, path: KeyPath) -> int | None:
        """Line, counted from 1, of the key at ``path`` or of the nearest thing around it.

        The TOML parser keeps no positions, so this looks for headers and keys at line starts.
        That is enough for a file that parsed: what stands inside a list has the list's line.
        """
        lines = bare_lines(self.text)
        table: KeyPath = ()
        here: KeyPath
        rules, depth, found = 0, 0, None
        for number, line in enumerate(lines, 1):
            if header := HEADER.match(line):
                table = split_key(header[1])
                if table == ("rule",):
                    table, rules = ("rule", rules), rules + 1
                here = table
            elif key := _KEY.match(line):
                here = (*table, *split_key(key[1]))
            else:
                continue
            common = min(len(here), len(path))
            if depth < common and here[:common] == path[:common]:
                depth, found = common, number
        return found

    def place(self, path: KeyPath) -> str:
        """``distr.toml:7 (rule 2)``; :func:`.errors.place_of` where there is no file."""
        if not self.name:
            return place_of(path)
        line = self.line_of(path)
        return f"{self.name if line is None else f'{self.name}:{line}'} ({place_of(path)})"

    def duplicate_line(self) -> int | None:
        """The line that repeats a key: there ends the shortest beginning refused for it."""
        lines = self.text.split("\n")

        def repeats(count: int) -> bool:
            try:
                tomlkit.parse("\n".join(lines[:count]))
            except TOMLKitError as error:
                return _is_duplicate(error)
            return False

        return bisect.bisect_left(range(len(lines) + 1), True, key=repeats)


def bare_lines(text: str) -> list[str]:
    """The lines of a text with nothing in the place of strings that go over several of them."""
    return _WORDS.sub(lambda m: "\n" * m[1].count("\n") if m[1] else m[0], text).split("\n")


def split_key(dotted: str) -> tuple[str, ...]:
    """The parts of a dotted key, without the quotes."""
    return tuple(part.strip(" \t\"'") for part in dotted.split("."))


def _is_duplicate(error: TOMLKitError) -> bool:
    return "already exists" in str(error) or "Redefinition" in str(error)


def parse(source: Source) -> dict[str, Any]:
    """The tables of a TOML text.

    Raises:
        PolicyError: it is not TOML, or says a key twice.
    """
    try:
        return tomlkit.parse(source.text).unwrap()
    except TOMLKitError as error:
        if _is_duplicate(error):
            line, advice = source.duplicate_line(), "keep one of the two"
        else:
            line, advice = getattr(error, "line", None), "correct the line"
        got = re.sub(r"\.? at line \d+ col \d+$|\.$", "", str(error))
        message = sentence("TOML", got, "TOML 1.0, each key once", advice)
        raise PolicyError(f"{source.name}:{line}: {message}") from None
