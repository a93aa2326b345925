"""The three roles that an estimator has modules for: what they are asked, and what they give.

A row of the table of estimators names a module for each role, and each module lists in ``COMPUTES``
the estimators that it computes. What is below has the same name and signature in every folder, as
``tests/test_estimator_rows.py`` holds it to.

``reference.py``, the definition, which ``attention/reference.py`` calls:

- ``factors(Q, K, mask, asked)``: the ``Block`` of each of ``asked.blocks``, in turn, of
  Q ``(B, H_k, rep, N, d)`` and K ``(B or 1, H_k, M, d)``. The mask says with ``asked`` which rows
  and keys count, if the estimator asks for that.

``cpu.py``, A and B for PyTorch's products and for the CPU kernel, which ``lowering/cpu.py`` calls:

- ``ONE_BLOCK``: whether one A and B serve all query rows, whatever grouping block is asked for.
- ``BY_PLACE``: whether A and B depend on the place of a row in its grouping block.
- ``READS_PANELS``: whether ``groups`` reads Q in panels of ``Asked.panel`` rows as temporaries.
- ``elements(head_dim, rank)``: elements of its temporaries for one key head, panels not counted.
- ``counted(mask, num_queries, num_keys, key_heads, rep, asked)``: which query rows have a part in A
  and B, bool ``(B or 1, H_k or 1, rep, N)``, and which keys, ``(B or 1, H_k or 1, M)``; None: all.
- ``bases(Q, K, queries, keys, asked)``: A and B ``(b h, d, r)`` of each grouping block in turn, of
  Q ``(b, h, rep, N, d)`` and K ``(b or 1, h, M, d)``, some heads of the call and the rows from the
  first that has a block to the last, with what ``counted`` gave for them.
- ``groups``, of the same arguments: the same for the CPU kernel, see ``Group`` in
  ``attention/cpu.py``; ``stacked`` there makes it of ``bases``.

``launch.py``, on a GPU, which ``lowering/cuda.py`` calls; it imports Triton only when it is called:

- ``prologue(Q, K, mask, asked)``: the ``Prologue`` of Q ``(B, H, N, d)`` and K
  ``(B or 1, H_k, M, d)``, the tensors of the whole call. With ``asked.bases`` it makes Qhat and
  Khat of the whole call at once, and they have no blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import Tensor

from distr_compile.kernels.blocks import Places


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
        first: the row with which the first block begins.
        stop: one past the last row of the last block; None for all rows.
        seen: for each block the keys before this number have a part in A and B, if they count;
            where it is None ``causal_offset`` says which.
        given_block: query rows per grouping block as they are asked for, 0 for "auto".
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
    first: int = 0
    stop: int | None = None
    seen: tuple[int, ...] | None = None
    given_block: int = 0

    def blocks(self, num_queries: int) -> Iterator[tuple[slice, slice]]:
        """The rows that A and B of each block are made of, and those that use them.

        They are the same, but that rows before the first block go with it, and those after the last
        block with that.
        """
        end = num_queries if self.stop is None else self.stop
        for start in range(self.first, end, self.block):
            stop = min(start + self.block, end)
            first = 0 if start == self.first else start
            yield slice(start, stop), slice(first, num_queries if stop == end else stop)


@dataclass(frozen=True)
class Block:
    """The two thin factors for query rows ``start`` to ``stop``: S is about Qhat Khat^T there.

    Attributes:
        start: first query row of the grouping block.
        stop: one past its last row.
        Qhat: ``(B, H, stop - start, r)``.
        Khat: ``(B, H_k, m, r)``, of the first m keys: all M, but with ``strict`` those before the
            block. The scores of the other keys are exact.
        entries: the batch entries that it is of, those of Qhat and Khat.
    """

    start: int
    stop: int
    Qhat: Tensor
    Khat: Tensor
    entries: slice = field(default_factory=lambda: slice(None))


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
        places: where the grouping blocks lie, if a mask may say that; ``factors`` then takes
            ``places=`` too, of the chunk.
    """

    factors: Callable[..., tuple[Tensor, Tensor]]
    own_bytes: tuple[int, int] = (0, 0)
    counted: tuple[Tensor | None, ...] = ()
    places: Places | None = None


def keys_of_block(asked: Asked, number: int, stop: int, num_keys: int) -> int:
    """The keys that have a part in A and B of a block, if they count: those before this one.

    Args:
        asked: of a form that is not strict.
        number: of the block.
        stop: one past its last row.
        num_keys: M.
    """
    if asked.seen is not None:
        return asked.seen[number]
    if asked.causal_offset is None:
        return num_keys
    return max(0, min(num_keys, stop + asked.causal_offset))


def prefix_edge(start: int, num_keys: int, causal_offset: int) -> int:
    """The keys that a block from row ``start`` on approximates in the strict form: those before it.

    Every row of the block comes after them where row i sees keys ``j <= i + causal_offset``. The
    first block has no queries before it, from which a basis could come: 0, all keys exact.
    """
    return max(0, min(num_keys, start + causal_offset)) if start else 0
