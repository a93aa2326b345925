"""Per site: approximate or stay exact, with every reason that speaks for exact.

What a plan comes to at a site, or at the bare shape of a call, is one value, made here only: the
:class:`.call.Approximation`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from distr_compile.estimators import (
    ESTIMATORS,
    MIN_QUERIES,
    MIN_RANK,
    auto_grouping_block,
    possible_group_sizes,
)
from distr_compile.lowering import exactly
from distr_compile.lowering.call import Approximation, Shape
from distr_compile.lowering.checkpointed import is_recomputed
from distr_compile.passes.site import AttentionSite, count
from distr_compile.passes.steps import AddStep, FillStep
from distr_compile.passes.vocabulary import same_size, shape_of
from distr_compile.policy import LayerPlan
from distr_compile.reporting import Reason

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Decision:
    """What becomes of one site.

    Attributes:
        reasons: every reason for exact; empty where it is approximated.
        rank: columns left of Q and K; 0 where the head width is not known.
        min_seq_len: the op itself decides below this length, where sizes are symbolic; else 0.
        plan: what the policy said.
        strict: the estimator takes its prefix form, which sees no later rows.
    """

    reasons: tuple[Reason, ...]
    rank: int
    min_seq_len: int
    plan: LayerPlan
    strict: bool = False

    @property
    def is_distr(self) -> bool:
        """Whether the site is approximated."""
        return len(self.reasons) == 0  # Dynamo, which traces this, knows no `not` of a tuple

    @property
    def approximation(self) -> Approximation:
        """What the op is told where the site is approximated."""
        return _approximation(self.plan, self.rank, self.strict)

    def columns(self, head_dim: Any) -> dict[str, Any]:
        """What a report's row says of the decision and, if there is one, the approximation."""
        if not self.is_distr:
            return {"decision": "exact", "reasons": self.reasons}
        estimator = ESTIMATORS[self.plan.estimator]
        return {
            "decision": "distr",
            "group_size": head_dim // self.rank if head_dim % self.rank == 0 else None,
            "rank": self.rank,
            "estimator": self.plan.estimator,
            "rounds": self.plan.rounds,
            "sees": estimator.prefix_sees if self.strict else estimator.sees,
            "grouping_block": self.plan.grouping_block,
        }


def decide(site: AttentionSite, plan: LayerPlan, extra: tuple[Reason, ...] = ()) -> Decision:
    """Collect every reason why this site stays exact; approximate it if there is none.

    Args:
        site: from :func:`.match.find`.
        plan: the policy's wishes for the site's layer.
        extra: reasons known to the caller, such as a graph shared by layers with different plans.
    """
    reasons = _reasons(site, plan, extra)
    trained = site.requires_grad or is_recomputed()
    if trained and plan.training == "exact":
        reasons.append(_GRADIENTS)
    elif site.written_later:
        text = "gradients are recorded, and an input or the output is written in place afterwards"
        reasons.append(Reason("in-place-write", text))
    if site.dropout_p and not (trained and plan.training == "approximate"):
        why = 'which is approximated in training that the policy calls "approximate" only'
        reasons.append(Reason("dropout", f"the weights are dropped out, {why}"))
    elif site.dropout_p and exactly.is_computing_exactly():
        why = "by other numbers than the model's, which is checked here"
        reasons.append(Reason("dropout", f"the weights are dropped out, {why}"))
    if site.dtype not in DTYPES:
        accepted = ", ".join(str(d)[6:] for d in DTYPES)
        reasons.append(Reason("dtype", f"dtype is {str(site.dtype)[6:]}; accepted: {accepted}"))
    return _decision(site, plan, reasons, _limit(plan) if site.symbolic_lengths else 0)


def decide_call(shape: Shape, plan: LayerPlan, extra: tuple[Reason, ...] = ()) -> Decision:
    """The same of a call of this shape that is made now, without a graph around it."""
    reasons = _reasons(shape, plan, extra)
    if shape.trained and plan.training == "exact":
        reasons.append(_GRADIENTS)
    return _decision(shape, plan, reasons)


