"""What ``lowering/cpu.py`` asks of the module that makes A and B; what such modules share.

The table of estimators names the module (``Estimator.cpu``). It has, besides ``COMPUTES``:

- ``ONE_BLOCK``: whether one A and B serve all query rows, whatever grouping block is asked for.
- ``READS_PANELS``: whether ``groups`` reads Q in panels of ``Asked.panel`` rows as temporaries.
- ``elements(head_dim, rank)``: elements of its temporaries for one key head, panels not counted.
- ``counted(mask, num_queries, num_keys, key_heads, rep, asked)``: which query rows have a part in A
  and B, bool ``(B or 1, H_k or 1, rep, N)``, and which keys, ``(B or 1, H_k or 1, M)``; None: all.
- ``bases(Q, K, queries, keys, asked)``: A and B ``(b h, d, r)`` of each grouping block in turn, of
  Q ``(b, h, rep, N, d)`` and K ``(b or 1, h, M, d)``, some heads of the call, with what ``counted``
  gave for them.
- ``groups``, of the same arguments: the same for the fused kernel, see ``Group`` in
  ``kernels/attention/cpu.py``; ``stacked`` there makes it of ``bases``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Asked:
    """How A and B are to be made.

    Attributes:
        estimator: a name that the module lists in ``COMPUTES``.
        block: query rows per grouping block.
        rank: r.
        rounds: how often the estimator refines its basis.
        seed: names the random numbers of the estimator.
        causal_offset: row i sees keys ``j <= i + causal_offset``; None where all do.
        strict: from the query rows before a block and the keys before it; ``causal_offset`` is a
            number then.
        panel: query rows to read at a time.
        key_rows: keys to read at a time.
        fixed: A and B ``(h, d, r)`` of these heads where the estimator needs them, else None.
    """

    estimator: str
    block: int
    rank: int
    rounds: int = 1
    seed: int = 0
    causal_offset: int | None = None
    strict: bool = False
    panel: int = 2048
    key_rows: int = 4096
    fixed: tuple[Tensor, Tensor] | None = None


def stack(Q: Tensor) -> Tensor:
    """``(b, h, rep, l, d)`` to ``(b h, l rep, d)``, rows token by token, in the working dtype."""
    return working(Q.transpose(2, 3)).reshape(-1, Q.shape[2] * Q.shape[3], Q.shape[4])


def working(t: Tensor) -> Tensor:
    """In the dtype of all arithmetic: fp64 stays, and what is narrower becomes fp32."""
    return t if t.dtype == torch.float64 else t.float()
