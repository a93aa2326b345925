"""What the tests of the fused CPU kernel share."""

from __future__ import annotations

import pytest

from distr_compile.kernels.attention import build, cpu


def require_kernel() -> None:
    """Build or load the kernel; skip where there is no compiler, fail for any other reason."""
    build.LIMIT_S = 200.0  # many processes may share this machine's cores with the tests
    reason = cpu.unavailable_reason()
    if reason is not None and "no C++ compiler" in reason:
        pytest.skip(reason)
    assert reason is None, reason
