"""What the tests of the fused CPU kernel share."""

from __future__ import annotations

import os
import shlex

import pytest

from distr_compile.kernels.attention import build, cpu

MORE_FLAGS = "DISTR_TEST_CPU_FLAGS"
"""Environment variable: flags that these tests build with besides the usual ones."""


def require_kernel() -> None:
    """Build or load the kernel; skip where there is no compiler, fail for any other reason."""
    build.LIMIT_S = 200.0  # many processes may share this machine's cores with the tests
    more = tuple(shlex.split(os.environ.get(MORE_FLAGS, "")))
    if build.FLAGS[-len(more) :] != more:
        build.FLAGS += more
    reason = cpu.unavailable_reason()
    if reason is not None and "no C++ compiler" in reason:
        pytest.skip(reason)
    assert reason is None, reason
