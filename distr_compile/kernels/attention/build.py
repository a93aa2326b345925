"""Builds the library of ``cpu.cpp`` at first use, and finds it again in Inductor's cache folder.

The compiler is the one that Inductor takes, the flags are ours: Inductor's own switch off the
contraction of a product and a sum into one instruction, which costs a third of the speed. The
source includes no header of torch, so a build takes seconds.

A library is native code that a process trusts. So the folder belongs to the user alone, is refused
where it does not, and a library is loaded only if its digest is the one written at its build.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

SOURCES = ("cpu.cpp", "amx.h", "backward.h", "dropout.h", "engine.h", "projection.h", "vectors.h")
"""What the library is built from, beside this file; the first is compiled, the others included."""

FUNCTIONS = (
    *("distr_workspace", "distr_attention", "distr_backward_workspace", "distr_backward"),
    *("distr_bases_workspace", "distr_bases"),
)
"""Each takes a pointer to its arguments and returns an integer."""

FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-shared", "-fvisibility=hidden")
"""No ``-ffast-math``: the kernel counts on infinities, on NaN, and on the order of its sums."""

NATIVE = {"aarch64": "-mcpu=native", "arm64": "-mcpu=native"}
"""The flag that builds for this very CPU, where it is not ``-march=native``."""

CAPABILITY_FLAGS = {"AVX2": ("-mno-avx512f",), "DEFAULT": ("-mno-avx",)}
"""What PyTorch is held to by ``ATEN_CPU_CAPABILITY`` holds for the kernel too."""

LIMIT_S = 15.0
"""Most seconds that a call waits: for the compiler, and for another process that builds."""

SWITCH = "DISTR_CPU_KERNEL"
"""An environment variable; 0 forbids building and loading."""


class UnavailableError(Exception):
    """The kernel cannot run here; the message says why."""


@dataclass(frozen=True)
class Library:
    """A loaded library, or why there is none.

    Attributes:
        handle: the library, whose functions are declared; None where there is none.
        parallel_for: address of ``torch_parallel_for`` in the process.
        reason: why there is none, in words.
    """

    handle: Any
    parallel_for: int
    reason: str | None


def load(check: Callable[[Library], str | None]) -> Library:
    """The library from the cache, or built now.

    What does not load, or fails ``check``, is built anew once.

    Args:
        check: runs the library on small inputs and says what is wrong with its results, or None.

    Returns:
        A library, or one without a handle and with the reason.
    """
    try:
        return _load(check)
    except UnavailableError as failure:
        reason = str(failure)
    except OSError as failure:
        reason = f"the cache folder cannot be used: {failure}"
    log.warning("the CPU kernel is not available, PyTorch's products are used: %s", reason)
    return Library(None, 0, reason)


def _load(check: Callable[[Library], str | None]) -> Library:
    if sys.platform == "win32":
        raise UnavailableError("it needs GCC or Clang; MSVC has no vector types")
    parallel_for = _parallel_for()
    program, version = compiler()
    flags = compiler_flags()
    path = cache_folder() / f"{_key(flags, version)}.so"
    with locked(path.parent):
        for fresh in (False, True):
            if fresh or not _intact(path):
                _build(program, flags, path)
            handle = None
            try:
                handle = ctypes.CDLL(str(path))
                library = Library(_declared(handle), parallel_for, None)
                wrong = check(library)
            except (OSError, AttributeError) as failure:
                wrong = f"it does not load: {failure}"
            if wrong is None:
                return library
            log.warning("%s: %s", path, wrong)
            close(handle)
            for file in (path, _digest_file(path)):
                file.unlink(missing_ok=True)
    raise UnavailableError(f"the library was built, but {wrong}")


def close(handle: Any) -> None:
    """Unload a library: as long as it is loaded, a new one under its name would not be."""
    if handle is not None:
        import _ctypes

        _ctypes.dlclose(handle._handle)


def _declared(handle: Any) -> Any:
    for name in FUNCTIONS:
        function = getattr(handle, name)
        function.restype, function.argtypes = ctypes.c_int64, (ctypes.c_void_p,)
    handle.distr_peak.restype = ctypes.c_int64
    handle.distr_peak.argtypes = (ctypes.c_int64, ctypes.c_int64)
    return handle


def _parallel_for() -> int:
    """The address of PyTorch's own parallel loop in the libtorch_cpu that is loaded."""
    suffix = "dylib" if sys.platform == "darwin" else "so"
    loaded = Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{suffix}"
    try:
        function = ctypes.CDLL(str(loaded)).torch_parallel_for
    except (OSError, AttributeError) as failure:
        raise UnavailableError(f"libtorch_cpu gives no torch_parallel_for: {failure}") from failure
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def compiler() -> tuple[str, str]:
    """The C++ compiler that Inductor takes, and all it says of its version."""
    from torch._inductor import cpp_builder, exc

    try:
        program = cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as failure:
        raise UnavailableError("there is no C++ compiler; set CXX to GCC or Clang") from failure
    try:
        said = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=LIMIT_S, check=True
        )
    except (OSError, subprocess.SubprocessError) as failure:
        raise UnavailableError(f"the compiler {program} does not run: {failure}") from failure
    return program, said.stdout


