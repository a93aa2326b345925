"""What the user wants for each layer: the policy file, checked, resolved and saved.

A policy is a value. It is read from TOML, a dict or arguments, checked as a whole before anything
compiles, compared and hashed by content, and answers one question: the :class:`LayerPlan` of a
layer. :class:`LayerPlan` is also the one table of fields: the checks, the JSON schema and the error
messages are made from it, so a new field is one entry there. Imports no torch.
"""

from __future__ import annotations

import bisect
import dataclasses
import difflib
import fnmatch
import functools
import hashlib
import json
import operator
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tomlkit
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import PydanticCustomError
from tomlkit.exceptions import TOMLKitError
from tomlkit.items import Array

from distr_compile.estimators import DEFAULT_ESTIMATOR, ESTIMATORS, MIN_RANK

__all__ = ["ENV_VAR", "BasesFile", "LayerPlan", "Policy", "PolicyError", "Rule"]

ENV_VAR = "DISTR_POLICY"
"""Environment variable with the path of the policy file to use when none is given."""

KeyPath = tuple[str | int, ...]
"""Where a value stands in a policy, such as ``("rule", 0, "group_size")``."""


class PolicyError(ValueError):
    """A policy that cannot be used: where, the key, what was got, what is accepted, what to do."""


# --- the fields ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """What one field accepts: integers from ``at_least`` to ``at_most``, or one of ``choices``."""

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
            kinds.append(Annotated[int, Field(ge=self.at_least, le=self.at_most)])
        if self.choices:
            kinds.append(Literal[self.choices])
        return functools.reduce(operator.or_, kinds)

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
            return [f"an integer >= {self.at_least}"]
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
        min_seq_len: approximate only where min(N_q, N_k) is at least this; "auto" asks the device.
        causal: what an estimator may see at a causal site: "block" or "strict".
        exact: what becomes of exact sites: "sdpa" or "keep".
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
        " is known to be faster on this device, so hardly ever on a CPU. 0: at any length.",
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
    exact: Literal["sdpa", "keep"] = _option(
        "sdpa",
        "What becomes of attention that stays exact. sdpa: one scaled_dot_product_attention call"
        " where that means the same. keep: the graph is left alone.",
        choices=("sdpa", "keep"),
    )
    rule: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.rank is not None:  # plans that mean the same are equal
            object.__setattr__(self, "group_size", None)

    @property
    def is_exact(self) -> bool:
        """Whether the policy itself asks for exact attention."""
        return self.group_size == 1


_OPTIONS: dict[str, Option] = {
    f.name: f.metadata["option"] for f in dataclasses.fields(LayerPlan) if "option" in f.metadata
}
_DEFAULTS: dict[str, int | str | None] = {name: getattr(LayerPlan, name) for name in _OPTIONS}
_INSTEAD = {"group_size": "rank", "rank": "group_size"}
"""Two fields that say one thing: a table may set one of them, and where tables meet one replaces
the other."""
_LAYERS_HELP = (
    "Which modules: a glob on the full name as in named_modules(), where * also matches dots; or"
    " re: and a regular expression that must match the whole name."
)
_LAYERS_ACCEPTED = (
    'a module name, a glob such as "blocks.*.attn", or "re:" and a regular expression'
)


@dataclass(frozen=True)
class Rule:
    """One ``[[rule]]``: a pattern and the fields it sets, in the order of the table of fields."""

    layers: str
    fields: tuple[tuple[str, int | str], ...]

    def matches(self, layer: str) -> bool:
        """Whether the pattern names the module ``layer`` (a full dotted name, "" for the root)."""
        return _compiled(self.layers).fullmatch(layer) is not None

    def to_dict(self) -> dict[str, int | str]:
        """The rule as it stands in a policy file."""
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


def _pattern_fault(pattern: str) -> str | None:
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


# --- the pydantic models, made from the table ---------------------------------------------------


