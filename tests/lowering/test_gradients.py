"""Gradients of the op: against autograd of the definition with A and B held constant.

The rule for every dtype: the error to the definition in fp64 is at most ``FACTOR`` times the error
of autograd through the definition in the working precision, plus the rounding of the result. For
``projection`` twice that, as in ``test_cpu.py``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distr_compile.estimators import ESTIMATORS
from distr_compile.kernels.attention import backward as backward_kernel
from distr_compile.kernels.attention import cpu as kernel
from distr_compile.kernels.attention import reference
from distr_compile.kernels.projection import reference as projection
from distr_compile.lowering import cpu_backward, exactly, pieces, training
from distr_compile.lowering.call import Approximation, Call, Scores, Shape
from distr_compile.lowering.flops import attention_flops, backward_flops
from distr_compile.lowering.saved import Gradients, Saved
from distr_compile.lowering.told import Listener, listening
from distr_compile.reporting import Handover
from tests.kernels.cpu_kernel import require_kernel

op: Any = torch.ops.distr.attention
FACTOR = 3.0


@pytest.fixture(params=["products", "fused"])
def forward(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who computes the forward, what is saved, and the backward where it can."""
    if request.param == "fused":
        require_kernel()
    else:
        monkeypatch.setattr(kernel, "unavailable_reason", lambda: "a test forbids it")


