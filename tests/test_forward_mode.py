"""Forward-mode AD: calls with a tangent are exact, by the op and in compiled models.

What primals and tangents are compared with is ``torch.func.jvp`` of attention's formula in fp64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

import distr_compile
from distr_compile.kernels.attention import dropout
from distr_compile.lowering.told import Listener, listening
from distr_compile.reporting import Handover

B, H, N, M, D, DV = 2, 4, 24, 20, 32, 8
SCALE = 0.2
op = torch.ops.distr.attention.default

Tensors = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def formula(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    causal_offset: int | None = None,
    softcap: float = 0.0,
    keeps: Tensor | None = None,
) -> Tensor:
    """Attention by its definition: exponentials over their sum, and 0 where nothing is seen."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    S = SCALE * q @ k.mT
    S = softcap * torch.tanh(S / softcap) if softcap else S
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    if causal_offset is not None:
        seen = seen.tril(causal_offset)
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    elif mask is not None:
        S = S + mask
    E = torch.where(seen, S.exp(), 0)
    total = E.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.exp()[:, None, None]
    P = E / torch.where(total > 0, total, 1)
    return (P if keeps is None else P * keeps) @ v


def tensors(**more: Tensor) -> Tensors:
    q, k, v = torch.randn(B, H, N, D), torch.randn(B, 2, M, D), torch.randn(B, 2, M, DV)
    return {"q": q, "k": k, "v": v, **more}


def hiding_rows() -> Tensor:
    mask = torch.rand(B, 1, N, M) > 0.3
    mask[:, :, 3] = False
    return mask


VARIANTS: dict[str, Callable[[], tuple[Tensors, dict[str, Any], dict[str, Any]]]] = {
    "plain": lambda: (tensors(), {}, {}),
    "causal": lambda: (tensors(), {"is_causal": True}, {"causal_offset": 0}),
    "offset": lambda: (tensors(), *({"causal_offset": -2},) * 2),
    "rows without keys": lambda: (tensors(mask=hiding_rows()), {}, {}),
    "bias": lambda: (tensors(mask=torch.randn(1, H, N, M)), {}, {}),
    "soft cap, sinks": lambda: (tensors(sinks=torch.randn(H)), *({"softcap": 1.5},) * 2),
}


def dual(given: Tensors, along: Tensors, call: Callable[[Tensors], Tensor]) -> tuple[Tensor, Any]:
    """Primal and tangent of ``call`` at ``given`` along ``along``."""
    with forward_ad.dual_level():
        inputs = {
            name: forward_ad.make_dual(t, along[name]) if name in along else t
            for name, t in given.items()
        }
        return tuple(forward_ad.unpack_dual(call(inputs)))  # type: ignore[return-value]


def directions(given: Tensors) -> Tensors:
    return {name: torch.randn_like(t) for name, t in given.items() if t.is_floating_point()}