def _checked_pattern(pattern: str) -> str:
    if fault := _pattern_fault(pattern):
        raise ValueError(fault)
    return pattern


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Fields(_Table):
    model_config = ConfigDict(json_schema_extra={"not": {"required": list(_INSTEAD)}})

    @model_validator(mode="after")
    def _says_a_thing_once(self) -> _Fields:
        if _INSTEAD.keys() <= self.model_fields_set:
            raise PydanticCustomError("both", "group_size and rank")
        return self


class _RuleBase(_Fields):
    model_config = ConfigDict(
        json_schema_extra={"minProperties": 2, "not": {"required": list(_INSTEAD)}}
    )

    layers: Annotated[str, AfterValidator(_checked_pattern)] = Field(
        description=_LAYERS_HELP, json_schema_extra={"minLength": 1}
    )

    @model_validator(mode="after")
    def _sets_something(self) -> _RuleBase:
        if self.model_fields_set == {"layers"}:
            raise ValueError("no field")
        return self


def _model_fields(defaults: Mapping[str, int | str | None]) -> dict[str, Any]:
    """Arguments of ``create_model``; a field without a default is None, which means "not set"."""
    return {
        name: (option.type, Field(default=defaults.get(name), description=option.help))
        for name, option in _OPTIONS.items()
    }


_DefaultModel = create_model("Default", __base__=_Fields, **_model_fields(_DEFAULTS))
_RuleModel = create_model("Rule", __base__=_RuleBase, **_model_fields({}))


class _BasesTable(_Table):
    file: str = Field(
        min_length=1,
        description="The file that distr calibrate wrote, relative to the policy file.",
    )
    sha256: str = Field(
        pattern="^[0-9a-f]{64}$", description="Its SHA-256 in hex, as distr calibrate prints it."
    )


class _Document(_Table):
    default: _DefaultModel = Field(  # type: ignore[valid-type]
        default_factory=_DefaultModel, description="The plan of every layer that no rule names."
    )
    rule: list[_RuleModel] = Field(  # type: ignore[valid-type]
        default_factory=list,
        description="Exceptions for named layers; a later rule overrides an earlier one by field.",
    )
    bases: _BasesTable = Field(
        default=None,  # type: ignore[assignment]  # as if not there: TOML has no null
        description="The bases of layers whose estimator is calibrated.",
    )


class _EditorSchema(GenerateJsonSchema):
    """No ``const``, which editors that read draft 4 do not know, and no null, which TOML lacks."""

    def literal_schema(self, schema: Any) -> JsonSchemaValue:
        return {"type": "string", "enum": list(schema["expected"])}

    def default_schema(self, schema: Any) -> JsonSchemaValue:
        if schema.get("default", ...) is None:
            return self.generate_inner(schema["schema"])
        return super().default_schema(schema)

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


# --- errors -------------------------------------------------------------------------------------

_RULE_ADVICE = "write [[rule]], with two brackets, above each rule"
_SHAPES: dict[str | int, tuple[str, str]] = {
    "default": ("a table of fields", "write [default] and the fields below it"),
    "rule": ("a list of tables", _RULE_ADVICE),
    "bases": ("a table with file and sha256", "take the lines that distr calibrate prints"),
}
_BASES: dict[str | int, str] = {
    "file": "the path of a file that distr calibrate wrote",
    "sha256": "64 hexadecimal digits, lower case",
}


def _sentence(key: object, got: str, accepted: str, advice: str) -> str:
    return f"{key}: got {got}; accepted: {accepted}; {advice}"


def _shown(value: object) -> str:
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"


def _nearest(word: object, words: Iterable[str]) -> str | None:
    close = difflib.get_close_matches(str(word), list(words), n=1, cutoff=0.5)
    return close[0] if close else None


