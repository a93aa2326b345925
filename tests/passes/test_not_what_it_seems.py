"""Names, keywords and later calls that are not what they look like: nothing is taken for granted.

Each function here was rewritten wrongly once, or broke a compile that PyTorch alone gets right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import distr_compile
from distr_compile.lowering import sdpa
from distr_compile.lowering.exactly import computing_exactly

from .by_backend import EXACT, FORCED, codes, compiled

POLICIES = pytest.mark.parametrize("policy", [EXACT, FORCED], ids=["exact", "approximate"])


def qkv(tokens: int = 24, heads: int = 2) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(2, heads, tokens, 32, generator=draw) for _ in range(3)]


# -- names ----------------------------------------------------------------------------------------


@torch.library.custom_op("distr_test_seems::exp", mutates_args=())
def half_exp(x: Tensor) -> Tensor:
    return (x * 0.5).exp()


@torch.library.custom_op("distr_test_seems::sum", mutates_args=())
def sum_and_one(x: Tensor, dim: int, keepdim: bool) -> Tensor:
    return x.sum(dim, keepdim) + 1


@torch.library.custom_op("distr_test_seems::logsumexp", mutates_args=())
def more_than_logsumexp(x: Tensor, dim: int, keepdim: bool) -> Tensor:
    return x.logsumexp(dim, keepdim) + 1


@torch.library.custom_op("distr_test_seems::log_softmax", mutates_args=())
def twice_log_softmax(x: Tensor, dim: int) -> Tensor:
    return x.log_softmax(dim) * 2


for own in (half_exp, twice_log_softmax):
    own.register_fake(lambda x, *_: torch.empty_like(x))
for own in (sum_and_one, more_than_logsumexp):
    own.register_fake(lambda x, dim, keepdim: torch.empty_like(x.sum(dim, keepdim)))


def by_own_exp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = half_exp(q @ k.mT)
    return (e / e.sum(-1, keepdim=True)) @ v


def by_own_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = (q @ k.mT * 0.1).exp()
    return (e / sum_and_one(e, -1, True)) @ v


def by_own_logsumexp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT * 0.1
    return (s - more_than_logsumexp(s, -1, True)).exp() @ v


def by_own_log_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return twice_log_softmax(q @ k.mT * 0.1, -1).exp() @ v


def by_a_whole_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = (q @ k.mT * 0.1).exp()
    return (e / e.sum(-1, keepdim=True, dtype=torch.int64)) @ v


@POLICIES
@pytest.mark.parametrize(
    "attend",
    [by_own_exp, by_own_sum, by_own_logsumexp, by_own_log_softmax, by_a_whole_sum],
)
def test_what_only_has_the_name_of_a_softmax_is_none(
    attend: Callable[..., Tensor], policy: dict[str, Any]
) -> None:
    inputs = qkv()
    with computing_exactly():
        torch.testing.assert_close(compiled(attend, policy)(*inputs), attend(*inputs))


# -- later calls ----------------------------------------------------------------------------------


@POLICIES
def test_two_inputs_may_be_one_in_a_later_call(policy: dict[str, Any]) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, other: Tensor) -> Tensor:
        scores = q @ k.mT * 0.2
        other.zero_()
        return scores.softmax(-1) @ v

    q, k, v = qkv()
    run = compiled(attend, policy)
    with computing_exactly():
        run(q, k, v, torch.ones_like(q))
        assert codes(run) == ["in-place-write"]
        one, same = q.clone(), q.clone()
        got = run(one, k, v, one.view(2, 2, 24, 32))
        torch.testing.assert_close(got, attend(same, k, v, same))


@POLICIES
@pytest.mark.parametrize("dtype", [torch.int32, torch.bfloat16], ids=str)
def test_two_inputs_may_be_one_under_two_dtypes(policy: dict[str, Any], dtype: torch.dtype) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, other: Tensor) -> Tensor:
        scores = (q * 0.3) @ (k * 0.5).mT
        other.zero_()
        return scores.softmax(-1) @ v

    q, k, v = qkv()
    run = compiled(attend, policy)
    with computing_exactly():
        run(q, k, v, torch.ones_like(k.view(dtype)))
        one, same = k.clone(), k.clone()
        got = run(q, one, v, one.view(dtype))
        torch.testing.assert_close(got, attend(q, same, v, same.view(dtype)))


class Cached(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("k", torch.zeros(2, 2, 24, 32))
        self.register_buffer("v", torch.zeros(2, 2, 24, 32))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.k.copy_(k)
        scores = q @ self.k.mT * 0.2
        self.step.add_(1)
        self.v.copy_(v)
        return scores.softmax(-1) @ self.v


def test_caches_of_a_module_are_none_of_its_arguments() -> None:
    inputs, model = qkv(), Cached().eval()
    with computing_exactly(), torch.no_grad():
        run = compiled(model)
        torch.testing.assert_close(run(*inputs), model(*inputs))
    assert distr_compile.report(run).rows[0].decision == "distr"


@POLICIES
def test_a_gradient_may_be_asked_of_what_an_operand_was_made_to(policy: dict[str, Any]) -> None:
    """Dynamo breaks the graph there, and hands both the operand and the output out of it."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scaled = q * 0.3
        out = (scaled @ k.mT).softmax(-1) @ v + scaled
        return torch.autograd.grad(out.square().sum(), scaled)[0]

    inputs = [x.requires_grad_() for x in qkv()]
    training = {"default": {**policy["default"], "training": "approximate"}}
    with computing_exactly():
        got = compiled(attend, training)(*inputs)
        torch.testing.assert_close(got, attend(*inputs), atol=1e-4, rtol=1e-4)


