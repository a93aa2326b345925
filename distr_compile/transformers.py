"""Attention of transformers' models: ``from_pretrained(..., attn_implementation="distr")``.

A model calls the function that is registered here with its own module; :func:`apply` gave that
module its name and its plan. There is no graph; ``distr_compile.report(model)`` tells what became
of the calls.
"""

from __future__ import annotations

import functools
import itertools
import os
import warnings
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from distr_compile import calls, masks, naming
from distr_compile.bases import BasesOfModel
from distr_compile.calls import ASSIGNED, NAME, Assigned
from distr_compile.estimators import ESTIMATORS
from distr_compile.functional import drawn_seed, four_axes
from distr_compile.lowering import op, sdpa
from distr_compile.lowering.call import Approximation, Scores, Shape, op_arguments
from distr_compile.lowering.checkpointed import is_recomputed
from distr_compile.lowering.judge import Judge
from distr_compile.passes.decide import Decision, decide_call
from distr_compile.policy import ENV_VAR, LayerPlan, Policy, PolicyError
from distr_compile.policy.errors import check_type, sentence
from distr_compile.reporting import Reason

HARMLESS = frozenset(
    """
    cache_position cu_seq_lens_k cu_seq_lens_q input_ids labels max_length_k max_length_q
    mm_token_type_ids num_items_in_batch position_ids s_aux seq_idx softcap token_type_ids
    """.split()
)
"""What models hand to their attention that is heeded, said by the mask already, or not about it."""

UNHEEDED = frozenset({"block_indices", "indices", "sinks"})
"""What a model hands over to have fewer keys seen, or sinks of each token."""


def register() -> None:
    """Make ``attn_implementation="distr"`` known to transformers, with masks.

    Masks are those of SDPA, and those of "eager" for models whose code can use no others.

    Models without a plan from :func:`apply` take the ``[default]`` of the policy that the
    environment variable ``DISTR_POLICY`` names, or of the defaults.

    Raises:
        PolicyError: ``DISTR_POLICY`` names something that is no policy.
    """
    global _read
    _read = _policy(os.environ.get(ENV_VAR))
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, masks.make)


def apply(model: nn.Module, policy: Any = None) -> None:
    """Give each module of a model its name and its plan.

    A later call replaces what an earlier one gave. Names are those of ``model.named_modules()``
    without wrappers, as for ``torch.compile(model, backend="distr")``.

    Args:
        model: of transformers, or one that contains such models; loaded with
            ``attn_implementation="distr"``.
        policy: a path, a dict, a ``Policy``; None is the file that ``DISTR_POLICY`` names, or the
            defaults.

    Raises:
        PolicyError: the policy is wrong, or a rule names no module.
        ValueError: no model in it asks for ``attn_implementation="distr"``, or all that ask have
            attention that transformers cannot exchange; of some of them a warning tells.
        TypeError: it is no module.
    """
    check_type("model", model, nn.Module, "a model of transformers", "give the whole model")
    asked = Policy.from_any(policy)
    shown = naming.canonical(model)
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    asked.check_layers({*shown, *shown.values()})
    asked.check_ambiguous(naming.ambiguous(model, shown))
    _check_asked(model)
    bases = BasesOfModel(asked, model)
    given: dict[nn.Module, Assigned] = {}
    for module, group in names.items():
        every = dict.fromkeys((*map(shown.__getitem__, group), *group))
        plans = [asked.resolve(name) for name in every]
        plan = next((each for each in plans if each.rule), plans[0])
        needs = ESTIMATORS[plan.estimator].needs == "bases"
        given[module] = Assigned(shown[group[0]], plan, bases if needs else None)
    for module, assigned in given.items():  # all or none: nothing above has changed the model
        setattr(module, ASSIGNED, assigned)


