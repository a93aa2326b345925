"""The LSH estimators on a GPU: what ``cuda.py`` asks of ``kernels/lsh/launch.py``."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from distr_compile.kernels.lsh.reference import COMPUTES as COMPUTES
from distr_compile.lowering.cuda import Asked, Prologue


def prologue(q: Tensor, k: Tensor, mask: Tensor | None, asked: Asked) -> Prologue:
    """What makes Qhat and Khat of a chunk: it asks for no memory of its own, and for no mask."""
    from distr_compile.kernels.lsh.launch import lsh_factors

    return Prologue(
        partial(
            lsh_factors,
            rank=asked.rank,
            estimator=asked.estimator,
            grouping_block=asked.block,
            seed=asked.seed,
        )
    )