# -- kernels that are missing or wrong ------------------------------------------------------------


@POLICIES
@pytest.mark.parametrize("inside", [True, False])
def test_where_sdpa_has_no_kernel_the_model_runs(policy: dict[str, Any], inside: bool) -> None:
    """What spells its attention out knows of no kernel that ``sdpa_kernel`` could forbid."""

    def spelled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * 0.2).softmax(-1) @ v

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            return spelled(q, k, v)

    run = compiled(attend if inside else spelled, policy)
    for tokens in (24, 8):
        inputs = qkv(tokens)
        if inside:
            torch.testing.assert_close(run(*inputs), spelled(*inputs), atol=1, rtol=1)
            continue
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            torch.testing.assert_close(run(*inputs), spelled(*inputs), atol=1, rtol=1)
    assert torch.backends.cuda.math_sdp_enabled()


@POLICIES
@pytest.mark.parametrize("scale", [-0.2, 0.0])
@pytest.mark.parametrize("tokens", [24, 8])
def test_a_scale_that_is_not_positive(policy: dict[str, Any], scale: float, tokens: int) -> None:
    """Of ``is_causal`` and such a scale SDPA makes NaN on a CPU."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hidden = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
        return (q @ k.mT * scale).masked_fill(hidden, -torch.inf).softmax(-1) @ v

    inputs = qkv(tokens)
    with computing_exactly():
        run = compiled(attend, policy)
        torch.testing.assert_close(run(*inputs), attend(*inputs))
    assert distr_compile.report(run).rows[0].mask == "causal"


# -- casts ----------------------------------------------------------------------------------------


def test_a_cast_to_its_own_dtype_hides_no_repeated_heads() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x[:, :, None].expand(2, 2, 2, 24, 32).reshape(2, 4, 24, 32) for x in (k, v))
        scores = q.float() @ k.float().mT * 0.2
        return scores.softmax(-1).to(v.dtype) @ v

    (q, _, _), (_, k, v) = qkv(heads=4), qkv()
    run = compiled(attend)
    got = run(q, k, v)
    assert distr_compile.report(run).rows[0].shapes["k"] == (2, 2, 24, 32)
    want = distr_compile.attention(q, k, v, scale=0.2, enable_gqa=True)
    torch.testing.assert_close(got, want)


def test_a_kernel_that_is_chosen_is_not_replaced_by_another() -> None:
    """Else a race among SDPA's kernels would time PyTorch's products under their names."""
    with pytest.raises(RuntimeError, match=r"No (available|viable)"):
        sdpa.by(SDPBackend.EFFICIENT_ATTENTION, lambda: sdpa.attention(*qkv(), scale=0.2))