def _describe(kind: str, path: KeyPath, value: Any) -> str:
    """One error of pydantic (its type, place and input) in our words."""
    key = path[-1]
    if kind == "both":
        got = f"{value['rank']} beside group_size = {value['group_size']}"
        return _sentence("rank", got, "one of the two in a table", "remove one")
    if kind in ("extra_forbidden", "invalid_key"):
        return _describe_unknown(path)
    if len(path) == 1:
        return _sentence(key, _shown(value), *_SHAPES[key])
    if path[0] == "bases":
        got = "nothing" if kind == "missing" else _shown(value)
        return _sentence(key, got, _BASES[key], _SHAPES["bases"][1])
    if isinstance(key, int) and kind == "value_error":
        does_nothing = "no field besides layers, so the rule does nothing"
        one_of = f"one or more of {', '.join(_OPTIONS)}"
        return _sentence("rule", does_nothing, one_of, "add a field or remove the rule")
    if isinstance(key, int):
        return _sentence("rule", _shown(value), "a table with layers and a field", _RULE_ADVICE)
    if kind == "missing":
        return _sentence(
            key, "nothing", _LAYERS_ACCEPTED, 'add layers = "..."; "*" is every module'
        )
    if key == "layers":
        advice = _pattern_fault(value) if isinstance(value, str) else "write one string"
        return _sentence(key, _shown(value), _LAYERS_ACCEPTED, str(advice))
    return _sentence(key, _shown(value), _OPTIONS[key].accepted, _value_advice(key, value))


def _describe_unknown(path: KeyPath) -> str:
    key = path[-1]
    if len(path) == 1:
        known = ["default", "rule", "bases"]
    elif path[0] == "bases":
        known = [str(name) for name in _BASES]
    else:
        known = list(_OPTIONS) if path[0] == "default" else ["layers", *_OPTIONS]
    if len(path) == 1 and key in _OPTIONS:
        advice = "move it under [default] or into a [[rule]]"
    elif path[0] == "default" and key == "layers":
        advice = "[default] is for every layer: move the pattern into a [[rule]]"
    elif near := _nearest(key, known):
        advice = f"did you mean {near}?"
    else:
        advice = "remove it"
    return _sentence(key, "an unknown key", ", ".join(known), advice)


def _value_advice(name: str, value: object) -> str:
    option = _OPTIONS[name]
    if isinstance(value, str):
        if option.at_least is not None and re.fullmatch(r"\s*[+-]?\d+\s*", value):
            return "write the number without quotes"
        if near := _nearest(value, option.choices):
            return f"did you mean {json.dumps(near)}?"
    if _DEFAULTS[name] is None:
        return "leave it out for the default"
    return f"write {json.dumps(_DEFAULTS[name])} for the default"


def _collected(errors: Sequence[str]) -> PolicyError:
    if len(errors) == 1:
        return PolicyError(errors[0])
    return PolicyError("\n  ".join([f"{len(errors)} errors in the policy:", *errors]))


# --- where in the file --------------------------------------------------------------------------

_MULTILINE_STRING = re.compile(r"(\"{3}|'{3})(?:.|\n)*?\1")
_HEADER = re.compile(r"\s*\[{1,2}([^\[\]#=]+)\]")
_KEY = re.compile(r"\s*([\w.\-\"' \t]+?)\s*=")


