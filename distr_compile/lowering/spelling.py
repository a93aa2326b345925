"""A call's shape and approximation as one line of text, which ``distr measure --call`` reads.

The seed of the hash planes is no part of it: it moves results, not times.

Such as ``q=1x6x4096x64 k=1x6x4096 v=64 dtype=float32 device=cpu estimator=projection rank=32``.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from distr_compile.estimators import estimator_named
from distr_compile.lowering.call import BHND, Approximation, Shape

_WORDS = ("causal", "softcap", "sinks", "strict", "training", "dropout")
_KEYS = (
    *("q", "k", "v", "dtype", "device", "mask", "causal", "order"),
    *("estimator", "rank", "block", "rounds"),
)
_NEEDED = ("q", "k", "v", "dtype")
_LETTERS = "bhnd"  # axes in memory, outermost first; capital where one was expanded
_FORM = "q=BxHxNxd k=BxHxM v=d_v dtype=float32, then what else there is; see docs/policy.md"


class SpellingError(ValueError):
    """A text that is no call: got, accepted and what to do."""


def spelled(shape: Shape, approximation: Approximation | None) -> str:
    """The text of a call; the parts that are as usual are left out."""
    s = shape
    parts = {
        "q": _by((s.batch, s.num_heads, s.num_queries, s.head_dim)),
        "k": _by((s.batch, s.num_key_heads, s.num_keys)),
        "v": str(s.value_dim),
        "dtype": _name(s.dtype),
        "device": str(s.device),
    }
    if s.mask is not None:
        parts["mask"] = f"{_name(s.mask[1])}:{_by(s.mask[0])}"
    if s.is_causal and s.causal_offset:
        parts["causal"] = str(s.causal_offset)
    if s.order != (BHND,) * 3:
        parts["order"] = ",".join("".join(map(_letter, axes)) for axes in s.order)
    words = [("causal", s.is_causal and not s.causal_offset)]
    words += [("softcap", s.softcap), ("sinks", s.sinks), ("training", s.trained)]
    words.append(("dropout", s.dropout))
    if (a := approximation) is not None:
        parts |= {"estimator": a.estimator, "rank": str(a.rank)}
        if a.block:
            parts["block"] = str(a.block)
        if a.rounds != 1:
            parts["rounds"] = str(a.rounds)
        words.append(("strict", a.strict))
    given = [f"{key}={value}" for key, value in parts.items()]
    return " ".join([*given, *(word for word, is_said in words if is_said)])


def read_call(text: str) -> tuple[Shape, Approximation | None]:
    """The call that a text spells; without ``estimator`` an exact one.

    Raises:
        SpellingError: the text spells none.
    """
    parts: dict[str, str] = {}
    for part in text.split():
        key, _, value = part.partition("=")
        if not (key in _KEYS and value) and part not in _WORDS:
            known = ", ".join([*(f"{key}=" for key in _KEYS), *_WORDS])
            raise SpellingError(f"call: got {part!r}; accepted: {known}: write it as {_FORM}")
        parts[key] = value
    missing = [key for key in _NEEDED if key not in parts]
    if missing:
        raise SpellingError(f"call: got no {', '.join(missing)}; must be there: write {_FORM}")
    try:
        return _shape(parts), _approximation(parts)
    except (ValueError, AttributeError, RuntimeError) as error:
        raise SpellingError(f"call: got {text!r}; {error}: write it as {_FORM}") from error


def _shape(parts: dict[str, str]) -> Shape:
    batch, heads, queries, width = _numbers(parts["q"], 4)
    _, key_heads, keys = _numbers(parts["k"], 3)
    if not key_heads or heads % key_heads:
        raise ValueError(f"{key_heads} key heads do not divide {heads} heads")
    mask = None
    if "mask" in parts:
        dtype, _, sizes = parts["mask"].partition(":")
        mask = (tuple(_numbers(sizes, 4)), _dtype(dtype))
    order = (BHND,) * 3
    if "order" in parts:
        words = parts["order"].split(",")
        if len(words) != 3 or any(sorted(word.lower()) != sorted(_LETTERS) for word in words):
            raise ValueError(f"order must be three permutations of bhnd, not {parts['order']}")
        order = tuple(tuple(map(_axis, word)) for word in words)  # type: ignore[assignment]
    return Shape(
        batch=batch,
        num_heads=heads,
        num_key_heads=key_heads,
        num_queries=queries,
        num_keys=keys,
        head_dim=width,
        value_dim=int(parts["v"]),
        is_causal="causal" in parts,
        mask=mask,
        dtype=_dtype(parts["dtype"]),
        device=torch.device(parts.get("device", "cpu")),
        causal_offset=int(parts.get("causal") or 0),
        softcap="softcap" in parts,
        sinks="sinks" in parts,
        order=order,
        trained="training" in parts,
        dropout="dropout" in parts,
    )


def _approximation(parts: dict[str, str]) -> Approximation | None:
    if "estimator" not in parts:
        return None
    if "rank" not in parts:
        raise ValueError("an estimator needs a rank")
    return Approximation(
        estimator=estimator_named(parts["estimator"]).name,
        rank=int(parts["rank"]),
        block=int(parts.get("block", 0)),
        rounds=int(parts.get("rounds", 1)),
        strict="strict" in parts,
    )


def _letter(axis: int) -> str:
    return _LETTERS[axis] if axis >= 0 else _LETTERS[~axis].upper()


def _axis(letter: str) -> int:
    axis = _LETTERS.index(letter.lower())
    return ~axis if letter.isupper() else axis


def _by(sizes: Iterable[int]) -> str:
    return "x".join(map(str, sizes))


def _numbers(text: str, count: int) -> list[int]:
    numbers = [int(number) for number in text.split("x")]
    if len(numbers) != count or min(numbers) < 1:
        raise ValueError(f"{text} must be {count} sizes of at least 1 with an x between")
    return numbers


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name} is no dtype of torch")
    return dtype
