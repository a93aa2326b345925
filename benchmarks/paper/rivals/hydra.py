"""Hydra attention (arXiv 2209.07484): as many heads as features, and no softmax.

With Q and K of every token scaled to length 1 over the features of all heads together, O_i is
q_i * sum_j (k_j * v_j), element by element. There is no scale and no 1 / N. The causal form is
ours: the sum goes over j <= i.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.paper.rivals.layer import Rival

EPSILON = 1e-12
"""Least length to divide by."""


def hydra(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """Return Hydra attention, ``(B, H, N, d)``.

    Args:
        q: ``(B, H, N, d)``, floating.
        k: ``(B, H, M, d)``; M = N if causal.
        v: ``(B, H, M, d)``.
        causal: row i sums the keys j <= i only.
    """
    found = _unit(k) * v
    total = found.cumsum(2) if causal else found.sum(2, keepdim=True)
    return _unit(q) * total


def _unit(t: Tensor) -> Tensor:
    """Every token divided by its length over all heads."""
    return t / torch.linalg.vector_norm(t, dim=(1, 3), keepdim=True).clamp_min(EPSILON)


class Hydra(Rival):
    """Hydra attention of one layer; no parameters."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """See :meth:`Rival.attend`."""
        return hydra(q, k, v, causal=self.layer.is_causal)