@dataclass(frozen=True)
class _Source:
    """The file a policy came from ("" once edited): for messages, and to save it with comments."""

    name: str
    text: str

    def line_of(self, path: KeyPath) -> int | None:
        """Line, counted from 1, of the key at ``path`` or of the nearest thing around it.

        The TOML parser keeps no positions, so this looks for headers and keys at line starts.
        That is enough for a file that parsed: what stands inside a list has the list's line.
        """
        lines = _MULTILINE_STRING.sub(lambda m: "\n" * m[0].count("\n"), self.text).split("\n")
        table: KeyPath = ()
        here: KeyPath
        rules, depth, found = 0, 0, None
        for number, line in enumerate(lines, 1):
            if header := _HEADER.match(line):
                table = _split_key(header[1])
                if table == ("rule",):
                    table, rules = ("rule", rules), rules + 1
                here = table
            elif key := _KEY.match(line):
                here = (*table, *_split_key(key[1]))
            else:
                continue
            common = min(len(here), len(path))
            if depth < common and here[:common] == path[:common]:
                depth, found = common, number
        return found

    def place(self, path: KeyPath) -> str:
        if not self.name:
            return _place(path)
        line = self.line_of(path)
        return f"{self.name if line is None else f'{self.name}:{line}'} ({_place(path)})"

    def duplicate_line(self) -> int | None:
        """The line that repeats a key: there ends the shortest beginning refused for it."""
        lines = self.text.split("\n")

        def repeats(count: int) -> bool:
            try:
                tomlkit.parse("\n".join(lines[:count]))
            except TOMLKitError as error:
                return _is_duplicate(error)
            return False

        return bisect.bisect_left(range(len(lines) + 1), True, key=repeats)


def _split_key(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip(" \t\"'") for part in dotted.split("."))


def _place(path: KeyPath) -> str:
    """``rule 3``, counted from 1, ``default``, or ``policy`` for what is around them."""
    if len(path) > 1:
        return f"rule {int(path[1]) + 1}" if path[0] == "rule" else str(path[0])
    return "policy"


def _is_duplicate(error: TOMLKitError) -> bool:
    return "already exists" in str(error) or "Redefinition" in str(error)


def _parse(source: _Source) -> dict[str, Any]:
    try:
        return tomlkit.parse(source.text).unwrap()
    except TOMLKitError as error:
        if _is_duplicate(error):
            line, advice = source.duplicate_line(), "keep one of the two"
        else:
            line, advice = getattr(error, "line", None), "correct the line"
        got = re.sub(r"\.? at line \d+ col \d+$|\.$", "", str(error))
        message = _sentence("TOML", got, "TOML 1.0, each key once", advice)
        raise PolicyError(f"{source.name}:{line}: {message}") from None


# --- the policy ---------------------------------------------------------------------------------


