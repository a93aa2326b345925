"""``compile_blocks`` with bases: an input of the one graph, those of the block that runs."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import distr_compile
from distr_compile.policy import Policy, PolicyError
from distr_compile.reporting import GraphReport, Report
from distr_compile.running import _running, entered, serving
from distr_compile.tuning.calibrate import Calibration, calibrate
from tests.test_regional import EAGER, graphs

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

FIELDS: dict[str, Any] = {"estimator": "calibrated", "rank": 16, "min_seq_len": 0}


class Attention(nn.Module):
    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(128, 384), nn.Linear(128, 128)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.attention = Attention(heads)
        self.is_checkpointed = False

    def forward(self, x: Tensor) -> Tensor:
        if self.is_checkpointed:
            return x + checkpoint(self.attention, x, use_reentrant=False)
        return x + self.attention(x)


class Net(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def inputs(tokens: int = 40, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, tokens, 128, generator=generator, dtype=torch.float64)


def calibrated(model: nn.Module, path: Path, **more: Any) -> tuple[Policy, Calibration]:
    """Bases of its own for each block of a model, and the policy that takes them."""
    dtype = next(model.parameters()).dtype
    result = calibrate(model, [inputs().to(dtype)], path=path / "bases", progress=False)
    counters.clear()
    return Policy({**FIELDS, **more}).with_bases(result.path, result.sha256), result


def net(blocks: int, dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    return Net(blocks).to(dtype).eval()


def reference(block: nn.Module, x: Tensor, bases: Any) -> Tensor:
    """One block by its definition, fp64: Q A and K B in the places of Q and K."""
    attention: Any = block.attention
    q, k, v = attention.qkv(x).unflatten(-1, (3, 2, 64)).permute(2, 0, 3, 1, 4)
    A, B = (basis[..., :16].double() for basis in (bases.basis_q, bases.basis_k))
    weights = (q @ A @ (k @ B).mT / 8).softmax(-1)
    return x + attention.out((weights @ v).transpose(1, 2).flatten(2))


def test_twelve_blocks_are_one_graph_with_the_bases_of_each(tmp_path: Path) -> None:
    model = net(12)
    policy, result = calibrated(model, tmp_path)
    x = wanted = inputs(seed=2)
    with torch.no_grad():
        groups = distr_compile.compile_blocks(model, policy, options=EAGER)
        assert [len(names) for names in groups] == [12]
        for i, block in enumerate(model.blocks):
            own = result.bases.layers[f"blocks.{i}.attention"]
            other = result.bases.layers[f"blocks.{(i + 1) % 12}.attention"]
            wanted, wrong = reference(block, x, own), reference(block, x, other)
            got = block(x)
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
            assert (got - wrong).norm() > 1e-3 * got.norm(), "any bases would do"
            x = got
        torch.testing.assert_close(model(inputs(seed=2)), wanted, rtol=0, atol=1e-11)
    assert graphs() == 1
    rows = distr_compile.report(model).rows
    assert [row.layer for row in rows] == [f"blocks.{i}.attention" for i in range(12)]
    assert [(row.estimator, row.rank, row.runtime_calls) for row in rows] == 12 * [
        ("calibrated", 16, 2)
    ]


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_every_compiler_takes_them(tmp_path: Path, compiler: str, dynamic: bool | None) -> None:
    model = net(3, torch.float32)
    policy, _ = calibrated(model, tmp_path)
    options = {"policy": policy, "compiler": compiler}
    whole = torch.compile(copy.deepcopy(model), backend="distr", options=options, dynamic=dynamic)
    with torch.no_grad():
        distr_compile.compile_blocks(
            model, policy, options={"compiler": compiler}, dynamic=dynamic, fullgraph=True
        )
        for tokens in (40, 48):
            x = inputs(tokens).float()
            torch.testing.assert_close(model(x), whole(x), rtol=0, atol=1e-5)
    rows = distr_compile.report(model).rows
    assert sum(row.runtime_calls or 0 for row in rows) == 6


@pytest.mark.parametrize("outside", [None, False, True], ids=["plain", "checkpoint", "reentrant"])
@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_gradients_are_through_the_bases_of_each_block(
    tmp_path: Path, compiler: str, outside: bool | None
) -> None:
    model = net(3)
    policy, result = calibrated(model, tmp_path, training="approximate")
    exact = copy.deepcopy(model)
    distr_compile.compile_blocks(model, policy, options={"compiler": compiler})
    x, y = (inputs(seed=2).requires_grad_() for _ in range(2))
    got, wanted = x, y
    for i in range(3):
        block: Any = model.blocks[i]
        got = block(got) if outside is None else checkpoint(block, got, use_reentrant=outside)
        wanted = reference(exact.blocks[i], wanted, result.bases.layers[f"blocks.{i}.attention"])
    got.square().sum().backward()
    wanted.square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-9)
    for mine, theirs in zip(model.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-9)


def test_checkpoints_within_a_block_have_a_graph_each(tmp_path: Path) -> None:
    """Their bodies take no further inputs."""
    model = net(3)
    policy, result = calibrated(model, tmp_path)
    for block in model.blocks:
        block.is_checkpointed = True
    distr_compile.compile_blocks(model, policy, options=EAGER)
    x = inputs(seed=2)
    with torch.no_grad():
        for i, block in enumerate(model.blocks):
            own = result.bases.layers[f"blocks.{i}.attention"]
            torch.testing.assert_close(block(x), reference(block, x, own), rtol=0, atol=1e-12)
    assert graphs() == 3
    rows = distr_compile.report(model).rows
    assert [(row.layer, row.decision, row.runtime_calls) for row in rows] == [
        (f"blocks.{i}.attention", "distr", 1) for i in range(3)
    ]


def test_threads_run_each_block_with_its_own(tmp_path: Path) -> None:
    model, x = net(4), inputs(seed=2)
    policy, result = calibrated(model, tmp_path)
    wanted = [
        reference(block, x, result.bases.layers[f"blocks.{i}.attention"]).detach()
        for i, block in enumerate(model.blocks)
    ]
    distr_compile.compile_blocks(model, policy, options=EAGER)
    with torch.no_grad():
        model(x)
    failures: list[BaseException] = []

    def work(i: int) -> None:
        try:
            with torch.no_grad():
                for _ in range(50):
                    torch.testing.assert_close(model.blocks[i](x), wanted[i], rtol=0, atol=1e-12)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert [row.runtime_calls for row in distr_compile.report(model).rows] == 4 * [51]


class Nesting(nn.Module):
    """A list of blocks, in each of which a model of blocks of its own runs, or an error."""

    def __init__(self, inner: list[Net]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Outer(net) for net in inner)


class Outer(nn.Module):
    def __init__(self, inner: Net) -> None:
        super().__init__()
        self.attention = Attention()
        self.inner = [inner]
        self.fails = False

    @torch.compiler.disable
    def step(self, x: Tensor) -> Tensor:
        if self.fails:
            raise KeyError("on purpose")
        return self.inner[0](x)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.step(x))


def test_calls_nest_and_end_with_an_error(tmp_path: Path) -> None:
    """One model's block runs the blocks of another of the same names, then goes on itself."""
    (tmp_path / "in").mkdir()
    inner = net(2)
    policy, result = calibrated(inner, tmp_path / "in")
    torch.manual_seed(1)
    outer = Nesting([inner, inner]).double().eval()
    for module in (outer, inner):
        module.forward = lambda x, m=module: [each(x) for each in next(m.children())][-1]
    x = inputs(seed=2)
    bases = calibrate(outer, [inputs()], path=tmp_path / "bases", progress=False)
    of_outer = Policy(FIELDS).with_bases(bases.path, bases.sha256)
    distr_compile.compile_blocks(inner, policy, options=EAGER)
    distr_compile.compile_blocks(outer, of_outer, options=EAGER)
    last = reference(inner.blocks[1], x, result.bases.layers["blocks.1.attention"])
    with torch.no_grad():
        for i, layer in enumerate(outer.layers):
            own = bases.bases.layers[f"layers.{i}.attention"]
            wanted = x + reference(layer, last, own) - last
            torch.testing.assert_close(layer(x), wanted, rtol=0, atol=1e-12)
            layer.fails = True
            with pytest.raises(KeyError, match="on purpose"):
                layer(x)
            assert _running.get().block == ""
            layer.fails = False
            torch.testing.assert_close(layer(x), wanted, rtol=0, atol=1e-12)


