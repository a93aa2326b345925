"""The inverse factor of ``projection/solve.py`` against fp64: in the interpreter, or on a GPU."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from distr_compile.kernels.projection.launch import LATER_SHIFT, LEAST, SHIFT, TINY
from distr_compile.kernels.projection.solve import _inverse_factor, block_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _factor_kernel(
    W, S, out, shift, SIZE: tl.constexpr, LEAST: tl.constexpr, TINY: tl.constexpr
):  # fmt: skip
    w = tl.load(block_of(W, 0, 0, SIZE, SIZE, SIZE))
    w = _inverse_factor(w, S, shift, SIZE, LEAST, TINY)
    tl.store(block_of(out, 0, 0, SIZE, SIZE, SIZE), w)


def inverse_factor(W: Tensor, shift: float = SHIFT) -> Tensor:
    size = len(W)
    room, out = torch.full_like(W, torch.nan), torch.empty_like(W)
    _factor_kernel[(1,)](W, room, out, shift, size, LEAST, TINY)
    return out


def drawn(rows: int, size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, size, generator=generator, dtype=torch.float64)


def shifted(W: Tensor, shift: float = SHIFT) -> Tensor:
    """What is factored, in fp64: ``shift`` of each entry of the diagonal is added to it."""
    return W.double() + shift * W.double().diagonal().diag()


@pytest.mark.parametrize("shift", [SHIFT, LATER_SHIFT])
@pytest.mark.parametrize("size", [16, 32, 64])
def test_inverse_factor(size: int, shift: float) -> None:
    X = drawn(100, size) * torch.logspace(-6, 6, size, dtype=torch.float64)
    W = (X.T @ X).float().to(DEVICE)
    E = inverse_factor(W, shift).double()
    L = torch.linalg.cholesky(shifted(W, shift))
    want = torch.linalg.inv(L)
    assert not E.triu(1).any()
    assert ((E - want).norm(dim=1) <= 2e-5 * want.norm(dim=1)).all()


@pytest.mark.parametrize("numbers", ["drawn", "equal"])
@pytest.mark.parametrize("size", [16, 64])
def test_where_columns_are_alike_the_factor_stays_within_its_bound(size: int, numbers: str) -> None:
    """W of rank 1: rounding is all there is beside the shift."""
    column = drawn(1, size) if numbers == "drawn" else torch.full((1, size), 3.0).double()
    W = (column.T @ column).float().to(DEVICE)
    E = inverse_factor(W).double()
    wrong = E @ shifted(W) @ E.T - torch.eye(size, device=DEVICE)
    # Rounding of size 2^-24 times the condition of W, and a few of these.
    assert E.isfinite().all()
    assert wrong.abs().max() <= 16 * size * 2.0**-24 / SHIFT
    scaled = E * W.double().diagonal().sqrt()
    assert torch.linalg.matrix_norm(scaled, 2) <= 1.5 * SHIFT**-0.5


def test_columns_of_zero_stay_by_themselves() -> None:
    X = drawn(40, 32)
    X[:, [0, 5, 31]] = 0
    W = (X.T @ X).float().to(DEVICE)
    E = inverse_factor(W)
    assert E.isfinite().all()
    kept = [i for i in range(32) if i not in (0, 5, 31)]
    want = torch.linalg.inv(torch.linalg.cholesky(shifted(W)[kept][:, kept]))
    assert (E.double()[kept][:, kept] - want).abs().max() <= 1e-5 * want.abs().max()
    off = E - E.diagonal().diag()
    assert not off[[0, 5, 31]].any()
    assert not off[:, [0, 5, 31]].any()
