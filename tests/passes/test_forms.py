"""Every spelling of attention that must be rewritten, one function each.

Each is compiled twice: approximated, with the op computed exactly (see ``capture``), and exact,
with SDPA in its place; the forms of the survey also in bf16. All must agree with eager mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .capture import OP, error, run, run_exact
from .inputs import KEYS, ROWS, VALUE_WIDTH, WIDTH, B, C, H, eager, example_inputs, in_dtype


@dataclass(frozen=True)
class Form:
    """One spelling of attention and what the report must say about it."""

    name: str
    function: Callable[..., Tensor]
    shapes: dict[str, tuple[int, ...]]
    mask: str
    sdpa: bool
    key_heads: int
    sites: int
    dtypes: tuple[torch.dtype, ...]

    def inputs(self, dtype: torch.dtype) -> list[Tensor]:
        return example_inputs(self.function, self.shapes, dtype)


FORMS: list[Form] = []

CAP = 0.8
"""A soft cap that the examples' scores run into."""


def form(
    name: str,
    *,
    mask: str = "none",
    sdpa: bool = True,
    key_heads: int = H,
    sites: int = 1,
    dtypes: tuple[torch.dtype, ...] = (),
    **shapes: tuple[int, ...],
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register a spelling; numbers are the survey's. ``sdpa``: exact, it becomes an SDPA call."""

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        function = function().eval() if isinstance(function, type) else function
        both = (torch.float32, torch.bfloat16)
        known = dtypes or (both if name[0].isdigit() else (torch.float32,))
        FORMS.append(Form(name, function, shapes, mask, sdpa, key_heads, sites, known))
        return function

    return register


# -- the twenty forms of the survey ---------------------------------------------------------------


@form("1: scale, mask, softmax in fp32, cast, dropout", mask="float")
def _(q, k, v, bias):
    scores = torch.matmul(q, k.transpose(2, 3)) * C
    scores = scores + bias
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    weights = F.dropout(weights, p=0.1, training=False)
    return torch.matmul(weights, v).transpose(1, 2).contiguous()


@form("2: the same without dtype and cast", mask="float")
def _(q, k, v, bias):
    scores = torch.matmul(q, k.transpose(-1, -2)) * C + bias
    return F.dropout(F.softmax(scores, dim=-1), p=0.1, training=False) @ v


@form("3: softmax in fp32 without a mask")
def _(q, k, v):
    scores = torch.matmul(q, k.transpose(-1, -2)) * C
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(F.dropout(weights, training=False), v)


@form("4: scale, softmax, dropout")
def _(q, k, v):
    weights = (torch.matmul(q, k.mT) * C).softmax(dim=-1)
    return torch.matmul(F.dropout(weights, 0.0, training=True), v)


@form("5: the scale on Q")
def _(q, k, v):
    return (q * C @ k.transpose(-2, -1)).softmax(dim=-1) @ v


@form("6: the scale on Q, a bias", mask="float")
def _(q, k, v, table):
    scores = (q * C) @ k.transpose(-2, -1) + table.unsqueeze(0)
    return scores.softmax(dim=-1) @ v


@form("7: divided by the square root, a mask", mask="float")
def _(q, k, v, bias):
    scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(WIDTH)
    return torch.matmul(torch.softmax(scores + bias, -1), v)


@form("8: two biases with views between them (windows of swin)", mask="float", q=(4, H, 17, 40))
def _(q, table, bias):  # 2 images of 2 windows; table per head, bias per window
    k, v = q * 0.5 + 1, q.cos()
    scores = (q * C) @ k.transpose(-2, -1) + table.unsqueeze(0)
    scores = scores.view(2, 2, H, 17, 17) + bias.unsqueeze(1).unsqueeze(0)
    scores = scores.view(-1, H, 17, 17)
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(4, 17, H * 40)


FORMS[-1].shapes.update(table=(H, 17, 17), bias=(2, 17, 17))


@form("9: bmm over merged heads, a mask under a view", mask="float")
def _(q, k, v, bias):
    q, k, v = (x.reshape(B * H, -1, x.shape[-1]) for x in (q * C, k, v))
    scores = torch.bmm(q, k.transpose(1, 2))
    scores = scores.view(B, H, ROWS, KEYS) + bias
    weights = F.softmax(scores.view(B * H, ROWS, KEYS), dim=-1)
    out = torch.bmm(F.dropout(weights, 0.1, False), v)
    return out.view(B, H, ROWS, VALUE_WIDTH).transpose(1, 2).reshape(B, ROWS, H * VALUE_WIDTH)


@form("10: the weights on the right of V", q=(B, H, WIDTH, ROWS), k=(B, H, WIDTH, KEYS))
def _(q, k, v):
    scores = q.transpose(-2, -1) @ k * C
    return v.transpose(-2, -1) @ scores.softmax(dim=-1).transpose(-2, -1)


@form("10: scores as K Q^T, transposed before the softmax")
def _(q, k, v):
    scores = (k @ q.transpose(-2, -1) * C).transpose(-2, -1)
    return v.mT @ F.softmax(scores, -1).mT


@form("11: cosine attention with a scale per head", mask="float")
def _(q, k, v, heads, table):
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    scores = scores * torch.clamp(heads, max=math.log(100.0)).exp() + table
    return scores.softmax(-1) @ v


FORMS[-1].shapes.update(heads=(H, 1, 1))


@form("12: soft-capped, a mask, softmax in fp32", mask="float", sdpa=False)
def _(q, k, v, bias):
    scores = torch.matmul(q, k.transpose(2, 3)) * C
    scores = scores / CAP
    scores = torch.tanh(scores)
    scores = scores * CAP
    weights = F.softmax(scores + bias, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(F.dropout(weights, 0.0, False), v).transpose(1, 2).contiguous()


@form("12: soft-capped in place by a reciprocal, causal", mask="causal", sdpa=False)
def _(q, k, v):
    scores = (q * C) @ k.mT
    scores *= 1 / CAP
    scores = scores.tanh_().mul_(CAP)
    seen = torch.ones(ROWS, KEYS, dtype=torch.bool).tril()
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v


@form("12: soft-capped, other factors inside than outside", mask="float", sdpa=False)
def _(q, k, v, bias, heads):
    scores = -2.5 * F.tanh((q @ k.mT).view(B * H, ROWS, KEYS) / -5.0).view(B, H, ROWS, KEYS)
    return ((scores + bias) * 1.5).softmax(-1) @ v


@form("12: a scale per head inside the soft cap", sdpa=False, heads=(H, 1, 1))
def _(q, k, v, heads):
    return (F.tanh(q @ k.mT * heads) * CAP).softmax(-1) @ v


@form("12: a tanh alone", mask="bool", sdpa=False)
def _(q, k, v, keep):
    return torch.where(keep, torch.tanh(q @ k.mT * C), -torch.inf).softmax(-1) @ v


@form("13: sinks, stabilised by the maximum", mask="float", sdpa=False, sinks=(H,))
def _(q, k, v, bias, sinks):
    scores = torch.matmul(q, k.transpose(2, 3)) * C
    scores = scores + bias
    column = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
    scores = torch.cat([scores, column], dim=-1)
    scores = scores - scores.max(dim=-1, keepdim=True).values
    weights = F.softmax(scores, dim=-1, dtype=scores.dtype)[..., :-1]
    weights = F.dropout(weights, p=0.1, training=False).to(v.dtype)
    return torch.matmul(weights, v).transpose(1, 2).contiguous()


@form("13: sinks in front, softmax in fp32", mask="bool", sdpa=False, sinks=(H,))
def _(q, k, v, keep, sinks):
    scores = (q @ k.mT * C).masked_fill(~keep, -torch.inf).float()
    column = sinks[None, :, None, None].float().repeat(B, 1, ROWS, 1)
    weights = torch.cat((column, scores), -1).softmax(-1)[:, :, :, 1:]
    return weights.to(v.dtype) @ v


@form("13: sinks, bmm", sdpa=False, sinks=(H,))
def _(q, k, v, sinks):
    scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT * C).view(B, H, ROWS, KEYS)
    scores = torch.concat([scores, sinks.view(H, 1, 1).expand(B, H, ROWS, 1)], 3) + 1.0
    weights = F.softmax(scores.flatten(0, 1), -1)[..., :KEYS]
    return torch.bmm(weights, v.flatten(0, 1))


@form("13: sinks and a soft cap", mask="float", sdpa=False, sinks=(H,))
def _(q, k, v, bias, sinks):
    scores = torch.tanh(q @ k.mT * C / CAP) * CAP + bias
    column = sinks.view(H, 1, 1).broadcast_to(B, H, ROWS, 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ v


@form("14: einsum on both sides", q=(B, ROWS, H, WIDTH), k=(B, KEYS, H, WIDTH), v=(B, KEYS, H, 24))
def _(q, k, v):
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(C).softmax(dim=-1)
    return torch.einsum("bhqk, bkhd -> bqhd", weights, v)


@form("14: einsum with the operands in the other order", mask="float")
def _(q, k, v, bias):
    scores = torch.einsum("bhjd,bhid->bhij", [k, q * C])
    weights = F.softmax(scores + bias, dim=-1)
    return torch.einsum("bhjd,bhij->bihd", v, weights)


@form("14: einsum and matmul", q=(ROWS, B, H, WIDTH), k=(KEYS, B, H, WIDTH))
def _(q, k, v):
    scores = torch.einsum("ibnd,jbnd->bnij", q, k) * C
    return torch.softmax(scores, 3) @ v


@form("15: baddbmm with alibi", mask="float")
def _(q, k, v, bias, alibi):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = alibi.baddbmm(batch1=q, batch2=k.transpose(1, 2), beta=1.0, alpha=C)
    scores = scores.view(B, H, ROWS, KEYS) + bias
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.bmm(weights.view(B * H, ROWS, KEYS), v)


FORMS[-1].shapes.update(alibi=(B * H, 1, KEYS))


@form("15: torch.baddbmm of zeros", key_heads=B * H)
def _(q, k, v):
    q, k, v = (x.reshape(B * H, -1, x.shape[-1]) for x in (q, k, v))
    zeros = torch.zeros(B * H, ROWS, KEYS, dtype=q.dtype)
    scores = torch.baddbmm(zeros, q, k.transpose(1, 2), beta=0, alpha=C)
    return torch.bmm(scores.softmax(-1), v).view(B, H, ROWS, VALUE_WIDTH)


@form("16: masked_fill of the smallest number", mask="float")
def _(q, k, v, keep):
    scores = q @ k.mT * C
    scores = scores.masked_fill(~keep, torch.finfo(scores.dtype).min)
    return scores.softmax(-1) @ v


@form("16: masked_fill of -inf", mask="bool")
def _(q, k, v, padding):
    scores = q @ k.mT * C
    scores = scores.masked_fill(padding[:, None, None, :].logical_not(), float("-inf"))
    return scores.softmax(-1) @ v


@form("16: where, with a tensor for the other scores", mask="float")
def _(q, k, v, keep):
    scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(WIDTH)
    lowest = torch.full([], -1e9, dtype=scores.dtype)
    return torch.matmul(F.softmax(torch.where(keep, scores, lowest), dim=-1), v)


@form("16: where as a method, -inf", mask="bool")
def _(q, k, v, keep):
    scores = (q @ k.mT * C).where(keep, -torch.inf)
    return scores.softmax(-1) @ v


@form("16: where with the scores last", mask="bool")
def _(q, k, v, keep):
    scores = torch.where(keep.logical_not(), -torch.inf, q @ k.mT * C)
    return scores.softmax(-1) @ v


@form("17: stabilised by the maximum, divided and multiplied", mask="float")
def _(q, k, v, bias):
    scores = (q / math.sqrt(WIDTH)) @ k.transpose(-1, -2) + bias
    scaled = scores / 32
    maximum = scaled.amax(dim=-1).unsqueeze(-1)
    return F.softmax((scaled - maximum) * 32, dim=-1) @ v


@form("17: the maximum subtracted and clamped", mask="float")
def _(q, k, v, bias):
    scores = torch.bmm(q.flatten(0, 1) * C, k.flatten(0, 1).transpose(1, 2))
    scores = scores - scores.max(dim=-1, keepdim=True)[0]
    scores = torch.clamp(scores, min=-50000)
    scores = torch.clamp(scores, max=50000)
    scores = scores.view(B, H, ROWS, KEYS) + bias
    return torch.bmm(scores.view(B * H, ROWS, KEYS).softmax(-1), v.flatten(0, 1))


@form("17: not below the smallest number", mask="float")
def _(q, k, v, bias):
    scores = (q * C) @ k.transpose(-1, -2) + bias
    lowest = torch.tensor(torch.finfo(scores.dtype).min)
    return F.softmax(torch.max(scores, lowest), dim=-1) @ v


@form("19: the mask is divided too", mask="float")
def _(q, k, v, bias):
    scores = (torch.matmul(q, k.transpose(-1, -2)) + bias) / math.sqrt(WIDTH)
    return torch.matmul(F.softmax(scores, dim=-1), v)


@form("20: scaled twice")
def _(q, k, v):
    scores = torch.matmul(q * C, k.transpose(2, 3)) * 1.0
    return torch.matmul(scores.softmax(-1), v)


# -- fused calls ----------------------------------------------------------------------------------


@form("SDPA", sdpa=False)
def _(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


@form("SDPA with a boolean mask and a scale", mask="bool", sdpa=False)
def _(q, k, v, keep):
    return F.scaled_dot_product_attention(q, k, v, keep, scale=0.3)


@form("SDPA with a float mask", mask="float", sdpa=False)
def _(q, k, v, bias):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=0.0)


@form("SDPA, is_causal, fewer queries than keys", mask="causal", sdpa=False)
def _(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@form("SDPA, enable_gqa", sdpa=False, key_heads=2, q=(B, 6, ROWS, 32), k=(B, 2, KEYS, 32))
def _(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, is_causal=False)


FORMS[-1].shapes.update(v=(B, 2, KEYS, 32))


@form("SDPA, enable_gqa and one head", sdpa=False, key_heads=1, q=(B, 6, 17, 32), k=(B, 1, 33, 32))
def _(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


FORMS[-1].shapes.update(v=(B, 1, KEYS, 24))


@form(
    "SDPA, one key head for all without enable_gqa",
    sdpa=False,
    key_heads=1,
    k=(B, 1, KEYS, WIDTH),
    v=(B, 1, KEYS, VALUE_WIDTH),
)
def _(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


@form("SDPA of three axes", sdpa=False, mask="float", key_heads=6, q=(6, 17, 32), k=(6, 33, 32))
def _(q, k, v, bias):
    return F.scaled_dot_product_attention(q, k, v, bias)


FORMS[-1].shapes.update(v=(6, 33, 32), bias=(6, 17, 33))


@form(
    "SDPA of five axes",
    mask="bool",
    sdpa=False,
    q=(2, 4, H, ROWS, 32),
    k=(2, 4, H, KEYS, 32),
    v=(2, 4, H, KEYS, 32),
    keep=(2, 1, 1, ROWS, KEYS),
)
def _(q, k, v, keep):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


@form("SDPA of two axes", sdpa=False, key_heads=1, q=(17, 32), k=(33, 32), v=(33, 40))
def _(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


@form("SDPA, queries of one batch entry for all", sdpa=False, q=(1, H, ROWS, WIDTH))
def _(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


# -- what real models add -------------------------------------------------------------------------


@form("one key head for all, broadcast", key_heads=1, k=(B, 1, KEYS, WIDTH), v=(B, 1, KEYS, 24))
def _(q, k, v):
    return (q @ k.mT * C).softmax(-1) @ v


@form("one key head for all, expanded", k=(B, 1, KEYS, WIDTH), v=(B, 1, KEYS, 24))
def _(q, k, v):
    k, v = k.expand(B, H, KEYS, WIDTH), v.expand(-1, H, -1, -1)
    return (q @ k.mT * C).softmax(-1) @ v


@form("keys without a batch axis", k=(H, KEYS, WIDTH))
def _(q, k, v):
    return (q @ k.mT * C).softmax(-1) @ v


@form("queries and keys without a batch, a mask with one", mask="float")
def _(q, k, v, bias):
    return ((q @ k.mT) * C + bias).softmax(-1) @ v


FORMS[-1].shapes.update(q=(1, H, ROWS, WIDTH), k=(1, H, KEYS, WIDTH))


@form("weights of one batch entry, values of several", q=(1, H, 17, 40), k=(1, H, 33, 40))
def _(q, k, v):
    return (q @ k.mT * C).softmax(-1) @ v


@form("queries and keys of parameters only (the first decoder layer of DETR)")
class LearnedQueries(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(ROWS, H * WIDTH))
        self.q, self.k = nn.Linear(H * WIDTH, H * WIDTH), nn.Linear(H * WIDTH, H * WIDTH)

    def forward(self, v):
        query = self.query.unsqueeze(0).expand(B, -1, -1)
        q, k = (f(query).view(B, ROWS, H, WIDTH).transpose(1, 2) for f in (self.q, self.k))
        return (q @ k.mT * C).softmax(-1) @ v[:, :, :ROWS]


@form("keys and values of parameters", q=(B, ROWS, 32), key_heads=1)
class LearnedMemory(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(KEYS, 32))

    def forward(self, q):
        return (q @ self.table.t() * 0.2).softmax(-1) @ self.table


@form("repeat_kv as expand and reshape", key_heads=2, q=(B, 6, ROWS, 32), k=(B, 2, KEYS, 32))
def _(q, k, v):
    def repeat(x):
        batch, heads, length, width = x.shape
        x = x[:, :, None, :, :].expand(batch, heads, 3, length, width)
        return x.reshape(batch, heads * 3, length, width)

    scores = torch.matmul(q, repeat(k).transpose(2, 3)) * 0.17
    return torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), repeat(v))


FORMS[-1].shapes.update(v=(B, 2, KEYS, 24))


@form("repeat_kv as repeat_interleave", key_heads=2, q=(1, 6, ROWS, 32), k=(1, 2, KEYS, 32))
def _(q, k, v):
    k, v = k.repeat_interleave(3, dim=1), torch.repeat_interleave(v, 3, dim=-3)
    return (q @ k.mT * 0.2).softmax(-1) @ v


FORMS[-1].shapes.update(v=(1, 2, KEYS, 24))


@form("heads repeated in another order than GQA", key_heads=6, q=(B, 6, 17, 32), k=(B, 2, 33, 32))
def _(q, k, v):
    k, v = k.repeat(1, 3, 1, 1), v.repeat(1, 3, 1, 1)
    return (q @ k.mT * 0.2).softmax(-1) @ v


FORMS[-1].shapes.update(v=(B, 2, KEYS, 24))


@form("SDPA after repeat_kv", key_heads=2, sdpa=False, q=(B, 6, ROWS, 32), k=(B, 2, KEYS, 32))
def _(q, k, v):
    k, v = (x[:, :, None].expand(B, 2, 3, *x.shape[2:]).flatten(1, 2) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=False)


FORMS[-1].shapes.update(v=(B, 2, KEYS, 32))


@form("grouped heads as a fifth axis", q=(B, 2, 3, ROWS, 32), k=(B, 2, 1, KEYS, 32), key_heads=1)
def _(q, k, v):
    return (q @ k.mT * 0.2).softmax(-1) @ v


FORMS[-1].shapes.update(v=(B, 2, 1, KEYS, 24))


@form(
    "five axes (windows), a bias per head",
    mask="float",
    q=(2, 4, H, ROWS, 32),
    k=(2, 4, H, KEYS, 32),
    v=(2, 4, H, KEYS, 40),
)
def _(q, k, v, table):
    return ((q * 0.2) @ k.mT + table).softmax(-1) @ v


@form("two axes", q=(ROWS, 32), k=(KEYS, 32), v=(KEYS, 40), key_heads=1)
def _(q, k, v):
    return torch.softmax(q @ k.T / 32**0.5, dim=1) @ v


@form("three axes, a mask per head", mask="bool", key_heads=6, q=(6, 17, 32), k=(6, 33, 32))
def _(q, k, v, keep):
    scores = torch.bmm(q, k.transpose(1, 2)) * 0.2
    return torch.bmm(scores.masked_fill(keep == 0, -torch.inf).softmax(-1), v)


FORMS[-1].shapes.update(v=(6, 33, 32), keep=(6, 1, 33))


@form("decomposed relative positions (SAM)", mask="float", q=(B, H, 4 * 5, 32))
class RelativePositions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows, self.columns = nn.Parameter(torch.randn(7, 32)), nn.Parameter(torch.randn(9, 32))

    def forward(self, q):
        k, v = q.sin(), q.cos()
        image = q.reshape(B * H, 4, 5, 32)
        rows = self.rows[torch.arange(4)[:, None] - torch.arange(4)[None, :] + 3]
        columns = self.columns[torch.arange(5)[:, None] - torch.arange(5)[None, :] + 4]
        by_row = torch.einsum("bhwc,hkc->bhwk", image, rows)
        by_column = torch.einsum("bhwc,wkc->bhwk", image, columns)
        bias = by_row[:, :, :, :, None] + by_column[:, :, :, None, :]
        scores = (q * 0.2) @ k.transpose(-2, -1) + bias.reshape(B, H, 20, 20)
        return scores.softmax(-1) @ v


@form("a bias over split axes of the scores", mask="float", key_heads=B * H, q=(B * H, 20, 32))
def _(q, by_row, by_column):
    k, v = q.sin(), q.cos()
    scores = (q * 0.2) @ k.transpose(-2, -1)
    scores = scores.view(B * H, 4, 5, 4, 5) + by_row[..., None] + by_column[:, :, :, None, :]
    scores = scores.view(B * H, 20, 20)
    return scores.softmax(-1) @ v


FORMS[-1].shapes.update(by_row=(B * H, 4, 5, 4), by_column=(B * H, 4, 5, 5))


@form("the scale on Q in front of a reshape")
def _(q, k, v):
    q = (q.transpose(1, 2).reshape(B, ROWS, H * WIDTH) * C).view(B, ROWS, H, WIDTH).transpose(1, 2)
    return (q @ k.mT).softmax(-1) @ v


@form("the scale on Q in front of a rotary embedding")
def _(q, k, v, cos, sin):
    def rotate(x):
        return torch.cat((-x[..., WIDTH // 2 :], x[..., : WIDTH // 2]), dim=-1)

    q = q * C
    q = q * cos + rotate(q) * sin
    return (q @ k.mT).softmax(-1) @ v


FORMS[-1].shapes.update(cos=(ROWS, WIDTH), sin=(ROWS, WIDTH))


@form("the scale on K")
def _(q, k, v):
    return (q @ (k * C).mT).softmax(-1) @ v


@form("the scale on both, divided")
def _(q, k, v):
    root = WIDTH**0.25
    return ((q / root) @ (k.transpose(-2, -1) / root)).softmax(-1) @ v


@form("a tensor of one number as the scale")
def _(q, k, v, temperature):
    return (q @ k.mT / temperature).softmax(-1) @ v


@form("a scale per query, then a bias", mask="float")
def _(q, k, v, per_query, bias):
    return (q @ k.mT * per_query + bias).softmax(-1) @ v


FORMS[-1].shapes.update(per_query=(ROWS, 1))


@form("a bias, then a scale per head", mask="float")
def _(q, k, v, heads, bias):
    return ((q @ k.mT + bias) * heads).softmax(-1) @ v


FORMS[-1].shapes.update(heads=(1, H, 1, 1))


@form("a negative scale")
def _(q, k, v):
    return (-0.1 * (q @ k.mT)).softmax(-1) @ v


@form("a bias added with alpha, another subtracted", mask="float")
def _(q, k, v, bias, table):
    scores = torch.add(q @ k.mT * C, bias, alpha=0.5)
    return scores.sub(table, alpha=2).softmax(-1) @ v


@form("the bias on the left", mask="float")
def _(q, k, v, bias):
    return (bias + C * torch.matmul(q, k.mT)).softmax(-1) @ v


@form("a mask of 0 and -10000", mask="float")
def _(q, k, v, padding):
    extended = (1.0 - padding[:, None, None, :].to(q.dtype)) * -10000.0
    return (q @ k.mT * C + extended).softmax(-1) @ v


@form("a bias, a boolean mask and another bias", mask="float")
def _(q, k, v, bias, keep, table):
    scores = q @ k.mT * C + bias
    scores = scores.masked_fill(~keep, -torch.inf)
    return (scores + table).softmax(-1) @ v


@form("two boolean masks", mask="bool")
def _(q, k, v, keep, padding):
    scores = (q @ k.mT * C).masked_fill(~keep, -torch.inf)
    scores = torch.where(padding[:, None, None, :], scores, -torch.inf)
    scores = scores.masked_fill(torch.zeros_like(keep), -torch.inf)
    return scores.softmax(-1) @ v


@form("masks of different rank", mask="float", q=(B * H, ROWS, 32), k=(B * H, KEYS, 32))
def _(q, k, v, keep, table):
    scores = torch.bmm(q, k.transpose(1, 2)) * 0.2
    scores = scores.view(B, H, ROWS, KEYS).masked_fill(~keep, -torch.inf) + table
    return torch.bmm(scores.flatten(0, 1).softmax(-1), v)


FORMS[-1].shapes.update(v=(B * H, KEYS, 24))


@form("scores of four axes, weights of three", q=(B, H, ROWS, 32), k=(B, H, KEYS, 32))
def _(q, k, v):
    weights = (q @ k.mT * 0.2).softmax(-1).reshape(B * H, ROWS, KEYS)
    return weights.bmm(v.flatten(0, 1)).reshape(B, H, ROWS, 24).transpose(1, 2)


@form("a mask of higher precision", mask="float", sdpa=False, dtypes=(torch.bfloat16,))
def _(q, k, v, bias):
    scores = (q @ k.mT * C).float() + bias.float()
    return scores.softmax(-1).type_as(q) @ v


@form("Q and K upcast in front of the product", dtypes=(torch.bfloat16,))
def _(q, k, v):
    scores = torch.matmul(q.float(), k.float().transpose(-1, -2)) * C
    return scores.softmax(-1).to(v.dtype) @ v


@form("dropout before the cast")
def _(q, k, v):
    weights = F.softmax(q @ k.mT * C, dim=-1, dtype=torch.float32)
    return F.dropout(weights, 0.1, False).type(q.dtype) @ v


@form("zero and a number added")
def _(q, k, v):
    scores = torch.add(q @ k.mT * C, 0) + 3.0
    return scores.softmax(-1) @ v


@form("iadd and itruediv on the scores", mask="float")
def _(q, k, v, bias):
    scores = torch.matmul(q, k.mT)
    scores /= math.sqrt(WIDTH)
    scores += bias
    return F.softmax(scores, dim=-1) @ v


@form("masked_fill_, rebound", mask="bool")
def _(q, k, v, keep):
    scores = torch.matmul(q, k.mT).mul_(C)
    scores = scores.masked_fill_(~keep, -torch.inf)
    return F.softmax(scores, dim=-1) @ v


@form("a packed projection, unbound", packed=(B, 17, 3, H, 32), sites=1)
def _(packed):
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    weights = (q * 0.2 @ k.transpose(-2, -1)).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).reshape(B, 17, H * 32)


@form("a packed projection, chunked", packed=(B, 17, 3 * H * 32))
def _(packed):
    q, k, v = (x.view(B, 17, H, 32).transpose(1, 2) for x in packed.chunk(3, dim=-1))
    return (q @ k.transpose(-2, -1) / 32**0.5).softmax(dim=-1) @ v


@form("keys appended to an empty cache, and returned", empty=(B, H, 0, WIDTH))
def _(q, k, v, empty):
    k, v = torch.cat([empty, k], dim=-2), torch.cat([empty[..., :VALUE_WIDTH], v], dim=-2)
    return torch.cat([(q @ k.mT * C).softmax(-1) @ v, k[..., :ROWS, :VALUE_WIDTH] + v[..., :17, :]])


@form("keys written into a cache before they are read", cache=(B, H, 40, WIDTH))
def _(q, k, v, cache):
    cache.index_copy_(2, torch.arange(KEYS), k)
    return (q @ cache[:, :, :KEYS].mT * C).softmax(-1) @ v


@form("V written before its product reads it")
def _(q, k, v):
    weights = (q @ k.mT * C).softmax(-1)
    v.mul_(2.0)
    return weights @ v + v.sum()


@form("softmax from torch.special, a keyword dim")
def _(q, k, v):
    return torch.special.softmax(input=q @ k.mT * C, dim=3) @ v


@form("a view of the output, after transpose and contiguous")
def _(q, k, v):
    out = (q @ k.mT * C).softmax(-1) @ v
    return out.transpose(1, 2).contiguous().view(B, ROWS, H * VALUE_WIDTH)


@form("a view that relies on the memory order of a product")
def _(q, k, v):
    out = (q @ k.mT * C).softmax(-1) @ v
    return out.view(B * H, ROWS, VALUE_WIDTH) + out.view(B * H, ROWS, VALUE_WIDTH)


@form("a flat view of an einsum")
def _(q, k, v):
    out = torch.einsum("bhqk,bhkd->bhqd", (q @ k.mT * C).softmax(-1), v)
    return out.view(-1)


@form("two attentions, one after the other", sites=2)
def _(q, k, v):
    out = (q @ k.mT * C).softmax(-1) @ v
    query = F.pad(out, (0, WIDTH - VALUE_WIDTH))
    return (query @ k.mT * C).softmax(-1) @ v


@form("the same Q and K for two softmaxes", sites=2)
def _(q, k, v):
    return (q @ k.mT * C).softmax(-1) @ v + (q @ k.mT * 0.5).softmax(-1) @ v


@form("one query", q=(B, H, 1, WIDTH))
def _(q, k, v):
    return (q @ k.mT * C).softmax(-1) @ v


# -- what is written in place is read when it is read ---------------------------------------------


@form("written: a mask written into the scores, not rebound", mask="bool")
def _(q, k, v, keep):
    scores = q @ k.mT * C
    scores.masked_fill_(~keep, -torch.inf)
    return scores.softmax(-1) @ v


@form("written: a bias added in place, not rebound", mask="float")
def _(q, k, v, bias):
    scores = q @ k.mT * C
    scores.add_(bias)
    return scores.softmax(-1) @ v


@form("written: a bias added by torch.add(out=)", mask="float")
def _(q, k, v, bias):
    scores = q @ k.mT * C
    torch.add(scores, bias, out=scores)
    return scores.softmax(-1) @ v


@form("written: scores written through a view", mask="bool")
def _(q, k, v, keep):
    scores = q @ k.mT * C
    scores.view(B, H, ROWS, KEYS).masked_fill_(~keep, -torch.inf)
    return scores.softmax(-1) @ v


@form("written: Q written after it was scaled, not rebound")
def _(q, k, v, bias):
    scaled = q * C
    scaled.add_(1.0)
    return (scaled @ k.mT).softmax(-1) @ v


@form("written: a copy of K written before the product")
def _(q, k, v):
    key = k.mT.contiguous()
    key.mul_(2.0)
    return (q @ key * C).softmax(-1) @ v


@form("written: repeated keys written before the product", key_heads=6, q=(B, 6, 17, 40))
def _(q, k, v):
    key, value = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    key[:, 1].mul_(2.0)
    return (q @ key.mT * C).softmax(-1) @ value


@form("written: a copy of K written before SDPA", sdpa=False)
def _(q, k, v):
    key = k.transpose(1, 2).contiguous()
    key.mul_(2.0)
    return F.scaled_dot_product_attention(q, key.transpose(1, 2), v)


@form("written: Q written between its scale and the product")
def _(q, k, v):
    scaled = q * C
    q.zero_()
    return (scaled @ k.mT).softmax(-1) @ v


@form("written: K written after it was repeated", key_heads=6, q=(B, 6, 17, 40), k=(B, 3, 33, 40))
def _(q, k, v):
    key, value = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    k.zero_()
    v.zero_()
    return (q @ key.mT * C).softmax(-1) @ value


@form("written: K written after it was copied by contiguous")
def _(q, k, v):
    key = k.mT.contiguous()
    k.zero_()
    return (q @ key * C).softmax(-1) @ v


@form("written: K put together by slice writes (deepseek_v3)")
def _(q, k, v):
    key = k.new_empty(B, H, KEYS, WIDTH)
    key[..., :20] = k[..., 20:]
    key[..., 20:] = k[..., :20]
    return (q @ key.mT * C).softmax(-1) @ v


@form("written: K put together by copies into slices (deepseek_v3)")
def _(q, k, v):
    key = k.new_empty(B, H, KEYS, WIDTH)
    key[..., :20].copy_(k[..., 20:])
    key[..., 20:].copy_(k[..., :20])
    return (q @ key.mT * C).softmax(-1) @ v


# -- causal, as graphs say it ---------------------------------------------------------------------


@form("causal: where of tril of ones", mask="causal")
def _(q, k, v):
    seen = torch.ones(ROWS, KEYS, dtype=torch.bool).tril()
    return torch.where(seen, q @ k.mT * C, -torch.inf).softmax(-1) @ v


@form("causal: masked_fill of triu", mask="causal")
def _(q, k, v):
    hidden = torch.triu(torch.ones(1, 1, ROWS, KEYS), diagonal=1).bool()
    return (q @ k.mT * C).masked_fill(hidden, -torch.inf).softmax(-1) @ v


@form("causal: triu of a matrix full of -inf, added", mask="causal")
def _(q, k, v):
    bias = torch.full((ROWS, KEYS), float("-inf"), dtype=q.dtype).triu(1)
    return (q @ k.mT * C + bias).softmax(-1) @ v


@form("causal: positions compared", mask="causal")
def _(q, k, v):
    seen = torch.arange(KEYS)[None, :] <= torch.arange(ROWS)[:, None]
    return torch.where(seen, q @ k.mT * C, torch.finfo(q.dtype).min).softmax(-1) @ v


@form("causal: SDPA with positions compared", mask="causal", sdpa=False)
def _(q, k, v):
    seen = torch.arange(ROWS).view(-1, 1) >= torch.arange(KEYS)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[None, None])


@form("causal: tril with another diagonal", mask="causal")
def _(q, k, v):
    seen = torch.ones(ROWS, KEYS, dtype=torch.bool).tril(KEYS - ROWS)
    return torch.where(seen, q @ k.mT * C, -torch.inf).softmax(-1) @ v


@form("causal: each query sees the keys up to it", mask="causal")
def _(q, k, v):
    seen = torch.arange(KEYS)[None, :] < torch.arange(ROWS)[:, None] + 1
    return torch.where(seen, q @ k.mT * C, -torch.inf).softmax(-1) @ v


@form("causal: positions shifted", mask="causal")
def _(q, k, v):
    seen = torch.arange(KEYS)[None, :] <= torch.arange(3, ROWS + 3)[:, None]
    return torch.where(seen, q @ k.mT * C, -torch.inf).softmax(-1) @ v


@form("not causal: steps of two", mask="bool")
def _(q, k, v):
    seen = torch.arange(KEYS)[None, :] <= torch.arange(0, 2 * ROWS, 2)[:, None]
    return torch.where(seen, q @ k.mT * C, -torch.inf).softmax(-1) @ v


@form("not causal: the lower triangle is hidden", mask="bool", q=(B, H, 17, 40))
def _(q, k, v):
    hidden = torch.ones(ROWS, KEYS, dtype=torch.bool).tril()
    return (q @ k.mT * C).masked_fill(hidden, -torch.inf).softmax(-1) @ v


@form("not causal: a buffer that happens to be one", mask="bool")
def _(q, k, v):
    return torch.where(CAUSAL_BUFFER, q @ k.mT * C, -torch.inf).softmax(-1) @ v


CAUSAL_BUFFER = torch.ones(ROWS, KEYS, dtype=torch.bool).tril()


@form("causal and a padding mask", mask="bool")
def _(q, k, v, padding):
    seen = torch.ones(ROWS, KEYS, dtype=torch.bool).tril() & padding[:, None, None, :]
    return torch.where(seen, q @ k.mT * C, -torch.inf).softmax(-1) @ v


@form("causal and a bias", mask="float")
def _(q, k, v, table):
    seen = torch.ones(ROWS, KEYS, dtype=torch.bool).tril()
    scores = torch.where(seen, q @ k.mT * C, -torch.inf)
    return (scores + table).softmax(-1) @ v


# -- the tests ------------------------------------------------------------------------------------


def _cases() -> list[Any]:
    return [
        pytest.param(f, dtype, id=f"{f.name}-{str(dtype)[6:]}") for f in FORMS for dtype in f.dtypes
    ]


def _check(actual: Tensor, form: Form, dtype: torch.dtype) -> None:
    """No further from fp64 than eager mode in the same precision, but for a rounding."""
    inputs = form.inputs(dtype)
    expected = eager(form.function, inputs, dtype)
    oracle = eager(form.function, inputs, torch.float64)
    assert actual.dtype == expected.dtype
    assert error(actual, oracle) <= 2 * error(expected, oracle) + 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize(("form", "dtype"), _cases())
def test_approximated_site_gets_exactly_its_arguments(form: Form, dtype: torch.dtype) -> None:
    capture = run(in_dtype(form.function, dtype), form.inputs(dtype))
    _check(capture.output, form, dtype)
    assert len(capture.rows) == form.sites
    assert not capture.not_attention
    for row in capture.rows:
        if "one query" in form.name:
            assert capture.codes == {"decode"}
            continue
        assert (row.decision, row.reasons) == ("distr", ())
        assert row.mask == form.mask
        assert row.shapes["k"][1] == row.shapes["v"][1] == form.key_heads
    assert len(capture.calls) == (0 if "one query" in form.name else form.sites)
    softmaxes = {F.softmax, torch.softmax, torch.special.softmax, "softmax"}
    assert "one query" in form.name or not softmaxes & set(capture.targets())


@pytest.mark.parametrize(("form", "dtype"), _cases())
def test_exact_site_becomes_sdpa(form: Form, dtype: torch.dtype) -> None:
    capture = run_exact(in_dtype(form.function, dtype), form.inputs(dtype))
    _check(capture.output, form, dtype)
    assert OP not in capture.targets()
    assert capture.codes == {"group-size-1"}
    assert [row.sdpa for row in capture.rows] == [form.sdpa] * form.sites


@pytest.mark.parametrize("form", [f for f in FORMS if f.name[0].isdigit()], ids=lambda f: f.name)
def test_keep_leaves_the_graph_alone(form: Form) -> None:
    policy = {"group_size": 1, "exact": "keep"}
    capture = run(form.function, form.inputs(torch.float32), policy=policy)
    assert torch.equal(capture.output, eager(form.function, form.inputs(torch.float32)))
    assert not any(row.sdpa for row in capture.rows)
