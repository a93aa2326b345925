"""The small algebra of ``projection`` in the arithmetic of tensor cores: which way bears what.

    python -m benchmarks.solve_conditioning [--json FILE] [--only inputs|layers] [--trials 8]

``kernels/projection/solve.py`` orthonormalises X = Ck Cq X0 without Householder's QR. Here are ways
to do that, each in fp32 with the products that ``tf32x3`` makes of it: numbers are cut into two of
11 bits, products of eight are added exactly and the sum is cut off to fp32, as tensor cores are
known to do. Compared is the error of the scores Q A B^T K^T, relative to Q K^T in fp64.

- ``Gram-Schmidt``: panels of 16 columns, twice, and once in the product of Cq (until this script).
- ``Cholesky``: Cholesky-QR of 64 columns, twice, and once in the product of Cq; shifts of 2^-18,
  2^-20, 2^-20. What the kernel does. Others are this with other shifts, or but once (``one``).
- ``Newton-Schulz``: X (1.5 I - 0.5 X^T X), 16 times, and Cholesky in the product of Cq.

``in fp16`` has Q A and K B rounded to fp16 as they are for fp16 inputs. On inputs whose scores have
no more than r directions the error of exact arithmetic is 0 and what is left is rounding.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from benchmarks.error_inputs import DRAWS, draw
from benchmarks.error_models import layers_of_zoo
from benchmarks.store import commit
from distr_compile.kernels.projection import reference
from distr_compile.kernels.projection.launch import LATER_SHIFT, LEAST, LOST, SHIFT, TINY
from distr_compile.kernels.random import start_columns
from tests.zoo import ZOO

Product = Callable[[Tensor, Tensor], Tensor]
Bases = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(Cq, Ck, X0) -> A, B"""

PANEL, BLOCK = 16, 64
TOKENS = 256
ROUNDING = 1e-4
"""Errors below it are mostly rounding of fp32; that of Q A and K B to fp16 is above it."""


# --- arithmetic ----------------------------------------------------------------------------------


