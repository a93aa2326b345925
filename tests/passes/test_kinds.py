"""Kinds of graphs on which a pass that goes by names is silently wrong, and relatives of each.

Every function is compiled by ``compiler="eager"`` and by Inductor, approximated (the op then
computes exact attention from its own arguments) and exact; each result must be eager's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distr_compile import attention, report
from distr_compile.lowering.exactly import computing_exactly

from .kinds import KINDS, QKV, B, D, H, Kind, N, kind, normal, plain

# -- leading axes that a reshape brings, where sizes do not tell which is which -------------------

FOUR = ((4, N, D),) * 3
"""As many batch entries as heads."""


@kind("one map for all heads of V", shapes=((4, N, D), (4, N, D), (4, 4, N, D)))
def _(q, k, v):
    return (q @ k.mT / 6).softmax(-1)[:, None] @ v


@kind("one map for all heads of V, two entries", shapes=((2, N, D), (2, N, D), (2, 4, N, D)))
def _(q, k, v):
    return (q @ k.mT / 6).softmax(-1).unsqueeze(1) @ v


@kind("V has the map's entries as heads", shapes=FOUR)
def _(q, k, v):
    return (q @ k.mT).softmax(-1)[:, None] @ v


@kind("a bias brings heads", shapes=(*FOUR, (4, N, N)))
def _(q, k, v, b):
    return ((q @ k.mT / 6)[:, None] + b).softmax(-1) @ v[:, None]


@kind("a bias before and one after heads come", shapes=(*FOUR, (4, N, N)))
def _(q, k, v, b):
    return ((q @ k.mT) + b).unsqueeze(1).add(b).softmax(-1) @ v[:, None]


@kind("a mask brings heads", shapes=(*FOUR, (4, N, N)))
def _(q, k, v, b):
    return (q @ k.mT)[:, None].masked_fill(b > 1, -torch.inf).softmax(-1) @ v[:, None]


@kind("a temperature brings heads", shapes=(*FOUR, (4, 1, 1)))
def _(q, k, v, t):
    return ((q @ k.mT / 6)[:, None] * t).softmax(-1) @ v[:, None]


@kind(
    "learned queries, values with heads",
    shapes=((N, D), (2, N, D), (2, 4, N, D)),
)
def _(q, k, v):
    return (q @ k.mT / 6).softmax(-1)[:, None] @ v


@kind("heads come and go", shapes=(*FOUR, (4, 4, N, N)))
def _(q, k, v, b):
    return ((q @ k.mT)[:, None] + b).view(16, N, N).softmax(-1) @ v.repeat(4, 1, 1)


@kind("axes that are swapped by a view, as many as they are")
def _(q, k, v):
    return (q @ k.mT / 6).view(H, B, N, N).softmax(-1) @ v[:1, :1]


@kind("heads that are repeated under one axis with the batch", shapes=((8, N, D), *FOUR[:2]))
def _(q, k, v):
    k, v = (x.repeat_interleave(2, 0) for x in (k, v))
    return ((q @ k.mT).view(2, 4, N, N) * 0.2).softmax(-1) @ v.view(2, 4, N, D)


@kind("shifted by a maximum that is not over the keys", "softmax-axis")
def _(q, k, v):
    scores = k @ q.mT / 6
    return (scores - scores.amax(-1, keepdim=True)).softmax(-2).mT @ v


@kind("shifted by the keys' maximum, keys on the last axis but one")
def _(q, k, v):
    scores = k @ q.mT / 6
    return (scores - scores.amax(-2, keepdim=True)).softmax(-2).mT @ v


# -- found by reading the pass with malice --------------------------------------------------------


@kind("a causal mask over a part of split queries and keys", shapes=((6, 20, 32),) * 3)
def _(q, k, v):
    scores = (q @ k.mT / 6).view(6, 4, 5, 4, 5)
    scores = scores.masked_fill(torch.ones(4, 5).triu(1) > 0, -torch.inf)
    return scores.view(6, 20, 20).softmax(-1) @ v


@kind("a boolean triangle is added, not masked with")
def _(q, k, v):
    return (q @ k.mT / 6 + torch.ones(N, N, dtype=torch.bool).tril()).softmax(-1) @ v


@kind("the exponentials are returned", "weights-reused")
def _(q, k, v):
    weights = (q @ k.mT / 6).exp()
    return (weights / weights.sum(-1, keepdim=True)) @ v, weights


@kind("the sum of the exponentials is returned", "weights-reused")
def _(q, k, v):
    weights = (q @ k.mT / 6).exp()
    total = weights.sum(-1, keepdim=True)
    return (weights / total) @ v, total


@kind("the log-sum-exp is returned", "weights-reused")
def _(q, k, v):
    scores = q @ k.mT / 6
    total = scores.logsumexp(-1, keepdim=True)
    return torch.exp(scores - total) @ v, total


@kind("the logarithms are returned", "weights-reused")
def _(q, k, v):
    logs = F.log_softmax(q @ k.mT / 6, dim=-1)
    return logs.exp() @ v, logs


@kind(
    "a bias of baddbmm, keys on the last axis but one",
    "layout",
    shapes=(*((B * H, N, D),) * 3, (B * H, N, N)),
)
def _(q, k, v, b):
    scores = torch.baddbmm(b, k, q.mT, alpha=0.2)
    return scores.softmax(-2).mT @ v


@kind("a causal bias, scaled until it hides nothing")
def _(q, k, v):
    return ((q @ k.mT + torch.full((N, N), -1e9).triu(1)) * 1e-10).softmax(-1) @ v


@kind("a causal bias in a softmin hides the other half", dtype=torch.float64)
def _(q, k, v):
    return F.softmin(q @ k.mT / 6 + torch.full((N, N), -1e4).tril(), dim=-1) @ v


@kind("V is the output of an attention whose softmax comes later")
def _(q, k, v):
    first, second = (q @ k.mT / 6).softmax(-1), (k @ q.mT / 5).softmax(-1)
    return first @ (second @ v)


@kind("one mask expanded like the scores of another attention", shapes=(*QKV, (N, N)))
def _(q, k, v, b):
    one, other = q @ k.mT / 6, k @ q.mT / 6
    hidden = (b > 1).expand_as(other)
    return (
        one.masked_fill(hidden, -1e9).softmax(-1) @ v
        - other.masked_fill(hidden, -1e9).softmax(-1) @ v
    )


@kind("scaled, expanded, then viewed", shapes=((B, 1, N, D), *QKV[1:]))
def _(q, k, v):
    q = (q.expand(B, H, N, D) * 0.5).view(B * H, N, D)
    return plain(q, k.flatten(0, 1), v.flatten(0, 1))


@kind("a copy of the output is written, and the output read again")
def _(q, k, v):
    out = plain(q, k, v)
    tokens = out.transpose(1, 2).reshape(B, N, H * D)
    tokens.mul_(2.0)
    return tokens, F.linear(out, SQUARE)


SQUARE = normal(D, D)


@kind("V in half precision under autocast, Q and K not", dtype=torch.float32)
def _(q, k, v):
    with torch.autocast("cpu", torch.bfloat16):
        out = (q @ k.mT / 6).softmax(-1) @ F.linear(v, SQUARE)
    return out.float().mul(1e-3).add(1.0)  # its error is bfloat16's


@kind("scores quantised to eight bits", "scores-edited")
def _(q, k, v):
    return (q @ k.mT / 6).to(torch.float8_e5m2).float().softmax(-1) @ v


@kind("K laid over other memory, which is then written", "in-place-write")
def _(q, k, v):
    k, other = k.clone(), k.clone() + 1
    k.set_(other)
    weights = (q @ k.mT / 6).softmax(-1)
    other.add_(1.0)
    return weights @ v


@kind("one column of queries times keys of several", "layout", shapes=((B, H, N, 1), *QKV[1:]))
def _(q, k, v):
    return torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1) @ v


@kind("operands by keyword")
def _(q, k, v):
    out = F.scaled_dot_product_attention(query=q, key=k, value=v)
    return torch.reshape(input=out, shape=(B * H, N, D))


@kind("per-row factors of split scores", "layout", shapes=(*QKV, (4, 1, 1)))
def _(q, k, v, b):
    return ((q @ k.mT / 6).view(B, H, 4, 6, N) * b).view(B, H, N, N).softmax(-1) @ v


# -- the tests ------------------------------------------------------------------------------------


class Called(nn.Module):
    """A function as a module, so that each compile has a report of its own."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def run(
    function: Callable[..., Any], inputs: list[Tensor], group_size: int, **options: Any
) -> tuple[Any, list[str]]:
    """The result of a compile, and the decision or first reason of every row."""
    torch._dynamo.reset()
    policy = {"default": {"group_size": group_size, "min_seq_len": 0}}
    called = function if isinstance(function, nn.Module) else Called(function)
    dynamic = options.pop("dynamic", None)
    compiled = torch.compile(
        called, backend="distr", options={"policy": policy, **options}, dynamic=dynamic
    )
    with computing_exactly():
        result = compiled(*[x.clone() for x in inputs])
    rows = report(compiled).rows
    return result, [r.decision if r.decision == "distr" else r.reasons[0].code for r in rows]


