"""What padding changes: rows of a sequence alone, and in a padded batch.

    python -m benchmarks.padding [--tokens 4096] [--causal | --cross] [--dtype float32]

Random Q, K and V; the mask says which keys count and the op is called as a compiled model calls it,
``min_seq_len = 0``. For each estimator the greatest relative difference (norm of the difference
over norm of the output, real rows only) over the lengths, with padding on the right and on the
left, and the difference of an approximated row from the exact one, to hold it against. ``--cross``:
queries are padded and keys are not, as in cross-attention, so that no mask says which rows are.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

import distr_compile.ops  # noqa: F401
from distr_compile.estimators import ESTIMATORS

LENGTHS = (20, 100, 300, 512, 600, 1000, 2000, 3000, 4000, 4096)
HEADS, WIDTH, RANK = 2, 64, 32
SIDES = ("right", "left")


def arms(causal: bool) -> dict[str, dict[str, Any]]:
    """Options of the op by the name of a row, each block as "auto" takes it."""
    found = {name: {"estimator": name} for name in ESTIMATORS}
    found["projection, block 128"] = {"estimator": "projection", "grouping_block": 128}
    found["lsh-mean, block 128"] = {"estimator": "lsh-mean", "grouping_block": 128}
    if causal:
        found["projection, strict"] = {"estimator": "projection", "strict": True}
    return found


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    """A call of the op at rank ``RANK``, or exactly."""
    options = {"rank": RANK, "grouping_block": 0, **options}
    bases: tuple[Tensor, ...] = ()
    if options["estimator"] == "calibrated":
        generator = torch.Generator().manual_seed(9)
        bases = tuple(torch.randn(HEADS, WIDTH, RANK, generator=generator) / 6 for _ in "AB")
    scale = WIDTH**-0.5
    out: Tensor = torch.ops.distr.attention(q, k, v, mask, *bases, scale=scale, **options)
    return out


def difference(
    length: int, tokens: int, side: str, form: str, dtype: torch.dtype, options: dict[str, Any]
) -> float:
    """Of a sequence's rows, alone and padded to ``tokens``."""
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(1, HEADS, tokens, WIDTH, generator=generator).to(dtype) for _ in "qkv")
    real = slice(0, length) if side == "right" else slice(tokens - length, tokens)
    mask = torch.zeros(1, 1, 1, tokens, dtype=torch.bool)
    mask[..., real] = True
    if form == "cross":
        k, v = (t[:, :, : tokens // 2] for t in (k, v))
        alone = attention(q[:, :, real], k, v, None, **options)
        padded = attention(q, k, v, None, **options)[:, :, real]
        return ((padded - alone).float().norm() / alone.float().norm()).item()
    causal = form == "causal"
    if causal:
        mask = mask & torch.ones(tokens, tokens, dtype=torch.bool).tril()
    own = (t[:, :, real] for t in (q, k, v))
    alone = attention(*own, None, is_causal=causal, **options)
    padded = attention(q, k, v, mask, **options)[:, :, real]
    return ((padded - alone).float().norm() / alone.float().norm()).item()


def error(length: int, options: dict[str, Any]) -> float:
    """Of the approximation, over a sequence that is not padded."""
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(1, HEADS, length, WIDTH, generator=generator) for _ in "qkv")
    exact = attention(q, k, v, None, estimator="projection", rank=WIDTH)
    return ((attention(q, k, v, None, **options) - exact).norm() / exact.norm()).item()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096, help="length after padding")
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument("--causal", action="store_true", help="with a causal mask as well")
    forms.add_argument("--cross", action="store_true", help="keys are not padded")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    args = parser.parse_args()
    lengths, dtype = [n for n in LENGTHS if n <= args.tokens], getattr(torch, args.dtype)
    form = "causal" if args.causal else "cross" if args.cross else ""
    rows = []
    for name, options in arms(args.causal).items():
        worst = []
        for side in SIDES:
            found = {n: difference(n, args.tokens, side, form, dtype, options) for n in lengths}
            at = max(found, key=lambda n: found[n])
            worst.append(f"{found[at]:.1e} (at {at})")
        rows.append([name, *worst, f"{error(1000, options):.2f}"])
    titles = ["estimator", *(f"padded on the {side}" for side in SIDES), "error of approximating"]
    print(f"{args.tokens} rows, {args.dtype} {form}\n")
    print(tabulate(rows, titles, tablefmt="pipe", disable_numparse=True))


if __name__ == "__main__":
    main()
