"""How the CPU kernel's library is built, cached, refused and done without."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from distr_compile.kernels.attention import build, cpu
from distr_compile.lowering import op
from tests.kernels.cpu_kernel import require_kernel

ROOT = Path(__file__).parents[2]

QUICK = ("-std=c++17", "-O0", "-fPIC", "-shared", "-fvisibility=hidden")
"""What does not concern speed is tested with libraries that build fast."""

TELL = """
from distr_compile.kernels.attention import build, cpu
build.LIMIT_S = 200.0
build.FLAGS = {flags}
print(cpu.unavailable_reason())
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder; afterwards the process has its library of before."""
    require_kernel()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(build, "FLAGS", QUICK)
    monkeypatch.setattr(cpu, "_loaded", None)
    yield tmp_path / "distr_cpu"
    cpu.forget()  # before the library of before comes back


def library(cache: Path) -> Path:
    (found,) = cache.glob("*.so")
    return found


def replace(path: Path, content: bytes) -> None:
    """Another file under the name; the old one may be loaded."""
    path.unlink()
    path.write_bytes(content)
    path.chmod(0o700)


def reason_anew() -> str | None:
    cpu.forget()
    return cpu.unavailable_reason()


def works_without(reason: str) -> None:
    """The kernel is not there for this reason, and attention is the same without it."""
    got = reason_anew()
    assert got is not None
    assert reason in got
    q = torch.randn(1, 2, 40, 32)
    assert not cpu.available(q.dtype)
    options = {"scale": 0.2, "rank": 16, "estimator": "projection", "grouping_block": 0}
    assert op.call(q, q, q, **options).isfinite().all()


def started(env: dict[str, str], script: str = TELL) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script.format(flags=QUICK)],
        env={**os.environ, **env},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_built_once_and_found_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger=build.log.name):
        assert cpu.unavailable_reason() is None
    assert "built the CPU kernel in" in caplog.text
    assert cache.stat().st_mode & 0o777 == 0o700
    assert {p.suffix for p in cache.iterdir()} == {".so", ".sha256", ""}  # no temporary file
    monkeypatch.setattr(build, "_build", None)
    assert reason_anew() is None


def test_eight_processes_at_once(cache: Path) -> None:
    several = [started({}) for _ in range(8)]
    said = [process.communicate(timeout=300) for process in several]
    assert [out for out, _ in said] == ["None\n"] * 8, said
    library(cache)
    assert len(list(cache.iterdir())) == 3


@pytest.mark.parametrize("size", [0, 1000, 100_000])
def test_truncated_library_is_built_anew(cache: Path, size: int) -> None:
    assert cpu.unavailable_reason() is None
    whole = library(cache).read_bytes()
    replace(library(cache), whole[: min(size, len(whole) - 1)])
    assert reason_anew() is None
    assert library(cache).read_bytes() == whole


def test_library_that_fails_its_test_is_built_anew(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Some other library lies there, with the digest that it has."""
    assert cpu.unavailable_reason() is None
    path = library(cache)
    for text in (
        "extern int x;",  # has no functions
        'extern "C" long distr_attention(void*) { return 0; }'
        'extern "C" long distr_workspace(void*) { return 64; }',
    ):
        source = path.parent.parent / "other.cpp"
        source.write_text(text)
        path.unlink()
        subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(path)], check=True)
        path.chmod(0o700)
        build._digest_file(path).write_text(build.hashlib.sha256(path.read_bytes()).hexdigest())
        caplog.clear()
        assert reason_anew() is None
        assert "does not load" in caplog.text or "is off by" in caplog.text


