"""The kinds of graphs of ``test_kinds.py``: their register, and what stands in models."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

B, H, N, D = 2, 4, 24, 32
GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


COS, SIN = normal(N, D).cos(), normal(N, D).sin()
TURN = torch.polar(torch.ones(N, D // 2), normal(N, D // 2))
TEMPERATURE = normal(H, 1, 1).abs() + 0.5


@dataclass(frozen=True)
class Kind:
    """A function, its inputs, and what must become of its attention: a decision or a reason."""

    name: str
    function: Callable[..., Any]
    dtype: torch.dtype
    shapes: tuple[tuple[int, ...], ...]
    found: str

    def inputs(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        return [torch.randn(s, generator=generator).to(self.dtype) for s in self.shapes]


KINDS: list[Kind] = []
QKV = ((B, H, N, D),) * 3
PACKED = ((B, N, 3 * H * D),)


def kind(
    name: str,
    found: str = "distr",
    shapes: tuple[tuple[int, ...], ...] = QKV,
    dtype: torch.dtype = torch.float32,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function; ``found`` is "distr" or the code of the reason for exact."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        KINDS.append(Kind(name, function, dtype, shapes, found))
        return function

    return register


def split(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.unflatten(-1, (H, D)).transpose(1, 2) for t in x.chunk(3, -1))


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / math.sqrt(D)).softmax(-1) @ v


def half(x: Tensor) -> Tensor:
    return torch.cat((-x[..., D // 2 :], x[..., : D // 2]), -1)


# -- masks that are written after they were made --------------------------------------------------


@kind("a prefix is shown by a slice write")
def _(q, k, v):
    mask = torch.ones(N, N, dtype=torch.bool).tril()
    mask[:, :8] = True
    return (q @ k.mT / 6).masked_fill(~mask, -torch.inf).softmax(-1) @ v


@kind("a prefix is shown by a slice write, SDPA")
def _(q, k, v):
    mask = torch.ones(N, N, dtype=torch.bool).tril()
    mask.narrow(1, 0, 8).fill_(True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@kind("a causal bias is weakened in place")
def _(q, k, v):
    bias = torch.full((N, N), -1e9).triu(1)
    bias.mul_(1e-10)
    return (q @ k.mT / 6 + bias).softmax(-1) @ v


@kind("a mask is written by foreach, through a view")
def _(q, k, v):
    mask = torch.zeros(N, N).triu(1)
    torch._foreach_sub_([mask[3:]], 2.0)
    return (q @ k.mT / 6 + mask).softmax(-1) @ v


@kind("positions by keyword", shapes=((B, H, N, D), (B, H, 48, D), (B, H, 48, D)))
def _(q, k, v):
    i, j = torch.arange(24, end=48), torch.arange(48)
    return (q @ k.mT / 6).masked_fill(j > i[:, None], -torch.inf).softmax(-1) @ v


@kind("positions with a step", shapes=((B, H, N, D), (B, H, 48, D), (B, H, 48, D)))
def _(q, k, v):
    i, j = torch.arange(start=1, end=49, step=2), torch.arange(48)
    return (q @ k.mT / 6).masked_fill(j > i[:, None], -torch.inf).softmax(-1) @ v


# -- Q, K or V written in place -------------------------------------------------------------------


@torch.library.custom_op("distr_kinds::rotary", mutates_args=("q", "k"))
def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    for t in (q, k):
        t.copy_(t * cos + half(t) * sin)


@kind("rotary by a custom op that writes in place", shapes=PACKED)
def _(x):
    q, k, v = split(x)
    q, k = q.contiguous(), k.contiguous()
    torch.ops.distr_kinds.rotary(q, k, COS, SIN)
    return plain(q, k, v)


@kind("rotary through a complex view", shapes=PACKED)
def _(x):
    q, k, v = split(x)
    q = q * D**-0.5
    torch.view_as_complex(q.unflatten(-1, (-1, 2))).mul_(TURN)
    return (q @ k.mT).softmax(-1) @ v


@kind("rotary by slice writes into an empty tensor", shapes=PACKED)
def _(x):
    def turn(t: Tensor) -> Tensor:
        a, b = t.unflatten(-1, (-1, 2)).unbind(-1)
        out = torch.empty_like(t)
        out[..., 0::2] = a * COS[:, : D // 2] - b * SIN[:, : D // 2]
        out[..., 1::2] = a * SIN[:, : D // 2] + b * COS[:, : D // 2]
        return out.type_as(t)

    q, k, v = split(x)
    return F.scaled_dot_product_attention(turn(q), turn(k), v)


@kind("scaled in place before the product", shapes=PACKED)
def _(x):
    q, k, v = split(x)
    q = q.contiguous()
    q.mul_(0.2)
    return (q @ k.mT).softmax(-1) @ v


@kind("scaled through a view of the whole projection", shapes=PACKED)
def _(x):
    x = x + 0
    q, k, v = split(x)
    x[..., : H * D].mul_(0.2)
    return (q @ k.mT).softmax(-1) @ v


@kind("V written between the product and its use", "in-place-write")
def _(q, k, v):
    v = v + 0
    weights = (q @ k.mT / 6).softmax(-1)
    torch._foreach_mul_([v], 3.0)
    out = weights @ v
    v.zero_()
    return out


@kind("K written between product and output", "in-place-write")
def _(q, k, v):
    k = k + 0
    weights = (q @ k.mT / 6).softmax(-1)
    rotary(k, k.clone(), COS, SIN)
    return weights @ v, k


KINDS[-2] = Kind(KINDS[-2].name, KINDS[-2].function, torch.float32, QKV, "distr")


@kind("the scores copied before they are masked in place", "weights-reused")
def _(q, k, v):
    scores = q @ k.mT / 6
    before = scores.mean()
    scores.masked_fill_(torch.ones(N, N).triu(1) > 0, -torch.inf)
    return scores.softmax(-1) @ v + before


@kind("keys kept in a buffer that is written", shapes=QKV)
class Cache(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(B, H, 2 * N, D))

    def forward(self, q, k, v):
        self.keys[:, :, N:] = k
        return plain(q, self.keys[:, :, N:], v)


# -- dtypes ---------------------------------------------------------------------------------------


@kind("rotary tables in fp32", dtype=torch.bfloat16)
def _(q, k, v):
    return ((q * COS) @ (k * COS).mT / math.sqrt(D)).softmax(-1).to(v.dtype) @ v


@kind("QK norm in fp32", dtype=torch.float16)
def _(q, k, v):
    q, k = (F.normalize(x.float(), dim=-1) * 3 for x in (q, k))
    return (q @ k.mT).softmax(-1).half() @ v


@kind("a temperature in fp32", dtype=torch.bfloat16)
def _(q, k, v):
    return ((q @ k.mT) * TEMPERATURE).softmax(-1).to(v.dtype) @ v


@kind("a bias in fp32", dtype=torch.bfloat16)
def _(q, k, v):
    return (q @ k.mT / 6 + SCORE_BIAS).softmax(-1).to(v.dtype) @ v


SCORE_BIAS = normal(N, N)


# -- shapes of bias and mask ----------------------------------------------------------------------


@kind("a bias of no axis", shapes=(*QKV, ()))
def _(q, k, v, b):
    return (q @ k.mT / 6 + b).softmax(-1) @ v


@kind("a bias of one axis", shapes=(*QKV, (N,)))
def _(q, k, v, b):
    return (q @ k.mT / 6 + b).softmax(-1) @ v


@kind("a mask of one axis")
def _(q, k, v):
    return (q @ k.mT / 6).masked_fill(torch.arange(N) > 20, -torch.inf).softmax(-1) @ v


@kind("a bias that broadcasts one query to many", "layout", shapes=(*QKV, (N, N)))
def _(q, k, v, b):
    return (q[:, :, :1] @ k.mT + b).softmax(-1) @ v


@kind("a bias that adds a leading axis", "layout", shapes=(*QKV, (3, 1, 1, N, N)))
def _(q, k, v, b):
    return (q @ k.mT / 6 + b).softmax(-1) @ v


@kind(
    "a bias per batch entry for scores without a batch", shapes=((H, N, D),) * 3 + ((B, 1, N, N),)
)
def _(q, k, v, b):
    return (q @ k.mT / 6 + b).softmax(-1) @ v


# -- the output -----------------------------------------------------------------------------------


@kind("cast, then viewed")
def _(q, k, v):
    return plain(q, k, v).to(torch.float32).view(B * H, N, D)


@kind("gated, then viewed")
def _(q, k, v):
    return (plain(q, k, v) * 0.5).view(B * H, N, D)


@kind("activated, then viewed")
def _(q, k, v):
    return F.gelu(plain(q, k, v)).view(B * H, N, D)


@kind("written through a view of its rows")
def _(q, k, v):
    out = plain(q, k, v)
    out.reshape(B * H, N, D)[:, 0] = 0.0
    return out


@kind("as_strided")
def _(q, k, v):
    return plain(q, k, v).as_strided((B * H, D), (N * D, 1))


@kind("tokens first by a transpose, then viewed by strides")
def _(q, k, v):
    return torch.einsum("bhqk,bkhd->bqhd", (q @ k.mT / 6).softmax(-1), v.transpose(1, 2)).add(1)


# -- transforms and grad modes --------------------------------------------------------------------


@kind("vmap", "transform")
def _(q, k, v):
    return torch.vmap(plain)(q, k, v)


@kind("vmap over something else", "transform")
def _(q, k, v):
    return torch.vmap(lambda s: plain(q, k, v) * s)(q[0, 0, :3, 0])


@kind("func.grad", "transform")
def _(q, k, v):
    return torch.func.grad(lambda x: plain(x, k, v).sum())(q)


@kind("jvp", "transform")
def _(q, k, v):
    return torch.func.jvp(lambda x: plain(x, k, v), (q,), (k,))[1]


@kind("jacrev", "transform", shapes=((1, 1, 16, D),) * 3)
def _(q, k, v):
    return torch.func.jacrev(lambda x: plain(x, k, v).sum((0, 1, 3)))(q)


# -- axes and spellings ---------------------------------------------------------------------------


@kind("softmax over the heads", "softmax-axis")
def _(q, k, v):
    return (q @ k.mT / 8).softmax(1) @ v


@kind("softmax over the batch", "softmax-axis")
def _(q, k, v):
    return torch.softmax(q @ k.mT, dim=0) @ v


@kind("keys on the last axis but one (LoFTR)")
def _(q, k, v):
    return (k @ q.mT / 6).softmax(-2).mT @ v


@kind("keys and heads exchanged in an einsum", shapes=PACKED)
def _(x):
    q, k, v = (t.unflatten(-1, (H, D)) for t in x.chunk(3, -1))
    weights = torch.einsum("nlhd,nshd->nlsh", q, k).div(D**0.5).softmax(2)
    return torch.einsum("nlsh,nshd->nlhd", weights, v)


@kind("weights averaged for a caller that drops them")
def _(q, k, v):
    weights = (q @ k.mT / 6).softmax(-1)
    weights.view(2, 2, 2, N, N).transpose(1, 0).mean(0)
    return weights @ v


@kind("heads mixed by einsum", "cross-head-mix")
def _(q, k, v):
    scores = torch.einsum("bhij,hg->bgij", q @ k.mT / 6, MIX)
    return scores.softmax(-1) @ v


@kind("weights mixed by einsum", "cross-head-mix")
def _(q, k, v):
    weights = (q @ k.mT / 6).softmax(-1)
    return torch.einsum("bhij,hg->bgij", weights, MIX) @ v


MIX = nn.Parameter(normal(H, H), requires_grad=False)

MATRICES = ((N, D),) * 3


@kind("mm", shapes=MATRICES)
def _(q, k, v):
    return torch.mm(torch.mm(q, k.t()).softmax(-1), v)


@kind("linear", shapes=MATRICES)
def _(q, k, v):
    return F.linear(q, k).softmax(-1) @ v


@kind("inner", shapes=MATRICES)
def _(q, k, v):
    return torch.inner(q, k).softmax(-1) @ v


@kind("tensordot", shapes=MATRICES)
def _(q, k, v):
    return torch.tensordot(q, k, dims=([1], [1])).softmax(-1) @ v


@kind("linalg.matmul")
def _(q, k, v):
    return torch.linalg.matmul(torch.linalg.matmul(q, k.mT).softmax(-1), v)


@kind("baddbmm_ into an empty tensor", shapes=((B * H, N, D),) * 3)
def _(q, k, v):
    scores = torch.empty(B * H, N, N)
    scores.baddbmm_(q, k.mT, beta=0, alpha=0.2)
    return scores.softmax(-1) @ v


@kind("baddbmm_ into an empty tensor, then scaled and biased", shapes=((B * H, N, D),) * 3)
def _(q, k, v):
    scores = torch.empty(B * H, N, N)
    scores.baddbmm_(q, k.mT, beta=0)
    return (scores * 0.2 + SCORE_BIAS).softmax(-1) @ v


@kind("exp over sum")
def _(q, k, v):
    scores = q @ k.mT / 6
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return (weights / weights.sum(-1, keepdim=True)) @ v


@kind("exp of log_softmax")
def _(q, k, v):
    return F.log_softmax(q @ k.mT / 6, dim=-1).exp() @ v


@kind("exp less logsumexp")
def _(q, k, v):
    scores = q @ k.mT / 6
    return torch.exp(scores - scores.logsumexp(-1, keepdim=True)) @ v


@kind("softmin")
def _(q, k, v):
    return F.softmin(q @ k.mT / 6, dim=-1) @ v


@kind("exp over a sum with an epsilon", "softmax-form")
def _(q, k, v):
    weights = (q @ k.mT / 6).exp()
    return (weights / (weights.sum(-1, keepdim=True) + 1e-6)) @ v


@kind("ATen overloads")
def _(q, k, v):
    aten = torch.ops.aten
    weights = aten.softmax.int(aten.div.Tensor(aten.matmul.default(q, k.mT), 6.0), -1)
    return aten.matmul.default(weights, v)


@kind("ATen's SDPA")
def _(q, k, v):
    return torch.ops.aten.scaled_dot_product_attention.default(q, k, v)
