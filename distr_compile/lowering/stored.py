"""Where measured decisions are kept: a small JSON file each, beside Inductor's caches.

What is stored is never measured again, so that a model computes the same numbers in every process
of a machine. The first that writes wins: a process that comes second takes what it finds. Why
something could not be measured is stored likewise; only ``distr measure`` puts a race there.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch

from distr_compile.kernels.attention import build, cpu
from distr_compile.lowering.call import Approximation, Shape
from distr_compile.lowering.measure import Race
from distr_compile.lowering.spelling import spelled

log = logging.getLogger(__name__)

FOLDER = "distr_measured"

Answer = Race | str
"""A race, or why there was none."""

_in_process: dict[tuple[Path | None, str], Answer] = {}
"""By folder and name of the file: also where nothing can be written, a process decides once."""


class _DamagedError(Exception):
    """A file that is no answer to its call."""


def load(shape: Shape, approximation: Approximation | None, against: str) -> Answer | None:
    """What is stored of a race on this machine, as it is set up now; None without."""
    key = _key(shape, approximation, against)
    place = where, name = folder(), _name(key)
    if place not in _in_process and where is not None:
        try:
            _in_process[place] = _read(where / name, key)
        except FileNotFoundError:
            return None
        except (OSError, build.UnavailableError, _DamagedError) as error:
            log.warning("%s is not a stored decision: %s", where / name, error)
    return _in_process.get(place)


def store(
    shape: Shape, approximation: Approximation | None, against: str, answer: Answer
) -> Answer:
    """Keep an answer, unless there is one already; a race takes the place of a reason for none.

    Returns:
        The answer that holds.
    """
    key = _key(shape, approximation, against)
    place = where, name = folder(), _name(key)
    if isinstance(kept := _in_process.get(place), Race):
        return kept
    if where is not None:
        try:
            answer = _write(where / name, key, answer)
        except (OSError, build.UnavailableError) as error:
            log.warning("a measured decision cannot be stored: %s", error)
    _in_process[place] = answer
    return answer


def forget() -> None:
    """Leave what this process knows; the files stay."""
    _in_process.clear()


def _write(path: Path, key: dict[str, Any], answer: Answer) -> Answer:
    said = {"refused": answer} if isinstance(answer, str) else {"race": dataclasses.asdict(answer)}
    fd, name = tempfile.mkstemp(suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, **said}, indent=1) + "\n")
        with build.locked(path.parent):
            try:
                kept = _read(path, key)
                if isinstance(kept, Race) or isinstance(answer, str):
                    return kept
            except (FileNotFoundError, _DamagedError):
                pass
            os.replace(name, path)
            return answer
    finally:
        Path(name).unlink(missing_ok=True)


def _read(path: Path, key: dict[str, Any]) -> Answer:
    build.refuse_others(path)
    try:
        said = json.loads(path.read_text("utf-8"))
        if said["key"] != key:
            raise _DamagedError("it is of another call")
        if "refused" in said:
            return str(said["refused"])
        race = Race(**said["race"])
        numbers = [race.gain, race.rounds, race.heads, *race.seconds.values()]
        is_right = all(type(n) in (int, float) and math.isfinite(n) for n in numbers)
        if len(race.seconds) != 2 or not is_right:
            raise _DamagedError("its numbers are none")
        return race
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _DamagedError(str(error)) from error


def folder() -> Path | None:
    """Where the files are; None where there can be none."""
    try:
        return build.cache_folder(FOLDER)
    except (OSError, build.UnavailableError) as error:
        log.warning("measured decisions cannot be stored: %s", error)
        return None


def _name(key: dict[str, Any]) -> str:
    text = json.dumps(key, sort_keys=True)
    return f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def _key(shape: Shape, approximation: Approximation | None, against: str) -> dict[str, Any]:
    """Everything that the times may depend on."""
    return {"call": spelled(shape, approximation), "against": against, **_machine(shape.device)}


def _machine(device: torch.device) -> dict[str, Any]:
    common: dict[str, Any] = {
        "torch": torch.__version__,
        "code": code_digest(),
        "float32 products": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "mkldnn": torch.backends.mkldnn.enabled,
        "sdpa": {
            "flash": torch.backends.cuda.flash_sdp_enabled(),
            "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
            "math": torch.backends.cuda.math_sdp_enabled(),
            "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
        },
    }
    if device.type == "cuda":
        import triton

        return common | {
            "device": torch.cuda.get_device_name(device),
            "triton": triton.__version__,
            "sdpa order": list(torch._C._get_sdp_priority_order()),
        }
    return common | {
        "device": _cpu_name(),
        "features": hashlib.sha256(build.cpu_features().encode()).hexdigest()[:16],
        "threads": torch.get_num_threads(),
        "kernel": "none" if cpu.unavailable_reason() else "fused",
    }


@functools.cache
def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@functools.cache
def code_digest() -> str:
    """The digest of our code that computes attention: a change makes stored times void."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for folder in ("kernels", "lowering", "estimators.py"):
        place = root / folder
        files = sorted(place.rglob("*")) if place.is_dir() else [place]
        for file in files:
            if file.suffix in {".py", ".cpp", ".h"}:
                text = file.read_bytes()
                digest.update(f"{file.relative_to(root)} {len(text)} ".encode() + text)
    return digest.hexdigest()[:16]
