"""What only a GPU shows: streams, CUDA graphs, memory, several devices, bf16, whole models.

The kernels' numbers are tested in ``tests/kernels``, by the interpreter too.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import distr_compile
import distr_compile.lowering.op
from distr_compile.kernels.attention import reference
from distr_compile.kernels.random import projections
from distr_compile.lowering import cuda

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

op: Any = torch.ops.distr.attention
OPTIONS: dict[str, Any] = {"scale": 0.125, "estimator": "lsh-mean", "grouping_block": 0}


def qkv(
    B: int = 2,
    H: int = 4,
    Hk: int = 4,
    N: int = 1000,
    d: int = 64,
    dtype: torch.dtype = torch.float16,
    device: str = "cuda",
    seed: int = 4,
) -> list[Tensor]:
    """Drawn on the CPU: every device sees the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, H, N, d), (B, Hk, N, d), (B, Hk, N, d))
    return [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]


FACTOR = {torch.float16: 2, torch.bfloat16: 2, torch.float32: 8}
"""A kernel may err by this times the formula in its own precision: on a GPU three tf32 products
stand for one of fp32."""


def least_projection(q: Tensor, key_heads: int) -> float:
    """The cosine of the projection that is nearest to 0, of all that LSH takes the signs of."""
    rows = q.cpu().double().unflatten(1, (key_heads, -1)).transpose(2, 3).flatten(2, 3)
    P = projections(0, rows.shape[2], seed=0).double()
    cosines = rows.mT @ P / (rows.norm(dim=2)[..., None] * P.norm(dim=0))
    return cosines.abs().min().item()


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rank", [16, 32, 64])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("estimator", ["lsh-mean", "projection"])
def test_the_op_is_the_definition(
    dtype: torch.dtype, rank: int, is_causal: bool, key_heads: int, estimator: str
) -> None:
    """The groupings can differ only where a projection is nearly 0, which these inputs avoid."""
    q, k, v = qkv(Hk=key_heads, dtype=dtype)
    assert least_projection(q, key_heads) > 2e-6  # fp32 errs by 1e-7
    options = {**OPTIONS, "rank": rank, "is_causal": is_causal, "estimator": estimator}
    wide = [t.double() for t in (q, k, v)]
    wanted = reference.attention(*wide, **options)
    limit = error(reference.attention(q, k, v, **options), wanted)
    assert error(op(q, k, v, **options), wanted) <= FACTOR[dtype] * limit + torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("estimator", ["lsh-mean", "projection"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradients(dtype: torch.dtype, is_causal: bool, estimator: str, p: float) -> None:
    """Against the op in fp64 on the CPU, whose gradients are held to the definition there."""
    options = {**OPTIONS, "rank": 32, "is_causal": is_causal, "estimator": estimator}
    options |= {"dropout_p": p, "grouping_block": 300}
    found = []
    for device, to in (("cuda", dtype), ("cpu", torch.float64)):
        inputs = [t.to(device, to).requires_grad_() for t in qkv(Hk=2, dtype=dtype)]
        seed = torch.tensor(11, device=device) if p else None
        out = op(*inputs, None, None, None, None, seed, **options)
        found.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for got, wanted in zip(*found, strict=True):
        assert error(got.cpu(), wanted) <= 32 * torch.finfo(dtype).eps


def test_cuda_graph_of_a_training_step_with_dropout() -> None:
    """The seed is drawn in the graph: each replay drops others, forward and backward alike."""
    inputs = [t.requires_grad_() for t in qkv()]
    value = inputs[2]

    def step() -> tuple[Tensor, Tensor]:
        out = distr_compile.attention(*inputs, dropout_p=0.5)
        return out, torch.autograd.grad(out.sum(), value)[0]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, grad = step()
    seen = []
    for _ in range(2):
        graph.replay()
        # The sum of the outputs is that of V times its gradient: both saw the same weights.
        torch.testing.assert_close(
            (value.float() * grad.float()).sum(), out.float().sum(), rtol=0.02, atol=2.0
        )
        seen.append(out.clone())
    assert not torch.equal(*seen)


def test_streams() -> None:
    """Work on a side stream neither waits for nor races with the default one."""
    q, k, v = qkv()
    wanted = op(q, k, v, rank=32, **OPTIONS)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    results = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(op(q, k, v, rank=32, **OPTIONS))
    torch.cuda.synchronize()
    assert all(torch.equal(got, wanted) for got in results)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("key_heads", [1, 4])
def test_the_strict_form_is_the_definition(dtype: torch.dtype, key_heads: int) -> None:
    q, k, v = qkv(Hk=key_heads, dtype=dtype)
    options = {**OPTIONS, "rank": 32, "estimator": "projection", "grouping_block": 300}
    options |= {"is_causal": True, "strict": True}
    wanted = reference.attention(*(t.double() for t in (q, k, v)), **options)
    limit = error(reference.attention(q, k, v, **options), wanted)
    got = op(q, k, v, **options)
    assert error(got, wanted) <= FACTOR[dtype] * limit + 2 * torch.finfo(dtype).eps
    for t in (q, k, v):  # later rows move nothing before them
        t[:, :, 700:] *= -3
    assert torch.equal(op(q, k, v, **options)[:, :, :700], got[:, :, :700])


@pytest.mark.parametrize(
    ("estimator", "strict"), [("lsh-mean", False), ("projection", False), ("projection", True)]
)
def test_cuda_graph_of_the_op(estimator: str, strict: bool) -> None:
    q, k, v = qkv()
    mask = torch.arange(1000, device="cuda") < 900
    options = {**OPTIONS, "rank": 32, "estimator": estimator, "strict": strict}
    for _ in range(3):
        op(q, k, v, mask, **options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = op(q, k, v, mask, **options)
    for seed in range(3):
        fresh = qkv(seed=seed)
        for old, new in zip((q, k, v), fresh, strict=True):
            old.copy_(new)
        graph.replay()
        torch.testing.assert_close(got, op(q, k, v, mask, **options), rtol=0, atol=0)


class Block(nn.Module):
    """Attention as a model spells it, for compilation."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(256, 768)
        self.proj = nn.Linear(256, 256)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 64)).permute(2, 0, 3, 1, 4)
        weights = (q * 0.125 @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_models(mode: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Block().cuda().half().eval()
    wide = copy.deepcopy(model).double()
    policy = distr_compile.Policy(default={"group_size": 2, "min_seq_len": 0})
    options = {"policy": policy, "mode": mode}
    compiled = torch.compile(model, backend="distr", options=options, dynamic=dynamic)
    with torch.inference_mode():
        for length in (512, 512, 512, 600, 512):
            x = torch.randn(2, length, 256, device="cuda", dtype=torch.float16)
            got = compiled(x).clone()
            q, k, v = wide.qkv(x.double()).unflatten(-1, (3, 4, 64)).permute(2, 0, 3, 1, 4)
            inner = reference.attention(q, k, v, rank=32, **OPTIONS)
            wanted = wide.proj(inner.transpose(1, 2).flatten(2))
            # Rounding moves a few columns of nearly zero projection to another group.
            assert error(got, wanted) < 0.05
    row = distr_compile.report(compiled).rows[0]
    assert row.decision == "distr"
    assert row.runtime_reason is None


@pytest.mark.parametrize("estimator", ["lsh-mean", "projection"])
def test_nothing_waits_for_the_device(estimator: str) -> None:
    q, k, v = qkv()
    mask = torch.arange(1000, device="cuda") < 900
    options = {**OPTIONS, "estimator": estimator}
    op(q, k, v, mask, rank=32, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for rank in (16, 32, 64):
            op(q, k, v, rank=rank, is_causal=True, **options)
            op(q, k, v, mask, rank=rank, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("estimator", ["lsh-mean", "projection"])
def test_memory_is_bounded_and_given_back(estimator: str) -> None:
    """Khat of all blocks would take 16 GiB here."""
    q, k, v = qkv(B=1, H=1, Hk=1, N=131072)
    options = {**OPTIONS, "grouping_block": 64, "estimator": estimator}
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = op(q, k, v, rank=32, **options)
    peak = torch.cuda.max_memory_allocated() - before - out.nbytes
    assert peak <= (cuda.WORKSPACE_MIB << 20) * 1.1
    rows = slice(70_016, 70_080)
    wanted = reference.attention(*(t.double() for t in (q[:, :, rows], k, v)), rank=32, **options)
    assert error(out[:, :, rows], wanted) < 0.01
    del out
    assert torch.cuda.memory_allocated() == before


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_devices_in_one_process() -> None:
    here, there = qkv(), qkv(device="cuda:1")
    for old, new in zip(there, here, strict=True):
        old.copy_(new)
    assert torch.equal(op(*there, rank=32, **OPTIONS).to("cuda:0"), op(*here, rank=32, **OPTIONS))


def test_inference_mode_and_autocast() -> None:
    q, k, v = qkv(dtype=torch.float32)
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        got = op(q, k, v, rank=32, **OPTIONS)
    assert got.dtype == torch.bfloat16
    wanted = reference.attention(*(t.bfloat16().double() for t in (q, k, v)), rank=32, **OPTIONS)
    assert error(got, wanted) < 0.02


def test_soft_cap_and_sinks_have_an_exact_kernel() -> None:
    q, k, v = qkv(N=300)
    sinks = torch.tensor([0.5, -2.0, 3.0, 1.0], device="cuda")
    got = op(q, k, v, None, None, None, sinks, rank=64, softcap=2.0, **OPTIONS)
    wide = [t.double() for t in (q, k, v)]
    wanted = reference.attention(*wide, sinks=sinks, softcap=2.0, rank=64, **OPTIONS)
    assert error(got, wanted) < 2e-3
    assert error(F.scaled_dot_product_attention(q, k, v, scale=0.125), wanted) > 0.1
