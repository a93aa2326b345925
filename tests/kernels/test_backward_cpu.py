"""The backward of the fused CPU kernel: chunks, threads and memory; values, in test_gradients.py.

The reference is the formula of attention under autograd in fp64, with A and B any matrices.
"""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor

from distr_compile.kernels.attention import backward as module
from distr_compile.kernels.attention import cpu as kernel
from distr_compile.kernels.attention.dropout import Dropout
from tests.kernels.cpu_kernel import require_kernel


@pytest.fixture(autouse=True)
def _kernel() -> None:
    require_kernel()


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))
    return torch.randn(shape, generator=generator)


Sizes = tuple[int, int, int, int, int, int, int]


class Case:
    """Inputs of one call of B, H, H_k, N, M, d, d_v, what its forward keeps, and its gradients."""

    def __init__(
        self,
        sizes: Sizes,
        *,
        rank: int = 0,
        block: int = 0,
        mask: Tensor | None = None,
        softcap: float = 0.0,
        offset: int | None = None,
        shared: bool = False,
        strict: bool = False,
        dropout: Dropout | None = None,
    ) -> None:
        B, H, Hk, N, M, d, dv = sizes
        Bk, rep = 1 if shared else B, H // Hk
        self.q = draw(B, H, N, d)
        self.k, self.v = draw(Bk, Hk, M, d, seed=1), draw(Bk, Hk, M, dv, seed=2)
        self.grad, self.mask = draw(B, H, N, dv, seed=3), mask
        block = block or N
        self.bases = None
        if rank:
            self.bases = tuple(
                draw(B, Hk, -(-N // block), d, rank, seed=s) / d**0.5 for s in (4, 5)
            )
        self.options: dict[str, Any] = {
            "scale": 0.8 / d**0.5,
            "grouping_block": block,
            "softcap": softcap,
            "is_causal": offset is not None,
            "causal_offset": offset or 0,
        }
        self.options |= {"strict": True} if strict else {}
        self.options |= {"dropout": dropout} if dropout else {}
        wide = [t.double().requires_grad_() for t in (self.q, self.k, self.v)]
        q, k, v = wide
        if mask is not None and mask.is_floating_point():
            mask = mask.double().requires_grad_()
            wide.append(mask)
        K, V = (t.repeat_interleave(rep, 1) for t in (k, v))
        parts = []
        for start in range(0, N, block):
            Q, Khat = q[:, :, start : start + block], K
            if self.bases is not None:
                A, Bb = (t[:, :, start // block].double() for t in self.bases)
                Qhat, Khat = Q @ A.repeat_interleave(rep, 1), K @ Bb.repeat_interleave(rep, 1)
                hat = Qhat @ Khat.mT
                edge = max(0, min(M, start + (offset or 0))) if strict and start else 0
                edge = edge if strict else M
                parts.append(torch.cat([hat[..., :edge], (Q @ K.mT)[..., edge:]], -1))
                continue
            parts.append(Q @ Khat.mT)
        S = torch.cat(parts, 2) * self.options["scale"]
        S = softcap * torch.tanh(S / softcap) if softcap else S
        if mask is not None:
            S = S.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else S + mask
        if offset is not None:
            S = S.masked_fill(~torch.ones(N, M, dtype=torch.bool).tril(offset), -torch.inf)
        lse = S.logsumexp(-1)
        weights = (S - lse[..., None]).exp().nan_to_num(0)
        out = (dropout.weigh(weights) if dropout else weights) @ V
        self.wanted = torch.autograd.grad(out, wide, self.grad.double())
        self.out, self.lse = out.detach(), lse.detach()

    def run(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """The gradients of q, k, v, and of a floating mask that has one for each head."""
        q, k, v, out, grad = (t.to(dtype) for t in (self.q, self.k, self.v, self.out, self.grad))
        made = [torch.full_like(q, torch.nan), *(torch.full(t.shape, torch.nan) for t in (k, v))]
        results: dict[str, Any] = dict(zip(("dq", "dk", "dv"), made, strict=True))
        if self.mask is not None and self.mask.is_floating_point():
            sizes = (*(1,) * (4 - self.mask.dim()), *self.mask.shape)
            if sizes[1] == q.shape[1] or k.shape[1] == 1:
                results["dmask"] = torch.full(sizes, torch.nan)
                made.append(results["dmask"])
        module.backward(
            q,
            k,
            v,
            self.mask,
            out,
            self.lse.float(),
            grad,
            bases=self.bases,
            **results,
            **self.options,
        )
        return made


CASES: dict[str, tuple[Sizes, dict[str, Any]]] = {
    "exact": ((2, 4, 2, 100, 230, 40, 24), {}),
    "causal": ((1, 2, 1, 200, 230, 72, 80), {"rank": 36, "offset": -3}),
    "blocks": ((2, 2, 2, 100, 230, 48, 40), {"rank": 24, "block": 30, "offset": 20}),
    "blocks shorter than a tile": ((1, 2, 1, 70, 70, 32, 32), {"rank": 17, "block": 7}),
    "one row": ((1, 2, 2, 1, 1, 24, 1), {"rank": 16}),
    "several chunks": ((1, 1, 1, 4500, 65, 32, 16), {"rank": 16, "block": 1900, "softcap": 2.0}),
    "short blocks in several chunks": ((1, 1, 1, 700, 65, 32, 16), {"rank": 16, "block": 9}),
    "shared by batch entries": ((3, 4, 2, 50, 70, 32, 48), {"rank": 16, "shared": True}),
    "bool mask": ((2, 2, 1, 70, 300, 32, 32), {"mask": draw(2, 1, 70, 300) > -0.5, "rank": 16}),
    "bias of keys": ((2, 2, 1, 70, 300, 32, 32), {"mask": draw(2, 1, 1, 300), "offset": 0}),
    "bias of scores": ((2, 4, 2, 70, 210, 32, 24), {"mask": draw(2, 4, 70, 210), "softcap": 2.0}),
    "bias of heads": ((3, 4, 2, 70, 210, 32, 24), {"mask": draw(1, 4, 70, 210), "rank": 16}),
    "bias of keys and heads": ((2, 2, 2, 70, 30, 32, 24), {"mask": draw(2, 2, 1, 30), "offset": 9}),
    "bias of shared keys": (
        (4, 2, 1, 70, 30, 32, 24),
        {"mask": draw(1, 1, 1, 30), "shared": True, "rank": 16, "block": 33},
    ),
    "strict": (
        (2, 4, 2, 150, 230, 40, 24),
        {"rank": 17, "block": 40, "offset": 3, "strict": True},
    ),
    "strict, keys in front": (
        (1, 2, 1, 100, 420, 40, 24),
        {"rank": 20, "block": 30, "offset": 220, "strict": True, "mask": draw(1, 2, 100, 420)},
    ),
    "strict, several chunks": (
        (1, 1, 1, 2500, 70, 32, 16),
        {"rank": 16, "block": 1100, "offset": -1040, "strict": True, "softcap": 2.0},
    ),
    "dropout": (
        (2, 4, 2, 100, 230, 32, 24),
        {"rank": 16, "block": 45, "dropout": Dropout(0.4, torch.tensor(3), 4)},
    ),
    "hidden keys": ((1, 1, 1, 70, 500, 32, 32), {"mask": torch.arange(500) % 400 > 300}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients(name: str, dtype: torch.dtype) -> None:
    sizes, options = CASES[name]
    case = Case(sizes, **options)
    found = case.run(dtype)
    for got, wanted in zip(found, case.wanted[: len(found)], strict=True):
        # Inputs and the output are rounded to the dtype, a few thousand sums to fp32.
        bound = 8 * torch.finfo(dtype).eps * wanted.norm().item() + 1e-30
        assert (got.double().view(wanted.shape) - wanted).norm().item() <= bound


@pytest.mark.parametrize(
    "name", ["blocks", "several chunks", "shared by batch entries", "bias of heads", "strict"]
)
def test_bits_do_not_depend_on_threads(name: str) -> None:
    sizes, options = CASES[name]
    case, before = Case(sizes, **options), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(case.run())
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [0, 16])
def test_no_keys(rank: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of Q are 0, whatever was in the memory that is taken."""
    take = kernel.workspace
    monkeypatch.setattr(kernel, "workspace", lambda size: take(size).fill_(0x41))
    q, grad = draw(1, 2, 20, 32).to(dtype), draw(1, 2, 20, 24).to(dtype)
    k, v = torch.empty(1, 1, 0, 32, dtype=dtype), torch.empty(1, 1, 0, 24, dtype=dtype)
    dq = torch.full_like(q, torch.nan)
    bases = (draw(1, 1, 1, 32, rank), draw(1, 1, 1, 32, rank, seed=1)) if rank else None
    lse = torch.full((1, 2, 20), -torch.inf)
    made: dict[str, Any] = {"dq": dq, "dk": k.float(), "dv": v.float(), "bases": bases}
    module.backward(q, k, v, None, torch.zeros_like(grad), lse, grad, scale=1.0, **made)
    assert not dq.any()


def workspace_of(tokens: int, monkeypatch: pytest.MonkeyPatch, strict: bool = False) -> int:
    sizes: list[int] = []
    take = kernel.workspace
    monkeypatch.setattr(kernel, "workspace", lambda size: sizes.append(size) or take(size))
    q, k, v = (torch.zeros(1, 1, tokens, 128) for _ in range(3))
    A = torch.zeros(1, 1, 1, 128, 64)
    made: dict[str, Any] = {"dq": q.clone(), "dk": k.clone(), "dv": v.clone()}
    lse = torch.full((1, 1, tokens), -torch.inf)
    options: dict[str, Any] = {"bases": (A, A), "strict": strict}
    if strict:
        blocks = A.expand(-1, -1, tokens // 512, -1, -1)
        options |= {"bases": (blocks, blocks), "grouping_block": 512}
    module.backward(q, k, v, None, v, lse, v, scale=1.0, **options, **made)
    monkeypatch.setattr(kernel, "workspace", take)
    return sizes[0]


def test_workspace_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    at_4096 = workspace_of(4096, monkeypatch)
    assert at_4096 <= torch.get_num_threads() * 6 << 20
    assert workspace_of(8192, monkeypatch) == at_4096
    strict = workspace_of(4096, monkeypatch, strict=True)
    assert strict <= torch.get_num_threads() * 10 << 20
    assert workspace_of(8192, monkeypatch, strict=True) == strict


def test_the_structure_is_the_librarys() -> None:
    """A library of another layout says so instead of reading past the end."""
    call = module._Gradients(size=ctypes.sizeof(module._Gradients) - 8)
    assert kernel.library().handle.distr_backward_workspace(ctypes.byref(call)) == -1
    assert kernel.library().handle.distr_backward(ctypes.byref(call)) == -1
