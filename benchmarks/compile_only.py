"""Compiling kernels for a device that is not here: Triton's own path, without the launch.

The kernels' host functions are called on tensors without storage (``device="meta"``), under a
driver that only knows the name of an architecture. What is compiled, and under which key Triton's
cache keeps it, is what a launch on such a device would ask for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch


class Driver:
    """Stands where Triton's driver of a device stands, and knows the device's architecture only."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        """The architecture."""
        return self.target

    def get_current_device(self) -> str:
        """By which Triton keeps what it has compiled in this process."""
        return str(self.target)

    def get_current_stream(self, device: str) -> int:
        """None is ever used."""
        return 0


def target(architecture: str) -> Any:
    """Triton's name of an architecture such as "sm_90" or "gfx942"."""
    from triton.backends.compiler import GPUTarget

    if architecture.startswith("gfx"):
        return GPUTarget("hip", architecture, 64)
    return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)


@contextmanager
def compiling(
    architecture: str,
    compiled: Callable[[Any], object],
    is_wanted: Callable[[Any, dict[str, Any]], bool] = lambda kernel, arguments: True,
) -> Iterator[None]:
    """Compile each kernel that is launched inside, and do not launch it.

    Args:
        architecture: to compile for.
        compiled: is given what came out.
        is_wanted: is given the kernel and its arguments by name; where it says no, nothing happens.

    Raises:
        RuntimeError: Triton was imported for its interpreter, which compiles nothing.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("got TRITON_INTERPRET=1, which compiles nothing: unset it")
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(Driver(target(architecture)))
    run = JITFunction.run

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if not is_wanted(self, dict(zip(self.arg_names, args, strict=False)) | kwargs):
            return None
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled(kernel)
        return kernel

    with (
        mock.patch.object(JITFunction, "run", only_compile),
        mock.patch.object(torch.version, "hip", "0" if architecture.startswith("gfx") else None),
    ):
        yield
