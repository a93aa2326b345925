"""One call's arguments, from whatever users hand over."""

from __future__ import annotations

from collections import UserDict

import pytest
import torch
from torch import Tensor, nn

from distr_compile.accuracy.batch import Batch, walk


class Sum(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + 2 * y


def test_arguments_of_every_kind() -> None:
    x, y = torch.tensor(3.0), torch.tensor(5.0)
    model = Sum()
    given = [(x, y), {"x": x, "y": y}, UserDict(x=x, y=y), Batch((x,), {"y": y}, labels=1)]
    assert [Batch.of(item).call(model).item() for item in given] == [13, 13, 13, 13]
    assert Batch.of(x).call(nn.Identity()) is x
    one_list = [x, y]  # a list is one argument
    assert Batch.of(one_list).call(lambda xs: len(xs)) == 2
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
