"""The Triton backward: in the interpreter where there is no GPU; the cases of the CPU kernel's.

The reference is the formula of attention under autograd in fp64, with A and B any matrices.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from distr_compile.kernels.attention.triton_bwd import BackwardTile, Cut, attention_bwd
from distr_compile.kernels.blocks import Places
from tests.kernels.test_backward_cpu import CASES, Case, draw

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
SMALL = BackwardTile(Cut(16, 32, 4), Cut(32, 16, 4))

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

BF16 = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(
        not ON_GPU, reason="Triton's interpreter computes bf16 on its bits, as integers"
    ),
)
SLOW = {"several chunks", "short blocks in several chunks"}  # of the CPU kernel's own walk
MORE: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "a wide head": ((1, 1, 1, 40, 50, 128, 128), {"rank": 64, "offset": 0}),
    "soft cap and bias": (
        (1, 2, 1, 50, 70, 32, 40),
        {"rank": 16, "softcap": 2.0, "mask": draw(1, 2, 50, 70), "block": 20},
    ),
    "rows that see nothing": ((1, 2, 1, 40, 40, 32, 32), {"rank": 16, "offset": -7}),
    "bias of rows": ((1, 2, 2, 20, 33, 32, 32), {"mask": draw(20, 1)}),
}
ALL = {
    name: case
    for name, case in (CASES | MORE).items()
    if name not in SLOW and "strict" not in case[1]
}


LONG = ["dropout", "bias of heads", "bias of scores", "bool mask", "exact"]
SHORT = [name for name in list(ALL)[::2] if name not in LONG]
"""Where they are interpreted: of the long ones half in fp32, half in fp16; of the others all in
fp32 and half in fp16."""


class Call(Case):
    """The case on the device, with what ``attention_bwd`` makes of it."""

    def gradients(self, dtype: torch.dtype, tile: BackwardTile) -> list[Tensor]:
        """Each inside of a larger tensor full of NaN, that must stay so around it."""
        options = dict(self.options)
        block, rep = options["grouping_block"], self.q.shape[1] // self.k.shape[1]
        Qhat, Khat, bases = self.q, self.k[:, :, None], None
        if self.bases is not None:
            A, B = bases = tuple(t.to(DEVICE) for t in self.bases)
            rows = torch.arange(self.q.shape[2]) // block
            wide = A.cpu().repeat_interleave(rep, 1)[:, :, rows]
            Qhat = torch.einsum("bhnd,bhndr->bhnr", self.q, wide)
            Khat = self.k[:, :, None] @ B.cpu()
        given = (Qhat, Khat, self.v, self.mask, self.out, self.lse, self.grad)
        names = ("Qhat", "Khat", "V", "mask", "out", "lse", "grad")
        tensors = {
            name: None if t is None else t.to(DEVICE, dtype if t.is_floating_point() else t.dtype)
            for name, t in zip(names, given, strict=True)
        }
        tensors["lse"] = self.lse.float().to(DEVICE)
        around = [
            torch.full((*t.shape[:2], t.shape[2] + 3, t.shape[3] + 5), math.nan, device=DEVICE)
            for t in (self.q, self.k, self.v)
        ]
        around = [t.to(dtype) for t in around]
        made = [t[:, :, 2:-1, :-5] for t in around]
        results = dict(zip(("dq", "dk", "dv"), made, strict=True))
        if dropout := options.get("dropout"):
            options["dropout"] = dataclasses.replace(dropout, seed=dropout.seed.to(DEVICE))
        options |= {"bases": bases, "tile": tile, **results}
        attention_bwd(*tensors.values(), **options)
        for whole, part in zip(around, made, strict=True):
            assert whole.isnan().sum() == whole.numel() - part.numel()
        return [t.cpu() for t in made]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in ALL if ON_GPU or name not in LONG[::2]),
        *((name, torch.float16) for name in ALL if ON_GPU or name in (*LONG[::2], *SHORT)),
        *(pytest.param(name, *BF16.values, marks=BF16.marks) for name in ALL),
    ],
)
def test_gradients(name: str, dtype: torch.dtype) -> None:
    sizes, options = ALL[name]
    case = Call(sizes, **options)
    for got, wanted in zip(case.gradients(dtype, SMALL), case.wanted[:3], strict=True):
        # Inputs, Qhat, Khat, the weights and dS are rounded to the dtype.
        bound = 8 * torch.finfo(dtype).eps * wanted.norm().item() + 1e-30
        assert (got.double() - wanted).norm().item() <= bound


def test_tiles_do_not_matter() -> None:
    tile = BackwardTile(Cut(64, 128, 8), Cut(16, 16, 4))
    sizes, options = ALL["blocks"]
    case = Call(sizes, **options)
    for got, other in zip(
        case.gradients(torch.float32, SMALL), case.gradients(torch.float32, tile), strict=True
    ):
        torch.testing.assert_close(got, other, rtol=1e-4, atol=1e-5)


def test_bits_repeat() -> None:
    sizes, options = ALL["shared by batch entries"]
    case = Call(sizes, **options)
    first, second = (case.gradients(torch.float16, SMALL) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_places() -> None:
    """Blocks that lie in each batch entry as a mask says, and differently from entry to entry."""
    sizes = (3, 4, 2, 50, 44, 32, 24)
    ends = [(0, 50, 0, 50, 16), (0, 50, 20, 50, 16), (0, 50, 9, 41, 32)]
    blocks_of = [4, 2, 1]
    case = Call(sizes, rank=16, block=13, offset=5)  # of four blocks
    A, B = (t.double() for t in case.bases)
    q, k, v = (t.double().requires_grad_() for t in (case.q, case.k, case.v))
    rows = torch.arange(50)
    block = torch.stack(
        [
            ((rows - first) // size).clamp(0, number - 1)
            for (_, _, first, _, size), number in zip(ends, blocks_of, strict=True)
        ]
    )
    entry = torch.arange(3)[:, None]
    own_A = A.repeat_interleave(2, 1)[entry, :, block].movedim(1, 2)  # (B, H, N, d, r)
    own_B = B.repeat_interleave(2, 1)[entry, :, block].movedim(1, 2)
    Qhat = torch.einsum("bhnd,bhndr->bhnr", q, own_A)
    wide_k, wide_v = (t.repeat_interleave(2, 1) for t in (k, v))
    s = torch.einsum("bhnr,bhmd,bhndr->bhnm", Qhat, wide_k, own_B) * case.options["scale"]
    s = s.masked_fill(torch.arange(44) > rows[:, None] + 5, -math.inf)
    out = s.softmax(-1) @ wide_v
    out.backward(case.grad.double())
    made = [torch.empty_like(t, dtype=torch.float32, device=DEVICE) for t in (q, k, v)]
    given = [
        *(Qhat.detach(), (k.detach()[:, :, None] @ B), v.detach(), None, out.detach()),
        *(s.logsumexp(-1).detach(), case.grad),
    ]
    attention_bwd(
        *(None if t is None else t.to(DEVICE, torch.float32) for t in given),
        **{**case.options, "grouping_block": 1, "bases": tuple(t.to(DEVICE) for t in case.bases)},
        tile=SMALL,
        **dict(zip(("dq", "dk", "dv"), made, strict=True)),
        places=Places(torch.tensor(ends, dtype=torch.int32, device=DEVICE), None, 4, 32),
    )
    for got, wanted in zip(made, (q.grad, k.grad, v.grad), strict=True):
        bound = 8 * torch.finfo(torch.float32).eps * wanted.norm().item()
        assert (got.cpu().double() - wanted).norm().item() <= bound
