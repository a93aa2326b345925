"""What attention takes: seconds on the device at hand, or floating-point operations counted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distr_compile.accuracy.instrument import Site
from distr_compile.estimators import ESTIMATORS
from distr_compile.lowering.architecture import architecture
from distr_compile.lowering.call import Approximation, Scores, Shape, op_arguments
from distr_compile.lowering.dispatch import best_sdpa
from distr_compile.passes.decide import decide_bare
from distr_compile.policy import LayerPlan

_OP = torch.ops.distr.attention.default

WAYS = ("auto", "measure", "model", "products")

SECONDS = 0.1
"""Least time that one call is measured for."""

Cost = Callable[[Shape, LayerPlan | None], float]
"""Of one call with a plan; None is exact attention."""


@dataclass(frozen=True)
class Clock:
    """How costs are found.

    Attributes:
        unit: "s" or "FLOP".
        about: in words, for people who read a policy.
        cost: of one call.
    """

    unit: str
    about: str
    cost: Cost

    def of_sites(self, sites: Iterable[Site], plan: LayerPlan | None, label: str = "") -> float:
        """Of all calls of some attentions.

        Args:
            sites: with the calls that were made.
            plan: of their layer; None for exact attention.
            label: the plan's name among the candidates; where a site refused it, it is exact.
        """
        total = []
        for site in sites:
            here = plan if label in site.possible else None
            total += [count * self.cost(shape, here) for shape, count in site.calls.items()]
        return math.fsum(total)


def clock(time: str, device: torch.device) -> Clock:
    """The clock that ``time`` names.

    Args:
        time: "measure": the op and SDPA are timed at the shapes of the calls, on the device of the
            model. "model": operations are counted, those of the estimator included. "products":
            those of the two products alone, which is what is left of "model" when sequences become
            long. "auto": "measure" on CUDA, else "model".
        device: of the model.

    Raises:
        ValueError: another word.
    """
    if time not in WAYS:
        raise ValueError(f"time: got {time!r}; accepted: {', '.join(map(repr, WAYS))}")
    if time == "auto":
        time = "measure" if device.type == "cuda" else "model"
    if time == "measure":
        name = architecture(device) if device.type == "cuda" else device.type
        return Clock("s", f"measured on {name}", _remembered(seconds))
    if time == "products":
        return Clock("FLOP", "operations of Q K^T and of weights times V, counted", products)
    about = "operations of attention, estimators included, counted; no time was measured"
    if device.type == "cpu":
        about += "; on a CPU hardly anything is faster"
    return Clock("FLOP", about, flops)


# --- counted ------------------------------------------------------------------------------------


def products(shape: Shape, plan: LayerPlan | None) -> float:
    """FLOPs of Qhat Khat^T and of the weights times V, of the scores that causality leaves."""
    return _products(shape, _approximation(shape, plan))


def flops(shape: Shape, plan: LayerPlan | None) -> float:
    """``products``, and what making Qhat and Khat takes: ``Estimator.cost``."""
    approximation = _approximation(shape, plan)
    if approximation is None:
        return _products(shape, None)
    estimator = ESTIMATORS[approximation.estimator]
    cost = (estimator.prefix_cost if approximation.strict else None) or estimator.cost
    made = cost(
        num_queries=shape.num_queries,
        num_keys=shape.num_keys,
        head_dim=shape.head_dim,
        rank=approximation.rank,
        block=approximation.block_of(shape.num_queries),
        rounds=approximation.rounds,
        rep=shape.num_heads // shape.num_key_heads,
    )
    return _products(shape, approximation) + shape.batch * shape.num_key_heads * made.flops


def _approximation(shape: Shape, plan: LayerPlan | None) -> Approximation | None:
    return None if plan is None else decide_bare(shape, plan)


def _products(shape: Shape, approximation: Approximation | None) -> float:
    rank = shape.head_dim if approximation is None else approximation.rank
    N, M = shape.num_queries, shape.num_keys
    # Row i sees min(i + 1, M) keys.
    seen = min(N, M)
    pairs = seen * (seen + 1) // 2 + (N - seen) * M if shape.is_causal else N * M
    return 2.0 * shape.batch * shape.num_heads * pairs * (rank + shape.value_dim)


# --- measured -----------------------------------------------------------------------------------


def seconds(shape: Shape, plan: LayerPlan | None) -> float:
    """Median time of one call on random numbers; exact attention is the device's best SDPA.

    A mask is all True, or zeros. Sinks and soft caps are left out.
    """
    from torch.utils.benchmark import Timer

    approximation = _approximation(shape, plan)
    with torch.no_grad():
        q, k, v, mask = _inputs(shape)
        scale = 1 / math.sqrt(shape.head_dim)
        if approximation is None:
            best = best_sdpa(shape.device) if shape.device.type == "cuda" else nullcontext()

            def run() -> Any:
                return F.scaled_dot_product_attention(
                    q,
                    k,
                    v,
                    mask,
                    is_causal=shape.is_causal and mask is None,
                    scale=scale,
                    enable_gqa=shape.num_heads != shape.num_key_heads,
                )
        else:
            best = nullcontext()
            arguments = op_arguments(approximation, Scores(scale, shape.is_causal))
            bases = _bases(shape, approximation)

            def run() -> Any:
                return _OP(q, k, v, mask, *bases, **arguments)

        with best:
            run()
            timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
            return float(timer.blocked_autorange(min_run_time=SECONDS).median)


def _inputs(shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    def draw(heads: int, tokens: int, width: int) -> Tensor:
        sizes = (shape.batch, heads, tokens, width)
        return torch.randn(sizes, device=shape.device).to(shape.dtype)

    q = draw(shape.num_heads, shape.num_queries, shape.head_dim)
    k = draw(shape.num_key_heads, shape.num_keys, shape.head_dim)
    v = draw(shape.num_key_heads, shape.num_keys, shape.value_dim)
    mask = None
    if shape.mask is not None:
        sizes, dtype = shape.mask
        fill = torch.ones if dtype == torch.bool else torch.zeros
        mask = fill(sizes, dtype=dtype, device=shape.device)
    return q, k, v, mask


def _bases(shape: Shape, approximation: Approximation) -> tuple[Tensor, ...]:
    if ESTIMATORS[approximation.estimator].needs != "bases":
        return ()
    sizes = (shape.num_key_heads, shape.head_dim, approximation.rank)
    A, B = (torch.randn(sizes, device=shape.device) / math.sqrt(shape.head_dim) for _ in "AB")
    return A, B


def _remembered(cost: Cost) -> Cost:
    """Layers share shapes: each is measured once."""
    known: dict[tuple[Shape, LayerPlan | None], float] = {}

    def remembered(shape: Shape, plan: LayerPlan | None) -> float:
        key = (shape, plan)
        if key not in known:
            known[key] = cost(shape, plan)
        return known[key]

    return remembered
