"""The walk of the GPU's kernels over one call, interpreted where there is no GPU."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from distr_compile.lowering import cuda
from distr_compile.lowering.call import call_of


def by_kernels(
    *tensors: Tensor | None,
    out: Tensor,
    workspace: int = cuda.WORKSPACE_MIB << 20,
    by_pointers: bool = False,
    **options: Any,
) -> Tensor:
    """``out``, filled; tensors and options are those of ``call_of``."""
    call = call_of(*tensors, out=out, **options)
    cuda.attention(call, workspace=workspace, by_pointers=by_pointers)
    return out
