"""Per site: approximate or stay exact, with every reason that speaks for exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from distr_compile.estimators import MIN_QUERIES, MIN_RANK, possible_group_sizes
from distr_compile.lowering.architecture import architecture
from distr_compile.lowering.dispatch import break_even
from distr_compile.passes.site import AttentionSite
from distr_compile.passes.vocabulary import hint
from distr_compile.policy import LayerPlan
from distr_compile.reporting import Reason

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Decision:
    """What becomes of one site.

    Attributes:
        decision: ``"distr"`` or ``"exact"``.
        reasons: every reason for exact; empty for distr.
        rank: columns left of Q and K (d / group_size).
        min_seq_len: the op itself decides below this length, where sizes are symbolic; else 0.
        plan: what the policy said.
    """

    decision: Literal["distr", "exact"]
    reasons: tuple[Reason, ...]
    rank: int
    min_seq_len: int
    plan: LayerPlan

    @property
    def is_distr(self) -> bool:
        """Whether the site is approximated."""
        return self.decision == "distr"


def decide(
    site: AttentionSite, plan: LayerPlan, extra: tuple[Reason, ...] = (), grad_mode: bool = False
) -> Decision:
    """Collect every reason why this site stays exact; approximate it if there is none.

    Args:
        site: from :func:`.match.find`.
        plan: the policy's wishes for the site's layer.
        extra: reasons known to the caller, such as a graph shared by layers with different plans.
        grad_mode: whether autograd records.
    """
    reasons = [*_policy_reasons(site, plan), *extra]
    if not plan.is_exact:  # else no length would change anything
        reasons += _size_reasons(site, plan)
    if grad_mode and site.requires_grad:
        reasons.append(Reason("gradients", "gradients are recorded: call under torch.no_grad()"))
    if site.dtype not in DTYPES:
        accepted = ", ".join(str(d)[6:] for d in DTYPES)
        reasons.append(Reason("dtype", f"dtype is {str(site.dtype)[6:]}; accepted: {accepted}"))
    width = site.head_dim if isinstance(site.head_dim, int) else 0
    return Decision(
        decision="exact" if reasons else "distr",
        reasons=tuple(reasons),
        rank=width // plan.group_size,
        min_seq_len=0 if reasons else _run_time_limit(site, plan),
        plan=plan,
    )


def _policy_reasons(site: AttentionSite, plan: LayerPlan) -> list[Reason]:
    if plan.is_exact:
        return [Reason("group-size-1", "the policy says group_size = 1")]
    width, group_size = site.head_dim, plan.group_size
    if not isinstance(width, int):
        return [Reason("rank", "the head width is not known while compiling")]
    if width % group_size or width // group_size < MIN_RANK:
        sizes = ", ".join(map(str, possible_group_sizes(width)))
        why = f"must divide the width and leave at least {MIN_RANK} columns: one of {sizes}"
        return [Reason("rank", f"group_size: got {group_size} for head width {width}; {why}")]
    return []


def _size_reasons(site: AttentionSite, plan: LayerPlan) -> list[Reason]:
    reasons = []
    queries, keys = site.num_queries, site.num_keys
    if isinstance(queries, int) and queries < MIN_QUERIES:
        reasons.append(
            Reason("decode", f"N_q is {queries}; fewer than {MIN_QUERIES} rows are always exact")
        )
    limit, source = _limit(site, plan)
    if limit is None:
        reasons.append(Reason("not-faster", f"min_seq_len is auto: {source}; 0 forces it"))
        return reasons
    known = [n for n in (queries, keys) if isinstance(n, int)]
    if known and min(known) < limit:
        text = f"min(N_q, N_k) is {min(known)}, min_seq_len is {limit}{source}"
        reasons.append(Reason("min-seq-len", text))
    return reasons


def _limit(site: AttentionSite, plan: LayerPlan) -> tuple[int | None, str]:
    """The least length to approximate at, None for no length, and what that is known from."""
    if plan.min_seq_len != "auto":
        return plan.min_seq_len, ""
    width, dtype = site.head_dim, str(site.dtype).removeprefix("torch.")
    rank = width // plan.group_size if isinstance(width, int) else 0
    found = break_even(site.device, site.dtype, head_dim=width, rank=rank)
    limit = None
    if found is not None:
        limit = found.causal_tokens if site.is_causal else found.tokens
    if found is None or limit is None:
        name = site.device.type
        if name == "cuda":
            name = f"{architecture(site.device)} in {dtype} at width {width}, G = {plan.group_size}"
        return None, f"not known to be faster on {name}"
    return limit, f" (auto, {found.source})"


def _run_time_limit(site: AttentionSite, plan: LayerPlan) -> int:
    if all(isinstance(n, int) for n in (site.num_queries, site.num_keys)):
        return 0
    return _limit(site, plan)[0] or 0


def flops(site: AttentionSite) -> int:
    """FLOPs of the exact attention, 2 B H N_q N_k (d + d_v); symbolic sizes by their hints."""
    product: Any = 2
    for size in (site.batch, site.num_heads, site.num_queries, site.num_keys):
        product *= max(hint(size), 0)
    return int(product * (max(hint(site.head_dim), 0) + max(hint(site.value_dim), 0)))