@dataclass(frozen=True, init=False)
class Policy:
    """Which plan every layer gets: a default and an ordered list of rules.

    A value: frozen, compared and hashed by what it says, not by where it came from or how it is
    written (``Policy() == Policy(default={"group_size": 2})``).

    Attributes:
        default: the plan of a layer that no rule names.
        rule: the rules in order; a later one overrides an earlier one field by field.
        bases: the file with the bases of calibrated layers.
    """

    default: LayerPlan
    rule: tuple[Rule, ...]
    bases: BasesFile | None = None
    _source: _Source | None = dataclasses.field(default=None, compare=False, repr=False)
    _folder: str = dataclasses.field(default="", compare=False, repr=False)

    def __init__(
        self,
        default: Mapping[str, object] | LayerPlan | None = None,
        rule: Sequence[Mapping[str, object] | Rule] = (),
        bases: Mapping[str, object] | BasesFile | None = None,
    ) -> None:
        """Check and keep a policy.

        Args:
            default: fields for every layer; what is left out has the default of :class:`LayerPlan`.
            rule: tables with ``layers`` and at least one field, or rules of another policy.
            bases: ``file`` and ``sha256`` of a file that ``distr calibrate`` wrote.

        Raises:
            PolicyError: anything unknown or not accepted; all errors at once.
        """
        data = {"default": {} if default is None else default, "rule": rule}
        self._fill(data if bases is None else {**data, "bases": bases}, None)

    def _fill(self, data: Mapping[str, Any], source: _Source | None) -> None:
        plain = {key: _plain(value) for key, value in data.items()}
        try:
            document = _Document.model_validate(plain)
        except ValidationError as invalid:
            errors: dict[KeyPath, str] = {}
            for error in invalid.errors(include_url=False, include_context=False):
                # one entry per key: a union reports each of its members under a longer place
                path = error["loc"][
                    : {"default": 2, "rule": 3, "bases": 2}.get(str(error["loc"][0]), 1)
                ]
                if error["type"] == "both":
                    path = (*path, "rank")
                place = source.place(path) if source else _place(path)
                errors[path] = f"{place}: {_describe(error['type'], path, error['input'])}"
            # pydantic puts unknown keys last; a file is read from the top
            order = sorted(errors, key=lambda p: (source and source.line_of(p)) or 0)
            raise _collected([errors[path] for path in order]) from None
        content: Any = document.model_dump(exclude_unset=True)
        rules = [
            Rule(r["layers"], tuple((name, r[name]) for name in _OPTIONS if name in r))
            for r in content.get("rule", ())
        ]
        object.__setattr__(self, "default", LayerPlan(**content.get("default", {})))
        object.__setattr__(self, "rule", tuple(rules))
        bases = content.get("bases")
        object.__setattr__(self, "bases", None if bases is None else BasesFile(**bases))
        object.__setattr__(self, "_source", source)
        object.__setattr__(self, "_folder", os.path.dirname(source.name) if source else "")
        if faults := _refused_rounds(self.default, self.rule):
            raise _collected([f"{self._place(path)}: {text}" for path, text in faults.items()])

    @classmethod
    def _build(cls, data: Mapping[str, Any], source: _Source | None = None) -> Policy:
        policy = cls.__new__(cls)
        policy._fill(data, source)
        return policy

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Policy:
        """Read a TOML file.

        Raises:
            PolicyError: the file cannot be read, is not TOML, or is not a policy.
        """
        return cls._load(path, "")

    @classmethod
    def _load(cls, path: str | os.PathLike[str], named_by: str) -> Policy:
        name = os.fspath(path)
        try:
            # bytes, because reading text would change the line ends that save() writes back
            text = Path(name).read_bytes().decode("utf-8")
        except (OSError, ValueError) as error:
            got = getattr(error, "strerror", None) or str(error)
            message = _sentence("file", got, "a TOML file in UTF-8", "check the path and the file")
            raise PolicyError(f"{name}{named_by}: {message}") from None
        source = _Source(name, text)
        return cls._build(_parse(source), source)

    @classmethod
    def from_any(cls, policy: str | os.PathLike[str] | Mapping[str, Any] | Policy | None) -> Policy:
        """A policy from whatever the user gave: a path, a dict, a policy, or nothing.

        Args:
            policy: a path is loaded; a dict has the shape of the file, ``{"default": {...}, "rule":
                [{...}]}``; None means the file named by the environment variable ``DISTR_POLICY``,
                and without that the defaults.

        Raises:
            PolicyError: as :meth:`load`; also for anything of another type.
        """
        if isinstance(policy, Policy):
            return policy
        if policy is None:
            path = os.environ.get(ENV_VAR)
            return (
                cls._load(path, f" (named by the environment variable {ENV_VAR})")
                if path
                else cls()
            )
        if isinstance(policy, (str, os.PathLike)):
            return cls.load(policy)
        if isinstance(policy, Mapping):
            return cls._build(policy)
        accepted = "a path, a dict, a Policy or None"
        raise PolicyError(_sentence("policy", _shown(policy), accepted, "give one of these"))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the policy as TOML, whole or not at all.

        A policy that came from a file is written as it stood there, comments included.

        Raises:
            OSError: the file cannot be written.
        """
        target = Path(os.path.realpath(path))
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            temporary.write_bytes(self.to_toml().encode("utf-8"))
            if target.exists():
                shutil.copymode(target, temporary)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    def to_toml(self) -> str:
        """The text :meth:`save` writes."""
        if self._source is not None:
            return self._source.text
        return tomlkit.dumps({key: value for key, value in self.to_dict().items() if value})

    def to_dict(self) -> dict[str, Any]:
        """The policy as plain data, every default spelled out; :meth:`from_any` reads it back."""
        tables: dict[str, Any] = {
            "default": _plain(self.default),
            "rule": [rule.to_dict() for rule in self.rule],
        }
        return tables if self.bases is None else {**tables, "bases": _plain(self.bases)}

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of the content as canonical JSON: the same in every process."""
        content = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()

    def with_default(self, **fields: object) -> Policy:
        """A copy with fields of the default replaced; a file's comments and layout are kept.

        Raises:
            PolicyError: an unknown field or a value that is not accepted.
        """
        changed = Policy(_overridden(_plain(self.default), fields), self.rule, self.bases)
        return changed._edited_from(self, lambda text: _text_with_default(text, fields))

    def with_rule(self, layers: str, **fields: object) -> Policy:
        """A copy with one more rule at the end; a file's comments and layout are kept.

        Raises:
            PolicyError: a bad pattern, no field, an unknown field or a value that is not accepted.
        """
        rule = {"layers": layers, **fields}
        changed = Policy(self.default, (*self.rule, rule), self.bases)
        return changed._edited_from(self, lambda text: _text_with_rule(text, rule))

    def with_bases(self, path: str | os.PathLike[str], sha256: str) -> Policy:
        """A copy with the table ``[bases]`` set; a file's comments and layout are kept.

        Args:
            path: of the bases, as seen from the working directory; what is written is relative to
                the folder of the policy file.
            sha256: of the bases' bytes, in hex.

        Raises:
            PolicyError: not a SHA-256.
        """
        relative = os.path.relpath(path, self._folder or os.curdir)
        bases = BasesFile(Path(relative).as_posix(), sha256)
        changed = Policy(self.default, self.rule, bases)
        return changed._edited_from(self, lambda text: _text_with_bases(text, _plain(bases)))

    @property
    def bases_path(self) -> Path | None:
        """Where the file of bases is, as seen from the working directory; None without one."""
        return None if self.bases is None else Path(self._folder, self.bases.file)

    def read_bases(self) -> bytes:
        """The bytes of the file of bases, which has the checksum that the policy says.

        Raises:
            PolicyError: there is no ``[bases]``, no such file, or one of another checksum.
        """
        advice = "run distr calibrate and copy the lines it prints"
        if self.bases is None:
            raise PolicyError(
                f'{self._place(("bases",))}: bases: got estimator = "calibrated" and no table '
                f"[bases]; accepted: [bases] with file and sha256; {advice}"
            )
        place, path = self.place_of_bases(), Path(self._folder, self.bases.file)
        try:
            data = path.read_bytes()
        except OSError as error:
            got = f"{path}: {error.strerror or error}"
            message = _sentence("file", got, _BASES["file"], advice)
            raise PolicyError(f"{place}: {message}") from None
        found = hashlib.sha256(data).hexdigest()
        if found != self.bases.sha256:
            got = f"{path} with SHA-256 {found}"
            accepted = f"the file of SHA-256 {self.bases.sha256}"
            advice = f"it was changed or replaced: restore it, or {advice}"
            raise PolicyError(f"{place}: {_sentence('file', got, accepted, advice)}")
        return data

    def _edited_from(self, before: Policy, edit: Callable[[str], str]) -> Policy:
        """The same policy with the edited text of the file that ``before`` came from, if any."""
        edited = self if before._source is None else self._written(edit(before._source.text))
        object.__setattr__(edited, "_folder", before._folder)
        return edited

    def _written(self, text: str) -> Policy:
        """The same policy, to be saved as ``text``, which is in no file yet."""
        if "\r\n" in text:
            text = re.sub("\r?\n", "\r\n", text)
        source = _Source("", text)
        written = self._build(_parse(source), source)
        if written != self:
            raise RuntimeError(f"the edited text says {written}, not {self}; report this:\n{text}")
        return written

    def rules_matching(self, layer: str) -> tuple[int, ...]:
        """0-based indices of the rules that name the module ``layer``, in order."""
        return tuple(i for i, rule in enumerate(self.rule) if rule.matches(layer))

    def resolve(self, layer: str) -> LayerPlan:
        """The plan of the module ``layer``, its full dotted name as in ``named_modules()``.

        Raises:
            PolicyError: the rules that name the layer come to rounds its estimator does not take.
        """
        matching = self.rules_matching(layer)
        fields = _plain(self.default)
        path: KeyPath = ("default", "rounds")
        for index in matching:
            set_here = dict(self.rule[index].fields)
            fields = _overridden(fields, set_here)
            if key := _key_of_rounds(set_here):
                path = ("rule", index, key)
        if fault := _rounds_fault(fields["estimator"], fields["rounds"]):
            raise PolicyError(f"{self._place(path)}: layer {layer!r}: {fault}")
        return LayerPlan(**fields, rule=matching)

    def where(self, index: int) -> str:
        """The place of ``rule[index]`` for messages: ``distr.toml:7 (rule 2)``, or ``rule 2``."""
        return self._place(("rule", index))

    def place_of_bases(self) -> str:
        """The place of the bases' file for messages: ``distr.toml:9 (bases)``, or ``bases``."""
        return self._place(("bases", "file"))

    def _place(self, path: KeyPath) -> str:
        return self._source.place(path) if self._source else _place(path)

    def check_layers(self, module_names: Iterable[str]) -> None:
        """Check that every rule names at least one module.

        Args:
            module_names: full dotted names as in ``named_modules()``, with or without the root, "".

        Raises:
            PolicyError: every rule that names none, each with up to three of the nearest names.
        """
        names = list(module_names)
        below_root = [name for name in names if name]
        errors = []
        for index, rule in enumerate(self.rule):
            if any(map(rule.matches, names)):
                continue
            wanted = rule.layers.removeprefix("re:").replace("\\", "")
            near = difflib.get_close_matches(wanted, below_root, n=3, cutoff=0.0)
            advice = (
                f"nearest modules: {', '.join(near)}" if near else "the model has no submodules"
            )
            got = f'"{rule.layers}", which names no module of the model'
            errors.append(
                f"{self.where(index)}: {_sentence('layers', got, _LAYERS_ACCEPTED, advice)}"
            )
        if errors:
            raise _collected(errors)

    @staticmethod
    def json_schema() -> dict[str, Any]:
        """JSON schema (draft 2020-12) of the policy file, for TOML editors."""
        schema = _Document.model_json_schema(schema_generator=_EditorSchema)
        return {
            "$schema": GenerateJsonSchema.schema_dialect,
            **schema,
            "title": "distr policy",
            "description": "Which attention layers the distr backend approximates, and how.",
        }


