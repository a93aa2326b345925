"""Near misses of attention: their register, and other mathematics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .inputs import KEYS, ROWS, VALUE_WIDTH, WIDTH, B, C, H, Shapes


@dataclass(frozen=True)
class Refusal:
    """A near miss of attention, and the reason code the report must give."""

    name: str
    code: str
    function: Callable[..., Any]
    shapes: Shapes
    attention: bool


REFUSALS: list[Refusal] = []


def refuse(
    name: str, code: str, *, attention: bool = True, **shapes: tuple[int, ...]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a near miss. ``attention`` False: it belongs into ``report.not_attention``."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        made = function().eval() if isinstance(function, type) else function
        REFUSALS.append(Refusal(name, code, made, shapes, attention))
        return function

    return register


# -- other mathematics ----------------------------------------------------------------------------


@refuse("a bias inside the soft cap", "soft-cap")
def _(q, k, v, bias):
    scores = torch.tanh((q @ k.mT * C + bias) / 50.0) * 50.0
    return scores.softmax(-1) @ v


@refuse("one number added inside the soft cap", "soft-cap")
def _(q, k, v):
    return (((q @ k.mT * C + 1.0) / 5.0).tanh() * 5.0).softmax(-1) @ v


@refuse("the row maximum subtracted inside the soft cap", "soft-cap")
def _(q, k, v):
    scores = q @ k.mT * C
    scores = scores - scores.amax(-1, keepdim=True)
    return ((scores / 5.0).tanh() * 5.0).softmax(-1) @ v


@refuse("a mask inside the soft cap", "soft-cap")
def _(q, k, v, keep):
    scores = (q @ k.mT * C).masked_fill(~keep, -torch.inf)
    return ((scores / 5.0).tanh() * 5.0).softmax(-1) @ v


@refuse("baddbmm inside the soft cap", "soft-cap", table=(B * H, ROWS, KEYS))
def _(q, k, v, table):
    scores = torch.baddbmm(table, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=C)
    return torch.bmm((scores.tanh() * 5.0).softmax(-1), v.flatten(0, 1))


@refuse("a soft cap per head", "soft-cap", cap=(H, 1, 1))
def _(q, k, v, cap):
    return (torch.tanh(q @ k.mT * C / cap) * cap).softmax(-1) @ v


@refuse("soft-capped twice", "soft-cap")
def _(q, k, v):
    scores = torch.tanh(q @ k.mT * C / 50.0) * 50.0
    return (torch.tanh(scores / 30.0) * 30.0).softmax(-1) @ v


@refuse("soft-capped to nothing", "soft-cap")
def _(q, k, v):
    return (torch.tanh(q @ k.mT * C) * 0.0).softmax(-1) @ v


@refuse("gated by the tanh of the scores", "two-products")
def _(q, k, v):
    scores = q @ k.mT * C
    return (scores * scores.tanh()).softmax(-1) @ v


@refuse("a soft cap that is also returned", "weights-reused")
def _(q, k, v):
    scores = torch.tanh(q @ k.mT * C / 5.0)
    return (scores * 5.0).softmax(-1) @ v, scores


def _with_sink(scores: Tensor, sink: Tensor) -> Tensor:
    return torch.cat([scores, sink.expand(*scores.shape[:-1], 1)], dim=-1)


@refuse("a sink per query", "sinks", sink=(1, H, ROWS, 1))
def _(q, k, v, sink):
    return _with_sink(q @ k.mT * C, sink).softmax(-1)[..., :-1] @ v


@refuse("a sink per batch", "sinks", sink=(B, 1, 1, 1))
def _(q, k, v, sink):
    return _with_sink(q @ k.mT * C, sink).softmax(-1)[..., :-1] @ v


@refuse("sinks that heads share in pairs", "sinks", q=(B, 4, 17, 40), k=(B, 4, 33, 40))
def _(q, k, v, sink):
    column = sink.view(1, 2, 1, 1).repeat(B, 2, ROWS, 1)
    return torch.cat([q @ k.mT * C, column], -1).softmax(-1)[..., :-1] @ v


REFUSALS[-1].shapes.update(v=(B, 4, KEYS, 24), sink=(2,))


@refuse("sinks of heads merged with the batch", "sinks", sink=(1, H, 1, 1))
def _(q, k, v, sink):
    scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT * C)
    scores = torch.cat([scores, sink.expand(B, -1, ROWS, -1).reshape(B * H, ROWS, 1)], -1)
    return torch.bmm(scores.softmax(-1)[..., :-1], v.flatten(0, 1))


@refuse("two sinks per head", "sinks", sink=(1, H, 1, 2))
def _(q, k, v, sink):
    scores = torch.cat([q @ k.mT * C, sink.expand(B, -1, ROWS, -1)], -1)
    return scores.softmax(-1)[..., :-2] @ v


@refuse("sink columns concatenated one after the other", "sinks", sink=(1, H, 1, 1))
def _(q, k, v, sink):
    scores = _with_sink(_with_sink(q @ k.mT * C, sink), sink)
    return scores.softmax(-1)[..., :-2] @ v


@refuse("the maximum subtracted before the sinks", "sinks", sink=(1, H, 1, 1))
def _(q, k, v, sink):
    scores = q @ k.mT * C
    scores = scores - scores.amax(-1, keepdim=True)
    return _with_sink(scores, sink).softmax(-1)[..., :-1] @ v


@refuse("a number added before the sinks", "sinks", sink=(1, H, 1, 1))
def _(q, k, v, sink):
    return _with_sink(q @ k.mT * C + 3.0, sink).softmax(-1)[..., :-1] @ v


@refuse("scores and sinks scaled together", "sinks", sink=(1, H, 1, 1))
def _(q, k, v, sink):
    return (_with_sink(q @ k.mT, sink) * C).softmax(-1)[..., :-1] @ v


@refuse("scores and sinks capped together", "sinks", sink=(1, H, 1, 1))
def _(q, k, v, sink):
    return (_with_sink(q @ k.mT * C, sink).tanh() * 5.0).softmax(-1)[..., :-1] @ v


@refuse("sinks that have a value", "sinks", sink=(1, H, 1, 1), v=(B, H, KEYS + 1, 24))
def _(q, k, v, sink):
    return _with_sink(q @ k.mT * C, sink).softmax(-1) @ v


@refuse("a key dropped in place of the sink", "weights-edited", sink=(1, H, 1, 1))
def _(q, k, v, sink):
    return _with_sink(q @ k.mT * C, sink).softmax(-1)[..., 1:] @ v


@refuse("the sinks' weights read", "weights-reused", sink=(1, H, 1, 1))
def _(q, k, v, sink):
    weights = _with_sink(q @ k.mT * C, sink).softmax(-1)
    return weights[..., :-1] @ v, weights[..., -1]


@refuse("sinks written during the attention", "in-place-write", sink=(H,))
def _(q, k, v, sink):
    weights = _with_sink(q @ k.mT * C, sink.view(1, H, 1, 1)).softmax(-1)
    sink.zero_()
    return weights[..., :-1] @ v


@refuse("18: a band of scores", "banded", q=(B, H, 17, WIDTH), k=(B, H, 17, WIDTH))
def _(q, k, v):
    scores = F.pad(q @ k.mT * C, (0, 1)).flatten(2)
    band = scores.as_strided((B, H, 15, 3), (*scores.stride()[:2], 19, 1))
    return band.softmax(-1) @ v[:, :, :3]


@refuse("talking heads before the softmax", "cross-head-mix")
class TalkingBefore(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(H, H)

    def forward(self, q, k, v):
        scores = q @ k.transpose(-2, -1) * C
        scores = self.mix(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return scores.softmax(dim=-1) @ v


@refuse("talking heads after the softmax", "cross-head-mix")
class TalkingAfter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(H, H)

    def forward(self, q, k, v):
        weights = (q @ k.transpose(-2, -1) * C).softmax(dim=-1)
        weights = self.mix(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return weights @ v


@refuse("heads mixed by a convolution", "cross-head-mix")
class MixedByConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(H, H, 1)

    def forward(self, q, k, v):
        return self.mix(q @ k.transpose(-2, -1) * C).softmax(dim=-1) @ v


@refuse("channel attention (xcit)", "channel-attention")
class CrossCovariance(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(H * WIDTH, 3 * H * WIDTH)

    def forward(self, x):
        qkv = self.qkv(x).reshape(B, ROWS, 3, H, WIDTH).permute(2, 0, 3, 4, 1)
        q, k, v = qkv.unbind(0)  # (B, H, WIDTH, ROWS)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        return (q @ k.transpose(-2, -1) * 2.0).softmax(dim=-1) @ v


@refuse("channel attention, the tokens last (davit)", "channel-attention")
class ChannelAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(H * WIDTH, 3 * H * WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(B, ROWS, 3, H, WIDTH).permute(2, 0, 3, 1, 4).unbind(0)
        weights = ((k * C).transpose(-1, -2) @ v).softmax(dim=-1)
        return (weights @ q.transpose(-1, -2)).transpose(-1, -2)


@refuse("attention across the batch", "batch-attention", image=(32, 3, 5, 5))
class AcrossBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Conv2d(3, 32, 1) for _ in range(3))

    def forward(self, image):
        q, k, v = (f(image).flatten(2).permute(2, 0, 1) for f in (self.q, self.k, self.v))
        return (q @ k.transpose(1, 2)).softmax(-1) @ v


@refuse("the softmax over the queries", "softmax-axis")
def _(q, k, v):
    return (q @ k.mT * C).softmax(dim=-2) @ v


@refuse("the weights contracted over queries", "softmax-axis", q=(B, H, 33, WIDTH))
def _(q, k, v):
    return (q @ k.mT * C).softmax(dim=-1).mT @ v


@refuse("the softmax over the heads", "softmax-axis")
def _(q, k, v):
    return torch.softmax(q @ k.mT * C, 1) @ v


@refuse("two products in the scores", "two-products", p=(B, H, KEYS, WIDTH))
def _(q, k, v, p):
    scores = q @ k.mT * C
    return (scores + q @ p.mT).softmax(-1) @ v


@refuse("two products, one gathered (deberta)", "two-products")
class Disentangled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(7, H * WIDTH)
        self.project = nn.Linear(H * WIDTH, H * WIDTH)

    def forward(self, q, k, v):
        p = self.project(self.positions.weight).view(7, H, WIDTH).permute(1, 2, 0)
        index = (torch.arange(ROWS)[:, None] - torch.arange(KEYS)[None, :]).clamp(-3, 3) + 3
        to_position = torch.gather(q @ p, -1, index.expand(B, H, ROWS, KEYS))
        return ((q @ k.mT + to_position) * C).softmax(-1) @ v


@refuse("one softmax over local and global scores", "concat-scores", far=(B, H, 5, WIDTH))
def _(q, k, v, far):
    weights = torch.cat([q @ k.mT, q @ far.mT], -1).softmax(-1)
    return weights @ torch.cat([v, far[..., :VALUE_WIDTH]], 2)


@refuse("clamped scores", "scores-edited")
def _(q, k, v):
    return (q @ k.mT).clamp(-5, 5).softmax(-1) @ v


@refuse("scores clamped far out, then scaled until the bounds are near", "scores-edited")
def _clamped_then_scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT * 1e5).clamp(-1e4, 1e4) * 1e-5).softmax(-1) @ v


@refuse("scores scaled up until bounds far out are near", "scores-edited")
def _scaled_then_clamped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 1e5).clamp(-1e4, 1e4).softmax(-1) @ v


@refuse("queries scaled up until bounds far out are near", "scores-edited")
def _queries_scaled_then_clamped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q * 1e5) @ k.mT).clamp(-1e4, 1e4).softmax(-1) @ v


@refuse("scores scaled by a tensor, then clamped", "scores-edited")
def _scaled_by_a_tensor_then_clamped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) * torch.full((1, 1, 1), 1e5).exp()).clamp(-1e4, 1e4).softmax(-1) @ v


@refuse("scores clamped far out, then scaled by a tensor", "scores-edited")
def _clamped_then_scaled_by_tensor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT * 1e5).clamp(-1e4, 1e4)
    return (scores * (q[..., :1].sigmoid() * 1e-5)).softmax(-1) @ v


@refuse("scores clamped from below", "scores-edited")
def _(q, k, v):
    return (q @ k.mT).clamp_min(0.0).softmax(-1) @ v


@refuse("rectified scores", "scores-edited")
def _(q, k, v):
    return F.relu(q @ k.mT).softmax(-1) @ v


@refuse("squared scores", "scores-edited")
def _(q, k, v):
    return ((q @ k.mT) ** 2).softmax(-1) @ v


@refuse("scores times themselves", "two-products")
def _(q, k, v):
    scores = q @ k.mT
    return (scores * scores).softmax(-1) @ v


@refuse("scores subtracted from a bias", "scores-edited")
def _(q, k, v, bias):
    return (bias - q @ k.mT).softmax(-1) @ v


@refuse("a bias divided by the scores", "scores-edited")
def _(q, k, v, bias):
    return (bias / (q @ k.mT)).softmax(-1) @ v


@refuse("scores scaled key by key", "scores-edited", per_key=(KEYS,))
def _(q, k, v, per_key):
    return (q @ k.mT * per_key).softmax(-1) @ v


@refuse("scores multiplied by a 0/1 mask", "scores-edited")
def _(q, k, v, keep):
    return (q @ k.mT * keep).softmax(-1) @ v


@refuse("scores replaced by 0", "scores-edited")
def _(q, k, v, keep):
    return (q @ k.mT).masked_fill(~keep, 0.0).softmax(-1) @ v


@refuse("scores replaced by an unknown number", "scores-edited")
def _(q, k, v, keep, value):
    return torch.where(keep, q @ k.mT, value).softmax(-1) @ v


@refuse("scores hidden, then shrunk until they are seen", "scores-edited")
def _(q, k, v, keep):
    return ((q @ k.mT).masked_fill(~keep, -1e4) * 1e-4).softmax(-1) @ v


@refuse("only the largest scores kept", "weights-reused")
def _(q, k, v):
    scores = q @ k.mT * C
    least = scores.topk(5, dim=-1).values[..., -1:]
    return scores.masked_fill(scores < least, -torch.inf).softmax(-1) @ v


@refuse("a maximum per key subtracted", "weights-reused", k=(B, H, ROWS, WIDTH), v=(B, H, 17, 40))
def _(q, k, v):
    scores = q @ k.mT * C
    return (scores - scores.amax(-1).unsqueeze(-2)).softmax(-1) @ v


@refuse("the axes of the scores permuted", "layout", q=(B, H, 17, 40), k=(B, H, 17, 40))
def _(q, k, v):
    return (q @ k.mT * C).permute(0, 2, 1, 3).softmax(-1) @ v.transpose(1, 2)[:, :17, :, :]


REFUSALS[-1].shapes.update(v=(B, 17, 17, 24))


@refuse("a row of scores cut off", "scores-edited")
def _(q, k, v):
    return (q @ k.mT * C)[..., 1:].softmax(-1) @ v[:, :, 1:]


@refuse("scores pooled over queries", "scores-edited")
def _(q, k, v):
    return (q @ k.mT * C).mean(-2, keepdim=True).softmax(-1) @ v
