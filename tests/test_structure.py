"""Files and functions stay of a size to be read at one sitting.

The limits are for the package and its tests. A kernel is a function under ``triton.jit``: it takes
what its launch passes. An option that is given by name costs a reader of a call nothing, so that of
a public function only the parameters that have a place count.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILE_LINES, BODY_LINES, PARAMETERS = 600, 60, 10

EXCEPTIONS = {
    "distr_compile/kernels/attention/triton_fwd.py: attention_fwd: body": (
        "one launch, argument by argument in the kernel's order"
    ),
    "distr_compile/kernels/attention/triton_bwd.py: attention_bwd: body": (
        "two launches, argument by argument"
    ),
    "tests/passes/test_properties.py: attend: body": "a drawn program, to be read from top to end",
}
"""What is longer, as ``file: function: limit``, and why."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def files() -> Iterator[tuple[str, str]]:
    for top in ("distr_compile", "tests"):
        for path in sorted((ROOT / top).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


def is_kernel(function: Function) -> bool:
    return any(ast.unparse(each).startswith("triton.jit") for each in function.decorator_list)


def body_lines(function: Function) -> int:
    """Lines of a body without its docstring."""
    body = function.body[ast.get_docstring(function) is not None :]
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def parameters(function: Function) -> int:
    given = function.args
    placed = len(given.posonlyargs) + len(given.args)
    return placed + len(given.kwonlyargs) * function.name.startswith("_")


def too_long(file: str, text: str) -> Iterator[str]:
    if text.count("\n") > FILE_LINES:
        yield f"{file}: lines"
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, Function) or is_kernel(node):
            continue
        if body_lines(node) > BODY_LINES:
            yield f"{file}: {node.name}: body"
        if parameters(node) > PARAMETERS:
            yield f"{file}: {node.name}: parameters"


def test_nothing_is_too_long_but_the_exceptions_and_these_are() -> None:
    found = {each for file, text in files() for each in too_long(file, text)}
    assert found - EXCEPTIONS.keys() == set(), "split it, or give what goes together as one value"
    assert EXCEPTIONS.keys() - found == set(), "no exception any more: take it off the list"


def test_the_limits_are_seen() -> None:
    names = [f"x{i}" for i in range(11)]
    placed, named = ", ".join(names), "*, " + ", ".join(names)
    lines = "\n".join(["    x = 1"] * 61)
    text = f'def f({placed}):\n    "s"\n\ndef g({named}):\n{lines}\n\ndef _h({named}): ...\n'
    assert list(too_long("a.py", text)) == [
        "a.py: f: parameters",
        "a.py: g: body",
        "a.py: _h: parameters",
    ]
    jitted = f"@triton.jit\ndef f({placed}):\n{lines}\n"
    assert list(too_long("a.py", jitted)) == []
    assert list(too_long("a.py", "x = 1\n" * 601)) == ["a.py: lines"]
