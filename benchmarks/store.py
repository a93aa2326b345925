"""Results on disk: one JSON file per kind of result, written cell by cell, whole or not at all.

    {"environments": {ID: {device, versions, commit, ...}},
     "cells": {KEY: {"environment": ID, ...what was measured...}}}

A cell counts as finished only in the environment that it was measured in. One of an older
environment stays in the file until it is measured again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from distr_compile.lowering.architecture import architecture

ROOT = Path(__file__).parents[1]
MEASURED = ("distr_compile/kernels", "distr_compile/lowering", "distr_compile/estimators.py")
TESTED = ("distr_compile", "tests")
SOURCES = {".py", ".cpp", ".h"}
"""Suffixes of the files that a result hangs on; others are data."""

Cell = dict[str, Any]


class Store:
    """The cells of one file. What another process wrote meanwhile is lost: one writer at a time.

    Args:
        path: the JSON file, which may not exist yet.
        environment: see ``describe``.
    """

    def __init__(self, path: Path, environment: dict[str, str]) -> None:
        self.path = path
        data = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.environments: dict[str, Any] = data.get("environments", {})
        self.cells: dict[str, Cell] = data.get("cells", {})
        # The commit is for people: two commits with the same kernels measure the same.
        told = {name: value for name, value in environment.items() if name != "commit"}
        self.id = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]
        self.environment = environment

    def current(self) -> dict[str, Cell]:
        """The cells of this environment, unfinished ones too."""
        return {key: cell for key, cell in self.cells.items() if cell["environment"] == self.id}

    def is_finished(self, key: str, whatever: frozenset[str] = frozenset()) -> bool:
        """Whether this cell need not be measured again, ``whatever`` of an environment it had."""
        cell = self.cells.get(key)
        if cell is None or cell.get("unfinished"):
            return False
        known, own = self.environments.get(cell["environment"], {}), self.environment
        told = {*known, *own} - whatever - {"commit"}
        return all(known.get(name) == own.get(name) for name in told)

    def put(self, key: str, cell: Cell) -> None:
        """Add a cell to the file. A reader sees the file before or after, nothing between."""
        self.cells[key] = {"environment": self.id, **_short(cell)}
        self.environments[self.id] = self.environment
        used = {cell["environment"] for cell in self.cells.values()}
        self.environments = {i: e for i, e in self.environments.items() if i in used}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        data = {"environments": self.environments, "cells": self.cells}
        part.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        part.replace(self.path)


def _short(value: Any) -> Any:
    """Five digits of every number; infinities and NaN, which JSON has not, as text."""
    if isinstance(value, dict):
        return {name: _short(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_short(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else str(value)
    return value


def describe(device: str, sources: tuple[str, ...] = MEASURED) -> dict[str, str]:
    """What a result depends on: device, versions, and the ``sources`` of this repository.

    The sources count by their text, so that a copy without its git history will do.
    """
    is_cuda = device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if is_cuda else f"cpu {platform.machine()}",
        "architecture": architecture(torch.device(device)),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if is_cuda
        else "none",
        "cuda": torch.version.cuda or torch.version.hip or "none",
        "cudnn": str(torch.backends.cudnn.version()),
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
        "sources": _digest(sources),
        "commit": commit(),
    }


def commit() -> str:
    """Of this repository; ``DISTR_COMMIT`` says it in a copy without its history."""
    return os.environ.get("DISTR_COMMIT") or _output("git", "rev-parse", "HEAD")


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip().partition("\n")[0]


def version(package: str) -> str:
    """The installed version, or "none"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _digest(sources: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for name in sources:
        path = ROOT / name
        inside = (f for f in path.rglob("*") if f.suffix in SOURCES)
        for file in sorted(inside) if path.is_dir() else [path]:
            digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]
