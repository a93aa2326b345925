"""A slice of the random programs of ``programs.py``, drawn and shrunk by hypothesis."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from . import programs
from .programs import Program, drawn, failure, shrunk, written

FEW = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@st.composite
def some_program(draw: st.DrawFn) -> Program:
    program = written(lambda values: draw(st.sampled_from(values)))
    assume(program.runs())
    return program


@pytest.mark.parametrize(
    ("compiler", "dynamic", "count"),
    [("eager", False, 30), ("eager", True, 8), ("inductor", False, 2), ("inductor", True, 1)],
)
def test_programs_are_rewritten_rightly(compiler: str, dynamic: bool, count: int) -> None:
    @settings(FEW, max_examples=count)
    @given(some_program())
    def holds(program: Program) -> None:
        assert failure(program, compiler, dynamic) == "", program

    holds()


def test_a_program_prints_as_the_code_that_it_is() -> None:
    program = Program(("k.mul_(0.5)", "out = plain(q, k, v)", "return out"), keys=33)
    names: dict[str, object] = {}
    exec(f"from {programs.__name__} import *\n{program}", names)
    again = names["program"](*program.inputs())  # type: ignore[operator]
    assert torch.equal(again, program.function()(*program.inputs()))


def test_the_same_seed_draws_the_same_program() -> None:
    assert drawn(5) == drawn(5)
    assert drawn(5).runs()


def test_what_the_failure_does_not_need_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(program: Program, compiler: str, dynamic: bool) -> str:
        return "wrong" if "k.mul_(0.5)" in program.lines else ""

    monkeypatch.setattr(programs, "failure", fails)
    lines = ("q = q * 2", "k.mul_(0.5)", "out = q * 1.0", "out = plain(q, k, v)", "return out")
    small = shrunk(Program(lines, dtype="float64"), "eager", False)
    assert small == Program(("k.mul_(0.5)", "out = plain(q, k, v)", "return out"))