def test_exact_calls_are_those_of_the_layer_that_was_called() -> None:
    """A short input decides in the op; the block that it was given counts it."""
    model = net(3, torch.float32)
    policy = {"default": {"group_size": 2, "min_seq_len": 32}}
    with torch.no_grad():
        distr_compile.compile_blocks(model, policy, options=EAGER, dynamic=True)
        model(inputs(40).float())
        model.blocks[1](inputs(20).float())
        model.blocks[1](inputs(24).float())
        model.blocks[2](inputs(24).float())
    rows = distr_compile.report(model).rows
    assert [(row.runtime_calls, row.runtime_exact_calls) for row in rows] == [
        (1, 0),
        (3, 2),
        (2, 1),
    ]
    text = str(distr_compile.report(model))
    assert "calls" in text
    again = Report.from_json(distr_compile.report(model).to_json())
    assert [row.runtime_calls for row in again.rows] == [1, 3, 2]


def test_calls_go_on_where_a_graph_is_captured_anew() -> None:
    """For other strides, which no row shows: one row for each layer, whichever graph it ran."""
    model, x = net(2, torch.float32), inputs().float()
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    with torch.no_grad():
        distr_compile.compile_blocks(model, {"default": {"min_seq_len": 0}}, options=EAGER)
        model.blocks[1](x)
        model.blocks[0](strided)
        model.blocks[1](x)
        model.blocks[1](strided)
    assert graphs() == 2
    rows = distr_compile.report(model).rows
    counts = [(row.layer, row.runtime_calls) for row in rows]
    assert counts == [("blocks.0.attention", 1), ("blocks.1.attention", 3)]