def _decision(
    call: AttentionSite | Shape, plan: LayerPlan, reasons: list[Reason], limit: int = 0
) -> Decision:
    return Decision(
        reasons=tuple(reasons),
        rank=_rank(call, plan),
        min_seq_len=0 if reasons else limit,
        plan=plan,
        strict=not reasons and _takes_prefix_form(call, plan),
    )


def decide_bare(shape: Shape, plan: LayerPlan) -> Approximation | None:
    """What a call of this shape, without a graph around it, is approximated by.

    That the plan fits the width and may stand here at all is for :func:`decide` to say, at the site
    that made the call.

    Returns:
        None where the call is exact, because the plan says so or because of its length.
    """
    rank = _rank(shape, plan)
    if rank == shape.head_dim or shape.num_queries < MIN_QUERIES:
        return None
    if min(shape.num_queries, shape.num_keys) < _limit(plan):
        return None
    return _approximation(plan, rank, _takes_prefix_form(shape, plan))


def _approximation(plan: LayerPlan, rank: int, strict: bool) -> Approximation:
    """The fields of a plan that change what is computed, as the op takes them.

    A new field of this kind is a line here and one in :mod:`.call`; rewriting, tuning and measuring
    go by the value.
    """
    return Approximation(
        estimator=plan.estimator,
        rank=rank,
        block=0 if plan.grouping_block == "auto" else plan.grouping_block,
        rounds=plan.rounds,
        strict=strict,
    )


def _rank(call: AttentionSite | Shape, plan: LayerPlan) -> int:
    """The columns the plan leaves, whether or not that can be; see ``Decision``."""
    if not isinstance(call.head_dim, int):
        return 0
    return plan.rank or call.head_dim // (plan.group_size or 1)


_GRADIENTS = Reason(
    "gradients",
    'gradients are recorded, and the policy says training = "exact": set "approximate", or call '
    "under torch.no_grad()",
)


def _reasons(
    call: AttentionSite | Shape, plan: LayerPlan, extra: tuple[Reason, ...]
) -> list[Reason]:
    """What the policy and the sizes say for exact, and what the caller knows."""
    if plan.is_exact:  # else no length would change anything
        return [Reason("group-size-1", "the policy says group_size = 1"), *extra]
    return [*_policy_reasons(call, plan), *extra, *_size_reasons(call, plan)]


def _policy_reasons(call: AttentionSite | Shape, plan: LayerPlan) -> list[Reason]:
    # Lists, not generators: Dynamo traces this where a model of transformers is compiled.
    found = []
    if not isinstance(call.head_dim, int):
        found.append(Reason("rank", "the head width is not known while compiling"))
    elif fault := rank_fault(call.head_dim, plan):
        found.append(Reason("rank", fault))
    if not _must_not_look_ahead(call, plan):
        return found
    estimator, why = ESTIMATORS[plan.estimator], ""
    if estimator.strict == "never":
        why = f"causal is strict, and {plan.estimator} sees {estimator.sees}"
    elif estimator.strict == "prefix" and not call.is_causal and _may_lack_keys(call):
        why = "causal is strict, and with fewer keys than queries nobody knows which come first"
    if why and not call.is_causal:
        why += '; the mask has a row per query and may be causal; causal = "block" if it is not'
    if why:
        found.append(Reason("looks-ahead", why))
    return found


def _takes_prefix_form(call: AttentionSite | Shape, plan: LayerPlan) -> bool:
    return ESTIMATORS[plan.estimator].strict == "prefix" and _must_not_look_ahead(call, plan)


def _must_not_look_ahead(call: AttentionSite | Shape, plan: LayerPlan) -> bool:
    """Whether the policy forbids a row to depend on later ones here.

    A mask that may be causal has an unknown offset: row i sees keys ``j <= i + offset``. The prefix
    form is told 0, and then approximates keys before a block by keys and rows before it. Row i of
    the block sees all of these itself if the true offset is 0 or more, as with keys in a cache in
    front; what it sees beyond is exact. Only a negative offset, fewer keys than queries aligned at
    the end, would make some of these keys later than the row: see ``_may_lack_keys``.
    """
    return plan.causal == "strict" and (call.is_causal or may_be_causal(call))


