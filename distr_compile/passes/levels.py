"""The shapes that scores take on their way, and where a tensor's leading axes stand at each.

Between two levels the scores were reshaped, or broadcast to more axes. What belongs to one level (Q
and K to the product's, V to the output's, a mask to that where it is added) is wanted at another.
Which axis becomes which is read off the reshapes in between: sizes alone do not tell, as a batch
may be as large as there are heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distr_compile.passes.site import Level, RefusedError
from distr_compile.passes.vocabulary import hint, same_shape, same_size

Lead = tuple[Any, ...]
"""Sizes of all axes but the last two, ints or SymInts; 1 where a tensor is broadcast."""


def all_ones(lead: Lead) -> bool:
    """Whether a tensor is broadcast over all of its leading axes."""
    return all(same_size(size, 1) for size in lead)


@dataclass(frozen=True)
class Levels:
    """The levels of a site, from the product's to the output's.

    Attributes:
        all: in order.
        matrix: (N_q, N_k).
    """

    all: tuple[Level, ...]
    matrix: tuple[Any, Any]

    def place(self, level: Level) -> int:
        """Where a level is among them."""
        return next(i for i, each in enumerate(self.all) if each is level)

    def lead(self, level: Level) -> Lead | None:
        """The leading axes, where the last ones make up (N_q, N_k), perhaps in parts."""
        if same_shape(level.shape[-2:], self.matrix):
            return level.lead
        tail = tail_length(level, self.matrix)
        return None if tail is None else level.shape[: len(level.shape) - tail]

    def carried(self, lead: Lead, start: Level, stop: Level) -> Lead:
        """A tensor's leading axes at another level, each of them full or 1, in the same order.

        Args:
            lead: aligned from the right with those of ``start``; each as large there, or 1.
            start: the level of the tensor.
            stop: the level that is asked for.

        Raises:
            RefusedError: a reshape merges or splits axes of which the tensor has only some.
        """
        first, last = self.place(start), self.place(stop)
        lead = _aligned(lead, self.lead(start))
        here, is_reshaped = start, False
        for i in range(first, last, 1 if last > first else -1):
            there = self.all[i + 1] if last > first else self.all[i - 1]
            is_reshaped |= (there if last > first else self.all[i]).is_reshaped
            full, wanted = self.lead(here), self.lead(there)
            if wanted is None and there is not stop:
                continue  # scores under a shape of no rows and keys: both reshapes are one
            if full is None or wanted is None:
                raise RefusedError("layout", "the scores are reshaped over rows or keys")
            lead = _reshaped(lead, full, wanted) if is_reshaped else _broadcast(lead, wanted)
            here, is_reshaped = there, False
        return lead


def tail_length(level: Level, matrix: tuple[Any, Any]) -> int | None:
    """How many trailing axes of ``level`` make up (N_q, N_k); None if none do."""
    area, product = math.prod(map(hint, matrix)), 1
    for count, size in enumerate(reversed(level.shape), start=1):
        product *= hint(size)
        if product == area:
            return count
    return None


def _aligned(lead: Lead, full: Lead | None) -> Lead:
    """The axes with others of size 1 in front, so that there are as many as the level has."""
    if full is None or len(lead) > len(full):
        raise RefusedError("layout", "the scores are reshaped over rows or keys")
    lead = (*(1,) * (len(full) - len(lead)), *lead)
    _check_part(lead, full)
    return lead


def _check_part(lead: Lead, full: Lead) -> None:
    """Refuse a tensor some axis of which is neither 1 nor as large as that of the scores."""
    for own, whole in zip(lead, full, strict=True):
        if same_size(own, 1) or same_size(own, whole):
            continue
        text = "an operand has other leading axes than the scores"
        if hint(own) == hint(whole):
            text = f"sizes {own} and {whole} of leading axes are not known to be equal"
        raise RefusedError("layout", text)


def _broadcast(lead: Lead, wanted: Lead) -> Lead:
    """Axes in front come, or go where they are 1; the others stay what they are."""
    added = len(wanted) - len(lead)
    if not all_ones(lead[: max(-added, 0)]):
        raise RefusedError("layout", "an operand has other leading axes than the scores")
    lead = (*(1,) * max(added, 0), *lead[max(-added, 0) :])
    _check_part(lead, wanted)
    return lead


def _reshaped(lead: Lead, full: Lead, wanted: Lead) -> Lead:
    """The axes under a reshape of ``full`` to ``wanted``.

    The reshape falls into groups of successive axes that are merged and split among themselves, the
    smallest there are; of each a tensor has all, or none.
    """
    if all_ones(lead):
        return (1,) * len(wanted)
    found: list[Any] = []
    for old, new in _groups(full, wanted):
        if same_shape(lead[old], full[old]):
            found += wanted[new]
        elif all_ones(lead[old]):
            found += (1,) * len(wanted[new])
        else:
            text = "an operand is broadcast over leading axes that are merged or split"
            raise RefusedError("layout", text)
    return tuple(found)


def _groups(full: Sequence[Any], wanted: Sequence[Any]) -> list[tuple[slice, slice]]:
    """Which axes of two shapes with as many elements hold the same elements, group by group."""
    groups, i, j = [], 0, 0
    while i < len(full) and j < len(wanted):
        first, second = i, j
        left, right = full[i], wanted[j]
        i, j = i + 1, j + 1
        while not same_size(left, right):
            if i < len(full) and (hint(left) < hint(right) or j == len(wanted)):
                left, i = left * full[i], i + 1
            elif j < len(wanted):
                right, j = right * wanted[j], j + 1
            else:
                raise RefusedError("layout", "a reshape of leading axes of unknown sizes")
        groups.append((slice(first, i), slice(second, j)))
    groups.append((slice(i, None), slice(j, None)))  # what is left: axes of size 1, or of none
    return groups