def compiler_flags() -> tuple[str, ...]:
    """The flags for this CPU, as far as PyTorch itself may use it."""
    native = NATIVE.get(platform.machine(), "-march=native")
    held = CAPABILITY_FLAGS.get(torch.backends.cpu.get_cpu_capability(), ())
    return (native, *held, *FLAGS)


def cpu_features() -> str:
    """What instructions this CPU has, in the words of the system."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return " ".join(sorted(line.partition(":")[2].split()))
    except OSError:
        pass
    return f"{platform.processor()} {torch.backends.cpu.get_cpu_capability()}"


def _key(flags: tuple[str, ...], version: str) -> str:
    """A name for the library: two that may differ have two names."""
    sources = [(Path(__file__).parent / name).read_bytes() for name in SOURCES]
    parts = [platform.machine(), sys.platform, cpu_features(), version, *flags]
    digest = hashlib.sha256()
    for part in (*sources, *(part.encode() for part in parts)):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:32]


def cache_folder(name: str = "distr_cpu") -> Path:
    """A folder of ours beside Inductor's caches, that of the libraries, made where there is none.

    Raises:
        UnavailableError: it is a link, belongs to somebody else, or others may write to it.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder = Path(cache_dir()) / name
    with suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    refuse_others(folder, stat.S_ISDIR, "a folder")
    return folder


def refuse_others(
    path: Path, kind: Callable[[int], bool] = stat.S_ISREG, noun: str = "a file"
) -> None:
    """Refuse what is not ours alone.

    Raises:
        UnavailableError: it is a link or of another kind, belongs to somebody else, or others may
            write to it.
        FileNotFoundError: it is not there.
    """
    found = os.lstat(path)
    if not kind(found.st_mode):
        raise UnavailableError(f"{path} is not {noun}, or a link: remove it")
    if found.st_uid != os.geteuid():
        raise UnavailableError(
            f"{path} belongs to user {found.st_uid}, not {os.geteuid()}: remove it"
        )
    if found.st_mode & 0o022:
        raise UnavailableError(f"others may write to {path}: chmod go-w")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; wait for another process at most ``LIMIT_S``."""
    import fcntl

    fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        give_up = time.monotonic() + LIMIT_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up:
                    raise UnavailableError(f"another process held {folder}/lock too long") from None
                time.sleep(0.05)
        yield
    finally:
        os.close(fd)


def _digest_file(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _intact(path: Path) -> bool:
    """Whether the library is there, ours, and has the digest that it was built with."""
    try:
        for file in (path, _digest_file(path)):
            refuse_others(file)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return digest == _digest_file(path).read_text()
    except (FileNotFoundError, UnavailableError):
        return False


def _build(compiler: str, flags: tuple[str, ...], path: Path) -> None:
    """Compile under a temporary name, then put library and digest in their places."""
    began = time.monotonic()
    fd, name = tempfile.mkstemp(suffix=".tmp", dir=path.parent)
    os.close(fd)
    built = Path(name)
    command = [compiler, *flags, str(Path(__file__).parent / SOURCES[0]), "-o", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line]
            first = (errors or done.stderr.splitlines() or ["no message"])[0]
            raise UnavailableError(f"{compiler} failed with status {done.returncode}: {first}")
        os.chmod(name, 0o700)
        written = built.with_suffix(".digest")
        written.write_text(hashlib.sha256(built.read_bytes()).hexdigest())
        os.chmod(written, 0o600)
        os.replace(name, path)
        os.replace(written, _digest_file(path))
    except subprocess.TimeoutExpired as failure:
        raise UnavailableError(f"{compiler} took more than {LIMIT_S:.0f} s") from failure
    except OSError as failure:
        raise UnavailableError(f"the library cannot be built: {failure}") from failure
    finally:
        built.unlink(missing_ok=True)
    log.info("built the CPU kernel in %.1f s: %s", time.monotonic() - began, path)