def _may_lack_keys(site: AttentionSite | Shape) -> bool:
    queries, keys = site.num_queries, site.num_keys
    if isinstance(queries, int) and isinstance(keys, int):
        return keys < queries
    return not same_size(queries, keys)


def rank_fault(width: int, plan: LayerPlan) -> str | None:
    """Why a width cannot become the rank of the plan, and what it can become."""
    divides = ESTIMATORS[plan.estimator].divides
    if plan.rank is None:
        group_size = plan.group_size or 1
        if width // group_size >= MIN_RANK and not (divides and width % group_size):
            return None
        accepted = f"must leave at least {MIN_RANK} columns: at most {max(width // MIN_RANK, 1)}"
        if divides:
            sizes = ", ".join(map(str, possible_group_sizes(width)))
            accepted = (
                f"must divide the width and leave at least {MIN_RANK} columns: one of {sizes}"
            )
        return f"group_size: got {group_size} for head width {width}; {accepted}"
    if plan.rank < width and not (divides and width % plan.rank):
        return None
    got = f"rank: got {plan.rank} for head width {width}"
    if plan.rank >= width:
        got += ", which is exact attention"
    if width <= MIN_RANK:
        return f"{got}; no rank is less than this width and at least {MIN_RANK}"
    if not divides:
        return f"{got}; must be less than the width: {MIN_RANK} to {width - 1}"
    ranks = [width // size for size in possible_group_sizes(width) if size > 1]
    any_rank = " or ".join(e.name for e in ESTIMATORS.values() if not e.divides)
    one_of = f"one of {', '.join(map(str, ranks))}" if ranks else "none does"
    return (
        f"{got}; with {plan.estimator} it must be less than the width and divide it: {one_of}; "
        f"{any_rank} takes any from {MIN_RANK} to {width - 1}"
    )


def may_be_causal(call: AttentionSite | Shape) -> bool:
    """Whether a mask of unknown content could hide later keys: it has a row for each query."""
    if isinstance(call, Shape):
        shapes: list[tuple[Any, ...]] = [] if call.mask is None else [call.mask[0]]
    elif call.kind in {"mha", "encoder"}:
        return call.mask_kind != "none"  # their masks are merged inside the node
    else:
        shapes = [shape_of(s.tensor) for s in call.steps if isinstance(s, AddStep | FillStep)]
    return any(len(shape) > 1 and not same_size(shape[-2], 1) for shape in shapes)


def _size_reasons(call: AttentionSite | Shape, plan: LayerPlan) -> list[Reason]:
    queries, limit, found = call.num_queries, _limit(plan), []
    if isinstance(queries, int) and queries < MIN_QUERIES:
        text = f"N_q is {queries}; fewer than {MIN_QUERIES} rows are always exact"
        found.append(Reason("decode", text))
    known = [n for n in (queries, call.num_keys) if isinstance(n, int)]
    if known and min(known) < limit:
        text = f"min(N_q, N_k) is {min(known)}, min_seq_len is {limit}"
        found.append(Reason("min-seq-len", text))
    if not isinstance(queries, int) or not _takes_prefix_form(call, plan):
        return found
    block = plan.grouping_block  # the prefix form scores the first exactly: there must be a second
    if block == "auto":
        block = auto_grouping_block(queries, plan.estimator, strict=True)
    if queries <= block:
        text = f"causal is strict, and N_q is {queries}: the first {block} rows are exact"
        found.append(Reason("one-block", text))
    return found


def _limit(plan: LayerPlan) -> int:
    """The least length to approximate at; of "auto", who rewrites asks how fast it is."""
    return 0 if plan.min_seq_len == "auto" else plan.min_seq_len


def flops(site: AttentionSite | Shape) -> int:
    """FLOPs of the exact attention, 2 B H N_q N_k (d + d_v); symbolic sizes by their hints."""
    scores = count((site.batch, site.num_heads, site.num_queries, site.num_keys))
    return 2 * scores * (count((site.head_dim,)) + count((site.value_dim,)))
