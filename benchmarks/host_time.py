"""Python's time for a call of the op on a GPU, measured without one: the launcher does nothing.

    python -m benchmarks.host_time [--rounds 30] [--json FILE]

Tensors lie on the CPU, kernels are compiled for the architecture and never run: what is left is the
op's dispatch, our walk, allocations and Triton's binding of arguments. Not in it are switching to
the tensors' device and what Triton's launcher itself takes, in C and for tensor descriptors. All
calls take turns; the least processor time of the rounds is printed: all else is other work on the
machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.compile_only import Driver, target
from benchmarks.store import commit, version
from distr_compile.lowering import choose, cuda, op
from distr_compile.lowering.call import Approximation, Scores, op_arguments
from distr_compile.lowering.measure import random_bases

SIZES = (1, 2, 64, 64)  # B, H, N, d: one chunk, and next to nothing for PyTorch to compute
REPEATS = 20


@contextmanager
def launching_nothing(architecture: str) -> Iterator[None]:
    """Triton compiles for the architecture, and its launcher is a function that returns.

    Raises:
        RuntimeError: Triton was imported for its interpreter.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("got TRITON_INTERPRET=1, which launches by itself: unset it")
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime.driver import driver

    driver.set_active(Driver(target(architecture)))
    taking_all = replace(cuda.IMPLEMENTATION, refuses=lambda shape, approximation: None)

    def nothing(*arguments: Any) -> None:  # a mock would take time
        return

    with (
        mock.patch.object(CompiledKernel, "run", nothing),
        mock.patch.object(CompiledKernel, "_init_handles", nothing),
        mock.patch.object(cuda, "architecture", lambda _: architecture),  # noqa: PT008
        mock.patch.object(choose, "implementations", lambda: (taking_all,)),  # noqa: PT008
        mock.patch.object(choose, "PLANNED", {"cpu"}),
        mock.patch.object(torch, "bmm", lambda a, b: a.new_empty(*a.shape[:2], b.shape[2])),
    ):
        yield


def calls(dtype: torch.dtype = torch.float16) -> dict[str, Callable[[], Any]]:
    """The op at the full width and with estimators, tokens before heads in memory."""
    B, H, N, d = SIZES
    q, k, v = (torch.randn(B, N, H, d).to(dtype).transpose(1, 2) for _ in "qkv")
    bases = random_bases(H, d, d // 2, q.device)
    scores = Scores(d**-0.5)

    def through_op(how: Approximation, *bases: torch.Tensor) -> Callable[[], Any]:
        arguments = op_arguments(how, scores)
        return lambda: op.call(q, k, v, None, *bases, **arguments)

    found = {"rank d": through_op(Approximation.none(d))}
    for name in ("lsh-mean", "projection", "calibrated"):
        given = bases if name == "calibrated" else ()
        found[name] = through_op(Approximation(name, d // 2), *given)
    return found | {f"{name}, no plan": without_plan(call) for name, call in found.items()}


def without_plan(call: Callable[[], Any]) -> Callable[[], Any]:
    """The same, worked out anew by every call."""

    def run() -> None:
        choose.PLANNED.clear()
        call()
        choose.PLANNED.add("cpu")

    return run


def best_us(timed: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Microseconds of processor time a call: the best round of each, rounds in turn."""
    best = dict.fromkeys(timed, float("inf"))
    for _ in range(rounds):
        for name, call in timed.items():
            start = time.thread_time()
            for _ in range(REPEATS):
                call()
            best[name] = min(best[name], 1e6 * (time.thread_time() - start) / REPEATS)
    return best


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--architecture", default="sm_90")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with launching_nothing(options.architecture):
        timed = calls()
        for call in timed.values():
            call()  # compiles
        found = best_us(timed, options.rounds)
    for name, us in found.items():
        print(f"{name:20} {us:7.1f} us")
    if options.json:
        told = {
            "cpu": platform.processor() or platform.machine(),
            "load": os.getloadavg(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": version("triton"),
            "commit": commit(),
            "sizes": SIZES,
            "us": {name: round(us, 1) for name, us in found.items()},
        }
        options.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