def skip_if_dynamo_fails(module: nn.Module, inputs: list[Any], **options: Any) -> None:
    """Nobody is owed a result that PyTorch's own backend cannot give: old versions trace less."""
    torch._dynamo.reset()
    try:
        torch.compile(module, backend="eager", **options)(*inputs)
    except torch._dynamo.exc.TorchDynamoException as error:
        pytest.skip(f"torch {torch.__version__} cannot trace this: {str(error)[:80]}")


def worst(got: Any, expected: Any) -> float:
    pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (got, expected)), strict=True)
    return max(_error(a, b) for a, b in pairs)


def _error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    assert torch.equal(got.isnan(), expected.isnan())
    got, expected = got.double().nan_to_num(), expected.double().nan_to_num()
    return ((got - expected).norm() / expected.norm().clamp_min(1e-9)).item()


@pytest.mark.parametrize("case", KINDS, ids=lambda k: k.name)
@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_every_result_is_eagers(case: Kind, dynamic: bool | None) -> None:
    function = case.function() if isinstance(case.function, type) else case.function
    bound = 2e-5 if case.dtype is torch.float32 else 3e-2
    with torch.no_grad():
        if dynamic and case.found == "transform":
            skip_if_dynamo_fails(Called(function), case.inputs(), dynamic=True)
        expected = function(*[x.clone() for x in case.inputs()])
        for group_size in (2,) if dynamic else (1, 2):
            got, found = run(function, case.inputs(), group_size, compiler="eager", dynamic=dynamic)
            assert worst(got, expected) <= bound, group_size
    if dynamic is None:
        assert set(found) == {case.found}


