"""The table of fields, the plan of a layer, and the parts of a policy that are made of fields."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import json
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from distr_compile.estimators import DEFAULT_ESTIMATOR, ESTIMATORS, MIN_RANK
from distr_compile.policy.errors import KeyPath, sentence


@dataclass(frozen=True)
class Option:
    """What one field accepts: integers from ``at_least`` to ``at_most``, or one of ``choices``.

    Without ``at_most`` an integer goes up to what the op can be given, which is 64 bits wide.
    """

    help: str
    at_least: int | None = None
    at_most: int | None = None
    choices: tuple[str, ...] = ()
    note: str = ""

    @property
    def type(self) -> Any:
        """The type that pydantic checks and describes."""
        kinds: list[Any] = []
        if self.at_least is not None:
            kinds.append(Annotated[int, Field(ge=self.at_least, le=self.largest)])
        if self.choices:
            kinds.append(Literal[self.choices])
        return functools.reduce(operator.or_, kinds)

    @property
    def largest(self) -> int:
        """The largest integer of those."""
        return 2**63 - 1 if self.at_most is None else self.at_most

    def accepts(self, value: object) -> bool:
        """Whether the field may have this value."""
        if isinstance(value, str):
            return value in self.choices
        if not isinstance(value, int) or isinstance(value, bool) or self.at_least is None:
            return False
        return self.at_least <= value <= self.largest

    @property
    def accepted(self) -> str:
        """The accepted values in words."""
        words = " or ".join([*self._integers, *(json.dumps(c) for c in self.choices)])
        return f"{words} ({self.note})" if self.note else words

    @property
    def _integers(self) -> list[str]:
        if self.at_least is None:
            return []
        if self.at_most is None:
            return [f"an integer >= {self.at_least} and < 2**63"]
        return [str(n) for n in range(self.at_least, self.at_most + 1)]


def _option(default: int | str | None, help: str, **accepts: Any) -> Any:
    return dataclasses.field(default=default, metadata={"option": Option(help, **accepts)})


@dataclass(frozen=True)
class LayerPlan:
    """What the policy wants for one layer, and the table of the fields a policy may set.

    Attributes:
        group_size: columns of Q and K merged into one, G* in the paper; 1 is exact attention. None
            where ``rank`` says it.
        rank: columns left of Q and K, instead of ``group_size``; None where that says it.
        estimator: name in :data:`distr_compile.estimators.ESTIMATORS`.
        rounds: how often the estimator refines its basis.
        grouping_block: query rows that share one grouping (l in the paper), or "auto".
        min_seq_len: approximate only where min(N_q, N_k) is at least this; "auto" measures.
        causal: what an estimator may see at a causal site: "block" or "strict".
        exact: what becomes of exact sites: "auto", "sdpa" or "keep".
        training: what becomes of sites that record gradients: "exact" or "approximate".
        rule: 0-based indices of the rules that named this layer, in the order they were applied.
    """

    group_size: int | None = _option(
        2,
        "Columns of Q and K merged into one (G* in the paper): the width d becomes d / group_size."
        " Must leave at least 16 columns and, for the lsh estimators, divide the width; a layer"
        " that cannot take it stays exact. 1 is exact attention.",
        at_least=1,
        note="1 = exact",
    )
    rank: int | None = _option(
        None,
        "Columns left of Q and K, instead of group_size. Must be less than the head width and, for"
        " the lsh estimators, divide it; a layer that cannot take it stays exact.",
        at_least=MIN_RANK,
        note="columns left of the head width",
    )
    estimator: str = _option(
        DEFAULT_ESTIMATOR,
        "How the narrow Q and K are made. "
        + " ".join(f"{e.name}: {e.summary}." for e in ESTIMATORS.values()),
        choices=tuple(ESTIMATORS),
    )
    rounds: int = _option(
        1,
        "How often the estimator refines its basis: 2 costs more and comes nearer to the exact"
        " scores. Estimators that take 2: "
        + ", ".join(e.name for e in ESTIMATORS.values() if 2 in e.rounds)
        + ".",
        at_least=1,
        at_most=max(max(e.rounds) for e in ESTIMATORS.values()),
    )
    grouping_block: int | Literal["auto"] = _option(
        "auto",
        "Query rows that share one grouping of the columns, or one basis. auto: with the lsh"
        " estimators all rows up to 4096, then max(2048, N/8) rounded up to a multiple of 128; with"
        " projection never more than N/4, rounded up likewise.",
        at_least=1,
        choices=("auto",),
        note="query rows",
    )
    min_seq_len: int | Literal["auto"] = _option(
        "auto",
        "Approximate only where min(N_q, N_k) is at least this many tokens. auto: only where that"
        " was measured to be faster on this machine; the answer is kept. 0: at any length.",
        at_least=0,
        choices=("auto",),
        note="tokens; 0 = at any length",
    )
    causal: Literal["block", "strict"] = _option(
        "block",
        "What an estimator may see where attention is causal. block: also later rows, those of the"
        " same grouping block. strict: no later row, ever; estimators that cannot promise it are"
        " not used there and the attention stays exact.",
        choices=("block", "strict"),
    )
    exact: Literal["auto", "sdpa", "keep"] = _option(
        "auto",
        "What becomes of attention that stays exact. sdpa: one scaled_dot_product_attention call"
        " where that means the same. auto: our own exact kernel where that was measured to be"
        " faster on this machine, else as sdpa. keep: the graph is left alone.",
        choices=("auto", "sdpa", "keep"),
    )
    training: Literal["exact", "approximate"] = _option(
        "exact",
        "What becomes of attention through which gradients are recorded. exact: it stays exact."
        " approximate: it is approximated as without gradients, and they flow through the"
        " approximation, the grouping or basis held fixed.",
        choices=("exact", "approximate"),
    )
    rule: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.rank is not None:  # plans that mean the same are equal
            object.__setattr__(self, "group_size", None)

    @property
    def is_exact(self) -> bool:
        """Whether the policy itself asks for exact attention."""
        return self.group_size == 1


OPTIONS: dict[str, Option] = {
    f.name: f.metadata["option"] for f in dataclasses.fields(LayerPlan) if "option" in f.metadata
}
"""The table of fields: what each accepts, in the order of :class:`LayerPlan`."""

DEFAULTS: dict[str, int | str | None] = {name: getattr(LayerPlan, name) for name in OPTIONS}
"""What each field is where nothing is said."""

INSTEAD = {"group_size": "rank", "rank": "group_size"}
"""Two fields that say one thing: a table may set one of them, and where tables meet one replaces
the other."""

LAYERS_HELP = (
    "Which modules: a glob on the full name as in named_modules(), where * also matches dots; or"
    " re: and a regular expression that must match the whole name."
)
LAYERS_ACCEPTED = 'a module name, a glob such as "blocks.*.attn", or "re:" and a regular expression'


@dataclass(frozen=True)
class Rule:
    """One ``[[rule]]``: a pattern and the fields it sets, in the order of the table of fields."""

    layers: str
    fields: tuple[tuple[str, int | str], ...]

    def matches(self, layer: str) -> bool:
        """Whether the pattern names the module ``layer`` (a full dotted name, "" for the root)."""
        return _compiled(self.layers).fullmatch(layer) is not None

    def to_dict(self) -> dict[str, int | str]:
        """Return the rule as it stands in a policy file."""
        return {"layers": self.layers, **dict(self.fields)}


@dataclass(frozen=True)
class BasesFile:
    """The table ``[bases]``: the file of bases that ``estimator = "calibrated"`` takes.

    Attributes:
        file: its path; a relative one is relative to the folder of the policy file, and where the
            policy is in no file to the working directory.
        sha256: of its bytes, in hex.
    """

    file: str
    sha256: str


@functools.lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    is_regex = pattern.startswith("re:")
    return re.compile(pattern[3:] if is_regex else fnmatch.translate(pattern))


def pattern_fault(pattern: str) -> str | None:
    """What is wrong with a pattern and what to do, or None."""
    if not pattern.strip():
        return 'the pattern is empty: write "*" for every module'
    if pattern.startswith("re:") and not pattern[3:].strip():
        return 'the regular expression is empty: write "*" for every module'
    try:
        _compiled(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return f"correct the regular expression: {error}"
    return None


# --- plans as tables, and tables that meet -----------------------------------------------------


def plain_data(value: Any) -> Any:
    """Plans, rules, mappings and sequences of them as dicts and lists; all else as it is."""
    if isinstance(value, LayerPlan):
        fields = {name: getattr(value, name) for name in OPTIONS}
        return {name: field for name, field in fields.items() if field is not None}
    if isinstance(value, Rule):
        return value.to_dict()
    if isinstance(value, BasesFile):
        return dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (list, tuple)):
        return [plain_data(item) for item in value]
    return value


def overridden(fields: Mapping[str, Any], by: Mapping[str, Any]) -> dict[str, Any]:
    """``fields`` with those of ``by`` set, and without what these stand instead of."""
    replaced = {INSTEAD.get(name) for name in by}
    return {**{name: value for name, value in fields.items() if name not in replaced}, **by}


# --- rounds and estimators ----------------------------------------------------------------------


def refused_rounds(default: LayerPlan, rules: Sequence[Rule]) -> dict[KeyPath, str]:
    """Tables whose ``rounds`` and ``estimator`` fit together in no plan, whatever rules meet.

    What only some rules that meet make of it is found by ``Policy.resolve``.
    """
    if fault := rounds_fault(default.estimator, default.rounds):
        return {("default", "rounds"): fault}
    faults: dict[KeyPath, str] = {}
    tables: list[dict[str, Any]] = [plain_data(default), *(dict(rule.fields) for rule in rules)]
    for index, rule in enumerate(rules):
        own: dict[str, Any] = dict(rule.fields)
        key = key_of_rounds(own)
        estimators, rounds = (
            [own[name]] if name in own else [table[name] for table in tables if name in table]
            for name in ("estimator", "rounds")
        )
        found = [rounds_fault(e, n) for e in estimators for n in rounds]
        if key and found[0] and all(found):
            faults["rule", index, key] = found[0]
    return faults


def key_of_rounds(fields: Mapping[str, Any]) -> str | None:
    """The key of a table to name where its rounds do not fit, None where it sets neither."""
    return next((key for key in ("rounds", "estimator") if key in fields), None)


def rounds_fault(estimator: str, rounds: int) -> str | None:
    """Why an estimator does not take these rounds and what to do, or None."""
    accepted = ESTIMATORS[estimator].rounds
    if rounds in accepted:
        return None
    others = [json.dumps(e.name) for e in ESTIMATORS.values() if rounds in e.rounds]
    return sentence(
        "rounds",
        f"{rounds} with estimator = {json.dumps(estimator)}",
        " or ".join(map(str, accepted)),
        f"write rounds = {accepted[0]}, or estimator = {' or '.join(others)}",
    )