@pytest.fixture(autouse=True)
def _constant_bases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd through the definition holds A and B constant; groups are integers anyway."""
    made = projection._bases
    monkeypatch.setattr(projection, "_bases", lambda *a: tuple(t.detach() for t in made(*a)))


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def bases(key_heads: int, head_dim: int, rank: int) -> tuple[Tensor, Tensor]:
    A, B = (draw(key_heads, head_dim, rank, seed=seed) / head_dim**0.5 for seed in (7, 8))
    return A.float(), B.float()


MEAN: dict[str, Any] = {"estimator": "lsh-mean"}
PADDED: tuple[Any, Any] = ((3, 4, 2, 60, 60, 32, 40), "padding")
CASES: dict[str, tuple[tuple[int, ...], Any, dict[str, Any]]] = {
    # name: B, H, H_k, N, M, d, d_v; mask: None, shape (of a bias), "bool", "padding"; options
    "one row": ((2, 2, 1, 1, 5, 32, 32), None, MEAN | {"rank": 16}),
    "17 rows": ((1, 2, 2, 17, 17, 40, 24), None, MEAN | {"rank": 20}),
    "197 rows": ((1, 3, 1, 197, 197, 64, 64), None, {"estimator": "projection", "rank": 32}),
    "1000 rows": ((1, 1, 1, 1000, 300, 96, 40), None, MEAN | {"rank": 48, "grouping_block": 384}),
    "width 24": ((1, 2, 1, 40, 33, 24, 24), None, {"estimator": "projection", "rank": 17}),
    "width 72": ((1, 2, 2, 18, 20, 72, 72), None, {"estimator": "lsh-signed", "rank": 36}),
    "width 80": ((1, 2, 1, 20, 19, 80, 80), None, {"estimator": "lsh-sample", "rank": 20}),
    "width 192": ((1, 1, 1, 140, 130, 192, 64), None, {"estimator": "projection", "rank": 96}),
    "signed, blocks": (
        (2, 4, 2, 50, 24, 32, 40),
        None,
        {"estimator": "lsh-signed", "rank": 16, "grouping_block": 16, "seed": 3},
    ),
    "sample, causal": (
        (2, 4, 2, 50, 50, 32, 32),
        None,
        {"estimator": "lsh-sample", "rank": 16, "is_causal": True, "grouping_block": 24},
    ),
    "projection, two rounds": (
        (2, 4, 2, 50, 44, 48, 32),
        "bool",
        {"estimator": "projection", "rank": 24, "rounds": 2, "grouping_block": 16},
    ),
    "calibrated": ((2, 4, 2, 40, 44, 32, 32), None, {"estimator": "calibrated", "rank": 20}),
    "strict": (
        (2, 4, 2, 70, 70, 32, 24),
        None,
        {
            "estimator": "projection",
            "rank": 16,
            "strict": True,
            "is_causal": True,
            "grouping_block": 16,
        },
    ),
    "strict, keys in front": (
        (1, 2, 1, 50, 77, 32, 32),
        (50, 77),
        {
            "estimator": "projection",
            "rank": 16,
            "strict": True,
            "is_causal": True,
            "causal_offset": 27,
            "grouping_block": 32,
            "softcap": 2.0,
        },
    ),
    "rows that see nothing": (
        (1, 2, 2, 24, 20, 32, 32),
        None,
        MEAN | {"rank": 16, "is_causal": True, "causal_offset": -5},
    ),
    "soft cap": ((2, 2, 2, 20, 24, 32, 32), "bool", MEAN | {"rank": 16, "softcap": 1.5}),
    "bias of every score": ((2, 4, 2, 20, 24, 32, 32), (2, 4, 20, 24), MEAN | {"rank": 16}),
    "bias of keys": ((2, 4, 2, 20, 24, 32, 32), (2, 1, 1, 24), MEAN | {"rank": 16}),
    "bias of heads": (
        (2, 4, 2, 20, 24, 32, 32),
        (4, 20, 24),
        {"estimator": "projection", "rank": 16, "grouping_block": 8, "softcap": 3.0},
    ),
    "bias of rows": ((2, 4, 2, 20, 24, 32, 32), (20, 1), MEAN | {"rank": 16}),
    "sinks": (
        (2, 4, 2, 20, 24, 32, 32),
        (24,),
        MEAN | {"rank": 16, "sinks": True, "is_causal": True, "causal_offset": -2},
    ),
    "a mask without gradient": (
        (2, 4, 2, 50, 200, 32, 40),
        (2, 1, 50, 200),
        {"estimator": "projection", "rank": 16, "grouping_block": 20, "softcap": 3.0},
    ),
    "keys without gradient": (
        (1, 4, 2, 70, 210, 48, 32),
        (210,),
        MEAN | {"rank": 24, "is_causal": True, "causal_offset": 100, "sinks": True},
    ),
    "padding": (*PADDED, {"estimator": "projection", "rank": 16, "grouping_block": 20}),
    "padding, causal": (*PADDED, {"estimator": "projection", "rank": 16, "is_causal": True}),
    "padding, hashed": (*PADDED, MEAN | {"rank": 16, "grouping_block": 16, "sinks": True}),
    "exact by rank": ((2, 4, 2, 20, 24, 32, 24), (1, 20, 24), MEAN | {"rank": 32, "sinks": True}),
    "exact by length": (
        (2, 4, 2, 20, 24, 32, 24),
        None,
        {"estimator": "projection", "rank": 16, "min_seq_len": 21, "is_causal": True},
    ),
}


def call_of(name: str, dtype: torch.dtype) -> tuple[list[Tensor | None], dict[str, Any]]:
    """The tensors q, k, v, mask, A, B and sinks, and the options."""
    (B, H, Hk, N, M, d, dv), mask, options = CASES[name]
    options = {"scale": 0.8 / d**0.5, "grouping_block": 0, **options}
    q, k, v = draw(B, H, N, d), draw(B, Hk, M, d, seed=1), draw(B, Hk, M, dv, seed=2)
    bias: Tensor | None = None
    if mask == "bool":
        bias = draw(B, 1, N, M, seed=3) > -0.7
    elif mask == "padding":  # on the right, on the left, on both sides
        first = torch.tensor([0, 20, 9])[:, None]
        bias = ((torch.arange(M) >= first) & (torch.arange(M) < first + 40))[:, None, None]
    elif mask is not None:
        bias = draw(*mask, seed=3).to(dtype)
    sinks = draw(H, seed=4).to(dtype) if options.pop("sinks", False) else None
    given: tuple[Tensor | None, ...] = (None, None)
    if ESTIMATORS[options["estimator"]].needs == "bases":
        given = bases(Hk, d, options["rank"])
    return [*(t.to(dtype) for t in (q, k, v)), bias, *given, sinks], options


def leaves(tensors: list[Tensor | None], name: str = "") -> list[Tensor]:
    """Those of q, k, v, mask and sinks that a gradient may flow to."""
    constant = (3, 4, 5) if "without gradient" in name else (4, 5)
    return [
        t.requires_grad_()
        for i, t in enumerate(tensors)
        if t is not None and i not in constant and t.is_floating_point()
    ]


def by_op(name: str, dtype: torch.dtype) -> list[Tensor]:
    tensors, options = call_of(name, dtype)
    wanted = leaves(tensors, name)
    out = op(*tensors, **options)
    return list(torch.autograd.grad(out, wanted, draw(*out.shape, seed=9).to(dtype)))


def by_definition(name: str, dtype: torch.dtype, working: torch.dtype) -> list[Tensor]:
    tensors, options = call_of(name, dtype)
    q, k, v, mask, A, B, sinks = (
        None if t is None else t if t.dtype == torch.bool else t.to(working) for t in tensors
    )
    wanted = leaves([q, k, v, mask, A, B, sinks], name)
    if options.pop("min_seq_len", 0) or q.shape[2] < 16:
        options |= {"rank": q.shape[3], "estimator": "lsh-mean"}
    is_given = A is not None and options["rank"] < q.shape[3]
    out = reference.attention(
        q, k, v, mask, sinks=sinks, bases=(A, B) if is_given else None, **options
    )
    grads = torch.autograd.grad(out, wanted, draw(*out.shape, seed=9).to(dtype).to(working))
    return [g.double() for g in grads]


@pytest.mark.usefixtures("forward")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_definition(name: str, dtype: torch.dtype) -> None:
    exact = by_definition(name, dtype, torch.float64)
    low = by_definition(name, dtype, dtype)
    factor = 2 * FACTOR if "projection" in str(CASES[name]) else FACTOR
    for got, wanted, rounded in zip(by_op(name, dtype), exact, low, strict=True):
        assert got.dtype == dtype
        size = wanted.norm().item() + 1e-30
        bound = factor * (rounded - wanted).norm().item() + torch.finfo(dtype).eps * size
        assert (got.double() - wanted).norm().item() <= bound


@pytest.mark.parametrize("limits", [None, (2048, 24, 20)])
@pytest.mark.parametrize("name", CASES)
def test_in_double_precision(name: str, limits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, and cut into many panels, tiles and chunks of keys."""
    if limits is not None:
        for limit, size in zip(("CHUNK", "PANEL_ROWS", "KEY_ROWS"), limits, strict=True):
            monkeypatch.setattr(pieces, limit, size)
    exact = by_definition(name, torch.float64, torch.float64)
    # The condition of the Gram matrices is felt in what projection makes of them.
    bound = 1e-7 if "projection" in str(CASES[name]) else 1e-12
    for got, wanted in zip(by_op(name, torch.float64), exact, strict=True):
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, wanted, rtol=bound, atol=bound)


