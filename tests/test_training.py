"""Training through the approximation: compiled models whose policy says ``training``.

What a compiled model's gradients are compared with is autograd through the definition, the basis
held constant, in the place of each attention.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch.utils.checkpoint import checkpoint

import distr_compile
from distr_compile.kernels.attention import reference
from distr_compile.kernels.attention.dropout import Dropout
from distr_compile.kernels.projection import reference as projection
from distr_compile.lowering import stored, training
from distr_compile.lowering.judge import Judge
from distr_compile.lowering.measure import SDPA, Measured, Race
from tests.backend_models import HEADS, WIDTH, Attention, approximate
from tests.kernels.cpu_kernel import require_kernel

TRAINED = {"default": {"min_seq_len": 0, "training": "approximate"}}
OPTIONS: dict[str, Any] = {"policy": TRAINED}
CLOSE = {"rtol": 1e-3, "atol": 1e-6}
"""For gradients of the mean of squares: fp32, sums in another order, through a basis."""


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    require_kernel()
    made = projection._bases
    monkeypatch.setattr(projection, "_bases", lambda *a: tuple(t.detach() for t in made(*a)))
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Defined(nn.Module):
    """``Attention`` with the definition of the default estimator in it."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        return approximate(self.attention, x)


class Checkpointed(nn.Module):
    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


def layers() -> nn.Sequential:
    return nn.Sequential(Attention(), nn.GELU(), Attention())


def tokens(batch: int = 2, length: int = 40) -> Tensor:
    return torch.randn(batch, length, WIDTH)


def compiled(model: Any, compiler: str = "eager", policy: Any = TRAINED, **options: Any) -> Any:
    dynamic = options.pop("dynamic", None)
    settings = {"policy": policy, "compiler": compiler, **options}
    return torch.compile(model, backend="distr", dynamic=dynamic, options=settings)


def gradients(model: nn.Module, called: Callable[..., Tensor], *batches: Tensor) -> list[Tensor]:
    """Of the sum over batches of the mean of squares: by the parameters, accumulated."""
    model.zero_grad()
    for x in batches:
        called(x).square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def defined(model: nn.Sequential) -> nn.Sequential:
    return nn.Sequential(*(Defined(m) if isinstance(m, Attention) else m for m in model))