def _plain(value: Any) -> Any:
    """Plans, rules, mappings and sequences of them as dicts and lists; all else as it is."""
    if isinstance(value, LayerPlan):
        fields = {name: getattr(value, name) for name in _OPTIONS}
        return {name: field for name, field in fields.items() if field is not None}
    if isinstance(value, Rule):
        return value.to_dict()
    if isinstance(value, BasesFile):
        return dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _overridden(fields: Mapping[str, Any], by: Mapping[str, Any]) -> dict[str, Any]:
    """``fields`` with those of ``by`` set, and without what these stand instead of."""
    replaced = {_INSTEAD.get(name) for name in by}
    return {**{name: value for name, value in fields.items() if name not in replaced}, **by}


# --- rounds and estimators ----------------------------------------------------------------------


def _refused_rounds(default: LayerPlan, rules: Sequence[Rule]) -> dict[KeyPath, str]:
    """Tables whose ``rounds`` and ``estimator`` fit together in no plan, whatever rules meet.

    What only some rules that meet make of it is found by :meth:`Policy.resolve`.
    """
    if fault := _rounds_fault(default.estimator, default.rounds):
        return {("default", "rounds"): fault}
    faults: dict[KeyPath, str] = {}
    tables: list[dict[str, Any]] = [_plain(default), *(dict(rule.fields) for rule in rules)]
    for index, rule in enumerate(rules):
        own: dict[str, Any] = dict(rule.fields)
        key = _key_of_rounds(own)
        estimators, rounds = (
            [own[name]] if name in own else [table[name] for table in tables if name in table]
            for name in ("estimator", "rounds")
        )
        found = [_rounds_fault(e, n) for e in estimators for n in rounds]
        if key and found[0] and all(found):
            faults["rule", index, key] = found[0]
    return faults


