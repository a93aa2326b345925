"""A call as values, and the keywords by which the op takes them."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import fx

from distr_compile.estimators import ESTIMATORS, auto_grouping_block
from distr_compile.kernels.attention import reference
from distr_compile.lowering.call import Approximation, Scores, Shape, op_arguments, read_arguments
from distr_compile.lowering.op import SCHEMA, attention

OP = torch.ops.distr.attention.default
PLAIN = Approximation("lsh-mean", 16), Scores(0.25)
OTHER: dict[str, Any] = {
    "estimator": "projection",
    "rank": 24,
    "block": 16,
    "rounds": 2,
    "seed": 3,
    "strict": True,
    "scale": 0.5,
    "is_causal": True,
    "offset": 0,
    "softcap": 4.0,
    "dropout_p": 0.5,
}
"""Another value for every field."""

KEYWORDS = {a.name: a for a in OP._schema.arguments if a.kwarg_only}


def changed(name: str) -> tuple[Approximation, Scores]:
    approximation, scores = PLAIN
    if name in {field.name for field in fields(Approximation)}:
        return replace(approximation, **{name: OTHER[name]}), scores
    return approximation, replace(scores, **{name: OTHER[name]})


def test_every_field_has_another_value_here() -> None:
    assert [f.name for f in (*fields(Approximation), *fields(Scores))] == list(OTHER)


@pytest.mark.parametrize("name", OTHER)
def test_every_field_reaches_the_op_by_a_keyword_of_its_own(name: str) -> None:
    plain, other = op_arguments(*PLAIN), op_arguments(*changed(name))
    assert plain.keys() <= other.keys() <= KEYWORDS.keys()
    different = {key for key in other if key not in plain or plain[key] != other[key]}
    assert len(different) == 1
    assert other[different.pop()] == OTHER[name]


def test_no_keyword_of_the_op_is_forgotten() -> None:
    approximation = Approximation(*(OTHER[f.name] for f in fields(Approximation)))
    scores = Scores(*(OTHER[f.name] for f in fields(Scores)))
    arguments = op_arguments(approximation, scores, 7, 8)
    assert arguments.keys() == KEYWORDS.keys(), SCHEMA
    assert (arguments["min_seq_len"], arguments["site"]) == (7, 8)


def test_what_is_left_out_is_the_default_of_the_op() -> None:
    arguments = op_arguments(*PLAIN)
    left_out = {"causal_offset": None, "softcap": 0.0, "seed": 0, "strict": False}
    left_out["dropout_p"] = 0.0
    assert KEYWORDS.keys() - arguments.keys() == left_out.keys()
    defaults = inspect.signature(attention).parameters
    assert {name: defaults[name].default for name in left_out} == left_out
    # None in the schema leaves an integer to the function.
    assert {n: KEYWORDS[n].default_value for n in left_out} == {**left_out, "seed": None}


def test_arguments_that_are_left_out_are_read_as_the_defaults_of_the_op() -> None:
    needed = {name for name, a in KEYWORDS.items() if not a.has_default_value()}
    given = {name: value for name, value in op_arguments(*PLAIN).items() if name in needed}
    assert read_arguments(given) == (*PLAIN, 0, -1)


@pytest.mark.parametrize("name", OTHER)
def test_arguments_are_read_back(name: str) -> None:
    values = (*changed(name), 5, 6)
    assert read_arguments(op_arguments(*values)) == values


def test_the_scale_may_be_a_node_of_a_graph() -> None:
    node = fx.Graph().placeholder("scale")
    assert op_arguments(PLAIN[0], Scores(node))["scale"] is node


def test_the_op_takes_the_arguments() -> None:
    """Against the definition in fp64."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 32, 48, dtype=torch.float64).unbind()
    approximation, scores = Approximation("lsh-mean", 16, block=16, seed=3), Scores(0.2, True)
    ours = OP(q, k, v, **op_arguments(approximation, scores))
    options: dict[str, Any] = {"scale": 0.2, "is_causal": True, "rank": 16}
    wanted = reference.attention(
        q, k, v, **options, estimator="lsh-mean", grouping_block=16, seed=3
    )
    torch.testing.assert_close(ours, wanted)
    exact = OP(q, k, v, **op_arguments(Approximation.none(48), scores))
    options["rank"] = 48
    torch.testing.assert_close(exact, reference.attention(q, k, v, **options))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_block_is_the_ops(name: str) -> None:
    assert Approximation(name, 16, block=48).block_of(5000) == 48
    assert Approximation(name, 16).block_of(5000) == auto_grouping_block(5000, name)
    strict = Approximation(name, 16, strict=True)
    assert strict.block_of(5000) == auto_grouping_block(5000, name, strict=True)


def test_the_shape_of_tensors() -> None:
    q, k, v = torch.empty(2, 4, 7, 32), torch.empty(2, 2, 9, 32), torch.empty(2, 2, 9, 16)
    cpu = torch.device("cpu")
    plain = Shape(2, 4, 2, 7, 9, 32, 16, True, None, torch.float32, cpu)
    assert Shape.of(q, k, v, None, True) == plain
    mask = torch.ones(7, 9, dtype=torch.bool)
    masked = plain._replace(mask=((1, 1, 7, 9), torch.bool), is_causal=False)
    assert Shape.of(q, k, v, mask, False) == masked
