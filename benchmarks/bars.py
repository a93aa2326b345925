"""What was asked of the CPU kernel's speed, to be printed beside what was measured."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

RUNTIME = "runtime"
"""Stands for the better of the other runtimes."""

BARS: tuple[tuple[str, str, tuple[int, ...], tuple[int, ...], str, dict[str, float]], ...] = tuple(
    (arm, over, widths, tokens, kind, {"float32": single, "bfloat16": half})
    for arm, over, widths, tokens, kind, single, half in (
        ("rank d", "SDPA", (64, 128), (1024, 4096, 16384), "full", 1.6, 2.8),
        ("projection G=2", "SDPA", (128,), (4096,), "full", 2.0, 3.2),
        ("projection G=4", "SDPA", (128,), (4096,), "full", 2.3, 3.6),
        ("projection G=2", "rank d", (128,), (16384,), "full", 1.15, 1.10),
        ("calibrated G=2", "rank d", (128,), (16384,), "full", 1.22, 1.15),
        ("rank d", RUNTIME, (64, 128), (4096,), "full", 0.95, 1.0),
        ("projection G=2", RUNTIME, (128,), (4096,), "full", 1.1, 1.2),
        ("strict projection G=2", "SDPA", (128,), (4096,), "causal", 1.6, 2.4),
    )
)
"""Arm, over, head widths, tokens, kind of call -> the least ratio in each dtype.

On a quiet machine with AVX-512 and bf16 dot products, one thread.
"""

HEADER = ["arm", "over", "dtype", "d", "N", "kind", "asked", "measured", ""]


@dataclass(frozen=True)
class Timed:
    """A call that was measured.

    Attributes:
        dtype: a key of the least ratios.
        head_dim: d.
        tokens: N.
        kind: "full", "causal", ...
        speed: of an arm over another; None where one has no time.
    """

    dtype: str
    head_dim: int
    tokens: int
    kind: str
    speed: Callable[[str, str], float | None]


def held(calls: Iterable[Timed]) -> list[list[object]]:
    """A row for each bar and each of the calls that it is about: asked for, and measured."""
    rows: list[list[object]] = []
    for (arm, over, widths, tokens, kind, bars), call in itertools.product(BARS, calls):
        if call.head_dim in widths and call.tokens in tokens and call.kind == kind:
            least, got = bars[call.dtype], call.speed(arm, over)
            verdict = "not measured" if got is None else "held" if got >= least else "missed"
            told = "-" if got is None else f"{got:.2f}"
            shape = [call.dtype, call.head_dim, call.tokens, kind]
            rows.append([arm, over, *shape, least, told, verdict])
    return rows
