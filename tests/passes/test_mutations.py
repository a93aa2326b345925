"""Wrong rewrites, planted one at a time, that ``verify`` must catch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distr_compile

from . import planting
from .planting import OP, argument, option, planted, result, without

N, HEADS, KEY_HEADS, WIDTH = 32, 4, 2, 32


class Model(nn.Module):
    """Grouped heads; Q written in place and cast; masked, biased or capped as ``kind`` says."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.q = nn.Linear(64, HEADS * WIDTH)
        self.kv = nn.Linear(64, 2 * KEY_HEADS * WIDTH)
        self.sink = nn.Parameter(torch.randn(HEADS))

    def forward(self, x: Tensor, keep: Tensor, bias: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, KEY_HEADS, WIDTH)).permute(2, 0, 3, 1, 4)
        q = q.clone()
        q.mul_(0.5)
        k = k.to(torch.bfloat16).to(torch.float32) if self.kind == "cast" else k
        k, v = (t.repeat_interleave(HEADS // KEY_HEADS, 1) for t in (k, v))
        scores = q @ k.mT / 3
        if self.kind == "capped":
            scores = 2 * torch.tanh(scores / 2)
        if self.kind == "masked":
            scores = scores.masked_fill(~keep, -torch.inf)
        if self.kind == "biased":
            scores = scores + bias
        if self.kind == "causal":
            seen = torch.ones(N, N, dtype=torch.bool).tril()
            scores = scores.masked_fill(~seen, -torch.inf)
        if self.kind == "sinks":
            column = self.sink[None, :, None, None].expand(x.shape[0], -1, N, 1)
            weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        return weights @ v


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, N, 64, generator=generator)
    keep = torch.rand(N, N, generator=generator) > 0.3
    keep[:, 0] = True
    return x, keep, torch.randn(N, N, generator=generator)


def last_sink_dropped(graph: Any, node: Any) -> None:
    node.args = node.args[:6]


MUTATIONS: dict[str, tuple[str, planting.Edit]] = {
    "scale 5 % off": ("plain", option(scale=lambda s: 1.05 * s)),
    "mask dropped": ("masked", argument(3, None)),
    "mask inverted": ("masked", argument(3, torch.logical_not)),
    "bias dropped": ("biased", argument(3, None)),
    "bias doubled": ("biased", argument(3, lambda bias: 2 * bias)),
    "bias transposed": ("biased", argument(3, lambda bias: bias.mT)),
    "causal without reason": ("plain", option(is_causal=lambda _: True)),
    "causal forgotten": ("causal", option(is_causal=lambda _: False)),
    "causal from the other corner": ("causal", option(causal_offset=lambda _: 1)),
    "K heads permuted": ("plain", argument(1, lambda k: k.flip(1))),
    "V heads mixed": ("plain", argument(2, lambda v: (v + v.roll(1, 1)) / 2)),
    "K and V swapped": ("plain", lambda graph, node: _swap(node, 1, 2)),
    "a write ignored": ("plain", without("mul_")),
    "a cast lost": ("cast", without("to", "to")),
    "axes of the output permuted": ("plain", result(lambda out: out.mT)),
    "heads of the output permuted": ("plain", result(lambda out: out.flip(1))),
    "soft cap lost": ("capped", option(softcap=lambda _: 0.0)),
    "sinks lost": ("sinks", last_sink_dropped),
    "one row wrong": ("plain", result(lambda out: out * (torch.arange(N)[:, None] != 7))),
}


def _swap(node: Any, i: int, j: int) -> None:
    args = list(node.args)
    args[i], args[j] = args[j], args[i]
    node.args = tuple(args)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_rewrite_is_caught(name: str) -> None:
    kind, edit = MUTATIONS[name]
    with planted(edit, OP) as nodes:
        found = distr_compile.verify(Model(kind).eval(), *inputs())
    assert len(nodes) == 1
    assert [row.status for row in found.rows] == ["wrong"], found
    assert [out.status for out in found.outputs] == ["wrong"], found


@pytest.mark.parametrize("kind", sorted({kind for kind, _ in MUTATIONS.values()}))
def test_without_a_mutation_it_is_right(kind: str) -> None:
    found = distr_compile.verify(Model(kind).eval(), *inputs())
    assert found.ok, found
    assert [row.decision for row in found.rows] == ["distr"]
