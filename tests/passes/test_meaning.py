"""What a rewrite must not change beside the numbers: gradients, memory order, what is recorded.

And numbers where a keyword, an autocast region or a symbolic factor decides them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import distr_compile
from distr_compile.lowering.exactly import computing_exactly

from .by_backend import EXACT, FORCED, codes, compiled


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def qkv(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (draw(batch, 4, 24, 32, seed=seed) for seed in range(3))
    return q, k, v


# -- gradients ------------------------------------------------------------------------------------


def cut_by_no_grad(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        weights = (q @ k.mT / 6).softmax(-1)
    return weights @ v


def cut_by_detach(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / 6).softmax(-1).detach() @ v


@pytest.mark.parametrize("policy", [EXACT, FORCED], ids=["exact", "approximate"])
@pytest.mark.parametrize("cut", [cut_by_no_grad, cut_by_detach])
def test_a_cut_gradient_stays_cut(cut: Callable[..., Tensor], policy: dict[str, Any]) -> None:
    """Also where V records none, so that nothing is recorded at all."""
    q, k, v = qkv()
    leaf = q.requires_grad_()

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return cut(q * 2, k, v)

    got = compiled(model, policy)
    assert not got(leaf, k, v).requires_grad
    assert codes(got) == ["gradients"]
    with torch.no_grad():
        assert not torch.equal(compiled(model, FORCED)(leaf, k, v), model(leaf, k, v))


class _Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k)
        return (q @ k.mT / 6).softmax(-1) @ v

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor]:
        q, k = ctx.saved_tensors
        return None, None, (q @ k.mT / 6).softmax(-1).mT @ grad


@pytest.mark.parametrize("training", ["exact", "approximate"])
def test_a_function_with_its_own_backward_stays_exact(training: str) -> None:
    q, k, v = qkv()
    policy = {"default": FORCED["default"] | {"training": training}}
    got = compiled(lambda *t: _Own.apply(*t), policy)
    out = got(q, k, leaf := v.requires_grad_())
    out.sum().backward()
    torch.testing.assert_close(out, _Own.apply(q, k, v))
    wanted = (q @ k.mT / 6).softmax(-1).mT @ torch.ones_like(out)
    torch.testing.assert_close(leaf.grad, wanted)
    assert {row.decision for row in distr_compile.report(got).rows} == {"exact"}
    # The body that torch 2.11 makes of it returns the weights for the backward.
    assert {"gradients", "weights-reused"} & set(codes(got))


# -- keywords, factors, dtypes --------------------------------------------------------------------


def test_dropout_that_does_not_train() -> None:
    q, k, v = qkv()
    policy = {"default": {"rank": 31, "min_seq_len": 0, "training": "approximate"}}

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.dropout((q @ k.mT / 6).softmax(-1), 0.5, train=False) @ v

    with computing_exactly():
        out = compiled(model, policy)(q, k, v.requires_grad_())
    torch.testing.assert_close(out, model(q, k, v))


def test_a_keyword_that_is_not_known_is_not_read_past() -> None:
    from distr_compile.passes import vocabulary

    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = torch.empty(2, 3)
    for keyword, known in (("inplace", True), ("rate", False)):
        node = graph.call_function(F.dropout, (x, 0.5), {keyword: True})
        assert (vocabulary.read(node) is not None) == known


@pytest.mark.parametrize(
    "op", [torch.add, torch.sub, torch.Tensor.add], ids=["add", "sub", "method"]
)
def test_a_factor_in_front_of_what_is_added(op: Callable[..., Tensor]) -> None:
    """The old overload ``add(scores, alpha, bias)``: what stands in second place is no shift."""
    bias = draw(4, 24, 24, seed=5)

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return op(q @ k.mT / 6, 2, bias).softmax(-1) @ v

    got = compiled(model)
    with torch.no_grad(), computing_exactly():
        torch.testing.assert_close(got(*qkv()), model(*qkv()))


@pytest.mark.parametrize("policy", [EXACT, FORCED], ids=["exact", "approximate"])
def test_a_tensor_like_scores_has_their_order_in_memory(policy: dict[str, Any]) -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (k @ q.mT).mT / 6
        return scores.softmax(-1) @ v + torch.ones_like(scores).mT.view(-1).mean()

    got = compiled(model, policy)
    with torch.no_grad(), computing_exactly():
        torch.testing.assert_close(got(*qkv()), model(*qkv()))


class _Biased(nn.Module):
    """A trained bias, with which SDPA lays its output out in another order than without."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.bias = nn.Linear(32, 3 * 128), nn.Parameter(draw(4, 24, 24))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 32)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, self.bias[None])


@pytest.mark.parametrize(("training", "decision"), [("approximate", "distr"), ("exact", "exact")])
def test_a_trained_bias_is_no_write_in_place(training: str, decision: str) -> None:
    got = compiled(_Biased(), {"default": FORCED["default"] | {"training": training}})
    got(draw(2, 24, 32)).sum().backward()
    (row,) = distr_compile.report(got).rows
    assert row.decision == decision
    assert codes(got) == ([] if decision == "distr" else ["gradients"])


def test_a_clamp_is_not_judged_by_the_first_calls_factor() -> None:
    q, k, v = qkv()

    def model(q: Tensor, k: Tensor, v: Tensor, t: float) -> Tensor:
        return (q @ k.mT / t).clamp(-1e4, 1e4).softmax(-1) @ v

    got = compiled(model, EXACT, dynamic=True)
    with torch.no_grad():
        for t in (1.0, 0.5, 1e-3):
            torch.testing.assert_close(got(q, k, v, t), model(q, k, v, t))