@pytest.mark.parametrize("layout", ["tokens before heads", "expanded", "broadcast batch"])
@pytest.mark.parametrize("causal", [False, True])
def test_strides_and_broadcast_keys(layout: str, causal: bool) -> None:
    """What is broadcast is summed, and gradients flow through any strides."""
    options = {"scale": 0.2, "rank": 16, "grouping_block": 8, "is_causal": causal}
    q, k, v = draw(3, 4, 20, 32), draw(3, 2, 24, 32, seed=1), draw(3, 2, 24, 40, seed=2)
    if layout == "broadcast batch":
        k, v = k[:1], v[:1]
    grads = []
    for call in (op, reference.attention):
        made = [t.clone().requires_grad_() for t in (q, k, v)]
        given = made
        if layout == "tokens before heads":
            made = [t.detach().transpose(1, 2).contiguous().requires_grad_() for t in made]
            given = [t.transpose(1, 2) for t in made]
        elif layout == "expanded":
            made = [made[0], *(t.detach()[:, :1].clone().requires_grad_() for t in made[1:])]
            given = [made[0], *(t.expand(-1, 2, -1, -1) for t in made[1:])]
        out = call(*given, estimator="lsh-mean", **options)
        grads.append(torch.autograd.grad(out.sum(), made))  # an expanded gradient
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted)


def test_only_what_is_asked_for() -> None:
    tensors, options = call_of("bias of heads", torch.float64)
    tensors[1].requires_grad_()
    op(*tensors, **options).sum().backward()
    assert [t is not None and t.grad is not None for t in tensors] == [
        *(False, True, False, False, False, False, False)
    ]
    with torch.no_grad():
        assert not op(*tensors, **options).requires_grad
    tensors[1].requires_grad_(False)
    assert not op(*tensors, **options).requires_grad


@pytest.mark.usefixtures("forward")
def test_the_result_is_that_without_gradients() -> None:
    for name in ("projection, two rounds", "strict", "sinks", "exact by length"):
        tensors, options = call_of(name, torch.float32)
        wanted = op(*tensors, **options)
        leaves(tensors)
        got = op(*tensors, **options)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
        assert got.stride() == wanted.stride()


