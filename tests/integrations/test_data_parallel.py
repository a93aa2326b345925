"""FSDP1 in a group of one process: the numbers and the names of the model without it.

DDP and FSDP2 with two processes are in ``tests/test_training.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

import distr_compile

RULE = {"layers": "0", "group_size": 1}
POLICY = {"default": {"min_seq_len": 0, "group_size": 2}, "rule": [RULE]}


@pytest.fixture(autouse=True)
def _group() -> Iterator[None]:
    torch._dynamo.reset()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(64, 192)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 1, 64)).permute(2, 0, 3, 1, 4)
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Attention(), Attention()).eval()


def compiled(model: nn.Module) -> tuple[Tensor, list[tuple[str, str]]]:
    options: dict[str, Any] = {"policy": POLICY, "compiler": "eager"}
    called = torch.compile(model, backend="distr", options=options)
    x = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = called(x)
        exact = encoder()(x)
    assert (out - exact).abs().max() > 1e-4, "nothing was approximated"
    return out, [(row.layer, row.decision) for row in distr_compile.report(called).rows]


def test_fsdp1() -> None:
    wanted, rows = compiled(encoder())
    assert rows == [("0", "exact"), ("1", "distr")]
    sharded = FullyShardedDataParallel(
        encoder(), device_id=torch.device("cpu"), use_orig_params=True
    )
    got, named = compiled(sharded)
    assert named == rows
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