def test_never_right_is_told(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_self_test", lambda _: "its result is off by 1")
    works_without("the library was built, but its result is off by 1")


def test_folder_that_is_not_ours_is_refused(cache: Path) -> None:
    elsewhere = cache.parent / "elsewhere"
    elsewhere.mkdir()
    cache.symlink_to(elsewhere)
    works_without("is not a folder, or a link")
    cache.unlink()
    cache.write_text("")
    works_without("is not a folder, or a link")
    cache.unlink()
    cache.mkdir(mode=0o700)
    cache.chmod(0o777)
    works_without("others may write to")
    cache.chmod(0o700)
    if os.geteuid():
        pytest.skip("only root can give a folder away")
    os.chown(cache, 12345, -1)
    works_without("belongs to user 12345")


def test_library_that_is_not_ours_is_built_anew(cache: Path) -> None:
    assert cpu.unavailable_reason() is None
    path = library(cache)
    path.chmod(0o777)
    assert not build._intact(path)
    path.chmod(0o700)
    assert build._intact(path)
    other = path.with_suffix(".other")
    path.rename(other)
    path.symlink_to(other)
    assert not build._intact(path)
    assert reason_anew() is None
    assert not path.is_symlink()


@pytest.mark.parametrize("option", ["ro", "noexec"])
def test_read_only_and_noexec_folders(cache: Path, option: str) -> None:
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(cache.parent)], capture_output=True
    )
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.decode().strip()}")
    try:
        cache.mkdir(mode=0o700)
        subprocess.run(["mount", "-o", f"remount,{option}", str(cache.parent)], check=True)
        works_without("Read-only file system" if option == "ro" else "it does not load")
    finally:
        subprocess.run(["umount", "-l", str(cache.parent)], check=True)


def test_cache_folder_that_cannot_be_made(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache.parent / "file").write_text("")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache.parent / "file"))
    works_without("the cache folder cannot be used")


def test_no_compiler(cache: Path) -> None:
    from torch._inductor import config

    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        works_without("there is no C++ compiler")
    assert not cache.exists()


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exit 1", "does not run"),
        ('[ "$1" = --version ] && echo g++ && exit; echo "x.cpp: error: no" >&2; exit 3',
         "failed with status 3: x.cpp: error: no"),
        ('[ "$1" = --version ] && echo g++ && exit; sleep 60', "took more than 1 s"),
        ('echo g++', "the library was built, but it does not load"),
    ],
)  # fmt: skip
def test_compiler_that_fails(
    cache: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str
) -> None:
    from torch._inductor import cpp_builder

    compiler = cache.parent / "compiler"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: str(compiler))
    monkeypatch.setattr(build, "LIMIT_S", 1.0)
    works_without(reason)
    assert {p.name for p in cache.glob("*")} <= {"lock"}  # nothing half built


def test_lock_held_too_long(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "LIMIT_S", 0.2)
    with build.locked(build.cache_folder()):
        works_without("held")


def test_other_cpu_or_flags_or_source_or_compiler_is_another_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keys = {build._key(build.FLAGS, "g++ 12"), build._key(build.FLAGS, "g++ 13")}
    keys.add(build._key((*build.FLAGS, "-g"), "g++ 12"))
    with monkeypatch.context() as patch:
        patch.setattr(build, "cpu_features", lambda: "fpu sse")
        keys.add(build._key(build.FLAGS, "g++ 12"))
    with monkeypatch.context() as patch:
        patch.setattr(build.platform, "machine", lambda: "riscv64")
        keys.add(build._key(build.FLAGS, "g++ 12"))
    with monkeypatch.context() as patch:
        patch.setattr(build, "SOURCES", (*build.SOURCES, "build.py"))
        keys.add(build._key(build.FLAGS, "g++ 12"))
    assert len(keys) == 6


def test_library_of_another_cpu_is_left_alone(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(build, "cpu_features", lambda: "fpu sse")
        assert cpu.unavailable_reason() is None
    theirs = library(cache).read_bytes(), library(cache)
    assert reason_anew() is None
    assert len(list(cache.glob("*.so"))) == 2
    assert theirs[1].read_bytes() == theirs[0]


def test_capability_of_pytorch_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert "-mno-avx512f" in build.compiler_flags()


def test_fork_keeps_the_library(cache: Path) -> None:
    """Before the first use and after it; the child's parallel loops are PyTorch's own concern."""
    script = """
import os, torch
torch.set_num_threads(1)
from distr_compile.kernels.attention import build, cpu
build.LIMIT_S = 200.0
build.FLAGS = {flags}
def child():
    pid = os.fork()
    if not pid:
        os._exit(cpu.unavailable_reason() is not None)
    return os.waitpid(pid, 0)[1]
cpu._lock.acquire()  # as if another thread were building
first = child()
cpu._lock.release()
print(first, cpu.unavailable_reason(), child())
"""
    out, err = started({}, script).communicate(timeout=300)
    assert out == "0 None 0\n", err


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_wheel_holds_the_source(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "distr_compile", tmp_path / "distr_compile")
    made = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q",
         "-w", str(tmp_path / "dist"), str(tmp_path)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        for source in build.SOURCES:
            text = files.read(f"distr_compile/kernels/attention/{source}")
            assert text == (Path(build.__file__).parent / source).read_bytes()