def _key_of_rounds(fields: Mapping[str, Any]) -> str | None:
    return next((key for key in ("rounds", "estimator") if key in fields), None)


def _rounds_fault(estimator: str, rounds: int) -> str | None:
    accepted = ESTIMATORS[estimator].rounds
    if rounds in accepted:
        return None
    others = [json.dumps(e.name) for e in ESTIMATORS.values() if rounds in e.rounds]
    return _sentence(
        "rounds",
        f"{rounds} with estimator = {json.dumps(estimator)}",
        " or ".join(map(str, accepted)),
        f"write rounds = {accepted[0]}, or estimator = {' or '.join(others)}",
    )


# --- editing the text ---------------------------------------------------------------------------


def _text_with_default(text: str, fields: Mapping[str, object]) -> str:
    text = _with_keys_renamed(text, fields)
    # with a line end, because tables in mixed order are written back in another order
    document: Any = tomlkit.parse(text if text.endswith("\n") else text + "\n")
    if "default" not in document:
        return _appended(text, {"default": fields})
    table = document["default"]
    table.update({key: value for key, value in fields.items() if key in table})
    new = {key: value for key, value in fields.items() if key not in table}
    lines = tomlkit.dumps(document).split("\n")
    for number, line in enumerate(lines, 1):
        if (header := _HEADER.match(line)) and _split_key(header[1]) == ("default",):
            # right below the header: at the table's end they would part the next table's comment
            # from that table
            lines[number:number] = tomlkit.dumps(new).splitlines()
            return "\n".join(lines)
    table.update(new)  # default = {...} or default.key = ...
    return tomlkit.dumps(document)


