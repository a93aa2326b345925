"""Spellings of attention: their register, those of the survey, and fused calls."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import KEYS, ROWS, VALUE_WIDTH, WIDTH, B, C, H, example_inputs


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


@form("clamped where no number is, then divided by a tensor", sdpa=True)
def _(q, k, v):
    scores = (q @ k.mT).clamp(min=-torch.inf).clamp(min=torch.finfo(torch.float32).min)
    return (scores / torch.full((H, 1, 1), 1 / C)).softmax(-1) @ v


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
