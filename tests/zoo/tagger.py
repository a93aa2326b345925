"""A BERT that says of every byte of Python source what it is part of.

Keywords and numbers can be told by their letters. Strings, docstrings and comments can only be told
from what stands before and after; a name is a parameter, a local or a global one by where else it
stands in its function.
"""

from __future__ import annotations

import ast
import io
import keyword
import tokenize
from collections.abc import Iterator
from functools import cache

import torch
from torch import Generator, Tensor, nn

from distr_compile.accuracy.batch import Batch
from distr_compile.accuracy.metrics import IGNORED
from tests.zoo import texts
from tests.zoo.recipe import Recipe, batched

CLASSES = (
    "keyword operator number string docstring comment definition parameter local global attribute "
    "argument"
).split()
LENGTH, SHORTEST = 256, 128  # bytes; half of the examples are shorter than LENGTH
EVALUATED = 96  # examples
LARGEST = "_pydecimal"  # more than all others together, and of one kind

_Place = tuple[int, int]
"""Line from 1 on and column from 0 on, as in ``tokenize`` and, for ASCII, in ``ast``."""


@cache
def classes_in(module: str) -> Tensor:
    """The classes of the source of a module."""
    return classes(texts.source(module))


def classes(text: str) -> Tensor:
    """``(len(text),)`` int64: a class for each byte of a source, -100 for white space."""
    starts = [0]
    for line in io.StringIO(text):
        starts.append(starts[-1] + len(line))
    tree = ast.parse(text)
    roles, docstrings = dict(_names(tree)), set(_docstrings(tree))
    found = torch.full((len(text),), IGNORED)

    def mark(start: _Place, end: _Place, name: str) -> None:
        first, last = (starts[line - 1] + column for line, column in (start, end))
        found[first:last] = CLASSES.index(name)

    inside: list[_Place] = []  # formatted strings, which newer versions cut into tokens
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind = tokenize.tok_name[token.type]
        if kind == "FSTRING_START":
            inside.append(token.start)
        elif kind == "FSTRING_END":
            mark(inside.pop(), token.end, "string")
        elif inside:
            continue
        elif kind == "NAME":
            role = "keyword" if keyword.iskeyword(token.string) else roles.get(token.start)
            mark(token.start, token.end, role or "global")
        elif kind == "STRING":
            role = "docstring" if token.start in docstrings else "string"
            mark(token.start, token.end, role)
        elif kind in ("OP", "NUMBER", "COMMENT"):
            name = {"OP": "operator"}.get(kind, kind.lower())
            mark(token.start, token.end, name)
    white = torch.isin(texts.as_bytes(text), texts.as_bytes(" \n\t\f"))
    return found.masked_fill(white, IGNORED)


def _docstrings(tree: ast.AST) -> Iterator[_Place]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                yield first.lineno, first.col_offset


def _names(tree: ast.AST) -> Iterator[tuple[_Place, str]]:
    """Where each name starts, and its role. What has none here is global."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)

    def visit(node: ast.AST, scope: dict[str, str]) -> Iterator[tuple[_Place, str]]:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            words = {ast.ClassDef: 1, ast.FunctionDef: 1}.get(type(node), 2)
            space = len("class " if isinstance(node, ast.ClassDef) else "def ") * words
            if words == 1:
                yield (node.lineno, node.col_offset + space), "definition"
        if isinstance(node, functions):
            stored = (n for n in ast.walk(node) if isinstance(n, ast.Name))
            local = {n.id: "local" for n in stored if isinstance(n.ctx, ast.Store)}
            a = node.args
            every = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
            scope = {**scope, **local, **{arg.arg: "parameter" for arg in every}}
        if isinstance(node, ast.Name):
            yield (node.lineno, node.col_offset), scope.get(node.id, "global")
        elif isinstance(node, ast.arg):
            yield (node.lineno, node.col_offset), "parameter"
        elif isinstance(node, ast.keyword) and node.arg:
            yield (node.lineno, node.col_offset), "argument"
        elif isinstance(node, ast.Attribute) and node.end_col_offset is not None:
            assert node.end_lineno is not None
            yield (node.end_lineno, node.end_col_offset - len(node.attr)), "attribute"
        for child in ast.iter_child_nodes(node):
            yield from visit(child, scope)

    return visit(tree, {})


def _cut(pieces: Tensor, labels: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    """Inputs and labels, padded with 0 and -100 from ``lengths`` on."""
    mask = torch.arange(LENGTH) < lengths[:, None]
    return {
        "input_ids": pieces * mask,
        "attention_mask": mask.long(),
        "labels": labels.masked_fill(~mask, IGNORED),
    }


def _lengths(count: int, generator: Generator) -> Tensor:
    """Full length for the first half, anything from ``SHORTEST`` on for the second."""
    shorter = torch.randint(SHORTEST, LENGTH, (count,), generator=generator)
    return torch.where(torch.arange(count) < count // 2, LENGTH, shorter)


def _batches(pieces: Tensor, labels: Tensor, generator: Generator) -> list[Batch]:
    cut = _cut(pieces, labels, _lengths(len(pieces), generator))
    labels = cut.pop("labels")
    return batched(8, cut, labels)


def _sample(generator: Generator, progress: float) -> Batch:
    found: list[Tensor] = []
    while len(found) < 8:
        module = texts.draw(generator, 1)[0]
        if module == texts.LANGUAGE or len(texts.source(module)) <= LENGTH:
            continue
        start = int(torch.randint(len(texts.source(module)) - LENGTH, (), generator=generator))
        both = torch.stack([texts.as_bytes(texts.source(module)), classes_in(module)])
        found.append(both[:, start : start + LENGTH])
    pieces, labels = torch.stack(found, 1)
    return _batches(pieces, labels, generator)[0]


def _evaluation() -> list[Batch]:
    names = [name for name in texts.modules(held_out=True) if name != LARGEST]
    text = torch.cat([texts.as_bytes(texts.source(name)) for name in names])
    labels = torch.cat([classes_in(name) for name in names])
    pieces, answers = (texts.windows(x, LENGTH, EVALUATED) for x in (text, labels))
    mixed = torch.arange(EVALUATED).view(-1, 2).T.flatten()  # short and long ones of each module
    return _batches(pieces[mixed], answers[mixed], Generator().manual_seed(1))


def _tagger() -> nn.Module:
    from transformers import BertConfig, BertForTokenClassification

    model = BertForTokenClassification(
        BertConfig(
            vocab_size=texts.VOCABULARY,
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=384,
            max_position_embeddings=LENGTH,
            type_vocab_size=1,
            num_labels=len(CLASSES),
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.06,
        )
    )
    # Sines to begin with: what is near is then alike, and bytes are soon put together to words.
    phase = torch.arange(LENGTH)[:, None] * 1.5 * 300 ** (-torch.arange(64) / 64)
    positions = model.bert.embeddings.position_embeddings.weight
    with torch.no_grad():
        positions.copy_(0.1 * torch.cat([phase.sin(), phase.cos()], -1))
    return model


RECIPES = (
    Recipe(
        "tagger",
        "transformers BERT, names what each of 256 bytes of Python source is part of, padded",
        ("f1", "kl"),
        head_dim=64,
        num_layers=4,
        floor=0.75,
        build=_tagger,
        sample=_sample,
        evaluation=_evaluation,
        steps=1100,
        rate=3e-3,
    ),
)
