"""Programs around one attention whose scores gain, merge, split and lose leading axes.

All sizes but those of rows, keys and widths are 1 or 2, so that one axis is easily taken for
another. The result of every rewritten program, its op computing exactly, is eager's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from distr_compile.lowering.exactly import computing_exactly

ROWS, KEYS, WIDTH, VALUES = 17, 19, 32, 8

Lead = tuple[int, ...]


@dataclass
class Program:
    """Lines of a function of its inputs, and the leading axes of what ``x`` is after them."""

    lead: Lead
    lines: list[str] = field(default_factory=list)
    inputs: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def given(self, *shape: int) -> str:
        name = f"t{len(self.inputs)}"
        self.inputs[name] = shape
        return name

    def grow(self, lead: Lead) -> None:
        self.lead = torch.broadcast_shapes(self.lead, lead)

    def reshape(self, lead: Lead, matrix: tuple[int, int]) -> None:
        self.lines.append(f"x = x.reshape({(*lead, *matrix)})")
        self.lead = lead

    def source(self) -> str:
        body = "\n    ".join([*self.lines, "return x"])
        return f"def function({', '.join(self.inputs)}):\n    {body}"


def leads(most: int) -> st.SearchStrategy[Lead]:
    return st.lists(st.sampled_from([1, 2, 2]), max_size=most).map(tuple)


def fitting(draw: st.DrawFn, lead: Lead, most: int) -> Lead:
    """Leading axes that broadcast with these, and perhaps add one."""
    own = [draw(st.sampled_from([1, 2] if n == 1 else [1, n])) for n in lead]
    own = own[draw(st.integers(0, len(own))) :]
    if len(own) == len(lead) < most and draw(st.booleans()):
        own = [2, *own]
    return tuple(own)


def other_axes(draw: st.DrawFn, lead: Lead) -> Lead:
    """The same elements under other leading axes."""
    kind = draw(st.sampled_from(["insert", "merge", "split", "drop"]))
    place = draw(st.integers(0, len(lead)))
    if kind == "merge" and len(lead) > 1:
        place = min(place, len(lead) - 2)
        return (*lead[:place], math.prod(lead[place : place + 2]), *lead[place + 2 :])
    if kind == "split" and 4 in lead:
        place = lead.index(4)
        return (*lead[:place], 2, 2, *lead[place + 1 :])
    if kind == "drop" and 1 in lead:
        place = lead.index(1)
        return (*lead[:place], *lead[place + 1 :])
    return (*lead[:place], 1, *lead[place:]) if len(lead) < 4 else lead


@st.composite
def programs(draw: st.DrawFn) -> Program:
    q = draw(leads(3))
    program = Program(q)
    k = fitting(draw, q, 3)
    program.grow(k)
    left, right = program.given(*q, ROWS, WIDTH), program.given(*k, KEYS, WIDTH)
    program.lines.append(f"x = {left} @ {right}.mT / 6")
    for _ in range(draw(st.integers(0, 3))):
        if draw(st.booleans()):
            program.reshape(other_axes(draw, program.lead), (ROWS, KEYS))
            continue
        own = fitting(draw, program.lead, 4)
        what = draw(st.sampled_from(["bias", "mask", "temperature"]))
        if what == "temperature":
            name = program.given(*own, 1, 1)
            program.lines.append(f"x = x * {name}")
        else:
            name = program.given(*own, ROWS, KEYS)
            change = f"x + {name}" if what == "bias" else f"x.masked_fill({name} > 1, -torch.inf)"
            program.lines.append(f"x = {change}")
        program.grow(own)
    program.lines.append("x = x.softmax(-1)")
    if draw(st.booleans()):
        program.reshape(other_axes(draw, program.lead), (ROWS, KEYS))
    v = program.given(*fitting(draw, program.lead, 4), KEYS, VALUES)
    program.lines.append(f"x = x @ {v}")
    return program


def check(program: Program, group_size: int, dynamic: bool) -> None:
    names: dict[str, object] = {"torch": torch}
    exec(program.source(), names)
    function = names["function"]
    assert callable(function)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(s, generator=generator) for s in program.inputs.values()]
    wanted = function(*inputs)
    torch._dynamo.reset()
    policy = {"default": {"group_size": group_size, "min_seq_len": 0}}
    options = {"policy": policy, "compiler": "eager"}
    compiled = torch.compile(function, backend="distr", options=options, dynamic=dynamic)
    with torch.no_grad(), computing_exactly():
        got: Tensor = compiled(*inputs)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("group_size", [1, 2])
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(program=programs(), dynamic=st.booleans())
def test_leading_axes(group_size: int, program: Program, dynamic: bool) -> None:
    check(program, group_size, dynamic)