def _check_asked(model: nn.Module) -> None:
    found: dict[str, list[nn.Module]] = {}
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            found.setdefault(str(config._attn_implementation), []).append(module)
    if NAME not in found:
        got = f"a model with {', '.join(map(repr, found)) or 'no config of transformers'}"
        advice = f'load it with attn_implementation="{NAME}", or model.set_attn_implementation'
        accepted = f"{NAME!r}"
        raise ValueError(sentence("attn_implementation", got, accepted, f'{advice}("{NAME}")'))
    asking = [
        (type(module).__name__, can_set())
        for module in found[NAME]
        if callable(can_set := getattr(module, "_can_set_attn_implementation", None))
    ]
    deaf = [name for name, can in asking if not can]
    if not deaf:
        return
    names = ", ".join(dict.fromkeys(deaf))
    got = f"{NAME!r} for {names}, whose code does not look at it"
    accepted = "models whose attention goes through transformers' AttentionInterface"
    advice = 'compile this one: model.compile(backend="distr", options={"policy": ...})'
    told = sentence("attn_implementation", got, accepted, advice)
    if len(deaf) == len(asking):
        raise ValueError(told)
    warnings.warn(f"{told}; until then it stays exact", stacklevel=3)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in the place of its own attention functions.

    Args:
        module: of the model, whose attention this is.
        query: ``(B, H, N, d)``.
        key: ``(B, H_k, M, d)``; H_k divides H.
        value: ``(B, H_k, M, d_v)``.
        attention_mask: as :func:`masks.make` makes it: ``(B, 1, N, M)``, bool; or floating, which
            is added.
        dropout: on the weights; such a call is exact, unless gradients are recorded and the plan
            says ``training = "approximate"``.
        scaling: multiplies Q K^T; ``1 / sqrt(d)`` if None.
        is_causal: where there is no mask; the module's own ``is_causal`` if None.
        position_bias: ``(B or 1, H, N, M)``, added to the scaled scores.
        options: ``softcap``, ``s_aux`` (sinks) and ``position_ids`` are heeded: where these tell of
            packed sequences, each is attended to alone. What ``HARMLESS`` names, and what is no
            tensor, tells masks, which are in ``attention_mask`` already.

    Returns:
        ``(B, N, H, d_v)`` and None, as there are no weights to give.

    Raises:
        ValueError: ``output_attentions``, what ``UNHEEDED`` names, or dropout beside a soft cap or
            sinks. Of another tensor among the options a warning tells, once.
        PolicyError: the policy of the environment has rules, and :func:`apply` was not called.
    """
    _check_options(options)
    softcap, sinks = options.get("softcap") or 0.0, options.get("s_aux")
    queries, keys = query.shape[2], key.shape[2]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
        if attention_mask is None and is_causal:  # "eager" without a mask sees everything
            config = type(getattr(module, "config", None))
            is_causal = masks.reads_those_of_sdpa(config) is not False
    is_causal = bool(is_causal) and attention_mask is None and queries > 1
    if is_causal and keys > queries:  # an empty static cache: from the top left nothing sees these
        key, value = key[:, :, :queries], value[:, :, :queries]
        position_bias = None if position_bias is None else position_bias[..., :queries]
    mask = _with_bias(attention_mask, position_bias)
    q, k, v = four_axes(query, key, value, mask, enable_gqa=True)
    scale = q.shape[3] ** -0.5 if scaling is None else scaling
    scores = Scores(scale, is_causal, softcap=softcap, dropout_p=dropout)
    bounds = _packed(mask, options.get("position_ids"))
    if mask is not None and bounds:
        out = _attend_packed(module, q, k, v, mask, sinks, scores, bounds)
    else:
        out = _attend(module, q, k, v, mask, sinks, scores)
    return out.transpose(1, 2).contiguous(), None


_told: set[str] = set()
"""Names of tensors that were not heeded, and that a warning has told of."""


def _check_options(options: dict[str, Any]) -> None:
    """Refuse what would change the result and is not heeded; tell once of what nobody knows.

    Models hand on what a caller gives them beside their own arguments, such as a column of a data
    set, which no attention looks at.
    """
    if options.get("output_attentions"):
        advice = 'load the model with attn_implementation="eager"'
        raise ValueError(sentence("output_attentions", "True", "False or None", advice))
    for name, value in options.items():
        if value is None or name in HARMLESS:
            continue
        if name not in UNHEEDED and (not isinstance(value, Tensor) or name in _told):
            continue
        advice = 'load the model with "sdpa" or "eager" and model.compile(backend="distr")'
        told = sentence(name, f"a {type(value).__name__}", "None", advice)
        if name in UNHEEDED:
            raise ValueError(told)
        if not torch.compiler.is_compiling():
            _told.add(name)
            warnings.warn(f"{told} if the model's attention depends on it", stacklevel=3)


def _packed(mask: Tensor | None, position_ids: Tensor | None) -> list[int]:
    """Where the sequences of a packed batch begin, and its end; empty for any other call.

    Packed is what transformers takes for it: one row of positions that begin anew, and a mask that
    shows each token itself and earlier ones of its own sequence, all of them or those of a window.
    Not looked for in a trace.
    """
    if mask is None or position_ids is None or torch.compiler.is_compiling():
        return []
    tokens = mask.shape[-1]
    if mask.dtype != torch.bool or mask.shape != (1, 1, tokens, tokens):
        return []
    if position_ids.shape != (1, tokens):
        return []
    begins = position_ids[0].diff(prepend=position_ids[0, :1] - 2) != 1
    number = begins.cumsum(0)
    own = (number[:, None] == number).tril()
    if number[-1] == 1 or not mask[0, 0].diagonal().all() or (mask[0, 0] & ~own).any():
        return []
    return [*begins.nonzero().flatten().tolist(), tokens]


def _attend_packed(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    sinks: Tensor | None,
    scores: Scores,
    bounds: list[int],
) -> Tensor:
    """Each sequence as it is alone: its part of the mask, or causal where that says no more."""
    parts = []
    for a, b in itertools.pairwise(bounds):
        own = mask[:, :, a:b, a:b]
        is_causal = torch.equal(own[0, 0], torch.ones_like(own[0, 0]).tril())
        Q, K, V = (x[:, :, a:b] for x in (q, k, v))
        each = replace(scores, is_causal=is_causal)
        parts.append(_attend(module, Q, K, V, None if is_causal else own, sinks, each))
    return torch.cat(parts, 2)


def _attend(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    scores: Scores,
) -> Tensor:
    assigned: Assigned | None = getattr(module, ASSIGNED, None)
    if assigned is not None and assigned.is_plain:
        return _exactly(q, k, v, mask, sinks, scores)
    assigned = assigned or Assigned("", _plan_without_apply())
    shape = Shape.of(
        *(q, k, v, mask, scores.is_causal),
        softcap=scores.softcap > 0,
        sinks=sinks is not None,
        dropout=scores.dropout_p != 0,
    )
    # Such a call is exact unless the plan says training = "approximate", as with the backend.
    trained = _needs_gradient(q, k, v, mask, sinks) or is_recomputed()
    shape = shape._replace(trained=trained)
    decision = _decided(shape, assigned.plan)
    calls.note(module, shape, decision, mask_grad=_needs_gradient(mask))
    if not decision.is_distr:
        return _exactly(q, k, v, mask, sinks, scores)
    bases = _bases(assigned, decision.approximation, k)
    given = op_arguments(decision.approximation, scores)
    seed = drawn_seed(q) if scores.dropout_p else None
    out: Tensor = op.call(q, k, v, mask, *bases, sinks, seed, **given)
    return out


def _with_bias(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    if bias is None or mask is None:
        return mask if bias is None else bias
    if mask.dtype == torch.bool:  # finite as in transformers: a row without keys is V's mean
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return mask + bias


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _decided(shape: Shape, plan: LayerPlan) -> Decision:
    """What becomes of a call, with the reasons why it is exact."""
    extra: tuple[Reason, ...] = ()
    if shape.dropout and not shape.trained:
        extra = (Reason("dropout", "the weights are dropped out, and nothing is trained"),)
    found = decide_call(shape, plan, extra)
    if not found.is_distr:
        return found
    needs_bases = ESTIMATORS[plan.estimator].needs == "bases"
    if torch.compiler.is_compiling():
        # Nothing is timed or read in a trace: SDPA stands there, for the backend.
        if plan.min_seq_len != "auto" and not needs_bases:
            return found
        return decide_call(shape, plan, (Reason("not-measured", "the call is traced"),))
    slower = _slower(shape, found.approximation) if plan.min_seq_len == "auto" else None
    return found if slower is None else decide_call(shape, plan, (slower,))


@functools.lru_cache(maxsize=4096)
def _slower(shape: Shape, approximation: Approximation) -> Reason | None:
    """Why exact attention is to be taken, as far as its speed tells."""
    found = Judge()(shape, approximation)
    if isinstance(found, str):
        return Reason("not-measured", found)
    if found.prefers_distr:
        return None
    text = f"measured on this machine: {found}; min_seq_len = 0 forces it"
    return Reason("not-faster", text)


def _bases(
    assigned: Assigned, approximation: Approximation, k: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    if ESTIMATORS[approximation.estimator].needs == "nothing":
        return None, None
    if assigned.bases is None:
        raise PolicyError(
            sentence(
                "estimator",
                f"{approximation.estimator!r} for a model without plans",
                "estimators that need no bases",
                "call distr_compile.transformers.apply(model, policy)",
            )
        )
    sizes = {"head_dim": k.shape[3], "key_heads": k.shape[1]}
    A, B = assigned.bases(assigned.name, rank=approximation.rank, **sizes)
    return A.contiguous().to(k.device), B.contiguous().to(k.device)


def _exactly(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    scores: Scores,
) -> Tensor:
    given, dropout = {"scale": scores.scale, "is_causal": scores.is_causal}, scores.dropout_p
    if dropout == 0:
        return sdpa.attention(q, k, v, mask, **given, softcap=scores.softcap, sinks=sinks)
    if not sdpa.says(scores.softcap, sinks):
        got = f"{dropout} beside a soft cap or sinks"
        advice = 'set it to 0, or train with attn_implementation="eager"'
        raise ValueError(sentence("dropout", got, "0 there", advice))
    if scores.is_causal and mask is not None:
        mask, given = sdpa.with_causal(mask, q, k, 0), {**given, "is_causal": False}
    k, v = (t.expand(q.shape[0], -1, -1, -1) for t in (k, v))
    gqa = k.shape[1] != q.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, enable_gqa=gqa, **given)


_read: Policy | None = None
"""What ``DISTR_POLICY`` named when :func:`register` was called: Dynamo cannot read files."""


def _plan_without_apply() -> LayerPlan:
    path = os.environ.get(ENV_VAR)
    policy = _read if torch.compiler.is_compiling() and _read is not None else _policy(path)
    if policy.rule:
        raise PolicyError(
            sentence(
                f"{path} (named by the environment variable {ENV_VAR})",
                f"{len(policy.rule)} rules for a model whose layers have no names",
                "a policy with [default] only",
                "call distr_compile.transformers.apply(model, policy)",
            )
        )
    return policy.default


@functools.lru_cache(maxsize=8)
def _policy(path: str | None) -> Policy:
    return Policy.from_any(None) if path else Policy()
