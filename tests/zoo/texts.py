"""Python's own sources and documentation, read from the running interpreter; nothing is shipped.

A text is bytes of ASCII, one token a byte. The modules in ``HELD_OUT`` are for evaluation only.
They hardly changed from Python 3.10 to 3.14; the digest of the data says when they did.
"""

from __future__ import annotations

import ast
import sysconfig
from functools import cache
from pathlib import Path

import torch
from torch import Generator, Tensor

STDLIB = Path(sysconfig.get_paths()["stdlib"])
HELD_OUT = "_pydecimal difflib heapq optparse sched graphlib xmlrpc/client cmd".split()
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "encodings", "site-packages", "__pycache__"}
VOCABULARY = 128
LANGUAGE = "pydoc_data/topics"  # the reference of the language, as help() shows it


@cache
def modules(*, held_out: bool) -> tuple[str, ...]:
    """Paths below the standard library, without ``.py``, sorted."""
    if held_out:
        return tuple(HELD_OUT)
    found = (path.relative_to(STDLIB) for path in STDLIB.rglob("*.py"))
    names = (p.with_suffix("").as_posix() for p in found if not LEFT_OUT & set(p.parts))
    return tuple(sorted(name for name in names if name not in HELD_OUT))


@cache
def source(module: str) -> str:
    """The source, what is not ASCII replaced by "?"."""
    text = (STDLIB / f"{module}.py").read_text("utf-8", "replace")
    return text.encode("ascii", "replace").decode("ascii").replace("\r\n", "\n")


@cache
def documentation(module: str) -> str:
    """The docstrings of the module and of all it defines, in order."""
    if module == LANGUAGE:
        names: dict[str, dict[str, str]] = {}
        exec(compile(source(module), module, "exec"), names)
        return "\n\n".join(names["topics"].values())
    return "\n\n".join(text for _, text in docstrings(module))


def docstrings(module: str) -> list[tuple[str, str]]:
    """(name within the module, docstring) in order, each text only once."""
    found: dict[str, str] = {}

    def visit(node: ast.AST, name: str) -> None:
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            name = f"{name}.{node.name}" if hasattr(node, "name") else module
            found.setdefault(ast.get_docstring(node) or "", name)
        for child in ast.iter_child_nodes(node):
            visit(child, name)

    visit(ast.parse(source(module)), module)
    return [(name, text) for text, name in found.items() if text]


def as_bytes(text: str) -> Tensor:
    """``(len(text),)`` int64."""
    return torch.frombuffer(bytearray(text, "ascii", "replace"), dtype=torch.uint8).long()


@cache
def _sizes() -> Tensor:
    names = modules(held_out=False)
    return torch.tensor([float((STDLIB / f"{name}.py").stat().st_size) for name in names])


def draw(generator: Generator, count: int) -> list[str]:
    """Modules to train on, larger ones more often."""
    names = modules(held_out=False)
    chosen = torch.multinomial(_sizes(), count, replacement=True, generator=generator)
    return [names[i] for i in chosen.tolist()]


def windows(text: Tensor, length: int, count: int) -> Tensor:
    """``(count, length)``: pieces of a text, as far from each other as can be."""
    starts = torch.linspace(0, len(text) - length, count).long()
    return text[starts[:, None] + torch.arange(length)]
