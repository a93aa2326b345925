"""What ``tune`` has found out so far, in a JSON file beside the policy, so that it can go on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from distr_compile.accuracy import ranks
from distr_compile.accuracy.checkpoint import write_whole
from distr_compile.tuning.bounds import Loss

FORMAT = "distr-tuning 2"

_Numbers = dict[str, float]


class _Loss(BaseModel):
    """The fields of ``Loss``, as the file must have them."""

    model_config = ConfigDict(extra="forbid", strict=True)
    exact: float
    value: float
    loss: float
    upper: float
    examples: int


class _Found(BaseModel):
    """The measurements, as the file must have them."""

    model_config = ConfigDict(extra="forbid", strict=True)
    errors: dict[str, _Numbers] | None = None
    costs: dict[str, _Numbers] | None = None
    refused: dict[str, str] | None = None
    layers: list[str] | None = None
    smooth: Literal["kl", "noise"] | None = None
    gains: _Numbers | None = None
    losses: dict[str, _Loss] | None = None
    divergences: _Numbers | None = None
    looks: dict[str, _Loss] | None = None
    earlier_looks: int | None = None


_TOGETHER = ("errors", "costs", "refused", "layers", "smooth")
"""Are measured in one pass; nothing else is of use without them."""


@dataclass
class State:
    """Measurements, all of which are JSON.

    Attributes:
        path: of the file; None keeps nothing.
        key: what the measurements are of, part by part.
        found: the measurements by name.
    """

    path: Path | None
    key: Mapping[str, Any]
    found: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path | None, key: Mapping[str, Any]) -> tuple[State, str]:
        """What ``path`` has, or an empty state and why (nothing if there was no file)."""
        key = json.loads(json.dumps(key))  # as it will be read
        fresh = cls(path, key)
        if path is None or not path.exists():
            return fresh, ""
        try:
            content = json.loads(path.read_text("utf-8"))
            if content["format"] != FORMAT:
                return fresh, f"{path} has the format {content['format']!r}"
            before, found = content["key"], content["found"]
            other = [part for part in key if before.get(part) != key[part]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return fresh, f"{path} cannot be read ({type(error).__name__}: {error})"
        if other:
            return fresh, f"{path} is of another {', another '.join(other)}"
        if fault := _fault(found):
            return fresh, f"{path} is damaged ({fault})"
        return cls(path, key, found), ""

    @classmethod
    def shared(
        cls, path: Path | None, key: Mapping[str, Any], *, resume: bool
    ) -> tuple[State, str]:
        """The state of the first process, in each of them; only the first writes the file.

        Returns:
            As ``open``; of an empty state where ``resume`` is False.

        Raises:
            ValueError: the processes do not measure the same.
        """
        ranks.require_same(key)
        path = path if ranks.is_first() else None
        state, why = cls.open(path if resume else None, key)
        state.path = path
        state.found, why = ranks.of_first(lambda: [state.found, why])
        return state, why

    def keep(self, name: str, value: Any) -> None:
        """Add a measurement, that of the first process, and write the file, whole."""
        value = ranks.of_first(lambda: value)
        self.found[name] = value
        if self.path is not None:
            content = {"format": FORMAT, "key": self.key, "found": self.found}
            write_whole(self.path, (json.dumps(content, indent=1) + "\n").encode())

    def loss(self, name: str, key: str) -> Loss | None:
        """A loss that was kept under a key, such as ``setting_key``."""
        kept = self.found.get(name, {}).get(key)
        return None if kept is None else Loss(**kept)

    def keep_losses(self, name: str, losses: Mapping[str, Loss]) -> None:
        """Add losses by their keys."""
        new = {key: dataclasses.asdict(loss) for key, loss in losses.items()}
        self.keep(name, {**self.found.get(name, {}), **new})

    @property
    def looks(self) -> int:
        """How often the held-out half was looked at."""
        return len(self.found.get("looks", {})) + int(self.found.get("earlier_looks", 0))

    def forget_losses(self) -> bool:
        """Drop what a metric was measured with, but not how often the held-out half was seen.

        Returns:
            Whether there was anything.
        """
        looks = self.looks
        had = [self.found.pop(name, None) for name in ("losses", "looks")]
        if looks:
            self.found["earlier_looks"] = looks
        return any(had)


def _fault(found: Any) -> str:
    """What is wrong with the measurements in a file; nothing if they can be used."""
    try:
        _Found.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "found"
        return f"{place}: {first['msg']}"
    if any(value is None for value in found.values()):
        return "a measurement is null"
    if found and not set(_TOGETHER) <= found.keys():
        return f"{', '.join(name for name in _TOGETHER if name not in found)}: missing"
    for layer, errors in found.get("errors", {}).items():
        costs = found["costs"].get(layer, {})
        if missing := {*errors, "exact"} - costs.keys():
            return f"costs of {layer}: {', '.join(sorted(missing))} missing"
    return ""


def setting_key(setting: Mapping[str, str]) -> str:
    """Names a choice; the same for equal ones."""
    return json.dumps(dict(sorted(setting.items())))