def by_formula(given: Tensors, along: Tensors, **options: Any) -> tuple[Tensor, Tensor]:
    """Primal and tangent of the formula, in fp64."""
    wide: dict[str, Any] = {
        name: t.double() if t.is_floating_point() else t for name, t in given.items()
    }

    def call(moved: Tensors) -> Tensor:
        return formula(**{**wide, **moved}, **options)

    moved = {name: wide[name] for name in along}
    found = torch.func.jvp(call, (moved,), ({name: t.double() for name, t in along.items()},))
    return found[0], found[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_op_gives_exact_tangents(variant: str, dtype: torch.dtype) -> None:
    given, options, same = VARIANTS[variant]()
    if variant == "offset":
        options = {"is_causal": True, **options}
    given = {n: t.to(dtype) if t.is_floating_point() else t for n, t in given.items()}
    along = directions(given)
    told: list[tuple[int, Handover | None]] = []

    def call(inputs: Tensors) -> Tensor:
        how = {"rank": 16, "estimator": "lsh-mean", "grouping_block": 0, "scale": SCALE, "site": 3}
        return op(**inputs, **how, **options)  # type: ignore[no-any-return]

    with listening(Listener(lambda *seen: told.append(seen))):
        primal, tangent = dual(given, along, call)
    for got, wanted in zip((primal, tangent), by_formula(given, along, **same), strict=True):
        assert got.dtype == dtype
        rtol, atol = (1e-4, 1e-5) if dtype == torch.float32 else (1e-10, 1e-10)
        torch.testing.assert_close(got.double(), wanted, rtol=rtol, atol=atol)
    assert [(site, one and one.reason.code) for site, one in told] == [(3, "transform")]


@pytest.mark.parametrize("moved", ["q", "k", "v"])
def test_one_tangent_is_enough(moved: str) -> None:
    given = tensors()
    along = {moved: torch.randn_like(given[moved])}
    found = dual(given, along, lambda t: distr_compile.attention(
        t["q"], t["k"], t["v"], scale=SCALE, enable_gqa=True,
    ))  # fmt: skip
    for got, wanted in zip(found, by_formula(given, along), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)


def test_half_precision_has_the_dtype_of_its_inputs() -> None:
    given = {name: t.bfloat16() for name, t in tensors().items()}
    along = directions(given)
    found = dual(given, along, lambda t: distr_compile.attention(
        t["q"], t["k"], t["v"], scale=SCALE, enable_gqa=True,
    ))  # fmt: skip
    for got, wanted in zip(found, by_formula(given, along), strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.double() - wanted).norm() / wanted.norm() < 0.01


def test_dropout_drops_what_the_seed_says() -> None:
    given, seed = tensors(), torch.tensor(7)
    along = directions(given)
    how = dropout.Dropout(0.3, seed, H)
    keeps = how.weigh(torch.ones(B, H, N, M)).double()
    options = {"rank": 16, "estimator": "projection", "grouping_block": 0, "scale": SCALE}

    def call(t: Tensors) -> Tensor:
        found: Tensor = op(t["q"], t["k"], t["v"], dropout_seed=seed, dropout_p=0.3, **options)
        return found

    found = dual(given, along, call)
    for got, wanted in zip(found, by_formula(given, along, keeps=keeps), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)


def test_a_tangent_of_a_gradient_is_exact_too() -> None:
    """Forward over reverse: a product of the Hessian and a vector."""
    given = {name: t.double() for name, t in tensors().items()}
    along = {"q": torch.randn_like(given["q"])}
    options = {"rank": 16, "estimator": "projection", "grouping_block": 0, "scale": SCALE}
    for t in given.values():
        t.requires_grad_()

    def gradient(t: Tensors) -> Tensor:
        loss = op(t["q"], t["k"], t["v"], **options).square().sum()
        return torch.autograd.grad(loss, t["k"], create_graph=True)[0]

    _, found = dual(given, along, gradient)

    def wanted(q: Tensor) -> Tensor:
        def loss(k: Tensor) -> Tensor:
            return formula(q, k, given["v"]).square().sum()

        slope: Tensor = torch.func.grad(loss)(given["k"])
        return slope

    expected = torch.func.jvp(wanted, (given["q"],), (along["q"],))[1]
    torch.testing.assert_close(found, expected)


def test_a_gradient_with_a_tangent_is_linear_in_it() -> None:
    """Of a call that was recorded before; nothing is left out in silence."""
    q, k, v = leaves = [torch.randn(B, H, N, D).requires_grad_() for _ in range(3)]
    out = op(q, k, v, rank=16, estimator="lsh-mean", grouping_block=0, scale=SCALE)
    given, along = torch.randn_like(out), torch.randn_like(out)
    wanted = [torch.autograd.grad(out, leaves, g, retain_graph=True) for g in (given, along)]
    with forward_ad.dual_level():
        found = torch.autograd.grad(out, leaves, forward_ad.make_dual(given, along))
        pairs = [forward_ad.unpack_dual(t) for t in found]
    for pair, expected in zip(pairs, zip(*wanted, strict=True), strict=True):
        torch.testing.assert_close(tuple(pair), expected, rtol=1e-5, atol=1e-6)


def test_a_compiled_backward_refuses_a_tangent() -> None:
    """It would leave out the tangent's way through the attention."""
    model, x = Model("softmax"), torch.randn(2, 24, 64).requires_grad_()
    policy = {"default": {"min_seq_len": 0, "training": "approximate"}}
    options: dict[str, Any] = {"policy": policy, "compiler": "aot_eager"}
    out = torch.compile(model, backend="distr", options=options)(x)
    with forward_ad.dual_level():
        grad = forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
        with pytest.raises(NotImplementedError, match="got a gradient with a tangent"):
            torch.autograd.grad(out, x, grad)


def heads(x: Tensor) -> tuple[Tensor, ...]:
    return x.unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4).unbind()


class Model(nn.Module):
    def __init__(self, spelled: str) -> None:
        super().__init__()
        self.qkv, self.spelled = nn.Linear(64, 192), spelled

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = heads(self.qkv(x))
        if self.spelled == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, scale=SCALE)
        return (SCALE * q @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("spelled", ["sdpa", "softmax"])
@pytest.mark.parametrize("training", [None, "exact", "approximate"])
def test_a_compiled_model_has_exact_tangents(
    compiler: str, spelled: str, training: str | None
) -> None:
    """Compiled without one; also where its attention is one of SDPA's kernels, which have none."""
    model, x = Model(spelled), torch.randn(2, 24, 64)
    along = torch.randn_like(x)
    policy = {"default": {"min_seq_len": 0, "training": training or "exact"}}
    options: dict[str, Any] = {"policy": policy, "compiler": compiler}
    called = torch.compile(model, backend="distr", options=options)

    def wanted(x: Tensor) -> Tensor:
        q, k, v = heads(model.qkv(x))
        return formula(q, k, v)

    with torch.set_grad_enabled(training is not None):
        before = called(x)
        found = dual({"x": x}, {"x": along}, lambda t: called(t["x"]))
        for got, expected in zip(found, torch.func.jvp(wanted, (x,), (along,)), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(called(x), before, rtol=0, atol=0)
    (row,) = distr_compile.report(called).rows
    if training == "exact":
        assert (row.decision, row.runtime_exact_calls) == ("exact", 0)
    else:
        assert (row.decision, row.runtime_exact_calls) == ("distr", 1)
        assert row.runtime_reason is not None
        assert row.runtime_reason.code == "transform"
        assert (before - found[0]).norm() / before.norm() > 1e-3, "the other calls approximate"


def test_a_tangent_on_the_first_call_is_left_to_eager() -> None:
    """Dynamo makes no graph of it, and ``report`` has its words; torch 2.11 does make one."""
    model, x = Model("softmax"), torch.randn(2, 24, 64)
    along = torch.randn_like(x)
    options: dict[str, Any] = {"policy": {"default": {"min_seq_len": 0}}, "compiler": "eager"}
    called = torch.compile(model, backend="distr", options=options)
    with torch.no_grad():
        found = dual({"x": x}, {"x": along}, lambda t: called(t["x"]))
        for got, expected in zip(found, torch.func.jvp(model, (x,), (along,)), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    said: list[str | None]
    try:
        said = [
            row.runtime_reason and row.runtime_reason.code
            for row in distr_compile.report(called).rows
        ]
    except LookupError as error:
        said = ["dual tensor" if "dual tensor" in str(error) else str(error)]
    assert said in (["dual tensor"], ["transform"])
