"""What ``tune`` has to choose from for each layer, besides exact attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distr_compile.estimators import ESTIMATORS
from distr_compile.policy import LayerPlan, Policy
from distr_compile.policy.plan import DEFAULTS
from distr_compile.tuning.written import TUNED

CANDIDATES: tuple[dict[str, Any], ...] = (
    *({"estimator": "projection", "group_size": G, "rounds": n} for G in (2, 4, 8) for n in (1, 2)),
    *({"estimator": name, "group_size": G} for name in ("lsh-mean", "lsh-signed") for G in (2, 4)),
)
"""By default; a layer takes what fits its width."""

CALIBRATED: tuple[dict[str, Any], ...] = tuple(
    {"estimator": "calibrated", "group_size": G} for G in (2, 4, 8)
)
"""Candidates where the policy that is given has ``[bases]``."""

UNIFORM: tuple[dict[str, Any], ...] = (
    {"estimator": "projection", "group_size": 2},
    {"estimator": "projection", "group_size": 4},
    {"estimator": "lsh-sample", "group_size": 2},
)
"""What the choice is compared with: every layer alike."""

IN_FRONT = ("estimator", "group_size", "rank")
"""Fields that every label begins with; the others follow where they are not the default."""

ALIKE = ("min_seq_len",)
"""Fields that are the same for all candidates, see ``spelled_out``: no label has them."""

SHORT = {"grouping_block": "block"}
"""What labels call some fields."""

Candidates = Sequence[Mapping[str, Any] | LayerPlan]


def candidate_fields(base: Policy, candidates: Candidates | None) -> dict[str, dict[str, Any]]:
    """Label -> fields of every candidate, all spelled out.

    Raises:
        PolicyError: a candidate is wrong, or needs bases that the policy has not.
    """
    if candidates is None:
        candidates = [*CANDIDATES, *(CALIBRATED if base.bases is not None else ())]
    fields = {}
    for candidate in candidates:
        plan = Policy(default=candidate).default
        if ESTIMATORS[plan.estimator].needs == "bases":
            base.read_bases()
        if not plan.is_exact:
            fields[name_of(plan)] = spelled_out(plan)
    if not fields:
        raise ValueError("candidates: got none; give one plan that is not exact, or leave it out")
    return fields


def name_of(plan: LayerPlan) -> str:
    """The label of a candidate."""
    width = f"G={plan.group_size}" if plan.rank is None else f"r={plan.rank}"
    others = {k: getattr(plan, k) for k in TUNED if k not in (*IN_FRONT, *ALIKE)}
    said = [f"{SHORT.get(k, k)}={value}" for k, value in others.items() if value != DEFAULTS[k]]
    return " ".join([plan.estimator, width, *said])


def spelled_out(plan: LayerPlan) -> dict[str, Any]:
    """The fields of a rule that gives any layer this plan, at any length."""
    fields = {name: getattr(plan, name) for name in TUNED}
    return {**{k: v for k, v in fields.items() if v is not None}, "min_seq_len": 0}
