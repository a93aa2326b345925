"""No policy of the environment may reach these tests."""

from __future__ import annotations

import pytest

from distr_compile.policy import ENV_VAR


@pytest.fixture(autouse=True)
def _no_policy_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENV_VAR, raising=False)
