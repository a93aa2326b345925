"""What the forward of a call keeps for its backward, and what that fills."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distr_compile.estimators import MOST_AUTO_BLOCKS, arithmetic, auto_grouping_block
from distr_compile.kernels.attention.dropout import Dropout
from distr_compile.lowering.call import Approximation


@dataclass(frozen=True)
class Saved:
    """What a backward needs beside inputs and output.

    Attributes:
        lse: ``(B, H, N)``: logarithm of each row's sum of exponentials, sinks included; -inf where
            the row sees nothing.
        bases: A and B ``(B or 1, H_k, blocks or 1, d, r)``; None where the call is exact, and to be
            filled not where it is given them.
    """

    lse: Tensor
    bases: tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class Gradients:
    """Tensors to be filled: gradients in the shapes and dtypes of q, k, v, the mask and the sinks.

    Those of mask and sinks are None where nobody asks for them.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    sinks: Tensor | None


def dropout_of(q: Tensor, p: float, seed: Tensor | None) -> Dropout | None:
    """What a call drops, of its arguments; ``p`` is less than 1."""
    return Dropout(p, seed, q.shape[1]) if p and seed is not None else None


def dtype_of(q: Tensor) -> torch.dtype:
    """The dtype of what is saved: that of the arithmetic, fp64 or fp32."""
    return torch.promote_types(q.dtype, torch.float32)


def number_of_blocks(num_queries: int, how: Approximation, has_mask: bool) -> int:
    """How many pairs of A and B there is room for; guards ask a symbolic length which rule holds.

    A mask may say that fewer rows count, of which "auto" can make more blocks.
    """
    if arithmetic(how.estimator, "cpu", "ONE_BLOCK").ONE_BLOCK:
        return 1
    block = how.block or auto_grouping_block(num_queries, how.estimator, how.strict)
    if has_mask and not how.block and not how.strict:
        return MOST_AUTO_BLOCKS
    return 1 if block >= num_queries else -(-num_queries // block)
