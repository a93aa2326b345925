"""Where a tensor's leading axes stand after the scores were reshaped or broadcast.

The reference is PyTorch: random numbers are broadcast to the scores' shape and reshaped with them.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distr_compile.passes.levels import Levels
from distr_compile.passes.site import Level, RefusedError

MATRIX = (3, 5)


def levels(*leads: tuple[int, ...], reshaped: bool = True) -> Levels:
    first, *others = ((*lead, *MATRIX) for lead in leads)
    return Levels((Level(first), *(Level(x, is_reshaped=reshaped) for x in others)), MATRIX)


def check(lead: tuple[int, ...], full: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether an answer is given; if so it is PyTorch's."""
    both = levels(full, wanted)
    start, stop = both.all
    try:
        found = both.carried(lead, start, stop)
    except RefusedError:
        return False
    term = torch.randn(lead, generator=torch.Generator().manual_seed(0))
    reshaped = term.expand(full).reshape(wanted)
    assert torch.equal(term.reshape(found).expand(wanted), reshaped)
    return True


@pytest.mark.parametrize(
    ("lead", "full", "wanted", "found"),
    [
        ((4,), (4,), (4, 1), (4, 1)),
        ((4,), (4,), (1, 4), (1, 4)),
        ((1, 4), (1, 4), (4, 1), (4, 1)),
        ((2, 1), (2, 4), (2, 1, 4), (2, 1, 1)),
        ((1, 4), (2, 4), (2, 2, 2), (1, 2, 2)),
        ((6, 1, 4), (6, 1, 4), (2, 3, 4), (2, 3, 4)),
        ((1, 1, 4), (2, 3, 4), (6, 4), (1, 4)),
        ((), (2, 4), (8,), (1,)),
        ((2, 4), (2, 4), (4, 2), (4, 2)),
    ],
)
def test_axes_follow_a_reshape(
    lead: tuple[int, ...], full: tuple[int, ...], wanted: tuple[int, ...], found: tuple[int, ...]
) -> None:
    both = levels(full, wanted)
    assert both.carried(lead, *both.all) == found
    assert check(lead, full, wanted)
    back = levels(wanted, full)
    padded = (*(1,) * (len(full) - len(lead)), *lead)
    assert back.carried(found, *back.all) == padded
    assert both.carried(found, both.all[1], both.all[0]) == padded


@pytest.mark.parametrize(
    ("lead", "full", "wanted"),
    [((1, 4), (2, 4), (8,)), ((2, 1), (2, 4), (8,)), ((2, 1), (2, 4), (4, 2))],
)
def test_a_part_of_merged_axes_is_refused(
    lead: tuple[int, ...], full: tuple[int, ...], wanted: tuple[int, ...]
) -> None:
    both = levels(full, wanted)
    with pytest.raises(RefusedError, match="merged or split"):
        both.carried(lead, *both.all)


def test_axes_that_are_broadcast_come_in_front() -> None:
    both = levels((4,), (2, 4), reshaped=False)
    assert both.carried((4,), *both.all) == (1, 4)
    assert both.carried((1, 4), both.all[1], both.all[0]) == (4,)
    with pytest.raises(RefusedError, match="other leading axes"):
        both.carried((2, 4), both.all[1], both.all[0])


def test_an_axis_that_the_scores_have_not_is_refused() -> None:
    both = levels((2, 1), (2, 4), reshaped=False)
    with pytest.raises(RefusedError, match="other leading axes"):
        both.carried((2, 4), *both.all)


def test_rows_and_keys_that_are_merged_in_between_do_not_matter() -> None:
    """Two reshapes are one where the shape in between has no axes of rows and keys."""
    first, last = Level((2, 4, *MATRIX)), Level((8, *MATRIX), is_reshaped=True)
    between = Level((2 * 4 * 3, 5), is_reshaped=True)
    three = Levels((first, between, last), MATRIX)
    assert three.carried((2, 4), first, last) == (8,)
    with pytest.raises(RefusedError, match="rows or keys"):
        three.carried((2, 4), first, between)


def test_axes_of_split_rows_and_keys_are_none_of_the_leading_ones() -> None:
    first, split = Level((2, *MATRIX)), Level((2, 1, 3, 5, 1), is_reshaped=True)
    both = Levels((first, split), MATRIX)
    assert both.carried((2,), first, split) in {(2,), (2, 1)}


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """A shape, another with as many elements, and a tensor that has some axes of the first."""
    primes = draw(st.lists(st.sampled_from([1, 2, 2, 3]), min_size=1, max_size=5))

    def grouped() -> tuple[int, ...]:
        cuts = draw(st.lists(st.integers(0, len(primes)), max_size=4))
        edges = [0, *sorted(cuts), len(primes)]
        return tuple(math.prod(primes[a:b]) for a, b in itertools.pairwise(edges))

    full, wanted = grouped(), grouped()
    kept = draw(st.lists(st.booleans(), min_size=len(full), max_size=len(full)))
    lead = tuple(size if keep else 1 for size, keep in zip(full, kept, strict=True))
    return lead, full, wanted


@given(case=reshapes())
def test_any_answer_is_pytorchs(
    case: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
) -> None:
    lead, full, wanted = case
    is_answered = check(lead, full, wanted)
    if lead == full or math.prod(lead) == 1:
        assert is_answered
