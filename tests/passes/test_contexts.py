"""What surrounds attention: symbolic shapes, autograd, higher-order ops, long graphs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from distr_compile.estimators import ESTIMATORS
from distr_compile.passes import match
from distr_compile.passes.apply import find_all
from distr_compile.passes.site import AttentionSite

from .capture import OP, error, run, run_exact
from .inputs import (
    ROWS,
    VALUE_WIDTH,
    WIDTH,
    B,
    Block,
    C,
    CappedWithSinks,
    H,
    eager,
    example_inputs,
)

# -- symbolic shapes ------------------------------------------------------------------------------


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * C).softmax(-1) @ v


def llama(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)) * C + bias
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, v).transpose(1, 2).contiguous()


def merged_heads(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    batch, heads, rows, _ = q.shape
    q, k, v = (x.reshape(batch * heads, -1, x.shape[-1]) for x in (q * C, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)).view(batch, heads, rows, -1) + bias
    weights = scores.view(batch * heads, rows, -1).softmax(-1)
    return torch.bmm(weights, v).view(batch, heads, rows, -1)


def width_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1) @ v


def fused(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, keep)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    return torch.where(seen, q @ k.mT * C, -torch.inf).softmax(-1) @ v


def causal_positions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    seen = torch.arange(k.shape[-2])[None, :] <= torch.arange(q.shape[-2])[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[None, None])


def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def repeat(x: Tensor) -> Tensor:
        batch, heads, length, width = x.shape
        x = x[:, :, None, :, :].expand(batch, heads, 2, length, width)
        return x.reshape(batch, heads * 2, length, width)

    q = torch.cat([q, q.cos()], 1)
    return (q @ repeat(k).mT * C).softmax(-1) @ repeat(v)


SINKS = torch.linspace(-1, 2, H)


def capped_with_sinks(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = torch.tanh(torch.matmul(q, k.transpose(2, 3)) * C / 0.8) * 0.8 + bias
    column = SINKS.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
    scores = torch.cat([scores, column], dim=-1)
    scores = scores - scores.max(dim=-1, keepdim=True).values
    return torch.matmul(scores.softmax(-1)[..., :-1], v)


def sinks_sliced_by_length(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * C
    column = SINKS.view(-1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., : k.shape[-2]] @ v


SYMBOLIC = [
    plain,
    llama,
    merged_heads,
    width_scale,
    fused,
    causal,
    causal_positions,
    repeated,
    capped_with_sinks,
    sinks_sliced_by_length,
]


def _shapes(batch: int, rows: int, keys: int) -> dict[str, tuple[int, ...]]:
    return {
        "q": (batch, H, rows, WIDTH),
        "k": (batch, H, keys, WIDTH),
        "v": (batch, H, keys, VALUE_WIDTH),
        "bias": (batch, 1, rows, keys),
        "keep": (batch, 1, rows, keys),
    }


@pytest.mark.parametrize("function", SYMBOLIC, ids=lambda f: f.__name__)
def test_dynamic_lengths(function: Callable[..., Tensor]) -> None:
    """One compile with batch and lengths marked dynamic; the width stays a number."""
    shapes = _shapes(3, 18, 34)
    inputs = example_inputs(function, shapes)
    for x in inputs:
        for axis in (0, 2, 3) if x.shape[1] == 1 else (0, 2):
            torch._dynamo.mark_dynamic(x, axis)
    capture = run(function, inputs)
    assert error(capture.output, eager(function, inputs)) < 1e-5
    row = capture.row
    assert (row.decision, row.reasons) == ("distr", ())
    assert row.shapes["q"][3] == WIDTH
    assert isinstance(row.shapes["q"][2], str)
    assert row.mask == ("causal" if "causal" in function.__name__ else row.mask)


@pytest.mark.parametrize("function", SYMBOLIC, ids=lambda f: f.__name__)
@pytest.mark.parametrize("is_exact", [False, True])
def test_one_graph_serves_other_lengths(function: Callable[..., Tensor], is_exact: bool) -> None:
    calls = [example_inputs(function, _shapes(*sizes)) for sizes in ((3, 18, 34), (5, 41, 23))]
    for x in calls[0]:
        for axis in (0, 2, 3) if x.shape[1] == 1 else (0, 2):
            torch._dynamo.mark_dynamic(x, axis)

    runner = run_exact if is_exact else run
    capture = runner(function, calls[0], again=calls[1:])
    assert len(capture.graphs) == 1
    for inputs, output in zip(calls, capture.outputs, strict=True):
        assert error(output, eager(function, inputs)) < 1e-5


def known_width(*tensors: Tensor) -> list[Tensor]:
    """As weights do in a model: with ``dynamic=True`` the widths of bare inputs are symbolic."""
    widths = (WIDTH, WIDTH, VALUE_WIDTH)
    return [x.view(B, H, -1, width) for x, width in zip(tensors, widths, strict=True)]


def scaled(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    q, k, v = known_width(q, k, v)
    return (q @ k.mT * scale).softmax(-1) @ v


def scaled_queries(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    q, k, v = known_width(q, k, v)
    return ((q / scale) @ k.mT).softmax(-1) @ v


def scaled_twice(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    q, k, v = known_width(q, k, v)
    scores = ((q * scale) @ k.mT + bias) / (1.0 + scale)
    return F.softmax(scores, dim=-1) @ v


@pytest.mark.parametrize("function", [scaled, scaled_queries, scaled_twice])
@pytest.mark.parametrize("is_exact", [False, True])
def test_symbolic_scale_is_not_specialised(function: Callable[..., Tensor], is_exact: bool) -> None:
    tensors = example_inputs(function)[:-1]
    calls = [[*tensors, 0.31], [*tensors, 0.47]]
    runner = run_exact if is_exact else run
    capture = runner(function, calls[0], again=calls[1:], dynamic=True)
    assert len(capture.graphs) == 1
    for inputs, output in zip(calls, capture.outputs, strict=True):
        assert error(output, eager(function, inputs)) < 1e-5
    if not is_exact:
        assert capture.row.decision == "distr"


def test_symbolic_scale_of_sdpa() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return F.scaled_dot_product_attention(*known_width(q, k, v), scale=scale)

    inputs = [*example_inputs(function)[:-1], 0.31]
    capture = run(function, inputs, dynamic=True)
    assert capture.row.decision == "distr"
    assert error(capture.output, eager(function, inputs)) < 1e-5


def test_symbolic_soft_cap_is_specialised() -> None:
    """The op takes the cap as a number: another one is another graph, never a wrong result."""

    def function(q: Tensor, k: Tensor, v: Tensor, cap: float) -> Tensor:
        q, k, v = known_width(q, k, v)
        return (torch.tanh(q @ k.mT * C / cap) * cap).softmax(-1) @ v

    tensors = example_inputs(function)[:-1]
    calls = [[*tensors, cap] for cap in (0.8, 0.3, 0.3, 0.8)]
    capture = run(function, calls[0], again=calls[1:], dynamic=True)
    assert {row.decision for row in capture.rows} == {"distr"}
    assert [call["softcap"] for call in capture.calls] == [0.8, 0.3, 0.3, 0.8]
    assert len(capture.graphs) == 2
    for inputs, output in zip(calls, capture.outputs, strict=True):
        assert error(output, eager(function, inputs)) < 1e-5


@pytest.mark.parametrize("function", SYMBOLIC, ids=lambda f: f.__name__)
def test_everything_dynamic(function: Callable[..., Tensor]) -> None:
    """With ``dynamic=True`` the head width may be symbolic too: then the site stays exact."""
    inputs = example_inputs(function)
    capture = run(function, inputs, dynamic=True)
    assert error(capture.output, eager(function, inputs)) < 1e-5
    assert capture.row.decision == "distr" or capture.codes <= {"rank", "layout"}


# -- autograd -------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [plain, llama, fused])
def test_gradients_keep_a_site_exact(function: Callable[..., Tensor]) -> None:
    def gradients(call: Callable[..., Tensor]) -> list[Tensor]:
        inputs = example_inputs(function)
        leaves = [x.requires_grad_() for x in inputs[:3]]
        output = call(*inputs)
        return [output.detach(), *torch.autograd.grad(output.square().sum(), leaves)]

    codes: list[set[str]] = []

    def compiled(*inputs: Tensor) -> Tensor:
        capture = run(function, inputs, grad=True)
        codes.append(capture.codes)
        return capture.output

    for ours, theirs in zip(gradients(compiled), gradients(function), strict=True):
        assert error(ours, theirs) < 1e-5
    assert codes == [{"gradients"}]


def test_gradients_of_a_bias_alone() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return (q @ k.mT * C + bias).softmax(-1) @ v

    inputs = example_inputs(function)
    inputs[3].requires_grad_()
    capture = run(function, inputs, grad=True)
    assert capture.codes == {"gradients"}
    capture.output.sum().backward()
    assert inputs[3].grad is not None


def test_gradients_of_sinks_alone() -> None:
    model = CappedWithSinks().eval()
    model.qkv.requires_grad_(False)
    capture = run(model, [torch.randn(B, ROWS, 96)], grad=True)
    assert capture.codes == {"gradients"}
    capture.output.sum().backward()
    assert model.sinks.grad is not None


def test_no_gradient_is_recorded_without_grad_mode() -> None:
    inputs = [x.requires_grad_() for x in example_inputs(plain)]
    assert run(plain, inputs).row.decision == "distr"


def test_frozen_model_under_grad_mode_is_approximated() -> None:
    torch.manual_seed(0)
    model = Block().eval().requires_grad_(False)
    assert run(model, [torch.randn(B, ROWS, 96)], grad=True).row.decision == "distr"


# -- bodies of higher-order ops -------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=False)
        return x


@pytest.mark.parametrize("is_exact", [True, False])
def test_activation_checkpointing(is_exact: bool) -> None:
    torch.manual_seed(0)
    model, x = Checkpointed().eval(), torch.randn(B, ROWS, 96)
    capture = (run_exact if is_exact else run)(model, [x])
    assert error(capture.output, eager(model, [x])) < 1e-5
    assert [row.layer for row in capture.rows] == ["blocks.0", "blocks.1"]
    assert [row.sdpa for row in capture.rows] == [is_exact] * 2
    assert len(capture.calls) == (0 if is_exact else 2)


@pytest.mark.parametrize("is_exact", [True, False])
def test_nested_compile_region(is_exact: bool) -> None:
    torch.manual_seed(0)
    block = Block().eval()

    @torch.compiler.nested_compile_region
    def region(x: Tensor) -> Tensor:
        return block(x)

    def model(x: Tensor) -> Tensor:
        return region(region(x))

    x = torch.randn(B, ROWS, 96)
    with torch.no_grad():
        expected = block(block(x))
    capture = (run_exact if is_exact else run)(model, [x])
    assert error(capture.output, expected) < 1e-5
    assert {row.decision for row in capture.rows} == {"exact" if is_exact else "distr"}
    assert len(capture.calls) == (0 if is_exact else 2)


# -- the policy's reasons -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "shapes", "codes"),
    [
        ({"group_size": 1}, {}, {"group-size-1"}),
        ({"group_size": 3, "min_seq_len": 0}, {}, {"rank"}),
        ({"group_size": 4, "min_seq_len": 0}, {}, {"rank"}),
        ({"group_size": 2, "min_seq_len": 17}, {}, set()),
        ({"group_size": 2, "min_seq_len": 18}, {}, {"min-seq-len"}),
        ({"group_size": 2}, {}, set()),  # whether it is faster is asked where a model compiles
        ({"group_size": 2, "min_seq_len": 0}, {"q": (B, H, 15, WIDTH)}, {"decode"}),
        ({"group_size": 2, "min_seq_len": 0}, {"q": (B, H, 16, WIDTH)}, set()),
        ({"group_size": 3}, {"q": (B, H, 1, WIDTH)}, {"rank", "decode"}),
    ],
)
def test_every_reason_is_collected(
    policy: dict[str, Any], shapes: dict[str, tuple[int, ...]], codes: set[str]
) -> None:
    inputs = example_inputs(plain, shapes)
    capture = run(plain, inputs, policy=policy)
    assert capture.codes == codes
    assert (capture.row.decision == "distr") == (not codes)
    assert error(capture.output, eager(plain, inputs)) < 1e-5


def test_rank_and_rounds_reach_the_op_and_the_report() -> None:
    inputs = example_inputs(plain)
    policy = {"rank": 24, "estimator": "projection", "rounds": 2, "min_seq_len": 0}
    capture = run(plain, inputs, policy=policy)
    (call,) = capture.calls
    assert (call["rank"], call["rounds"], call["estimator"]) == (24, 2, "projection")
    row = capture.row
    assert (row.group_size, row.rank, row.rounds) == (None, 24, 2)
    assert row.sees == ESTIMATORS["projection"].sees
    assert error(capture.output, eager(plain, inputs)) < 1e-5

    capture = run(plain, inputs, policy={"rank": 20, "min_seq_len": 0})
    assert capture.calls[0]["rank"] == 20
    assert (capture.row.group_size, capture.row.rank, capture.row.rounds) == (2, 20, 1)
    row = run_exact(plain, inputs).row
    assert (row.group_size, row.rank, row.rounds, row.sees) == (1, None, None, None)


def causal_call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def padded(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    return (q @ k.mT * C).masked_fill(~padding[:, None, None], -torch.inf).softmax(-1) @ v


def biased(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    return (q @ k.mT * C + table).softmax(-1) @ v


@pytest.mark.parametrize(
    ("function", "may_be_causal"),
    [(plain, False), (padded, False), (causal_call, True), (fused, True), (biased, True)],
)
def test_strict_causality(function: Callable[..., Tensor], may_be_causal: bool) -> None:
    """A mask with a row per query counts as causal unless the graph says what is in it."""
    inputs = example_inputs(function)
    policy = {"causal": "strict", "min_seq_len": 0}
    lsh = {**policy, "estimator": "lsh-mean"}
    capture = run(function, inputs, policy=lsh)
    assert capture.codes == ({"looks-ahead"} if may_be_causal else set())
    assert run(function, inputs, policy={**lsh, "causal": "block"}).codes == set()
    prefix = run(function, inputs, policy={**policy, "grouping_block": 8})
    assert prefix.codes == set()
    assert [call.get("strict", False) for call in prefix.calls] == [may_be_causal]
    sees = "earlier rows and keys only" if may_be_causal else ESTIMATORS["projection"].sees
    assert [row.sees for row in prefix.rows] == [sees]
    for got in (capture, prefix):
        assert error(got.output, eager(function, inputs)) < 1e-5


def test_half_precision_with_a_finite_mask_is_kept() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        scores = (q @ k.mT * C).masked_fill(~keep, torch.finfo(q.dtype).min)
        return scores.softmax(-1) @ v

    inputs = example_inputs(function, dtype=torch.float16)
    capture = run(function, inputs)
    assert capture.codes == {"fp16-mask"}
    assert torch.equal(capture.output, function(*inputs))


# -- rows without a key ---------------------------------------------------------------------------


def fill(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return (q @ k.mT * C).masked_fill(~keep, torch.finfo(q.dtype).min).softmax(-1) @ v


def fill_10000(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(~keep, -1e4).div(3.0).softmax(-1) @ v


def fill_upcast(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = (q @ k.mT * C).float()
    scores = torch.where(keep, scores, torch.finfo(scores.dtype).min)
    return scores.softmax(-1).to(q.dtype) @ v


def fill_upcast_biased(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, bias: Tensor) -> Tensor:
    scores = (q @ k.mT * C).float() + bias
    scores = scores.masked_fill(~keep, torch.finfo(scores.dtype).min)
    return scores.softmax(-1).to(q.dtype) @ v


@pytest.mark.parametrize("function", [fill, fill_10000, fill_upcast, fill_upcast_biased])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_exact", [True, False])
def test_rows_without_a_key_under_a_finite_mask_stay_uniform(
    function: Callable[..., Tensor], dtype: torch.dtype, is_exact: bool
) -> None:
    inputs = example_inputs(function, dtype=dtype)
    inputs[3][0, :, 3] = False
    expected = eager(function, inputs, dtype)
    oracle = eager(function, inputs, torch.float64)
    uniform = inputs[2][0].double().mean(1)
    assert error(oracle[0, :, 3], uniform) < 1e-5
    capture = (run_exact if is_exact else run)(function, inputs)
    assert error(capture.output, oracle) <= 2 * error(expected, oracle) + torch.finfo(dtype).eps
    assert capture.row.decision == ("exact" if is_exact else "distr")


@pytest.mark.parametrize("is_exact", [True, False])
def test_half_precision_with_upcast_scores(is_exact: bool) -> None:
    """The mask is fp32 as the scores are: the number does not fit fp16."""
    inputs = example_inputs(fill_upcast_biased, dtype=torch.float16)
    capture = (run_exact if is_exact else run)(fill_upcast_biased, inputs)
    oracle = eager(fill_upcast_biased, inputs, torch.float64)
    assert error(capture.output, oracle) < 2e-3
    assert not capture.row.sdpa


# -- long graphs ----------------------------------------------------------------------------------


def _long_graph(layers: int) -> fx.GraphModule:
    """The Dynamo graph of ``layers`` attention blocks on one sequence."""
    torch._dynamo.reset()
    weights = [torch.randn(96, 3 * 96) * 0.1 for _ in range(2)]

    def model(x: Tensor) -> Tensor:
        for layer in range(layers):
            qkv = torch.matmul(F.layer_norm(x, (96,)), weights[layer % 2])
            q, k, v = qkv.view(1, ROWS, 3, 3, 32).permute(2, 0, 3, 1, 4).unbind(0)
            out = (q * 0.2 @ k.transpose(-2, -1)).softmax(-1) @ v
            x = x + out.transpose(1, 2).reshape(1, ROWS, 96)
            x = x + F.gelu(x)
        return x

    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=backend)(torch.randn(1, ROWS, 96))
    return graphs[0]


def _repeat(gm: fx.GraphModule, count: int) -> fx.Graph:
    """The graph ``count`` times in a row: as long as one pleases, without tracing it."""
    long = fx.Graph()
    inputs: dict[fx.Node, fx.Node] = {}
    result: fx.Node | None = None
    for _ in range(count):
        copied = dict(inputs)
        for node in gm.graph.nodes:
            if node.op == "output":
                result = copied[node.args[0][0]]
            elif node.op != "placeholder":
                copied[node] = long.node_copy(node, lambda n, known=copied: known[n])
            elif node not in inputs:
                inputs[node] = copied[node] = long.node_copy(node)
        first = next(n for n in inputs if "x" in str(n.target))
        assert result is not None
        inputs[first] = result
    long.output((result,))
    return long


def test_time_of_the_matcher_is_linear() -> None:
    """Four times the nodes, 10,000 of them, take about four times as long."""
    gm = _long_graph(10)
    seconds = {}
    for count in (14, 56):
        graph = _repeat(gm, count)
        start = time.process_time()
        found = match.find(graph)
        seconds[len(graph.nodes)] = time.process_time() - start
        assert len(found) == 10 * count
        assert all(isinstance(site, AttentionSite) for site in found)
    small, large = seconds
    assert large >= 10_000 - 500
    assert seconds[large] / seconds[small] < 2 * large / small


def test_find_all_leaves_the_graph_alone() -> None:
    gm = _long_graph(2)
    before = gm.print_readable(print_output=False)
    assert len(find_all(gm)) == 2
    assert gm.print_readable(print_output=False) == before
    assert OP not in {node.target for node in gm.graph.nodes}
