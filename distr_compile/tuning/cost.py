"""What attention takes: seconds on the device at hand, or floating-point operations counted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from distr_compile.accuracy.instrument import Site
from distr_compile.estimators import ESTIMATORS
from distr_compile.lowering.architecture import architecture
from distr_compile.lowering.call import Approximation, Shape
from distr_compile.lowering.judge import Judge
from distr_compile.lowering.measure import DISTR, Measured, race
from distr_compile.lowering.spelling import spelled
from distr_compile.passes.decide import decide_bare
from distr_compile.policy import LayerPlan

WAYS = ("measure", "model", "products")

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
        """The cost of all calls of some attentions.

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
        time: "measure": attention is timed at the shapes of the calls, on the device of the model,
            once a machine: what ``min_seq_len = "auto"`` has measured counts, and the other way.
            "model": operations are counted, those of the estimator included. "products": those of
            the two products alone, which is what is left of "model" when sequences become long.
        device: of the model.

    Raises:
        ValueError: another word.
    """
    if time not in WAYS:
        raise ValueError(f"time: got {time!r}; accepted: {', '.join(map(repr, WAYS))}")
    if time == "measure":
        name = architecture(device) if device.type == "cuda" else device.type
        return Clock("s", f"measured on {name}", _remembered(seconds))
    if time == "products":
        return Clock("FLOP", "operations of Q K^T and of weights times V, counted", products)
    about = "operations of attention, estimators included, counted; no time was measured"
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

_WITHOUT_LIMIT = Judge(call_limit=None, limit=None)


def seconds(shape: Shape, plan: LayerPlan | None) -> float:
    """The time of one call, as "auto" measures and keeps it; exact attention is the faster of both.

    Raises:
        RuntimeError: it cannot be measured here.
    """
    found = _measured(shape, _approximation(shape, plan)).seconds
    if DISTR in found:
        return found[DISTR]
    if not found:  # nothing of ours computes it: the op hands on to SDPA
        alone = race(shape)
        found = {} if isinstance(alone, str) else dict(alone.seconds)
    return min(found.values())


def _measured(shape: Shape, approximation: Approximation | None) -> Measured:
    found = _WITHOUT_LIMIT(shape, approximation)
    if isinstance(found, str):
        raise RuntimeError(
            f'time: got "measure", but {found} ({spelled(shape, approximation)}); accepted: '
            '"measure", "model", "products": take "model", which counts operations'
        )
    return found


def _remembered(cost: Cost) -> Cost:
    """Layers share shapes: each is measured once."""
    known: dict[tuple[Shape, LayerPlan | None], float] = {}

    def remembered(shape: Shape, plan: LayerPlan | None) -> float:
        key = (shape, plan)
        if key not in known:
            known[key] = cost(shape, plan)
        return known[key]

    return remembered
