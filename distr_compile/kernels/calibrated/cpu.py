"""A and B of the estimator ``calibrated``, which are given; see ``kernels/roles.py``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from distr_compile.kernels.attention import cpu as attention
from distr_compile.kernels.roles import Asked

COMPUTES = ("calibrated",)
ONE_BLOCK = True
BY_PLACE = False
READS_PANELS = False


def elements(head_dim: int, rank: int) -> int:
    """A and B; see ``kernels/roles.py``."""
    return 2 * head_dim * rank


def counted(
    mask: Tensor | None, num_queries: int, num_keys: int, key_heads: int, rep: int, asked: Asked
) -> tuple[Tensor | None, Tensor | None]:
    """No row has a part in A and B."""
    return None, None


def bases(
    Q: Tensor, K: Tensor, queries: Tensor | None, keys: Tensor | None, asked: Asked
) -> Iterator[tuple[Tensor, Tensor]]:
    """A and B of ``asked.bases``, once, for each batch entry of Q, in its working dtype."""
    assert asked.bases is not None
    dtype = torch.promote_types(Q.dtype, torch.float32)
    # A copy for each entry: A and B are of (entry, key head).
    A, B = (basis.to(dtype).repeat(Q.shape[0], 1, 1) for basis in asked.bases)
    yield A, B


def groups(
    Q: Tensor, K: Tensor, queries: Tensor | None, keys: Tensor | None, asked: Asked
) -> Iterator[attention.Group]:
    """The same for the fused kernel."""
    return attention.stacked(bases(Q, K, queries, keys, asked))
