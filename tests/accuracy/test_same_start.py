"""All that is compared starts from one state, and nothing is left of it: model, inputs, numbers."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import distr_compile
from distr_compile.accuracy.batch import walk
from distr_compile.accuracy.evaluate import evaluate
from distr_compile.policy import Policy
from distr_compile.restoring import copied

EXACT: dict[str, Any] = {"default": {"group_size": 1}}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(64, 192)
        self.register_buffer("calls", torch.zeros(()))
        self.seen: deque[Tensor] = deque()
        self.kept = SimpleNamespace(last=torch.zeros(2, 24, 64), count=0)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 1, 64)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Random(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x + torch.randn_like(x))


class Counting(Attention):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.attend(x) + self.calls


class InPlace(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x.mul_(0.5).add_(1))


class Remembering(Attention):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([*self.seen, x], 1)
        self.seen.append(x)
        return self.attend(x)


class Holding(Attention):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.kept.last
        self.kept.last, self.kept.count = x, self.kept.count + 1
        return self.attend(x)


class ReturningState(Attention):
    def forward(self, x: Tensor) -> Tensor:
        self.kept.last.add_(self.attend(x))
        return self.kept.last


class Layer:
    """An object that a cache holds, which somebody else may hold, too."""

    def __init__(self) -> None:
        self.count = 0


class Deep(Attention):
    def __init__(self) -> None:
        super().__init__()
        layer = Layer()
        self.far = SimpleNamespace(a=SimpleNamespace(b=SimpleNamespace(c=layer)))
        self.near = layer

    def forward(self, x: Tensor) -> Tensor:
        self.near.count += 1
        return self.attend(x) + self.near.count


class Growing(Attention):
    def forward(self, x: Tensor) -> Tensor:
        self.calls.data = torch.cat([self.calls.data.reshape(-1), torch.ones(1)])
        return self.attend(x) + self.calls.sum()


KINDS = pytest.mark.parametrize(
    "kind", [Random, Counting, InPlace, Remembering, Holding, ReturningState, Deep, Growing]
)


def made(kind: type[Attention]) -> tuple[Attention, list[Tensor]]:
    torch.manual_seed(0)
    return kind().eval(), [torch.randn(2, 24, 64) for _ in range(2)]


@KINDS
def test_exact_attention_loses_nothing(kind: type[Attention]) -> None:
    model, data = made(kind)
    before = [x.clone() for x in data]
    result = distr_compile.regress(model, data, EXACT, progress=False).result
    (policy,) = result.policies.values()
    assert policy.metrics["sqnr"].value > 100
    assert policy.metrics["sqnr"].loss == 0
    assert all(map(torch.equal, data, before))
    assert (model.calls, len(model.seen), model.kept.count) == (0, 0, 0)


@KINDS
def test_a_right_rewrite_is_verified(kind: type[Attention]) -> None:
    model, data = made(kind)
    assert distr_compile.verify(model, data[0]).ok
    assert (model.calls, len(model.seen), model.kept.count) == (0, 0, 0)


def test_random_numbers_go_on_from_batch_to_batch() -> None:
    model, data = made(Random)
    policy = {"default": {"min_seq_len": 0}}
    torch.manual_seed(1)
    same = distr_compile.regress(model, [data[0], data[0]], policy, progress=False).result
    torch.manual_seed(1)
    once = distr_compile.regress(model, [data[0]], policy, progress=False).result
    values = [r.policies["policy"].metrics["cosine"].value for r in (same, once)]
    assert values[0] != values[1]


# --- batches -----------------------------------------------------------------------------------


class Stream:
    """An iterable that gives what is left of one iterator."""

    def __init__(self, data: list[Tensor]) -> None:
        self.left = iter(data)

    def __iter__(self) -> Iterator[Tensor]:
        return self.left


def test_one_iterator_is_not_walked_twice() -> None:
    model, data = made(Counting)
    left, stream = (x for x in data * 5), Stream(data * 5)
    for batches in (lambda: left, stream):
        with pytest.raises(ValueError, match=r"the same \w+ once more, which can be walked only"):
            distr_compile.regress(model, batches, EXACT, progress=False)
    workers: Any = DataLoader(data, batch_size=None, num_workers=1, persistent_workers=True)
    for _ in range(3):
        assert len(list(walk(lambda: (x for x in data)))) == 2
        assert len(list(walk(data))) == 2
        assert len(list(walk(workers))) == 2


# --- files -------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no folder that takes no files")
def test_a_folder_that_takes_no_file_is_told_first() -> None:
    model, data = made(Counting)

    def batches() -> list[Tensor]:
        raise AssertionError("nothing is measured")

    refused = pytest.raises(ValueError, match=r"whose folder takes no file: .*; write elsewhere")
    with refused:
        distr_compile.calibrate(model, batches, path="/proc/x.safetensors", progress=False)
    with refused:
        distr_compile.regress(model, batches, EXACT, out="/proc/x.json", progress=False)
    assert data


def test_lazy_modules_and_what_cannot_be_copied() -> None:
    class Locked:
        def __init__(self) -> None:
            self.lock = threading.Lock()

    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.inner = nn.LazyBatchNorm1d(), Counting()

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.inner(x).mT)

    _, (x, *_) = made(Counting)
    found = evaluate(Lazy().eval(), [x], ["sqnr"], {"exact": Policy(EXACT["default"])})
    assert found["exact"].values["sqnr"] > 100
    with pytest.warns(UserWarning, match="hold an object that cannot be copied"):
        copied((x, Locked()))
