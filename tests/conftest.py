"""Settings of PyTorch, Triton and measuring that all tests share."""

import gc
import importlib.metadata
import importlib.util
import os

import torch

# Without a GPU the kernels run in Triton's interpreter, which is chosen when Triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# No test looks at the speed of AOTInductor's wrapper, whose optimisation takes most of its time.
os.environ["AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL"] = "O0"

# What is faster on a machine must not decide what a test sees.
os.environ["DISTR_MEASURE"] = "0"

import torch._dynamo
import torch._dynamo.guards

# torch 2.11 on Python >= 3.12 frees such guards while dicts still point at them, and the process
# aborts (pytorch/pytorch#183753). Off by default in later versions.
torch._dynamo.config.use_recursive_dict_tags_for_guards = False

# Each compile flushes the CPU's caches to time its guards, for a log that nobody reads here.
torch._dynamo.guards.profile_guard_manager = lambda *given: 0.0

# The libraries are large and stay: thousands of compiles need not look for garbage in them.
gc.set_threshold(100_000, 50, 100)

from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402

from distr_compile.lowering import stored  # noqa: E402

# The same draws in every run; --hypothesis-profile=default draws others. GPU machines may lack it.
if importlib.util.find_spec("hypothesis") is not None:
    from hypothesis import settings

    settings.register_profile("repeatable", derandomize=True)
    settings.load_profile("repeatable")


@pytest.fixture(autouse=True, scope="session")
def _own_answers(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What this machine has measured before must not decide what a test sees."""
    folder = tmp_path_factory.mktemp("measured")
    stored.folder = lambda: folder


LIBRARIES = """
torch triton transformers diffusers timm peft accelerate lightning sentence-transformers
""".split()
"""What the tables of ``docs/using`` name versions of."""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """End with the versions that the tests had."""
    versions = []
    for name in LIBRARIES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name}: missing")
    terminalreporter.write_line(f"versions: {', '.join(versions)}")


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing was compiled or counted before, and nothing compiled is left."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def may_measure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Let "auto" measure; nothing is stored yet, and what is goes into this folder."""
    monkeypatch.setenv("DISTR_MEASURE", "1")
    monkeypatch.setattr(stored, "folder", lambda: tmp_path)
    stored.forget()
    return tmp_path