def same(got: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(got) == len(wanted) > 0
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_gradients_flow_through_the_approximation(compiler: str, dynamic: Any) -> None:
    model, batches = layers(), [tokens(2, 40), tokens(3, 56)]
    called = compiled(model, compiler, dynamic=dynamic)
    through = gradients(model, called, *batches)
    same(through, gradients(model, defined(model), *batches))
    rows = distr_compile.report(model).rows
    assert {(row.decision, row.backward) for row in rows} == {("distr", "distr-cpu")}
    exact = gradients(model, model, *batches)
    moved = [(a - e).norm() / e.norm() for a, e in zip(through, exact, strict=True)]
    assert max(moved) > 0.01, "the approximation is one"


def model_grads(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_the_policy_says_so_layer_by_layer() -> None:
    policy = {"default": {"min_seq_len": 0}, "rule": [{"layers": "2", "training": "approximate"}]}
    model = layers()
    gradients(model, compiled(model, policy=policy), tokens())
    first, second = distr_compile.report(model).rows
    assert [r.code for r in first.reasons] == ["gradients"]
    assert 'training = "exact"' in first.reasons[0].text
    assert (first.decision, first.backward) == ("exact", None)
    assert (second.decision, second.backward) == ("distr", "distr-cpu")
    assert "backward distr-cpu" in str(distr_compile.report(model))


def test_without_gradients_nothing_is_said_of_a_backward() -> None:
    model = layers()
    with torch.no_grad():
        compiled(model)(tokens())
    assert [(row.decision, row.backward) for row in distr_compile.report(model).rows] == [
        *(("distr", None),) * 2
    ]


def test_several_lengths_are_one_graph() -> None:
    """Blocks of auto are of one kind from 129 rows to 8192."""
    model = layers()
    called = compiled(model, "aot_eager", dynamic=True)
    for length in (150, 170, 230, 300):
        x = tokens(1, length)
        same(gradients(model, called, x), gradients(model, defined(model), x))
    assert len({row.graph for row in distr_compile.report(model).rows}) == 1


def test_the_op_decides_short_calls_at_run_time() -> None:
    policy = {"default": {"min_seq_len": 45, "training": "approximate"}}
    model = layers()
    called = compiled(model, "aot_eager", policy, dynamic=True)
    for length, wanted in ((60, defined(model)), (40, model), (50, defined(model)), (18, model)):
        x = tokens(2, length)
        same(gradients(model, called, x), gradients(model, wanted, x))
    assert [row.runtime_exact_calls for row in distr_compile.report(model).rows] == [2, 2]


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_activation_checkpointing_changes_no_bit(compiler: str) -> None:
    model, x = layers(), tokens()
    plain = gradients(model, compiled(model, compiler), x)
    again = gradients(model, compiled(Checkpointed(model), compiler), x)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_checkpointing_around_the_compiled_model(compiler: str) -> None:
    """From the first call on, which compiles while the checkpoint looks on."""
    model, x = layers(), tokens()
    called = compiled(model, compiler)
    around = gradients(model, lambda x: checkpoint(called, x, use_reentrant=False), x)
    plain = gradients(model, called, x)
    assert all(torch.equal(a, b) for a, b in zip(plain, around, strict=True))


class Dropping(Attention):
    """The weights are dropped: by ``F.dropout``, by SDPA, or in ``nn.MultiheadAttention``."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        if how == "module":
            self.inner = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "module":
            return self.inner(x, x, x, need_weights=False)[0]
        q, k, v = self.split(x)
        if self.how == "sdpa":
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.3)
        else:
            weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
            out = F.dropout(weights, 0.3, self.training) @ v
        return self.out(self.merge(out))

    def defined(self, x: Tensor, seed: Tensor) -> Tensor:
        """With the definition in its place."""
        if self.how == "module":
            heads = F.linear(x, self.inner.in_proj_weight, self.inner.in_proj_bias)
            q, k, v = heads.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = self.split(x)
        options = {"scale": q.shape[-1] ** -0.5, "rank": q.shape[-1] // 2}
        dropout = Dropout(0.3, seed, HEADS)
        out = reference.attention(q, k, v, estimator="projection", dropout=dropout, **options)
        return (self.inner.out_proj if self.how == "module" else self.out)(self.merge(out))


@pytest.mark.parametrize("training", ["exact", "approximate"])
def test_a_reentrant_checkpoint_runs_one_function_twice(training: str) -> None:
    """Its forward records no gradients, and is training all the same."""

    def run(checkpointed: bool) -> list[Tensor]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        # Weights that are dropped keep a forward exact which is not known to be training.
        model = Dropping("spelled") if training == "approximate" else layers()
        x = tokens().requires_grad_()
        called = compiled(model, policy={"default": {"min_seq_len": 0, "training": training}})
        torch.manual_seed(3)
        out = checkpoint(called, x, use_reentrant=True) if checkpointed else called(x)
        return [out.detach(), *gradients(model, lambda _: out, x)]

    got, wanted = run(True), run(False)
    assert len(got) == len(wanted) > 1
    assert all(map(torch.equal, got, wanted))


@pytest.fixture
def seeds(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The seeds that recorded calls are given, in the order in which they run."""
    seen: list[Tensor] = []
    run = training.forward

    def spy(call: Any, saved: Any) -> Any:
        seen.append(call.dropout.seed.clone())
        return run(call, saved)

    monkeypatch.setattr(training, "forward", spy)
    return seen


@pytest.mark.parametrize("how", ["spelled", "sdpa", "module"])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_dropout_of_the_weights(how: str, compiler: str, seeds: list[Tensor]) -> None:
    """Each step drops others, and its gradients are those of the definition at its seed."""
    model, x = Dropping(how), tokens()
    called = compiled(model, compiler)
    for step in range(2):
        through = gradients(model, called, x)
        assert len(seeds) == step + 1
        same(through, gradients(model, lambda x: model.defined(x, seeds[-1]), x))
    assert seeds[0] != seeds[1]
    (row,) = distr_compile.report(model).rows
    assert (row.decision, row.backward) == ("distr", "distr-cpu")
    torch.manual_seed(3)
    first = gradients(model, called, x)
    torch.manual_seed(3)
    assert all(torch.equal(a, b) for a, b in zip(first, gradients(model, called, x), strict=True))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("around", [False, True])
def test_checkpointing_drops_the_same_weights(
    compiler: str, around: bool, seeds: list[Tensor]
) -> None:
    """Inside of the compiled model and around it the recomputation has the seed of the forward."""
    model, x = nn.Sequential(Dropping("spelled"), nn.GELU(), Dropping("sdpa")), tokens()
    called = compiled(model if around else Checkpointed(model), compiler)
    run = (lambda x: checkpoint(called, x, use_reentrant=False)) if around else called
    through = gradients(model, run, x)
    first, second, *again = seeds
    if around:
        assert again == [first, second]

    def defined(x: Tensor) -> Tensor:
        return model[2].defined(model[1](model[0].defined(x, first)), second)

    same(through, gradients(model, defined, x))


def test_dropout_stays_exact_where_nothing_is_trained() -> None:
    model, x = Dropping("spelled"), tokens()
    for policy, grad, codes in (
        (TRAINED, False, ["dropout"]),
        ({"default": {"min_seq_len": 0}}, True, ["gradients", "dropout"]),
    ):
        torch._dynamo.reset()
        with torch.set_grad_enabled(grad):
            torch.manual_seed(1)
            got = compiled(model, policy=policy)(x)
            torch.manual_seed(1)
            assert torch.equal(got, model(x))
        rows = distr_compile.report(model).rows
        assert [r.code for r in rows[-1].reasons] == codes
    torch._dynamo.reset()
    with torch.no_grad():  # in evaluation nothing is dropped
        compiled(model.eval())(x)
    assert distr_compile.report(model).rows[-1].decision == "distr"


def test_gradients_accumulate() -> None:
    model, x = layers(), tokens(4)
    called = compiled(model, "inductor")
    parts = gradients(model, called, x[:2], x[2:])
    same(parts, gradients(model, lambda x: defined(model)(x) * 2**0.5, x))


def test_compiled_autograd() -> None:
    model, x = layers(), tokens()
    wanted = gradients(model, compiled(model, "inductor"), x)
    called = compiled(model, "inductor")
    loss = called(x).square().mean()
    model.zero_grad()
    with torch._dynamo.utils.maybe_enable_compiled_autograd(True):
        loss.backward()
    same(model_grads(model), wanted)


def test_autocast() -> None:
    model, x = layers(), tokens()
    called = compiled(model, "inductor")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gradients(model, called, x)
    wanted = gradients(model, defined(model), x)
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - theirs).norm() < 0.05 * theirs.norm() + 1e-5


@pytest.mark.parametrize("wrap", [nn.Sequential, Checkpointed])
def test_programs_of_another_formula_are_not_taken_from_the_caches(
    wrap: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiled backward calls the ops as they were when it was compiled.

    Also one that is compiled when it is called, and recomputes the forward.
    """
    model, x = layers(), tokens()

    def hits() -> int:
        torch._dynamo.reset()
        counters.clear()
        gradients(model, compiled(wrap(model), "inductor"), x)
        found = counters["aot_autograd"]["autograd_cache_hit"]
        return found + counters["inductor"]["fxgraph_cache_hit"]

    with fresh_cache():
        assert hits() == 0
        assert hits() > 0
        monkeypatch.setattr(stored, "code_digest", lambda: "another")
        assert hits() == 0


def test_a_second_derivative_is_pytorchs_error() -> None:
    model, x = layers(), tokens().requires_grad_()
    called = compiled(model, "aot_eager")
    (first,) = torch.autograd.grad(called(x).square().mean(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        first.square().sum().backward()


def test_frozen_keys_and_a_trained_bias() -> None:
    """Only what asks for a gradient has one, in the shape in which the model broadcasts it."""

    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.randn(HEADS, 1, 40))

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            scores = q @ k.mT * 0.25 + self.bias
            return scores.softmax(-1) @ v

    model, inputs = Biased(), [torch.randn(2, HEADS, 40, 32) for _ in range(3)]

    def gradient(called: Callable[..., Tensor]) -> Tensor:
        model.zero_grad()
        called(*inputs).square().mean().backward()
        return model.bias.grad.clone()

    got = gradient(compiled(model, "inductor"))
    (row,) = distr_compile.report(model).rows
    assert (row.decision, row.backward) == ("distr", "distr-cpu")
    # Where a bias is large against the scores, what the scores are matters little.
    exact = gradient(model)
    assert got.shape == exact.shape
    assert 0 < (got - exact).norm() < 0.3 * exact.norm()


def test_auto_measures_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def answer(self: Judge, shape: Any, approximation: Any, *, ours: bool = True) -> Measured:
        asked.append((shape.trained, approximation is not None))
        race = Race({SDPA: 4e-3, "distr": 2e-3}, "k", 2.0, 7, 4)
        return Measured(None, race if approximation is not None else None)

    monkeypatch.setattr(Judge, "__call__", answer)
    model = layers()
    gradients(model, compiled(model, policy={"default": {"training": "approximate"}}), tokens())
    assert asked == [(True, True)] * 2
    assert [row.decision for row in distr_compile.report(model).rows] == ["distr"] * 2


# --- several processes ----------------------------------------------------------------------------

TWO_PROCESSES = """
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import distr_compile
from tests.test_training import OPTIONS, compiled, layers, tokens

rank, store, kind = int(sys.argv[1]), *sys.argv[2:]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(0)
model, x = layers(), tokens(4)
if kind == "ddp":
    called = compiled(DistributedDataParallel(model), "inductor")
    reported = [called]
else:
    mesh, called, reported = init_device_mesh("cpu", (2,)), model, [model[0], model[2]]
    for layer in reported:
        layer.compile(backend="distr", options={**OPTIONS, "compiler": "aot_eager"})
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
called(x[2 * rank : 2 * rank + 2]).square().mean().backward()
rows = [row for each in reported for row in distr_compile.report(each).rows]
assert [(row.decision, row.backward) for row in rows] == [("distr", "distr-cpu")] * 2, rows
gradients = [p.grad if kind == "ddp" else p.grad.full_tensor() for p in model.parameters()]
torch.save(gradients, f"{store}.{rank}")
dist.destroy_process_group()
"""


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_have_the_gradients_of_one(kind: str, tmp_path: Path) -> None:
    """Each has half of the batch; DDP and FSDP2 average."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    store = tmp_path / "store"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(rank), str(store), kind],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in started:
        _, said = process.communicate(timeout=400)
        assert process.returncode == 0, said
    torch.manual_seed(0)
    model, x = layers(), tokens(4)
    wanted = gradients(model, defined(model), x)
    for rank in range(2):
        same(torch.load(f"{store}.{rank}", weights_only=True), wanted)
