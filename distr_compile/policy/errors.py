"""The error of a policy, and the words that all of its messages are made of."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

KeyPath = tuple[str | int, ...]
"""Where a value stands in a policy, such as ``("rule", 0, "group_size")``."""


class PolicyError(ValueError):
    """A policy that cannot be used: where, the key, what was got, what is accepted, what to do."""


def place_of(path: KeyPath) -> str:
    """``rule 3``, counted from 1, ``default``, or ``policy`` for what is around them."""
    if len(path) > 1:
        return f"rule {int(path[1]) + 1}" if path[0] == "rule" else str(path[0])
    return "policy"


def sentence(key: object, got: str, accepted: str, advice: str) -> str:
    """What every error says of a key, in the order of every error."""
    return f"{key}: got {got}; accepted: {accepted}; {advice}"


def check_type(
    key: str, value: object, kinds: type | tuple[type, ...], accepted: str, advice: str
) -> None:
    """Refuse a value of another type than one of ``kinds``; True and False count as no number.

    Raises:
        TypeError: what was got, what is accepted, and what to do.
    """
    is_bool = isinstance(value, bool) and kinds is not bool
    if is_bool or not isinstance(value, kinds):
        raise TypeError(sentence(key, shown(value), accepted, advice))


def check_callable(model: object) -> None:
    """Refuse a model that cannot be called.

    Raises:
        TypeError: what was got, what is accepted, and what to do.
    """
    if not callable(model):
        accepted = "a module or a function, compiled or not"
        raise TypeError(sentence("model", shown(model), accepted, "give what is to be run"))


def shown(value: object) -> str:
    """A value that was got, with its type; a long one is cut."""
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"


def nearest(word: object, words: Iterable[str]) -> str | None:
    """The word that was probably meant, if one is near."""
    close = difflib.get_close_matches(str(word), list(words), n=1, cutoff=0.5)
    return close[0] if close else None


def collected(errors: Sequence[str]) -> PolicyError:
    """One error that says them all."""
    if len(errors) == 1:
        return PolicyError(errors[0])
    return PolicyError("\n  ".join([f"{len(errors)} errors in the policy:", *errors]))