def test_scores_outside_of_autocast() -> None:
    q, k, v = qkv()

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            v = F.linear(v, torch.eye(32))
            with torch.autocast("cpu", enabled=False):
                weights = (q.float() @ k.float().mT).softmax(-1)
            return weights.to(v.dtype) @ v

    got = compiled(model)
    with torch.no_grad():
        torch.testing.assert_close(got(3 * q, 3 * k, v), model(3 * q, 3 * k, v))
    assert codes(got) == ["mixed-dtype"]


@pytest.mark.parametrize("is_tensor", [True, False])
def test_a_tensor_that_scales_scores_of_fp32(is_tensor: bool) -> None:
    """It goes into Q, which must not be rounded afterwards."""
    q, k, v = (3 * t.bfloat16() for t in qkv())
    scale: Any = draw(4, 1, 1, seed=5).exp() / 6 if is_tensor else 1 / 6

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q.float() @ k.float().mT) * scale).softmax(-1).to(v.dtype) @ v

    def in_fp64(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        factor = scale.double() if is_tensor else scale
        return ((q.double() @ k.double().mT) * factor).softmax(-1) @ v.double()

    exact = in_fp64(q, k, v)
    with torch.no_grad(), computing_exactly():
        out = compiled(model)(q, k, v)
    error, limit = ((t.double() - exact).norm() / exact.norm() for t in (out, model(q, k, v)))
    assert error <= 1.5 * limit


# -- what follows an attention --------------------------------------------------------------------


def merged(out: Tensor) -> Tensor:
    return out.reshape(-1, *out.shape[-2:]).view(-1, out.shape[-1])


def same_shape(out: Tensor) -> Tensor:
    return out.reshape(out.shape).view(-1, out.shape[-1])


def flat(out: Tensor) -> Tensor:
    return out.flatten(0, 1)


def laid_anew(out: Tensor) -> Tensor:
    out.transpose_(1, 2)
    return out.transpose(1, 2).view(-1, out.shape[-1])


@pytest.mark.parametrize(
    ("after", "compiler"),
    [
        *((after, "eager") for after in (merged, same_shape, flat, laid_anew)),
        (merged, "inductor"),
    ],
)
@pytest.mark.parametrize("sdpa", [False, True])
def test_views_of_the_output(after: Callable[..., Tensor], sdpa: bool, compiler: str) -> None:
    """Of a batch of 1 a reshape that merges batch and heads is a view; strides are eager's."""
    q, k, v = qkv(batch=1)

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v) if sdpa else (q @ k.mT / 6).softmax(-1) @ v
        return after(out)

    torch._dynamo.reset()
    options = {"policy": FORCED, "compiler": compiler}
    got = torch.compile(model, backend="distr", options=options)
    with torch.no_grad(), computing_exactly():
        out, wanted = got(q, k, v), model(q, k, v)
    assert out.stride() == wanted.stride()
    torch.testing.assert_close(out, wanted)


# -- the report -----------------------------------------------------------------------------------


class _Flagged(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, weights: bool = False) -> Any:
        p = (q @ k.mT / 6).softmax(-1)
        return (p @ v, p) if weights else p @ v


def test_both_graphs_of_a_flag_are_told() -> None:
    got = compiled(_Flagged())
    with torch.no_grad():
        got(*qkv())
        got(*qkv(), weights=True)
    decisions = sorted(row.decision for row in distr_compile.report(got).rows)
    assert decisions == ["distr", "exact"]


def by_operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT / 6
    w = (s - s.amax(-1, keepdim=True)).exp()
    w /= w.sum(-1, keepdim=True)
    return w @ v


def by_method(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT / 6
    w = (s - s.amax(-1, keepdim=True)).exp()
    w = w.div_(w.sum(-1, keepdim=True))
    return w @ v


@pytest.mark.parametrize("model", [by_operator, by_method])
def test_weights_that_are_divided_in_place(model: Callable[..., Tensor]) -> None:
    got = compiled(model)
    with torch.no_grad(), computing_exactly():
        torch.testing.assert_close(got(*qkv()), model(*qkv()))
    assert [row.decision for row in distr_compile.report(got).rows] == ["distr"]


def test_an_exported_cast_of_the_weights() -> None:
    class Model(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.softmax(q @ k.mT / 6, -1, dtype=torch.float32).to(q.dtype) @ v

    model, inputs = Model().eval(), tuple(t.bfloat16() for t in qkv())
    program = distr_compile.export(model, inputs, policy=FORCED)
    assert [row.decision for row in distr_compile.report(model).rows] == ["distr"]
    with computing_exactly():
        out = program.module()(*inputs)
    torch.testing.assert_close(out, model(*inputs), atol=2e-2, rtol=2e-2)


def test_scores_that_are_an_input_are_after_no_break() -> None:
    got = compiled(lambda scores, v: (scores / 6).softmax(-1) @ v)
    with torch.no_grad():
        got(draw(2, 4, 24, 24), draw(2, 4, 24, 32))
    (row,) = distr_compile.report(got).rows
    assert [reason.code for reason in row.reasons] == ["graph-break"]
    assert "the scores are an input" in row.reasons[0].text
