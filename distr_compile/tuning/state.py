"""What ``tune`` has found out so far, in a JSON file beside the policy, so that it can go on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distr_compile.accuracy.checkpoint import write_whole
from distr_compile.tuning.bounds import Loss

FORMAT = "distr-tuning 1"


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
        return cls(path, key, found), ""

    def keep(self, name: str, value: Any) -> None:
        """Add a measurement and write the file, whole."""
        self.found[name] = value
        if self.path is not None:
            content = {"format": FORMAT, "key": self.key, "found": self.found}
            write_whole(self.path, (json.dumps(content, indent=1) + "\n").encode())

    def loss(self, name: str, setting: Mapping[str, str]) -> Loss | None:
        """A loss that was measured for a choice, if it was."""
        kept = self.found.get(name, {}).get(setting_key(setting))
        return None if kept is None else Loss(**kept)

    def keep_losses(self, name: str, losses: Mapping[str, Loss]) -> None:
        """Add losses by ``setting_key``."""
        new = {key: dataclasses.asdict(loss) for key, loss in losses.items()}
        self.keep(name, {**self.found.get(name, {}), **new})


def setting_key(setting: Mapping[str, str]) -> str:
    """Names a choice; the same for equal ones."""
    return json.dumps(dict(sorted(setting.items())))
