"""A call as one line of text, and back."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distr_compile.estimators import ESTIMATORS
from distr_compile.lowering.call import Approximation, Shape
from distr_compile.lowering.measure import DISTR, SDPA, Race
from distr_compile.lowering.spelling import SpellingError, read_call, spelled

CPU = torch.device("cpu")
SHAPE = Shape(2, 4, 2, 200, 160, 64, 48, False, None, torch.float32, CPU)
HALF = Approximation("projection", 32)

FAST = Race({SDPA: 4e-3, DISTR: 2e-3}, "d", 1.4, 7, 4)
SLOW = dataclasses.replace(FAST, gain=0.8)

sizes = st.integers(1, 9000)
orders = st.tuples(st.permutations([1, 2, 3]), st.booleans()).map(
    lambda drawn: (0, *((~i if i == 1 and drawn[1] else i) for i in drawn[0]))
)
masks = st.one_of(
    st.none(),
    st.tuples(st.tuples(sizes, sizes, sizes, sizes), st.sampled_from([torch.bool, torch.bfloat16])),
)
shapes = st.builds(
    lambda rep, key_heads, is_causal, offset, **rest: Shape(
        num_heads=rep * key_heads,
        num_key_heads=key_heads,
        is_causal=is_causal,
        causal_offset=offset if is_causal else 0,
        device=CPU,
        **rest,
    ),
    rep=st.integers(1, 8),
    key_heads=st.integers(1, 8),
    is_causal=st.booleans(),
    offset=st.integers(-50, 50),
    batch=sizes,
    num_queries=sizes,
    num_keys=sizes,
    head_dim=sizes,
    value_dim=sizes,
    mask=masks,
    dtype=st.sampled_from([torch.float32, torch.float16]),
    softcap=st.booleans(),
    sinks=st.booleans(),
    order=st.tuples(orders, orders, orders),
    trained=st.booleans(),
)
approximations = st.one_of(
    st.none(),
    st.builds(
        Approximation,
        estimator=st.sampled_from(list(ESTIMATORS)),
        rank=st.integers(16, 128),
        block=st.integers(0, 4096),
        rounds=st.integers(1, 2),
        strict=st.booleans(),
    ),
)


@given(shapes, approximations)
@settings(max_examples=200, deadline=None)
def test_a_spelled_call_is_read_again(shape: Shape, approximation: Approximation | None) -> None:
    assert read_call(spelled(shape, approximation)) == (shape, approximation)


def test_the_usual_is_left_out() -> None:
    text = "q=2x4x200x64 k=2x2x160 v=48 dtype=float32 device=cpu estimator=projection rank=32"
    assert spelled(SHAPE, HALF) == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "got no q, k, v, dtype"),
        ("q=1x2x3x4", "got no k, v, dtype"),
        ("q=1x2x3 k=1x2x3 v=4 dtype=float32", "1x2x3 must be 4 sizes"),
        ("q=1x2x3x4 k=1x2x3 v=4 dtype=floot", "floot is no dtype"),
        ("q=1x2x3x4 k=1x0x3 v=4 dtype=float32", "1x0x3 must be 3 sizes of at least 1"),
        ("q=1x3x3x4 k=1x2x3 v=4 dtype=float32", "2 key heads do not divide 3 heads"),
        ("q=1x2x3x4 k=1x2x3 v=4 dtype=float32 estimator=lsh", "lsh"),
        ("q=1x2x3x4 k=1x2x3 v=4 dtype=float32 estimator=projection", "needs a rank"),
        ("q=1x2x3x4 k=1x2x3 v=4 dtype=float32 casual", "got 'casual'; accepted: q=, k="),
        ("q=1x2x3x4 k=1x2x3 v=4 dtype=float32 order=bhnd,bhnd,bhnn", "three permutations"),
    ],
)
def test_what_is_no_call(text: str, said: str) -> None:
    with pytest.raises(SpellingError, match=said):
        read_call(text)
