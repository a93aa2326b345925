"""One call's arguments, from whatever users hand over."""

from __future__ import annotations

import hashlib
import re
from collections import UserDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from distr_compile.accuracy.batch import Batch, add_to_digest, walk


class Sum(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + 2 * y


def test_arguments_of_every_kind() -> None:
    x, y = torch.tensor(3.0), torch.tensor(5.0)
    model = Sum()
    given = [(x, y), {"x": x, "y": y}, UserDict(x=x, y=y), Batch((x,), {"y": y}, labels=1)]
    assert [Batch.of(item).call(model).item() for item in given] == [13, 13, 13, 13]
    assert Batch.of(x).call(nn.Identity()) is x
    (rows,) = DataLoader(TensorDataset(torch.ones(4), torch.zeros(4)), batch_size=4)
    assert isinstance(rows, list)  # whose parts are arguments
    assert Batch.of(rows).call(model).tolist() == [1, 1, 1, 1]
    assert Batch.of(([x, y],)).call(lambda xs: len(xs)) == 2
    assert Batch([x, y]).args == (x, y)  # type: ignore[arg-type]
    assert Batch.of(given[3]) is given[3]


def test_moves_tensors_wherever_they_are() -> None:
    batch = Batch((torch.ones(1), [torch.ones(2)], "text"), {"a": (torch.ones(3),)}, torch.ones(4))
    moved = batch.to("meta")
    first, (second,), text = moved.args
    assert first.is_meta
    assert second.is_meta
    assert moved.kwargs["a"][0].is_meta
    assert text == "text"
    assert moved.labels is batch.labels


def test_walks_again_and_stops_at_the_limit() -> None:
    items = [torch.tensor(i) for i in range(4)]
    for batches in (items, lambda: iter(items), lambda: items):
        for _ in range(2):
            assert [batch.args[0].item() for batch in walk(batches, 3)] == [0, 1, 2]
    assert len(list(walk(items))) == 4


def test_an_iterator_is_refused() -> None:
    with pytest.raises(ValueError, match="got generator, which can be walked only once"):
        list(walk(x for x in [1, 2]))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"args": torch.ones(2, 3)}, r"^args: got tensor.*one argument is written \(x,\), with"),
        ({"args": {"x": 1}}, r"^args: got .*accepted: a tuple or list of arguments; "),
        ({"kwargs": [1]}, r"^kwargs: got \[1\] \(list\); accepted: a mapping of names"),
    ],
)
def test_what_is_no_arguments(given: Any, told: str) -> None:
    with pytest.raises(TypeError, match=re.compile(told, re.DOTALL)):
        Batch(**given)


@pytest.mark.parametrize(("limit", "kind"), [(-1, ValueError), (1.5, TypeError)])
def test_limits_that_are_none(limit: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=r"^limit: got .*accepted: a number of batches >= 0, or None"):
        list(walk([1, 2], limit))
    assert len(list(walk([1, 2], np.int64(1)))) == 1  # type: ignore[arg-type]


def digest(value: Any, tolerant: bool = False) -> str:
    sha = hashlib.sha256()
    add_to_digest(sha, Batch((value,)), tolerant=tolerant)
    return sha.hexdigest()


def standardised(seed: int) -> Tensor:
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(seed))
    return (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True)


@pytest.mark.parametrize("tolerant", [False, True])
def test_digests_notice_order_sign_and_other_data(tolerant: bool) -> None:
    x = standardised(0)
    swapped = x.clone()
    swapped[[2, 9]] = x[[9, 2]]
    others = [x.flip(0), x.flip(1), -x, swapped, 1.02 * x, x.double(), x.view(64, 16)]
    others += [standardised(seed) for seed in range(1, 20)]
    masked = torch.zeros(4)
    masked[1] = -torch.inf
    others += [0 * x, masked, masked.flip(0), torch.full((4,), torch.nan), torch.zeros(0)]
    others += [torch.full((4,), torch.finfo(torch.float32).min), x.bfloat16(), torch.tensor(1.5)]
    others += [torch.arange(4), torch.arange(4) > 1, x.numpy()[:, ::-1], np.arange(2000.0)]
    others += [np.append(np.arange(1999.0), 0)]  # which NumPy shows alike
    found = [digest(value, tolerant) for value in [x, *others]]
    assert len(set(found)) == len(found) - 1  # x.flip(1) is there twice
    assert digest(x.clone(), tolerant) == found[0]
    assert digest(x.T.contiguous().T, tolerant) == found[0]


def test_every_bit_counts_but_where_libraries_may_differ() -> None:
    x = standardised(0)
    moved = x.clone()
    moved[3, 5] += 2**-22
    assert digest(moved) != digest(x)
    assert digest(moved, tolerant=True) == digest(x, tolerant=True)
    rounds = [x.double() * (1 + 1e-9 * standardised(seed).double()) for seed in range(50)]
    assert {digest(y, tolerant=True) for y in rounds} == {digest(x.double(), tolerant=True)}
    assert len({digest(y) for y in rounds}) == 50
    # The bits of the signs are the same everywhere.
    assert digest(torch.arange(5.0), tolerant=True)[:16] == "74864d6f38373d47"