def tf32(x: Tensor) -> Tensor:
    """fp32 numbers rounded to 11 bits, as the kernel does."""
    return ((x.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


def cut(x: Tensor) -> Tensor:
    """fp64 numbers as fp32, towards 0."""
    rounded = x.float()
    over = rounded.double().abs() > x.abs()
    return torch.where(over, torch.nextafter(rounded, torch.zeros_like(rounded)), rounded)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b by three products of tf32 numbers."""
    a_high, b_high = tf32(a), tf32(b)
    a_low, b_low = tf32(a - a_high), tf32(b - b_high)
    sums = a.new_zeros(*a.shape[:-1], b.shape[-1])
    for x, y in ((a_low, b_high), (a_high, b_low), (a_high, b_high)):
        for k in range(0, a.shape[-1], 8):
            part = x[..., k : k + 8].double() @ y[..., k : k + 8, :].double()
            sums = cut(sums.double() + part)
    return sums


# --- ways to orthonormalise ----------------------------------------------------------------------


def gram_schmidt(X: Tensor) -> Tensor:
    """Panels of columns, each twice; columns of 0 stay 0."""
    X = X.clone()
    for first in range(0, X.shape[-1], PANEL):
        x = X[..., first : first + PANEL]
        x = x / x.abs().amax(-2, keepdim=True).clamp(min=TINY)
        for _ in range(2):
            for before in range(0, first, PANEL):
                e = X[..., before : before + PANEL]
                x = x - product(e, e.mT @ x)
            for j in range(x.shape[-1]):
                a = x[..., j : j + 1]
                w = (a * x).sum(-2, keepdim=True)
                root = w[..., j : j + 1].clamp(min=TINY).rsqrt()
                left = x - a * root * (w * root)
                x = torch.cat([x[..., :j], a * root, left[..., j + 1 :]], -1)
        X[..., first : first + PANEL] = x
    return X


def gram_schmidt_in_gram(X: Tensor, Y: Tensor) -> Tensor:
    """X with X^T C X = I, for Y = C X."""
    X, Y = X.clone(), Y.clone()
    for first in range(0, X.shape[-1], PANEL):
        panel = slice(first, first + PANEL)
        x, y = X[..., panel], Y[..., panel]
        for before in range(0, first, PANEL):
            e, f = X[..., before : before + PANEL], Y[..., before : before + PANEL]
            w = f.mT @ x
            x, y = x - product(e, w), y - product(f, w)
        for j in range(x.shape[-1]):
            a, b = x[..., j : j + 1], y[..., j : j + 1]
            w = (b * x).sum(-2, keepdim=True)
            root = w[..., j : j + 1].clamp(min=2.0**-20).rsqrt()
            a, b, w = a * root, b * root, w * root
            x = torch.cat([x[..., :j], a, (x - a * w)[..., j + 1 :]], -1)
            y = torch.cat([y[..., :j], b, (y - b * w)[..., j + 1 :]], -1)
        X[..., panel], Y[..., panel] = x, y
    return X


def inverse_factor(W: Tensor, shift: float) -> Tensor:
    """L^-1 of W, scaled to a diagonal of 1, and the shift; rows of 0 where rounding ate a pivot."""
    scale = W.diagonal(dim1=-2, dim2=-1).clamp(min=TINY).rsqrt()
    W = W * scale[..., None] * scale[..., None, :] + shift * torch.eye(W.shape[-1])
    E, row = torch.diag_embed(scale), torch.arange(W.shape[-1])
    for j in range(W.shape[-1]):
        pivot = W[..., j, j]
        root = torch.where(pivot > LEAST, pivot.clamp(min=LEAST).rsqrt(), 0)[..., None]
        column = torch.where(row > j, W[..., :, j] * root, 0)
        e = E[..., j, :] * root
        below = E - column[..., :, None] * e[..., None, :]
        E = torch.where((row == j)[:, None], e[..., None, :], below)
        W = W - column[..., :, None] * column[..., None, :]
    return E


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """a b by fp64 numbers, to see what tensor cores cost."""
    return (a.double() @ b.double()).float()


def cholesky(
    X: Tensor, shift: float, C: Tensor | None = None, product: Product = product
) -> tuple[Tensor, Tensor]:
    """X with X^T X = I, or with X^T C X = I; and C X."""
    X, Y = X.clone(), torch.zeros_like(X)
    for first in range(0, X.shape[-1], BLOCK):
        block = slice(first, first + BLOCK)
        x = X[..., block]
        square = x.square().sum(-2, keepdim=True)
        for before in range(0, first, BLOCK):
            e = slice(before, before + BLOCK)
            w = product((X if C is None else Y)[..., e].mT, x)
            x = x - product(X[..., e], w)
        if first:
            x = torch.where(x.square().sum(-2, keepdim=True) > LOST * square, x, 0)
        y = x if C is None else product(C, x)
        E = inverse_factor(product(x.mT, y), shift)
        X[..., block], Y[..., block] = product(x, E.mT), product(y, E.mT)
    return X, Y


# --- bases ---------------------------------------------------------------------------------------


def start(Cq: Tensor, Ck: Tensor, X0: Tensor) -> Tensor:
    return product(Ck, product(Cq, X0))


def polished(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    P = 1.5 * torch.eye(A.shape[-1]) - 0.5 * product(A.mT, B)
    return product(A, P), product(B, P)


def by_gram_schmidt(Cq: Tensor, Ck: Tensor, X0: Tensor) -> tuple[Tensor, Tensor]:
    X = gram_schmidt(start(Cq, Ck, X0))
    A = gram_schmidt_in_gram(X, product(Cq, X))
    return polished(A, product(Cq, A))


def by_cholesky(
    Cq: Tensor,
    Ck: Tensor,
    X0: Tensor,
    shifts: tuple[float, ...] = (SHIFT, LATER_SHIFT, 0.0),
    product: Product = product,
) -> tuple[Tensor, Tensor]:
    """One shift a time, the last of them in the product of Cq; ``product`` is that of each time."""
    X = start(Cq, Ck, X0)
    for shift in shifts[:-1]:
        X, _ = cholesky(X, shift, product=product)
    return polished(*cholesky(X, shifts[-1], Cq, product))


def by_newton_schulz(Cq: Tensor, Ck: Tensor, X0: Tensor, steps: int = 16) -> tuple[Tensor, Tensor]:
    X = start(Cq, Ck, X0)
    X = X / X.square().sum((-2, -1), keepdim=True).sqrt().clamp(min=TINY)
    for _ in range(steps):
        X = product(X, 1.5 * torch.eye(X.shape[-1]) - 0.5 * product(X.mT, X))
    return polished(*cholesky(X, 0.0, Cq))


BEFORE, CHOSEN = "Gram-Schmidt", "Cholesky"
WAYS: dict[str, Bases] = {
    BEFORE: by_gram_schmidt,
    CHOSEN: by_cholesky,
    "18 20 20": partial(by_cholesky, shifts=(2.0**-18, 2.0**-20, 2.0**-20)),
    "18 18 18": partial(by_cholesky, shifts=(2.0**-18,) * 3),
    "20 20 0": partial(by_cholesky, shifts=(2.0**-20, 2.0**-20, 0.0)),
    "16 20 0": partial(by_cholesky, shifts=(2.0**-16, 2.0**-20, 0.0)),
    "one": partial(by_cholesky, shifts=(SHIFT, 0.0)),
    "four": partial(by_cholesky, shifts=(SHIFT, LATER_SHIFT, 0.0, 0.0)),
    "exact products": partial(by_cholesky, product=exact_product),
    "Newton-Schulz": by_newton_schulz,
}


# --- what is measured ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Q and K, ``(trials, N, d)`` and ``(trials, M, d)`` fp64."""

    name: str
    Q: Tensor
    K: Tensor


def edge_inputs(d: int, trials: int) -> Iterator[Case]:
    """Inputs that are hard to divide by."""
    g = torch.Generator().manual_seed(d)
    Q, K = torch.randn(2, trials, TOKENS, d, generator=g, dtype=torch.float64)
    low = torch.randn(d, d // 3, generator=g, dtype=torch.float64)
    low = low @ torch.randn(d // 3, d, generator=g, dtype=torch.float64) / d
    turned = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64)).Q
    sizes = torch.logspace(-4, 4, d, dtype=torch.float64)
    yield Case("rank d / 3 of Q", Q @ low, K)
    yield Case("rank d / 3 of K", Q, K @ low)
    yield Case("scales 1e4, 1e-4", Q * 1e4, K * 1e-4)
    yield Case("columns 1e-4 to 1e4", Q * sizes, K)
    yield Case("columns, both", Q * sizes, K * sizes.flip(0))
    yield Case(
        "directions 1 to 1e-4", Q * sizes[: d // 2].repeat_interleave(2) @ turned, K @ turned
    )
    decay = torch.logspace(0, -4, d, dtype=torch.float64)
    yield Case("directions, both", Q * decay @ turned, K * decay @ turned)
    yield Case("constant Q", Q[:, :1].expand_as(Q), K)
    yield Case("constant K", Q, K[:, :1].expand_as(K))
    yield Case("all numbers alike", torch.full_like(Q, 3.0), torch.full_like(K, 3.0))
    yield Case("zero Q", Q * 0, K)
    yield Case("zero K", Q, K * 0)
    yield Case("both zero", Q * 0, K * 0)
    for name in DRAWS:
        drawn = draw(name, trials=trials, tokens=TOKENS, head_dim=d)
        yield Case(name, drawn.Q[:, 0], drawn.K[:, 0])


def errors(case: Case, rank: int, way: Bases) -> tuple[Tensor, Tensor]:
    """Errors of the scores of each trial, plain and with Q A and K B rounded to fp16."""
    Q, K = case.Q, case.K
    Cq, _ = reference.gram(Q.float(), None, ridge=reference.RIDGE)
    Ck, _ = reference.gram(K.float(), None, ridge=0)
    X0 = start_columns(Q.shape[-1], rank, seed=0).float() / 64
    A, B = way(Cq, Ck, X0.expand(len(Q), -1, -1))
    S, Qhat, Khat = Q @ K.mT, Q @ A.double(), K @ B.double()
    size = S.square().sum((-2, -1)).sqrt()
    found = []
    for left, right in ((Qhat, Khat), (as_fp16(Qhat), as_fp16(Khat))):
        wrong = (left @ right.mT - S).square().sum((-2, -1)).sqrt()
        found.append(torch.where(size > 0, wrong / size, wrong))
    return found[0], found[1]


def as_fp16(x: Tensor) -> Tensor:
    """Rounded to fp16 after a power of two has been taken out."""
    unit = reference.power_of_two(x.abs().amax((-2, -1), keepdim=True)) / 256
    return (x / unit).half().double() * unit


def rows_of(cases: Iterator[Case], ranks: list[int], of: str) -> Iterator[dict[str, Any]]:
    """A row a case and rank: mean errors of each way."""
    for case in cases:
        for rank in ranks:
            in_fp16: dict[str, float] = {}
            row: dict[str, Any] = {"of": of, "case": case.name, "d": case.Q.shape[-1], "r": rank}
            for name, way in WAYS.items():
                plain, rounded = (e.mean().item() for e in errors(case, rank, way))
                row[name] = float(f"{plain:.3g}")
                if name in (BEFORE, CHOSEN):
                    in_fp16[name] = rounded
            grown = in_fp16[CHOSEN] / in_fp16[BEFORE] if in_fp16[BEFORE] else 1 + in_fp16[CHOSEN]
            row["grown in fp16"] = round(grown, 3)
            print(line_of(row), flush=True)
            yield row


def layer_rows(models: list[str], examples: int) -> Iterator[dict[str, Any]]:
    """Every layer of some models of the zoo, G = 2 and 4."""
    for model in models:
        head_dim, layers = layers_of_zoo(model, examples)
        ranks = [head_dim // G for G in (2, 4) if head_dim // G >= 16]
        for number, layer in enumerate(layers):
            rep = layer.Q.shape[1] // layer.K.shape[1]
            K = layer.K.expand(len(layer.Q), -1, -1, -1).repeat_interleave(rep, 1)
            case = Case(f"{model} {number}", layer.Q.flatten(0, 1), K.flatten(0, 1))
            yield from rows_of(iter([case]), ranks, "layer")


def line_of(row: dict[str, Any]) -> str:
    figures = " ".join(f"{row[name]:.2e}" for name in WAYS)
    return f"{row['case']:24} {row['d']:4} {row['r']:4} {figures}  x {row['grown in fp16']:.3f}"


def growth(row: dict[str, Any], way: str) -> float:
    """Of the error by a way over Gram-Schmidt's; of 0 from 0 it is 1."""
    before, now = row[BEFORE], row[way]
    return now / before if before else 1 + now


def summary(rows: list[dict[str, Any]]) -> str:
    """The worst growth of each way, of all errors and of those that are more than rounding."""
    large = [row for row in rows if row[BEFORE] > ROUNDING]
    lines = [
        [way, *(max(growth(row, way) for row in some) for some in (large, rows)),
         sum(growth(row, way) > 1.1 for row in rows),
         sum(not math.isfinite(row[way]) for row in rows)]
        for way in WAYS
    ]  # fmt: skip
    headers = [
        "way",
        f"worst growth above {ROUNDING}",
        "of all",
        "errors that grow by > 10 %",
        "not finite",
    ]
    worst = max(row["grown in fp16"] for row in rows)
    return f"{tabulate(lines, headers)}\nworst growth of {CHOSEN} in fp16: {worst:.3f}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=("inputs", "layers"))
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--examples", type=int, default=2, help="of each model's data")
    parser.add_argument("--models", nargs="+", choices=list(ZOO), default=list(ZOO))
    options = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    if options.only != "layers":
        for d, ranks in ((64, [32, 16]), (128, [64, 32]), (256, [128])):
            trials = options.trials if d < 256 else max(1, options.trials // 4)
            rows += rows_of(edge_inputs(d, trials), ranks, "inputs")
    if options.only != "inputs":
        rows += layer_rows(options.models, options.examples)
    print(summary(rows))
    if options.json:
        told = {"torch": torch.__version__, "commit": commit(), "rows": rows}
        options.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
