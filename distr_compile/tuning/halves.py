"""The data of ``tune``: what is tuned on, and what is held out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

from distr_compile.accuracy.batch import Batch, Batches, add_to_digest, walk


class Halves:
    """The batches, halved: of every few, spread evenly, some are held out.

    Args:
        batches: see ``tune``.
        held_out: share of the batches.

    Raises:
        ValueError: a half is empty.
    """

    def __init__(self, batches: Batches, held_out: float) -> None:
        self._batches, self._share = batches, held_out
        self._digests = [_digest(batch) for batch in walk(batches)]
        count = len(self._digests)
        held = sum(map(self._is_held, range(count)))
        if count < 2 or not 0 < held < count:
            raise ValueError(
                f"batches: got {count}, of which {held} would be held out; accepted: 2 or more, "
                "with some in both parts; give smaller batches"
            )
        self.digest = hashlib.sha256("".join(self._digests).encode()).hexdigest()
        self.tuning_count, self.held_out_count = count - held, held
        self.held_out_indices = [index for index in range(count) if self._is_held(index)]

    def _is_held(self, index: int) -> bool:
        return math.floor((index + 1) * self._share) > math.floor(index * self._share)

    def half(self, *, held: bool) -> Iterator[Batch]:
        """One half, from its first batch on. Only its own batches are compared with the first time.

        Raises:
            ValueError: the batches are others than the first time.
        """
        index = -1
        for index, batch in enumerate(walk(self._batches)):
            if index >= len(self._digests):
                raise _others(f"more batches than the {len(self._digests)} there were")
            if self._is_held(index) != held:
                continue
            if _digest(batch) != self._digests[index]:
                raise _others(f"another batch {index} than there was")
            yield batch
        if index + 1 < len(self._digests):
            raise _others(f"{index + 1} batches instead of {len(self._digests)}")


def _others(got: str) -> ValueError:
    return ValueError(
        f"batches: got {got} when they were walked first; accepted: the same data in the same "
        "order; switch shuffling off, or give a list"
    )


def _digest(batch: Batch) -> str:
    digest = hashlib.sha256()
    add_to_digest(digest, batch)
    return digest.hexdigest()
