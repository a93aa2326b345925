"""Run the pass on a function and compute every ``distr.attention`` it writes exactly.

With the estimator out of the way, a rewritten graph has to equal the original one: whatever differs
is a fault of the matcher or the rewriter (a lost mask, a wrong scale, a head read twice).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from distr_compile.backend import run_pass
from distr_compile.policy import Policy
from distr_compile.reporting import NotAttention, SiteRow

OP = torch.ops.distr.attention.default


@dataclass
class Capture:
    """What the pass made of one call: the result, the report, the rewritten graphs."""

    outputs: list[Any] = field(default_factory=list)
    rows: list[SiteRow] = field(default_factory=list)
    not_attention: list[NotAttention] = field(default_factory=list)
    graphs: list[fx.GraphModule] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)

    @property
    def output(self) -> Any:
        """Of the first call."""
        return self.outputs[0]

    @property
    def row(self) -> SiteRow:
        """The only row."""
        assert len(self.rows) == 1, self.rows
        return self.rows[0]

    @property
    def codes(self) -> set[str]:
        """All reason codes of the report."""
        found = {reason.code for row in self.rows for reason in row.reasons}
        return found | {entry.reason.code for entry in self.not_attention}

    def targets(self) -> list[Any]:
        """What the rewritten graphs call, bodies of higher-order ops included."""
        return [
            node.target
            for graph in self.graphs
            for module in graph.modules()
            if isinstance(module, fx.GraphModule)
            for node in module.graph.nodes
            if node.op in {"call_function", "call_method"}
        ]


def run(
    function: Callable[..., Any],
    inputs: Sequence[Any],
    *,
    policy: dict[str, Any] | None = None,
    grad: bool = False,
    again: Sequence[Sequence[Any]] = (),
    **options: Any,
) -> Capture:
    """Compile with our pass and without a compiler, call, and compute our op exactly.

    Args:
        function: a module or a function.
        inputs: its arguments.
        policy: the policy's ``[default]``; without one everything possible is approximated.
        grad: whether autograd records.
        again: the inputs of further calls.
        **options: of ``torch.compile``.
    """
    torch._dynamo.reset()
    capture = Capture()
    chosen = Policy(default={"group_size": 2, "min_seq_len": 0} if policy is None else policy)

    def backend(gm: fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        before = _text(gm)
        tried = run_pass(gm, chosen, change=False)
        assert _text(gm) == before, "trying has changed the graph"
        result = run_pass(gm, chosen, change=True)
        assert tried.graph.rows == result.graph.rows
        capture.rows += result.graph.rows
        capture.not_attention += result.graph.not_attention
        _compute_exactly(gm, capture.calls)
        capture.graphs.append(gm)
        return gm.forward

    with torch.set_grad_enabled(grad):
        compiled = torch.compile(function, backend=backend, **options)
        capture.outputs = [compiled(*arguments) for arguments in (inputs, *again)]
    return capture


def _text(module: fx.GraphModule) -> list[str]:
    """All bodies, as code."""
    return [str(m.graph) for m in module.modules() if isinstance(m, fx.GraphModule)]


def run_exact(function: Callable[..., Any], inputs: Sequence[Any], **options: Any) -> Capture:
    """As :func:`run` with ``group_size = 1``: sites become SDPA calls where that means the same."""
    return run(function, inputs, policy={"group_size": 1}, **options)


def _compute_exactly(gm: fx.GraphModule, calls: list[dict[str, Any]]) -> None:
    def attention(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(kwargs)
        return exact_attention(*args, **kwargs)

    for module in gm.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        for node in module.graph.nodes:
            if node.target is OP:
                node.target = attention
        module.graph.lint()
        module.recompile()


def exact_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    basis_q: None = None,
    basis_k: None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    is_causal: bool = False,
    causal_offset: int = 0,
    rank: int,
    estimator: str,
    softcap: float = 0.0,
    **_: Any,
) -> Tensor:
    """What ``distr.attention`` approximates, in fp64, for arguments that keep its contract."""
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    batch, heads, rows, width = q.shape
    assert q.dtype == k.dtype == v.dtype
    assert {k.shape[0], v.shape[0]} <= {1, batch}
    assert heads % k.shape[1] == 0
    assert k.shape[1:3] == v.shape[1:3]
    assert k.shape[3] == width
    assert 16 <= rank < width if estimator == "projection" else rank == width // 2
    assert isinstance(scale, float)
    key, value = (x.repeat_interleave(heads // x.shape[1], 1).double() for x in (k, v))
    scores = q.double() @ key.mT * scale
    columns = scores.shape[-1]
    if softcap:
        assert softcap > 0
        scores = softcap * torch.tanh(scores / softcap)
    if is_causal:
        seen = torch.ones(rows, columns, dtype=torch.bool).tril(causal_offset)
        scores = scores.masked_fill(~seen, -torch.inf)
    if mask is not None:
        assert torch.broadcast_shapes(mask.shape, scores.shape) == scores.shape
        if mask.dtype is torch.bool:
            scores = scores.masked_fill(~mask, -torch.inf)
        else:
            assert mask.is_floating_point()
            scores = scores + mask.double()
    if sinks is not None:
        assert sinks.shape == (heads,)
        column = sinks.double()[None, :, None, None].expand(batch, -1, rows, -1)
        scores = torch.cat([scores, column], -1)
    weights = torch.softmax(scores, -1)[..., :columns].nan_to_num(0.0)
    # The op's memory order: B, N, H, d_v.
    return (weights @ value).to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2)


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert torch.equal(actual.isnan(), expected.isnan())
    actual, expected = (x.detach().double().nan_to_num() for x in (actual, expected))
    scale = expected.abs().max().clamp_min(1e-6)
    return ((actual - expected).abs().max() / scale).item()