class Seen(TorchDispatchMode):
    """The names of the ops of this package that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "distr":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def test_a_call_without_gradients_meets_no_other_op() -> None:
    tensors, options = call_of("17 rows", torch.float32)
    with Seen() as seen:
        op(*tensors, **options)
        tensors[0].requires_grad_()
        with torch.no_grad():
            op(*tensors, **options)
    assert seen.names == ["attention"] * 2
    with Seen() as seen:
        op(*tensors, **options).sum().backward()
    assert seen.names == ["attention_recorded", "attention_backward"]


# --- the form that takes A and B ----------------------------------------------------------------


class Given(torch.autograd.Function):
    """Attention with A and B ``(B, H_k, blocks, d, r)`` by its formula; its backward is the op's.

    Keys before ``edges[i]`` are scored by Qhat and Khat in block i, the others by Q and K.
    """

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, bias: Any, sinks: Any, how: Any) -> Tensor:
        A, B, block, edges, options = how
        rep, rows = q.shape[1] // k.shape[1], q.shape[2]
        wide_k, wide_v, A_of, B_of = (t.repeat_interleave(rep, 1) for t in (k, v, A, B))
        parts = []
        for i, edge in enumerate(edges):
            Q = q[:, :, i * block : (i + 1) * block]
            hat = (Q @ A_of[:, :, i]) @ (wide_k @ B_of[:, :, i]).mT
            parts.append(torch.cat([hat[..., :edge], (Q @ wide_k.mT)[..., edge:]], -1))
        S = torch.cat(parts, 2) * options["scale"]
        if cap := options.get("softcap"):
            S = cap * torch.tanh(S / cap)
        S = S + bias
        if options.get("is_causal"):
            seen = torch.ones(rows, k.shape[2], dtype=torch.bool)
            S = S.masked_fill(~seen.tril(options.get("causal_offset", 0)), -torch.inf)
        column = sinks[:, None, None].expand(*S.shape[:3], 1)
        lse = torch.cat([S, column], -1).logsumexp(-1)
        out = (S - lse[..., None]).exp() @ wide_v
        not_exact = torch.zeros((), dtype=torch.bool)
        ctx.save_for_backward(q, k, v, bias, sinks, out, lse, A, B, not_exact, None)
        ctx.options = options
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        saved, options = ctx.saved_tensors, dict(ctx.options)
        found = torch.ops.distr.attention_backward(
            grad, *saved, mask_grad=True, sinks_grad=True, **options
        )
        return *found, None


@pytest.mark.parametrize(
    ("strict", "options"),
    [
        (False, {"grouping_block": 8}),
        (False, {"grouping_block": 0, "softcap": 1.5}),
        (False, {"grouping_block": 8, "is_causal": True, "causal_offset": -2}),
        (True, {"grouping_block": 8, "is_causal": True, "softcap": 2.0}),
    ],
)
@pytest.mark.parametrize("signs", [False, True])
def test_gradcheck_of_given_bases(strict: bool, options: dict[str, Any], signs: bool) -> None:
    """Numerical derivatives, A and B constant: any matrices, or those of groups with signs."""
    rows, keys, d, r = 17, 6, 4, 2
    block = options["grouping_block"] or rows
    blocks = -(-rows // block)
    A, B = draw(2, 1, blocks, d, r, seed=5), draw(2, 1, blocks, d, r, seed=6)
    if signs:  # columns 0 and 2, 1 and 3; the last is turned
        B = torch.zeros(2, 1, blocks, d, r, dtype=torch.float64)
        B[..., 0, 0] = B[..., 2, 0] = B[..., 1, 1] = 1
        B[..., 3, 1] = -1
        A = B / 2
    edges = [keys] * blocks
    if strict:
        options = options | {"strict": True, "estimator": "projection"}
        edges = [0, *(min(keys, i * block) for i in range(1, blocks))]
    options = {"estimator": "projection", "scale": 0.7, "rank": r, **options}
    inputs = [draw(2, 2, rows, d), draw(2, 1, keys, d, seed=1), draw(2, 1, keys, 3, seed=2)]
    inputs += [draw(2, rows, keys, seed=3), draw(2, seed=4)]
    inputs = [t.requires_grad_() for t in inputs]
    how = (A, B, block, edges, options)
    assert torch.autograd.gradcheck(lambda *x: Given.apply(*x, how), inputs, fast_mode=True)


# --- as PyTorch sees it -------------------------------------------------------------------------

OPCHECKED = ("17 rows", "projection, two rounds", "calibrated", "strict", "bias of heads", "sinks")


@pytest.mark.parametrize("name", OPCHECKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    tensors, options = call_of(name, dtype)
    leaves(tensors)
    torch.library.opcheck(op.default, tuple(tensors), options)


@pytest.mark.parametrize("name", OPCHECKED)
def test_opcheck_of_the_backward(name: str) -> None:
    tensors, options = call_of(name, torch.float32)
    q, k, v, mask, A, B, sinks = tensors
    out, lse, made_A, made_B, note = torch.ops.distr.attention_recorded(*tensors, None, **options)
    A, B = (made_A, made_B) if A is None else (A, B)
    has_bias = mask is not None and mask.is_floating_point()
    wanted = {"mask_grad": has_bias, "sinks_grad": sinks is not None}
    torch.library.opcheck(
        torch.ops.distr.attention_backward.default,
        (torch.ones_like(out), q, k, v, mask, sinks, out, lse, A, B, note, None),
        {**options, **wanted},
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """Gradients come back in the dtypes of the inputs, and are those of the cast call."""
    tensors, options = call_of("bias of heads", torch.float32)
    wanted = leaves(tensors)
    with torch.autocast("cpu", dtype=dtype):
        out = op(*tensors, **options)
        assert out.dtype == dtype
        got = torch.autograd.grad(out.sum(), wanted)
    cast = [t if t is None else t.detach().to(dtype) for t in tensors]
    lower = leaves(cast)
    expected = torch.autograd.grad(op(*cast, **options).sum(), lower)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, theirs.float())


def test_exact_calls_are_counted() -> None:
    q, k, v = (draw(1, 2, 20, 32, seed=i).requires_grad_() for i in range(3))
    options = {"scale": 0.2, "estimator": "lsh-mean", "grouping_block": 0}
    told: list[tuple[int, Handover | None]] = []
    with listening(Listener(lambda *seen: told.append(seen))):
        op(q, k, v, rank=16, site=1, **options)
        op(q, k, v, rank=16, site=2, min_seq_len=21, **options)
        op(q[:, :, :3], k, v, rank=16, site=3, **options)
        op(q, k, v, rank=32, site=4, **options)
    assert told == [(2, None), (3, None)]


@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("name", ["projection", "calibrated"])
@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_the_forward_settles_whether_a_call_is_exact(
    forward: bool, backward: bool, name: str, compiler: str | None
) -> None:
    """The backward is of what was computed, inside the context and outside of it."""
    q, k, v = leaves = [draw(1, 2, 20, 32, seed=i).requires_grad_() for i in range(3)]
    A, B = bases(2, 32, 16) if name == "calibrated" else (None, None)
    options = {"scale": 0.2, "rank": 16, "estimator": name, "grouping_block": 8}

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return op(q, k, v, None, A, B, **options)

    def inside(is_inside: bool) -> Any:
        return exactly.computing_exactly() if is_inside else contextlib.nullcontext()

    called = torch.compile(call, backend=compiler) if compiler else call
    with inside(forward):
        out = called(q, k, v)
    with inside(backward):
        got = torch.autograd.grad(out.square().sum(), leaves)
    if forward:
        defined = F.scaled_dot_product_attention(q, k, v, scale=0.2)
    else:
        given = None if A is None else (A.double(), B.double())
        defined = reference.attention(q, k, v, bases=given, **options)
    torch.testing.assert_close(out, defined, rtol=1e-7, atol=1e-7)
    wanted = torch.autograd.grad(defined.square().sum(), leaves)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-7)


def test_flops_of_a_backward() -> None:
    """Scores, dP, dV, dQhat, dKhat, then both products with A and B, and both that rebuild."""
    shapes = (2, 4, 20, 32), (2, 2, 24, 32), (2, 2, 24, 48)
    options = {"rank": 16, "estimator": "lsh-mean", "grouping_block": 8}
    scores = 2 * 2 * 4 * 20 * 24
    bases = 2 * 2 * 2 * (4 * 20 + 3 * 2 * 24) * 32 * 16
    got = backward_flops((2, 4, 20, 48), *shapes, **options)
    assert got == scores * (3 * 16 + 2 * 48) + bases
    exact = options | {"rank": 32}
    assert backward_flops((2, 4, 20, 48), *shapes, **exact) == scores * (3 * 32 + 2 * 48)
    assert attention_flops(*shapes, **exact) == scores * (32 + 48)


# --- what has no gradient -----------------------------------------------------------------------


def test_a_second_derivative_is_refused_not_wrong() -> None:
    q, k, v = (draw(1, 1, 20, 32, seed=i).requires_grad_() for i in range(3))
    out = op(q, k, v, scale=0.2, rank=16, estimator="lsh-mean", grouping_block=0)
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"got a gradient of its gradient \(create_graph"):
        first.square().sum().backward()
    # A penalty that does not pass through the attention twice is none of that.
    out = op(q, k, v, scale=0.2, rank=16, estimator="lsh-mean", grouping_block=0)
    (first,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    (q.square().sum() + first.detach().sum()).backward()


def test_bases_are_constants() -> None:
    tensors, options = call_of("calibrated", torch.float32)
    tensors[4].requires_grad_()
    with pytest.raises(ValueError, match=re.escape("basis_q, basis_k: got one that requires grad")):
        op(*tensors, **options)
    with torch.no_grad():
        op(*tensors, **options)


@pytest.mark.parametrize("what", ["attention", "backward"])
def test_a_failing_kernel_hands_over(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's products then do the work, with a warning."""
    require_kernel()

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no such instruction")

    wanted = by_op("17 rows", torch.float32)
    monkeypatch.setattr(kernel if what == "attention" else backward_kernel, what, fail)
    monkeypatch.setattr(training.choose, "_failed", {})
    with pytest.warns(training.choose.KernelWarning, match="no such instruction"):
        got = by_op("17 rows", torch.float32)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_who_computes_a_backward() -> None:
    require_kernel()
    shape = Shape(2, 4, 2, 200, 160, 64, 48, True, None, torch.float32, torch.device("cpu"))
    how = Approximation("projection", 32)
    assert training.names(shape, how) == ("distr-cpu", "distr-cpu", {})
    mean = dataclasses.replace(how, estimator="lsh-mean", strict=True)
    assert training.names(shape, mean) == ("distr-cpu", "distr-cpu", {})
    strict = dataclasses.replace(how, strict=True)
    assert training.names(shape, strict) == ("distr-cpu", "distr-cpu", {})
    fused = {(1, 4, 200, 160): True, (2, 4, 1, 160): True, (2, 1, 1, 160): False}
    for sizes, is_fused in fused.items():
        masked = shape._replace(mask=(sizes, torch.float32))
        found = training.names(masked, how, mask_grad=True)
        assert found[:2] == ("distr-cpu", "distr-cpu" if is_fused else "torch-products")
        assert list(found.refused) == ([] if is_fused else ["distr-cpu, backward"])
        assert training.names(masked, how).backward == "distr-cpu"
    assert found.refused["distr-cpu, backward"].endswith("no gradient to a mask that heads share")
    alone = masked._replace(num_key_heads=1)
    assert training.names(alone, how, mask_grad=True).backward == "distr-cpu"
    double = training.names(shape._replace(dtype=torch.float64), how)
    assert double[:2] == ("torch-products", "torch-products")
    assert list(double.refused) == ["distr-cpu", "distr-cpu, backward"]


# --- memory -------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any op makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.untyped_storage().size() // out.element_size())
        return out


@pytest.mark.parametrize("estimator", ["lsh-mean", "projection"])
def test_no_matrix_of_scores_exists(estimator: str) -> None:
    q, k, v = (draw(1, 2, 3000, 32, seed=i).float() for i in range(3))
    options = {"scale": 0.2, "rank": 16, "estimator": estimator, "grouping_block": 0}
    given = (q, k, v, *[None] * 5)
    out, lse, A, B, _ = torch.ops.distr.attention_recorded(*given, **options)
    call = Call(q, k, v, None, None, Scores(0.2), Approximation(estimator, 16), None, out)
    grads = Gradients(*(torch.empty_like(t) for t in (q, k, v)), None, None)
    with Largest() as largest:
        cpu_backward.run(call, Saved(lse, (A, B)), torch.ones_like(out), grads)
    assert largest.elements <= pieces.CHUNK < 3000 * 3000
