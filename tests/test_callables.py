"""``torch.compile`` of what is neither a module nor a function of Python."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import distr_compile

POLICY = {"default": {"group_size": 2, "min_seq_len": 0}}


class Called:
    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT / 8).softmax(-1) @ v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self(q, k, v)


class Slotted:
    """Cannot be referred to weakly."""

    __slots__ = ()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT / 8).softmax(-1) @ v


CALLABLES = {
    "builtin": F.scaled_dot_product_attention,
    "partial of a builtin": functools.partial(F.scaled_dot_product_attention, dropout_p=0.0),
    "object": Called(),
    "bound method": Called().attend,
    "bound __call__": Called().__call__,
}


def called(function: Any) -> tuple[Any, Tensor]:
    torch._dynamo.reset()
    compiled = torch.compile(
        function, backend="distr", options={"policy": POLICY, "compiler": "eager"}
    )
    q = torch.randn(3, 1, 2, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got: Tensor = compiled(*q)
    torch.testing.assert_close(got, distr_compile.attention(*q), atol=1e-5, rtol=1e-5)
    return compiled, got


@pytest.mark.parametrize("name", CALLABLES)
def test_a_callable_is_rewritten_and_has_a_report(name: str) -> None:
    compiled, _ = called(CALLABLES[name])
    (row,) = distr_compile.report(compiled).rows
    assert (row.layer, row.decision, row.rank) == ("", "distr", 32)


def test_what_nothing_can_refer_to_has_no_report() -> None:
    compiled, _ = called(Slotted())
    with pytest.raises(
        TypeError, match=r"report: got Slotted; accepted: an nn\.Module, a function"
    ):
        distr_compile.report(compiled)
