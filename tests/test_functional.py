"""``distr_compile.attention``: SDPA's conventions, and the definition's numbers."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import distr_compile
from distr_compile.kernels.attention import reference

SIGNATURE = {
    "attn_mask": None,
    "dropout_p": 0.0,
    "is_causal": False,
    "scale": None,
    "enable_gqa": False,
    "group_size": 2,
    "rank": None,
    "estimator": "projection",
    "rounds": 1,
    "grouping_block": "auto",
    "causal": "block",
}


def qkv(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(shapes[0]) * shapes[0][-2])
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def same(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return qkv(shape, shape, shape, dtype=dtype)


def defined(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, rank: int, **options: Any
) -> Tensor:
    """The definition in fp64, of four axes.

    A call in fp64 is held to it where fewer rows than columns are left: the Gram matrices have next
    to no inverse then, and fp32 is off by what that makes of its roundings.
    """
    options.setdefault("scale", q.shape[-1] ** -0.5)
    options.setdefault("estimator", "projection")
    q, k, v = (t.double() for t in (q, k, v))
    mask = mask.double() if mask is not None and mask.is_floating_point() else mask
    return reference.attention(q, k, v, mask, rank=rank, **options)


def assert_near(got: Tensor, wanted: Tensor) -> None:
    assert got.shape == wanted.shape
    rounding = 1e-10 if got.dtype == torch.float64 else 64 * torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.double(), wanted.double(), rtol=rounding, atol=rounding)


def test_the_signature_is_that_of_sdpa_and_the_fields_of_a_policy() -> None:
    parameters = inspect.signature(distr_compile.attention).parameters
    defaults = {n: p.default for n, p in parameters.items() if p.default is not p.empty}
    assert list(parameters)[:3] == ["query", "key", "value"]
    assert defaults == SIGNATURE
    assert list(defaults) == list(SIGNATURE)
    keyword_only = [n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY]
    assert keyword_only == list(SIGNATURE)[3:]


@pytest.mark.parametrize("width", [40, 72, 80, 96, 192])
@pytest.mark.parametrize(("queries", "keys"), [(17, 197), (197, 17), (250, 250)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_it_is_the_definition(width: int, queries: int, keys: int, is_causal: bool) -> None:
    q, k, v = qkv((2, 3, queries, width), (2, 3, keys, width), (2, 3, keys, 24))
    got = distr_compile.attention(q, k, v, is_causal=is_causal)
    assert_near(got, defined(q, k, v, rank=width // 2, is_causal=is_causal))
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    if min(queries, keys) > width // 2:  # else a basis of that many columns holds all scores
        assert (got - exact).norm() > 1e-3 * exact.norm(), "nothing was approximated"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    q, k, v = qkv(*[(1, 2, 50, 64)] * 3, dtype=dtype)
    got = distr_compile.attention(q, k, v, rank=48, rounds=2, grouping_block=20)
    assert got.dtype == dtype
    wanted = defined(q, k, v, rank=48, rounds=2, grouping_block=20)
    rounding = {torch.float64: 1e-12}.get(dtype, 8 * torch.finfo(dtype).eps)
    torch.testing.assert_close(got.double(), wanted, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("tokens", [1, 5, 15])
@pytest.mark.parametrize("is_causal", [False, True])
def test_fewer_than_16_rows_are_exact(tokens: int, is_causal: bool) -> None:
    q, k, v = qkv((2, 2, tokens, 64), (2, 2, 40, 64), (2, 2, 40, 64))
    got = distr_compile.attention(q, k, v, is_causal=is_causal)
    wanted = [t.double() for t in (q, k, v)]
    assert_near(got, F.scaled_dot_product_attention(*wanted, is_causal=is_causal))
    q, k, v = qkv((2, 2, 16, 64), (2, 2, 40, 64), (2, 2, 40, 64))
    approximated = distr_compile.attention(q, k, v, estimator="lsh-sample")
    assert not torch.allclose(approximated, F.scaled_dot_product_attention(q, k, v))


def test_group_size_1_is_exact() -> None:
    q, k, v = same(1, 2, 100, 24)
    wide = [t.double() for t in (q, k, v)]
    got = distr_compile.attention(q, k, v, group_size=1)
    assert_near(got, F.scaled_dot_product_attention(*wide))


def test_three_axes() -> None:
    q, k, v = qkv((4, 30, 64), (4, 50, 64), (4, 50, 40))
    got = distr_compile.attention(q, k, v)
    assert_near(got, defined(q[None], k[None], v[None], rank=32)[0])
    mask = torch.rand(4, 30, 50, generator=torch.Generator().manual_seed(0)) > 0.3
    got = distr_compile.attention(q, k, v, mask)
    assert_near(got, defined(q[None], k[None], v[None], mask, rank=32)[0])
    few = distr_compile.attention(q[:, :8], k, v, mask[:, :8])
    assert_near(few, F.scaled_dot_product_attention(q[:, :8], k, v, mask[:, :8]))
    one_key_head = distr_compile.attention(q, k[:1], v[:1], enable_gqa=True)
    assert_near(one_key_head, defined(q[None], k[None, :1], v[None, :1], rank=32)[0])


MASKS = {
    "padding": lambda g: torch.rand(2, 1, 1, 50, generator=g) > 0.3,
    "a row per query": lambda g: torch.rand(30, 50, generator=g) > 0.3,
    "a row without keys": lambda g: (torch.arange(30) != 7)[:, None].expand(30, 50),
    "floating": lambda g: torch.randn(2, 4, 30, 50, generator=g),
    "-inf": lambda g: torch.where(torch.arange(30)[:, None] == 3, -torch.inf, 0.0).expand(30, 50),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_masks(name: str, is_causal: bool) -> None:
    q, k, v = qkv((2, 4, 30, 64), (2, 4, 50, 64), (2, 4, 50, 64), dtype=torch.float64)
    mask = MASKS[name](torch.Generator().manual_seed(3))
    got = distr_compile.attention(q, k, v, mask, is_causal=is_causal)
    wanted = defined(q, k, v, mask, rank=32, is_causal=is_causal)
    assert_near(got, wanted)
    seen = mask if mask.dtype == torch.bool else mask > -torch.inf
    seen = seen.expand(2, 4, 30, 50)
    hidden = ~(seen.tril() if is_causal else seen).any(-1)
    assert torch.equal(got[hidden], torch.zeros_like(got[hidden]))
    assert bool(hidden.any()) == (name in {"a row without keys", "-inf"}) or is_causal


def test_causality_is_counted_from_the_top_left() -> None:
    q, k, v = qkv((1, 2, 20, 64), (1, 2, 45, 64), (1, 2, 45, 64))
    got = distr_compile.attention(q, k, v, is_causal=True, group_size=1)
    assert_near(got, F.scaled_dot_product_attention(q, k, v, is_causal=True))
    later = v.clone()
    later[:, :, 20:] += 100
    assert torch.equal(distr_compile.attention(q, k, later, is_causal=True, group_size=1), got)


def test_strict_sees_no_later_row() -> None:
    q, k, v = same(1, 2, 300, 64)
    strict: dict[str, Any] = {"is_causal": True, "causal": "strict", "grouping_block": 64}
    got = distr_compile.attention(q, k, v, **strict)
    assert_near(got, defined(q, k, v, rank=32, is_causal=True, strict=True, grouping_block=64))
    changed = [torch.cat([t[:, :, :150], t[:, :, 150:] * 3], 2) for t in (q, k, v)]
    assert torch.equal(distr_compile.attention(*changed, **strict)[:, :, :150], got[:, :, :150])
    block = strict | {"causal": "block"}
    seen = distr_compile.attention(*changed, **block)[:, :, :150]
    assert not torch.equal(seen, distr_compile.attention(q, k, v, **block)[:, :, :150])


def test_strict_with_a_mask_over_fewer_keys_than_queries_is_exact() -> None:
    q, k, v = qkv((1, 2, 40, 64), (1, 2, 30, 64), (1, 2, 30, 64))
    mask = torch.ones(40, 30, dtype=torch.bool).tril(-10)
    got = distr_compile.attention(q, k, v, mask, causal="strict", grouping_block=16)
    wanted = F.scaled_dot_product_attention(*(t.double() for t in (q, k, v)), mask)
    assert_near(got, wanted.nan_to_num())


def test_key_heads() -> None:
    q, k, v = qkv((2, 6, 40, 64), (2, 2, 50, 64), (2, 2, 50, 64))
    got = distr_compile.attention(q, k, v, enable_gqa=True)
    assert_near(got, defined(q, k, v, rank=32))
    exact = distr_compile.attention(q, k, v, enable_gqa=True, group_size=1)
    assert_near(exact, F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
    with pytest.raises(ValueError, match=r"heads: got 6 and 2; accepted: .*; expand them; enable"):
        distr_compile.attention(q, k, v)
    with pytest.raises(ValueError, match="must divide the 6 heads"):
        distr_compile.attention(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1), enable_gqa=True)


BROADCAST = [
    ((1, 4, 20, 32), (3, 4, 30, 32), (3, 4, 30, 32)),
    ((3, 4, 20, 32), (1, 4, 30, 32), (3, 4, 30, 32)),
    ((3, 4, 20, 32), (3, 1, 30, 32), (3, 1, 30, 32)),
    ((3, 4, 20, 32), (3, 1, 30, 32), (3, 4, 30, 32)),
    ((3, 1, 20, 32), (3, 4, 30, 32), (3, 4, 30, 32)),
    ((1, 1, 20, 32), (1, 4, 30, 32), (3, 1, 30, 32)),
    ((2, 4, 0, 32), (2, 4, 30, 32), (2, 4, 30, 32)),
    ((0, 4, 20, 32), (0, 4, 30, 32), (0, 4, 30, 32)),
]


@pytest.mark.parametrize("shapes", BROADCAST, ids=str)
@pytest.mark.parametrize("tokens", [20, 4])
def test_leading_axes_broadcast_as_in_sdpa(shapes: Any, tokens: int) -> None:
    q, k, v = qkv(*shapes)
    q = q[:, :, :tokens]
    wanted = F.scaled_dot_product_attention(q, k, v)
    assert_near(distr_compile.attention(q, k, v, group_size=1), wanted)
    approximated = distr_compile.attention(q, k, v)
    assert approximated.shape == wanted.shape
    full = [t.expand(*wanted.shape[:2], -1, -1).contiguous() for t in (q, k, v)]
    if k.shape[1] == v.shape[1] == 1 != q.shape[1]:  # one key head: shared, as with GQA
        full[1:] = [t[:, :1].contiguous() for t in full[1:]]
    assert_near(approximated, defined(*full, rank=16) if q.numel() and tokens > 15 else wanted)


def test_any_strides() -> None:
    q, k, v = torch.randn(3, 2, 40, 2, 64, generator=torch.Generator().manual_seed(2)).unbind(0)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k = k[:, :, ::2]
    v = v.flip(3)[:, :, ::2]
    mask = torch.ones(1, 1, dtype=torch.bool).expand(40, 20)
    got = distr_compile.attention(q, k, v, mask)
    assert_near(got, defined(q.contiguous(), k.contiguous(), v.contiguous(), rank=32))


def test_scale_of_ones_own() -> None:
    q, k, v = same(1, 2, 20, 64, dtype=torch.float64)
    assert_near(distr_compile.attention(q, k, v, scale=0.3), defined(q, k, v, rank=32, scale=0.3))


def test_an_lsh_estimator() -> None:
    q, k, v = same(1, 2, 40, 96)
    got = distr_compile.attention(q, k, v, estimator="lsh-sample", group_size=3)
    assert_near(got, defined(q, k, v, rank=32, estimator="lsh-sample"))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "both": ({"group_size": 2, "rank": 32}, "group_size: got 2 (int) beside rank 32 (int); accept"),
    "dropout": ({"dropout_p": 2.0}, "dropout_p: got 2.0; must be from 0 to 1"),
    "group size": ({"group_size": 0}, "group_size: got 0 (int); accepted: an integer >= 1"),
    "wide": ({"grouping_block": 2**63}, "accepted: an integer >= 1 and < 2**63"),
    "bool": ({"group_size": True}, "group_size: got True (bool); accepted: an integer >= 1"),
    "too narrow": ({"group_size": 8}, "group_size: got 8 for head width 64; must leave at least"),
    "divides": (
        {"group_size": 3, "estimator": "lsh-mean"},
        "group_size: got 3 for head width 64; must divide the width",
    ),
    "rank": ({"rank": 8}, "rank: got 8 (int); accepted: an integer >= 16"),
    "wide rank": ({"rank": 64}, "rank: got 64 for head width 64, which is exact attention; must"),
    "estimator": ({"estimator": "lsh"}, "estimator: got 'lsh' (str); accepted: \"lsh-sample\" or"),
    "bases": ({"estimator": "calibrated"}, "estimator: got 'calibrated'; accepted: lsh-sample, "),
    "rounds": ({"rounds": 2, "estimator": "lsh-mean"}, "rounds: got 2; accepted: 1 with estimator"),
    "block": ({"grouping_block": "all"}, "grouping_block: got 'all' (str); accepted: an integer"),
    "causal": ({"causal": "none"}, 'causal: got \'none\' (str); accepted: "block" or "strict"'),
    "strict": (
        {"causal": "strict", "estimator": "lsh-mean", "is_causal": True},
        "causal: got 'strict' with estimator 'lsh-mean', which sees all query rows of the grouping",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options(name: str) -> None:
    options, message = WRONG[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        distr_compile.attention(*same(1, 2, 20, 64), **options)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("query", None, "query: got None (NoneType); accepted: a tensor; give Q, K and V"),
        ("value", [1.0], "value: got [1.0] (list); accepted: a tensor"),
        ("attn_mask", 3, "attn_mask: got 3 (int); accepted: a tensor, or None"),
        ("dropout_p", "x", "dropout_p: got 'x' (str); accepted: a number from 0 to 1"),
        ("dropout_p", True, "dropout_p: got True (bool); accepted: a number from 0 to 1"),
        ("scale", "a", "scale: got 'a' (str); accepted: a number, or None"),
        ("is_causal", 1, "is_causal: got 1 (int); accepted: True or False"),
        ("enable_gqa", "x", "enable_gqa: got 'x' (str); accepted: True or False"),
    ],
)
def test_other_types(name: str, value: Any, message: str) -> None:
    given = dict(zip(("query", "key", "value"), same(1, 2, 20, 64), strict=True))
    with pytest.raises(TypeError, match=re.escape(message)):
        distr_compile.attention(**{**given, name: value})


@pytest.mark.parametrize("name", ["query", "key", "value", "attn_mask"])
@pytest.mark.parametrize("make", ["to_sparse", "to_sparse_csr", "to_mkldnn"])
def test_tensors_without_strides_are_refused(name: str, make: str) -> None:
    given = dict(zip(("query", "key", "value"), same(1, 2, 20, 64), strict=True))
    like = torch.zeros(1, 1, 20, 20) if name == "attn_mask" else given[name]
    message = (
        rf"^{name}: got a tensor of torch\._?\w+; accepted: a tensor with strides; give {name}"
    )
    with pytest.raises(ValueError, match=message):
        distr_compile.attention(**{**given, name: getattr(like, make)()})


@pytest.mark.parametrize("mask", [None, (17, 1), (1, 0), (17, 0)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_without_keys_all_is_zero(mask: tuple[int, int] | None, dtype: torch.dtype) -> None:
    q, k, v = qkv((1, 2, 17, 64), (1, 2, 0, 64), (1, 2, 0, 64), dtype=torch.float32)
    for t in (q, k, v):
        t.requires_grad_()
    out = distr_compile.attention(q, k, v, None if mask is None else torch.ones(mask, dtype=dtype))
    assert torch.equal(out, torch.zeros(1, 2, 17, 64))
    for t, gradient in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
        assert torch.equal(gradient, torch.zeros_like(t))


@pytest.mark.parametrize("kind", [torch.tensor, np.float32])
def test_numbers_of_other_kinds(kind: Callable[[float], Any]) -> None:
    """SDPA takes them."""
    q, k, v = same(1, 2, 20, 64)
    got = distr_compile.attention(q, k, v, dropout_p=kind(0.0), scale=kind(0.25))
    assert torch.equal(got, distr_compile.attention(q, k, v, scale=0.25))


def test_no_width_and_no_device() -> None:
    """SDPA runs on either: without columns all scores are 0; on "meta" there are only sizes."""
    q, k, v = torch.empty(1, 2, 20, 0), torch.empty(1, 2, 30, 0), torch.randn(1, 2, 30, 8)
    got = distr_compile.attention(q, k, v, group_size=1)
    torch.testing.assert_close(got, v.mean(2, keepdim=True).expand(-1, -1, 20, -1))
    q, k, v = (t.to("meta") for t in same(1, 2, 20, 64))
    assert distr_compile.attention(q, k, v).shape == (1, 2, 20, 64)


def test_wrong_tensors() -> None:
    q, k, v = same(1, 2, 20, 64)
    for bad in (q[0, 0], q[None]):
        with pytest.raises(ValueError, match=r"query: got \d dimensions .*; accepted: .*; flatten"):
            distr_compile.attention(bad, bad, bad)
    with pytest.raises(ValueError, match="key: got 3 dimensions beside 4 of query"):
        distr_compile.attention(q, k[0], v)
    with pytest.raises(ValueError, match="attn_mask: got 4 dimensions; accepted: at most 3"):
        distr_compile.attention(q[0], k[0], v[0], torch.ones(1, 1, 20, 20, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask: got torch.int64; must be torch.bool"):
        distr_compile.attention(q, k, v, torch.ones(20, 20, dtype=torch.long))
    with pytest.raises(ValueError, match="batch sizes: got 2 and 3; accepted: one size, or 1"):
        distr_compile.attention(q.expand(2, -1, -1, -1), k.expand(3, -1, -1, -1), v)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"group_size": 1}])
def test_gradients_are_those_of_the_definition(options: dict[str, Any]) -> None:
    """Groups of columns do not change with small steps: autograd of the definition is right."""
    estimator = {"estimator": "lsh-mean"}
    tensors = [*same(2, 4, 40, 64, dtype=torch.float64), torch.randn(40, 40).double()]
    ours, wanted = ([t.clone().requires_grad_() for t in tensors] for _ in range(2))
    out = distr_compile.attention(*ours, **estimator, **options)
    rank = 64 // options.get("group_size", 2)
    is_causal = options.get("is_causal", False)
    expected = defined(*wanted, rank=rank, is_causal=is_causal, **estimator)
    assert_near(out, expected)
    weights = torch.randn(out.shape).double()
    for loss in ((out * weights).sum(), (expected * weights).sum()):
        loss.backward()
    for mine, theirs in zip(ours, wanted, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor", "distr"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_inside_a_compiled_function(backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return distr_compile.attention(q.sin(), k, v, is_causal=True, rank=40).cos()

    compiled = torch.compile(f, backend=backend, dynamic=dynamic, fullgraph=True)
    for tokens in (40, 57):
        q, k, v = same(2, 2, tokens, 64, dtype=torch.float64)
        assert_near(compiled(q, k, v), f(q, k, v).double())


def test_under_autocast() -> None:
    q, k, v = same(1, 2, 40, 64)
    with torch.autocast("cpu", torch.bfloat16):
        got = distr_compile.attention(q, k, v)
    half = [t.bfloat16() for t in (q, k, v)]
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, distr_compile.attention(*half))


@pytest.mark.parametrize("group_size", [1, 2])
@pytest.mark.parametrize("rows", [5, 20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(24,), ()])
def test_a_mask_of_less_than_two_axes(
    shape: tuple[int, ...], dtype: torch.dtype, rows: int, group_size: int
) -> None:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, n, 32, generator=draw).to(dtype) for n in (rows, 24, 24))
    bias = torch.randn(shape, generator=draw).to(dtype)
    got = distr_compile.attention(q, k, v, bias, group_size=group_size)
    want = distr_compile.attention(q, k, v, bias.expand(rows, 24), group_size=group_size)
    torch.testing.assert_close(got, want)