def test_other_sizes_of_bases_are_other_groups(tmp_path: Path) -> None:
    """Nothing but a number in the module's code tells these blocks apart."""
    model = net(4)
    model.blocks[2].attention.heads = 1
    policy, _ = calibrated(model, tmp_path)
    groups = distr_compile.compile_blocks(model, policy, options=EAGER)
    assert groups == [["blocks.0", "blocks.1", "blocks.3"], ["blocks.2"]]
    with torch.no_grad():
        model(inputs())
    assert [row.runtime_calls for row in distr_compile.report(model).rows] == 4 * [1]


def test_what_is_wrong(tmp_path: Path) -> None:
    model = net(2)
    with pytest.raises(PolicyError, match="bases"):
        distr_compile.compile_blocks(model, {"default": FIELDS})
    policy, _ = calibrated(model, tmp_path)
    assert distr_compile.compile_blocks(model, policy) == [["blocks.0", "blocks.1"]]
    further = {"blocks.0": {"A": inputs()}}
    run = serving(torch.add, GraphReport(0, "Net"), {"blocks.0": {}}, further)
    with pytest.raises(RuntimeError, match=r"graph of blocks\.0 was run while no block was called"):
        run(inputs())
    with pytest.raises(RuntimeError, match=r"was run while blocks\.7 was called"):
        entered("blocks.7", run)(inputs())
    torch.testing.assert_close(entered("blocks.0", run)(inputs()), 2 * inputs(), rtol=0, atol=0)
