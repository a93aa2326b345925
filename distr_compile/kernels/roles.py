"""The three roles that an estimator has modules for: what they are asked, and what they give.

A row of the table of estimators names a module for each role, and each module lists in ``COMPUTES``
the estimators that it computes. What is below has the same name and signature in every folder, as
``tests/test_estimator_rows.py`` holds it to.

``reference.py``, the definition, which ``attention/reference.py`` calls:

- ``factors(Q, K, mask, asked)``: the ``Block`` of each grouping block, in turn, of
  Q ``(B, H_k, rep, N, d)`` and K ``(B or 1, H_k, M, d)``. The mask says with ``asked`` which rows
  and keys count, if the estimator asks for that.

``cpu.py``, A and B for PyTorch's products and for the CPU kernel, which ``lowering/cpu.py`` calls:

- ``ONE_BLOCK``: whether one A and B serve all query rows, whatever grouping block is asked for.
- ``READS_PANELS``: whether ``groups`` reads Q in panels of ``Asked.panel`` rows as temporaries.
- ``elements(head_dim, rank)``: elements of its temporaries for one key head, panels not counted.
- ``counted(mask, num_queries, num_keys, key_heads, rep, asked)``: which query rows have a part in A
  and B, bool ``(B or 1, H_k or 1, rep, N)``, and which keys, ``(B or 1, H_k or 1, M)``; None: all.
- ``bases(Q, K, queries, keys, asked)``: A and B ``(b h, d, r)`` of each grouping block in turn, of
  Q ``(b, h, rep, N, d)`` and K ``(b or 1, h, M, d)``, some heads of the call, with what ``counted``
  gave for them.
- ``groups``, of the same arguments: the same for the CPU kernel, see ``Group`` in
  ``attention/cpu.py``; ``stacked`` there makes it of ``bases``.

``launch.py``, on a GPU, which ``lowering/cuda.py`` calls; it imports Triton only when it is called:

- ``prologue(Q, K, mask, asked)``: the ``Prologue`` of Q ``(B, H, N, d)`` and K
  ``(B or 1, H_k, M, d)``, the tensors of the whole call. With ``asked.bases`` it makes Qhat and
  Khat of the whole call at once, and they have no blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Asked:
    """How Qhat and Khat, or A and B, are to be made.

    Attributes:
        estimator: a name that the module lists in ``COMPUTES``.
        rank: r.
        block: l, query rows per grouping block, at least 1.
        rounds: how often the estimator refines its basis, one of those that it takes.
        seed: names the random numbers of the estimator.
        causal_offset: row i sees keys ``j <= i + causal_offset``; None where all do.
        strict: from the query rows before a block and the keys before it; ``causal_offset`` is a
            number then.
        bases: A and B ``(h, d, r)`` of the key heads where the estimator needs them, else None.
        panel: query rows that ``cpu.py`` reads at a time.
        key_rows: keys that it reads at a time.
    """

    estimator: str
    rank: int
    block: int
    rounds: int = 1
    seed: int = 0
    causal_offset: int | None = None
    strict: bool = False
    bases: tuple[Tensor, Tensor] | None = None
    panel: int = 2048
    key_rows: int = 4096


@dataclass(frozen=True)
class Block:
    """The two thin factors for query rows ``start`` to ``stop``: S is about Qhat Khat^T there.

    Attributes:
        start: first query row of the grouping block.
        stop: one past its last row.
        Qhat: ``(B, H, stop - start, r)``.
        Khat: ``(B, H_k, m, r)``, of the first m keys: all M, but with ``strict`` those before the
            block. The scores of the other keys are exact.
    """

    start: int
    stop: int
    Qhat: Tensor
    Khat: Tensor


@dataclass(frozen=True)
class Prologue:
    """What makes Qhat and Khat of a chunk of heads and query rows, or of the whole call.

    Attributes:
        factors: ``(Q, K, *counted, is_causal=, causal_offset=)`` -> Qhat ``(B, H, N, r)`` and Khat
            ``(B, H_k, blocks, M, r)``; in the prefix form ``earlier=``, the grouping blocks of Q
            that are not wanted, instead of ``is_causal``. Where the estimator needs bases it is
            ``(Q, K)`` -> Qhat and Khat ``(B or 1, H_k, M, r)``.
        own_bytes: its memory beside its results, for a key head once and for each grouping block.
        counted: which rows of all queries, and of all keys, it looks at; empty if it does not ask.
    """

    factors: Callable[..., tuple[Tensor, Tensor]]
    own_bytes: tuple[int, int] = (0, 0)
    counted: tuple[Tensor | None, ...] = ()


def prefix_edge(start: int, num_keys: int, causal_offset: int) -> int:
    """The keys that a block from row ``start`` on approximates in the strict form: those before it.

    Every row of the block comes after them where row i sees keys ``j <= i + causal_offset``. The
    first block has no queries before it, from which a basis could come: 0, all keys exact.
    """
    return max(0, min(num_keys, start + causal_offset)) if start else 0