REWRITTEN = [case for case in KINDS if case.found == "distr"]


# Inductor may make something else of what is left alone; the op is one call to it.
@pytest.mark.parametrize(
    "case", [*(k for k in KINDS if k not in REWRITTEN), *REWRITTEN[::2]], ids=lambda k: k.name
)
def test_through_inductor_too(case: Kind) -> None:
    function = case.function() if isinstance(case.function, type) else case.function
    bound = 2e-5 if case.dtype is torch.float32 else 3e-2
    with torch.no_grad():
        expected = function(*[x.clone() for x in case.inputs()])
        group_size = 1 if case.found == "distr" and len(case.name) % 2 else 2
        got, _ = run(function, case.inputs(), group_size)
    assert worst(got, expected) <= bound


def test_gradients_inside_no_grad_are_not_lost() -> None:
    """With the op as it is: the graph records gradients where the model does."""
    linear = nn.Linear(D, D)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.enable_grad():
            return plain(linear(q), k, v)

    inputs = [normal(B, H, N, D) for _ in range(3)]
    policy = {"default": {"group_size": 2, "min_seq_len": 0}}
    for compiler in ("eager", "inductor"):
        torch._dynamo.reset()
        compiled = torch.compile(
            function, backend="distr", options={"policy": policy, "compiler": compiler}
        )
        grads = []
        for called in (function, compiled):
            linear.zero_grad()
            with torch.no_grad():
                out = called(*inputs)
            assert out.requires_grad
            out.square().sum().backward()
            grads.append(linear.weight.grad.clone())
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)
        assert [r.code for row in report(compiled).rows for r in row.reasons] == ["gradients"]


