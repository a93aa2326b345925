"""What a long evaluation has done so far, in one file, so that it can go on after a stop."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

FORMAT = "distr-progress 1"

SECONDS = 10.0
"""Between two writes."""


@dataclass
class Checkpoint:
    """The rows of the batches done.

    Attributes:
        path: a safetensors file with the rows as tensors, ``policy/metric``, and what else there is
            as JSON in its metadata; None keeps nothing.
        key: of what is measured how; a file with another key is of no use.
        parts: digests of some batches, and their rows by ``policy/metric``. What was read from the
            file is one part; every batch after that is one, so that an interrupt leaves all of a
            batch or nothing.
        notes: what else is to be kept, JSON.
    """

    path: Path | None
    key: str
    parts: list[tuple[list[str], dict[str, Tensor]]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    _written: float = field(default_factory=time.monotonic)

    @classmethod
    def open(cls, path: Path | None, key: str) -> tuple[Checkpoint, str]:
        """What ``path`` has, or an empty checkpoint and why (nothing if there was no file)."""
        fresh = cls(path, key)
        if path is None or not path.exists():
            return fresh, ""
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {})["distr"])
                rows = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            return fresh, f"{path} cannot be read ({error})"
        if about.get("format") != FORMAT or about.get("key") != key:
            return fresh, f"{path} is of another model, policy, metric or version"
        parts = [(about["batches"], rows)] if rows else []
        return cls(path, key, parts, about["notes"]), ""

    @property
    def batches(self) -> list[str]:
        """The digest of each batch done."""
        return [digest for digests, _ in self.parts for digest in digests]

    @property
    def names(self) -> list[str]:
        """The ``policy/metric`` that there are rows of."""
        return list(self.parts[0][1]) if self.parts else []

    def add(self, digest: str, rows: Mapping[str, Tensor]) -> None:
        """Add one batch, and write if the last time is long ago."""
        self.parts.append(([digest], dict(rows)))
        if time.monotonic() - self._written > SECONDS:
            self.write()

    def together(self, name: str) -> Tensor:
        """All rows of one ``policy/metric``."""
        return torch.cat([rows[name] for _, rows in self.parts])

    def write(self) -> None:
        """Write the file, whole or not at all."""
        self._written = time.monotonic()
        if self.path is None:
            return
        about = {
            "format": FORMAT,
            "key": self.key,
            "batches": self.batches,
            "notes": self.notes,
        }
        tensors = {name: self.together(name) for name in self.names}
        write_whole(self.path, save(tensors, {"distr": json.dumps(about)}))

    def remove(self) -> None:
        """Remove the file: all is done."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def key_of(**what: Any) -> str:
    """SHA-256 of values that JSON knows."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def write_whole(path: Path, data: bytes) -> None:
    """Write beside the file and rename, so that a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
