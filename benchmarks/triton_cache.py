"""Triton's cache as one file that travels: what one machine has compiled, the next need not.

Of every kernel the code and what is needed to launch it are kept, not the stages of its
compilation.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

NAME = "triton-cache.tgz"

LIMIT_BYTES = 16 << 20
"""Most that the file may have; what is oldest is left out."""

KEPT = (".cubin", ".hsaco", ".json", ".so")
GROUP = "__grp__"


def use(carried: Path) -> Path:
    """Let this process and its children keep Triton's cache in a folder, filled from a file.

    Args:
        carried: the file, or none there: then the folder is as it was left.

    Returns:
        The folder, ``TRITON_CACHE_DIR`` if that is set.
    """
    default = Path(tempfile.gettempdir()) / f"distr-triton-cache-{os.getuid()}"
    folder = Path(os.environ.setdefault("TRITON_CACHE_DIR", str(default)))
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if carried.exists():
        unpack(carried, folder)
    return folder


def pack(results: Path) -> Path | None:
    """Write the cache of this process to the folder of results; None if there is none yet."""
    folder = Path(os.environ.get("TRITON_CACHE_DIR", ""))
    if not os.environ.get("TRITON_CACHE_DIR") or not folder.is_dir():
        return None
    kernels = [k for k in folder.iterdir() if k.is_dir() and any(k.glob("*.*"))]
    kernels.sort(key=lambda kernel: kernel.stat().st_mtime, reverse=True)
    kernels = list(_within(kernels, 8 * LIMIT_BYTES))  # nothing shrinks to less than an eighth
    data = _tar(kernels)
    while len(data) > LIMIT_BYTES:
        kernels = kernels[: len(kernels) * 3 // 4]
        data = _tar(kernels)
    path = results / NAME
    part = path.with_suffix(".part")
    part.write_bytes(data)
    part.replace(path)
    return path


def _kept(kernel: Path) -> list[Path]:
    return [file for file in sorted(kernel.iterdir()) if file.suffix in KEPT and file.is_file()]


def _within(kernels: list[Path], most: int) -> Iterator[Path]:
    """The first of them that take so many bytes together."""
    size = 0
    for kernel in kernels:
        size += sum(file.stat().st_size for file in _kept(kernel))
        if size > most:
            return
        yield kernel


def _tar(kernels: list[Path]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=6) as tar:
        for kernel in kernels:
            for file in _kept(kernel):
                tar.add(file, f"{kernel.name}/{file.name}")
    return buffer.getvalue()


def unpack(path: Path, folder: Path) -> int:
    """Fill the folder from a file of ``pack``, and say how many files there were.

    Triton writes down which files a kernel has and where: these few, and here, now.
    """
    count = 0
    with tarfile.open(path, mode="r:gz") as tar:
        packed = set(tar.getnames())
        for member in tar:
            kernel, _, name = member.name.partition("/")
            content = tar.extractfile(member) if member.isfile() else None
            if content is None or not name or "/" in name or ".." in (kernel, name):
                continue  # not of ``pack``
            data = content.read()
            if name.startswith(GROUP):
                paths = json.loads(data)["child_paths"]
                here = [child for child in paths if f"{kernel}/{child}" in packed]
                moved = {child: str(folder / kernel / child) for child in here}
                data = json.dumps({"child_paths": moved}).encode()
            (folder / kernel).mkdir(exist_ok=True)
            (folder / kernel / name).write_bytes(data)
            count += 1
    return count
