"""Spellings of attention that only values tell: writes in place, and causal masks."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .forms import form
from .inputs import KEYS, ROWS, WIDTH, B, C, H

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


@form("causal and a padding mask", mask="causal+bool")
def _(q, k, v, padding):
    seen = torch.ones(ROWS, KEYS, dtype=torch.bool).tril() & padding[:, None, None, :]
    return torch.where(seen, q @ k.mT * C, -torch.inf).softmax(-1) @ v


@form("causal and a bias", mask="causal+float")
def _(q, k, v, table):
    seen = torch.ones(ROWS, KEYS, dtype=torch.bool).tril()
    scores = torch.where(seen, q @ k.mT * C, -torch.inf)
    return (scores + table).softmax(-1) @ v
