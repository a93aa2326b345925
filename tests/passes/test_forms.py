"""Every spelling of attention that must be rewritten, one function each.

Each is compiled twice: approximated, with the op computed exactly (see ``capture``), and exact,
with SDPA in its place; the forms of the survey also in bf16. All must agree with eager mode.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import forms_by_value  # noqa: F401 (registers its forms)
from .capture import OP, error, run, run_exact
from .forms import FORMS, Form, form
from .inputs import KEYS, ROWS, VALUE_WIDTH, WIDTH, B, C, H, eager, in_dtype

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
    weights, v = (q @ k.mT * C).softmax(-1), v + 1
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


@form("einsum of heads with one K and V", key_heads=1, k=(B, KEYS, WIDTH), v=(B, KEYS, 24))
def _(q, k, v):
    weights = torch.einsum("bhid,bjd->bhij", q * C, k).softmax(-1)
    return torch.einsum("bhij,bjd->bihd", weights, v)


@form("einsum of groups of heads", key_heads=1, k=(B, 2, KEYS, WIDTH), v=(B, 2, KEYS, 24))
def _(q, k, v):
    grouped = q.repeat(1, 2, 1, 1)[:, :4].unflatten(1, (2, 2))
    weights = torch.einsum("bhgnd,bhmd->bhgnm", grouped, k).mul(C).softmax(-1)
    return torch.einsum("bhgnm,bhme->bhgne", weights, v).flatten(1, 2)


@form("scores and weights whose shape and dtype alone are read, too", mask="causal")
def _(q, k, v):
    scores = q @ k.mT * C
    hidden = torch.zeros_like(scores).masked_fill(scores.new_ones(scores.shape).triu(20) > 0, -1e9)
    weights = (scores + hidden).softmax(-1)
    return weights @ v + torch.full_like(input=weights, fill_value=2.0).mean()


@form(
    "an axis that PyTorch chooses",
    key_heads=1,
    q=(ROWS, WIDTH),
    k=(KEYS, WIDTH),
    v=(KEYS, VALUE_WIDTH),
)
def _(q, k, v):
    return F.softmax(q @ k.mT * C) @ v


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