def _with_keys_renamed(text: str, fields: Mapping[str, object]) -> str:
    """The text with the default's ``group_size`` called ``rank`` or the other way, if that changed.

    The line keeps its place and comment; its value is replaced next.
    """
    old = next((_INSTEAD[name] for name in fields if name in _INSTEAD), None)
    if old is None or old not in tomlkit.parse(text).get("default", {}):
        return text
    line = _Source("", text).line_of(("default", old))
    assert line is not None
    lines = text.split("\n")
    lines[line - 1] = re.sub(rf"\b{old}\b", _INSTEAD[old], lines[line - 1], count=1)
    return "\n".join(lines)


def _text_with_rule(text: str, rule: Mapping[str, object]) -> str:
    document: Any = tomlkit.parse(text)
    if not isinstance(document.get("rule"), Array):
        return _appended(text, {"rule": [rule]})
    table = tomlkit.inline_table()  # rule = [{...}, {...}]
    table.update(rule)
    document["rule"].append(table)
    return tomlkit.dumps(document)


def _text_with_bases(text: str, fields: Mapping[str, object]) -> str:
    document: Any = tomlkit.parse(text)
    if "bases" not in document:
        return _appended(text, {"bases": fields})
    document["bases"].update(fields)
    return tomlkit.dumps(document)


def _appended(text: str, tables: Mapping[str, Any]) -> str:
    """``text`` with tables after its end; what was there is untouched."""
    gap = "" if not text else "\n" if text.endswith("\n") else "\n\n"
    return text + gap + tomlkit.dumps(tables)