def test_an_exported_program_is_seen() -> None:
    class Model(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            return plain(q, k, v), F.scaled_dot_product_attention(q, k, v)

    inputs = [normal(B, H, N, D) for _ in range(3)]
    module = torch.export.export(Model(), tuple(inputs)).module()
    with torch.no_grad():
        got, found = run(module, inputs, 2, compiler="eager")
        assert found == ["distr", "distr"]
        assert worst(tuple(got), Model()(*inputs)) < 2e-5


@pytest.mark.parametrize("sdpa", [False, True])
@pytest.mark.parametrize("which", ["q", "k", "v", "scaled q", "copied q"])
def test_attention_of_attention(which: str, sdpa: bool) -> None:
    """The output of one attention is an operand of the next, which is rewritten before it."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v) if sdpa else plain(q, k, v)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attend(q, k, v)
        given = {"q": (out, k, v), "k": (q, out, v), "v": (q, k, out)}
        given |= {"scaled q": (out * 0.5, k, v), "copied q": (out.contiguous(), k, v)}
        return attend(*given[which])

    inputs = [normal(B, H, N, D) for _ in range(3)]
    with torch.no_grad():
        got, found = run(function, inputs, 2, compiler="eager")
        assert found == ["distr", "distr"]
        assert worst(got, function(*inputs)) < 2e-5


def test_transforms_around_the_compiled_function() -> None:
    q, k, v = (normal(B, H, N, D) for _ in range(3))
    policy = {"default": {"group_size": 2, "min_seq_len": 0}}
    torch._dynamo.reset()
    compiled = torch.compile(
        plain, backend="distr", options={"policy": policy, "compiler": "eager"}
    )
    for called in (
        lambda f: torch.vmap(f)(q, k, v),
        lambda f: torch.func.grad(lambda x: f(x, k, v).sum())(q),
        lambda f: torch.func.jvp(lambda x: f(x, k, v), (q,), (k,))[1],
        lambda f: _tangent(f, q, k, v),
    ):
        torch.testing.assert_close(called(compiled), called(plain), rtol=1e-4, atol=1e-5)


def _tangent(f: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    import torch.autograd.forward_ad as forward_ad

    with torch.no_grad(), forward_ad.dual_level():
        out = f(forward_ad.make_dual(q, k), k, v)
        tangent = forward_ad.unpack_dual(out).tangent
        assert tangent is not None
        return tangent


def test_distributed_tensors_are_approximated_where_that_is_forced(tmp_path: Any) -> None:
    """One process; at default options they are left alone: an exact site is no SDPA either."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rdzv", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        inputs = [normal(B, H, N, D) for _ in range(3)]
        sharded = [distribute_tensor(x, mesh, [Shard(1)]) for x in inputs]
        with torch.no_grad():
            skip_if_dynamo_fails(Called(plain), sharded)
        forced = {"default": {"group_size": 2, "min_seq_len": 0}}
        for policy, said in (({}, ["not-measured"]), (forced, [])):
            torch._dynamo.reset()
            options = {"policy": policy, "compiler": "eager"}
            compiled = torch.compile(plain, backend="distr", options=options)
            with torch.no_grad():
                out = compiled(*sharded).full_tensor()
            wanted = attention(*inputs, group_size=2) if policy else plain(*inputs)
            assert worst(out, wanted) < 1e-6
            assert [x.code for r in report(compiled).rows for x in r.reasons] == said
    finally:
        dist.destroy_process_group()


def _weights_detached(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / 6).softmax(-1).detach() @ v


def _scores_detached(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / 6).detach().softmax(-1) @ v


def _weights_without_grad(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        weights = (q @ k.mT / 6).softmax(-1)
    return weights @ v


def _keys_transposed_without_grad(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        k = k.mT
    return (q @ k / 6).softmax(-1) @ v


def _queries_scaled_without_grad(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        q = q * 0.5
    return (q @ k.mT / 6).softmax(-1) @ v


@pytest.mark.parametrize(
    "function",
    [
        _weights_detached,
        _scores_detached,
        _weights_without_grad,
        _keys_transposed_without_grad,
        _queries_scaled_without_grad,
        plain,
    ],
)
def test_gradients_go_where_the_model_lets_them(function: Callable[..., Tensor]) -> None:
    """An exact site becomes SDPA: not where the model cuts the gradient on the way."""
    found = []
    for called in (function, torch.compile(function, backend="distr", options=EAGER)):
        torch._dynamo.reset()
        inputs = [x.requires_grad_() for x in _fixed(3)]
        called(*inputs).square().sum().backward()
        found.append([x.grad for x in inputs])
    for got, expected in zip(found[1], found[0], strict=True):
        assert (got is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


EAGER = {"policy": {"default": {"group_size": 2, "min_seq_len": 0}}, "compiler": "eager"}


def _fixed(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(B, H, N, D, generator=generator) for _ in range(count)]


WEIGHT = _fixed(1)[0][0, :, :1].requires_grad_()


def output_written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.enable_grad():
        out = (q * WEIGHT @ k.mT).softmax(-1) @ v
    out[:, :, 0] = 0.0
    return out


def query_written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.clone()
    with torch.enable_grad():
        out = ((q / 6) @ (k * WEIGHT).mT).softmax(-1) @ v
    q.zero_()
    return out


@pytest.mark.parametrize("training", ["exact", "approximate"])
@pytest.mark.parametrize("compiler", ["eager", "inductor"])
@pytest.mark.parametrize("function", [output_written, query_written])
def test_what_is_written_later_is_not_kept_for_a_backward(
    function: Callable[..., Tensor], compiler: str, training: str
) -> None:
    """SDPA keeps Q, K, V and its output for its backward; the products and the softmax need not."""
    torch._dynamo.reset()
    inputs = _fixed(3)
    found = []
    policy = {"default": {"min_seq_len": 0, "group_size": 2, "training": training}}
    options = {"compiler": compiler, "policy": policy}
    compiled = torch.compile(function, backend="distr", options=options)
    for run in (function, compiled):
        WEIGHT.grad = None
        with torch.no_grad():
            out = run(*(x.clone() for x in inputs))
        out.square().sum().backward()
        assert WEIGHT.grad is not None
        found.append((out.detach(), WEIGHT.grad.clone()))
    for mine, eagers in zip(found[1], found[0], strict=True):
        # A gradient is a sum of some hundred numbers of either sign: rounding goes by the largest.
        atol = 1e-5 * max(1.0, eagers.abs().max().item())
        torch.testing.assert_close(mine, eagers, rtol=1e-4, atol=atol)
    assert [row.decision for row in report(compiled).rows] == ["exact"]
