"""What ``calibrate``, ``tune`` and ``regress`` are given, checked before anything is measured."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from distr_compile.backend import COMPILERS
from distr_compile.functional import number_of
from distr_compile.policy.errors import check_type, nearest, sentence, shown


def check_folder(path: str | os.PathLike[str], what: str = "path") -> None:
    """Tell before anything is measured that a file cannot be written.

    Raises:
        TypeError: it is no path.
        ValueError: its folder is missing or takes no files, or it is a folder itself.
    """
    check_type(what, path, (str, os.PathLike), "the path of a file", "say where to write")
    if Path(path).is_dir() or not Path(path).parent.is_dir():
        raise ValueError(
            f"{what}: got {os.fspath(path)!r}; accepted: a file in a folder that exists; create "
            "the folder, or write elsewhere"
        )
    try:
        with tempfile.TemporaryFile(dir=Path(path).parent):
            pass
    except OSError as error:
        got = f"{os.fspath(path)!r}, whose folder takes no file: {error.strerror}"
        raise ValueError(
            sentence(what, got, "a file in a folder that can be written", "write elsewhere")
        ) from error


def check_compiler(compiler: object) -> None:
    """Refuse what is no compiler of the backend.

    Raises:
        ValueError: what was got, what is accepted, and what to do.
    """
    if compiler not in COMPILERS:
        near = nearest(compiler, COMPILERS)
        advice = f"did you mean {near!r}?" if near else "give one of these"
        raise ValueError(sentence("compiler", shown(compiler), ", ".join(COMPILERS), advice))


def check_limit(limit: object, least: int = 1, name: str = "limit") -> int | None:
    """The number of batches at most, an int of Python; None stays.

    Raises:
        TypeError: no integer.
        ValueError: an integer below ``least``.
    """
    if limit is None:
        return None
    accepted, advice = f"a number of batches >= {least}, or None", "leave it out to take all"
    number: int = number_of(name, limit, accepted, advice, whole=True)
    if number < least:
        raise ValueError(sentence(name, str(number), accepted, advice))
    return number


def check_share(name: str, value: object, accepted: str = "a number between 0 and 1") -> None:
    """Refuse what is no number between 0 and 1.

    Raises:
        ValueError: what was got, what is accepted, and what to do.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < 1:  # type: ignore[operator]
        raise ValueError(sentence(name, shown(value), accepted, "give such a number"))
