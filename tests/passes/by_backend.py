"""Compile a function through the whole backend, with no compiler behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import distr_compile

EXACT: dict[str, Any] = {"default": {"group_size": 1}}
FORCED: dict[str, Any] = {"default": {"group_size": 2, "min_seq_len": 0}}


def compiled(f: Callable[..., Any], policy: dict[str, Any] = FORCED, **more: Any) -> Any:
    """``f`` compiled anew; ``more`` goes to ``torch.compile``."""
    torch._dynamo.reset()
    options = {"policy": policy, "compiler": "eager"}
    return torch.compile(f, backend="distr", options=options, **more)


def codes(f: Any) -> list[str]:
    """The codes of all reasons in the report of what was compiled."""
    return [reason.code for row in distr_compile.report(f).rows for reason in row.reasons]
