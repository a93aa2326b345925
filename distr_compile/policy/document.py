"""The shape of a policy file as pydantic models, made from the table of fields.

They check a policy as a whole and give the JSON schema; what pydantic finds is said in our words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any

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

from distr_compile.policy.errors import (
    KeyPath,
    PolicyError,
    collected,
    nearest,
    place_of,
    sentence,
    shown,
)
from distr_compile.policy.plan import (
    DEFAULTS,
    INSTEAD,
    LAYERS_ACCEPTED,
    LAYERS_HELP,
    OPTIONS,
    pattern_fault,
    plain_data,
)
from distr_compile.policy.source import Source


def _checked_pattern(pattern: str) -> str:
    if fault := pattern_fault(pattern):
        raise ValueError(fault)
    return pattern


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Fields(_Table):
    model_config = ConfigDict(json_schema_extra={"not": {"required": list(INSTEAD)}})

    @model_validator(mode="after")
    def _says_a_thing_once(self) -> _Fields:
        if INSTEAD.keys() <= self.model_fields_set:
            raise PydanticCustomError("both", "group_size and rank")
        return self


class _RuleBase(_Fields):
    model_config = ConfigDict(
        json_schema_extra={"minProperties": 2, "not": {"required": list(INSTEAD)}}
    )

    layers: Annotated[str, AfterValidator(_checked_pattern)] = Field(
        description=LAYERS_HELP, json_schema_extra={"minLength": 1}
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
        for name, option in OPTIONS.items()
    }


_DefaultModel = create_model("Default", __base__=_Fields, **_model_fields(DEFAULTS))
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


def checked(data: Mapping[str, Any], source: Source | None) -> dict[str, Any]:
    """The content of a policy, of the keys that it sets.

    Args:
        data: ``default``, ``rule`` and ``bases``, as tables or as parts of another policy.
        source: the text that ``data`` was read from, for the places in messages.

    Raises:
        PolicyError: anything unknown or not accepted; all errors at once.
    """
    plain = {key: plain_data(value) for key, value in data.items()}
    try:
        return _Document.model_validate(plain).model_dump(exclude_unset=True)
    except ValidationError as invalid:
        raise _in_our_words(invalid, source) from None


def json_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of the policy file, for TOML editors."""
    schema = _Document.model_json_schema(schema_generator=_EditorSchema)
    return {
        "$schema": GenerateJsonSchema.schema_dialect,
        **schema,
        "title": "distr policy",
        "description": "Which attention layers the distr backend approximates, and how.",
    }


# --- what pydantic finds, in our words -----------------------------------------------------------

_RULE_ADVICE = "write [[rule]], with two brackets, above each rule"
_SHAPES: dict[str | int, tuple[str, str]] = {
    "default": ("a table of fields", "write [default] and the fields below it"),
    "rule": ("a list of tables", _RULE_ADVICE),
    "bases": ("a table with file and sha256", "take the lines that distr calibrate prints"),
}
BASES_ACCEPTED: dict[str | int, str] = {
    "file": "the path of a file that distr calibrate wrote",
    "sha256": "64 hexadecimal digits, lower case",
}
"""The keys of ``[bases]`` and what each accepts."""


def _in_our_words(invalid: ValidationError, source: Source | None) -> PolicyError:
    errors: dict[KeyPath, str] = {}
    for error in invalid.errors(include_url=False, include_context=False):
        # one entry per key: a union reports each of its members under a longer place
        path = error["loc"][: {"default": 2, "rule": 3, "bases": 2}.get(str(error["loc"][0]), 1)]
        if error["type"] == "both":
            path = (*path, "rank")
        place = source.place(path) if source else place_of(path)
        errors[path] = f"{place}: {_describe(error['type'], path, error['input'])}"
    # pydantic puts unknown keys last; a file is read from the top
    order = sorted(errors, key=lambda p: (source and source.line_of(p)) or 0)
    return collected([errors[path] for path in order])


def _describe(kind: str, path: KeyPath, value: Any) -> str:
    """One error of pydantic (its type, place and input) in our words."""
    key = path[-1]
    if kind == "both":
        got = f"{value['rank']} beside group_size = {value['group_size']}"
        return sentence("rank", got, "one of the two in a table", "remove one")
    if kind in ("extra_forbidden", "invalid_key"):
        return _describe_unknown(path)
    if len(path) == 1:
        return sentence(key, shown(value), *_SHAPES[key])
    if path[0] == "bases":
        got = "nothing" if kind == "missing" else shown(value)
        return sentence(key, got, BASES_ACCEPTED[key], _SHAPES["bases"][1])
    if isinstance(key, int) and kind == "value_error":
        does_nothing = "no field besides layers, so the rule does nothing"
        one_of = f"one or more of {', '.join(OPTIONS)}"
        return sentence("rule", does_nothing, one_of, "add a field or remove the rule")
    if isinstance(key, int):
        return sentence("rule", shown(value), "a table with layers and a field", _RULE_ADVICE)
    if kind == "missing":
        return sentence(key, "nothing", LAYERS_ACCEPTED, 'add layers = "..."; "*" is every module')
    if key == "layers":
        advice = pattern_fault(value) if isinstance(value, str) else "write one string"
        return sentence(key, shown(value), LAYERS_ACCEPTED, str(advice))
    return sentence(key, shown(value), OPTIONS[key].accepted, _value_advice(key, value))


def _describe_unknown(path: KeyPath) -> str:
    key = path[-1]
    if len(path) == 1:
        known = ["default", "rule", "bases"]
    elif path[0] == "bases":
        known = [str(name) for name in BASES_ACCEPTED]
    else:
        known = list(OPTIONS) if path[0] == "default" else ["layers", *OPTIONS]
    if len(path) == 1 and key in OPTIONS:
        advice = "move it under [default] or into a [[rule]]"
    elif path[0] == "default" and key == "layers":
        advice = "[default] is for every layer: move the pattern into a [[rule]]"
    elif near := nearest(key, known):
        advice = f"did you mean {near}?"
    else:
        advice = "remove it"
    return sentence(key, "an unknown key", ", ".join(known), advice)


def _value_advice(name: str, value: object) -> str:
    option = OPTIONS[name]
    if isinstance(value, str):
        if option.at_least is not None and re.fullmatch(r"\s*[+-]?\d+\s*", value):
            return "write the number without quotes"
        if near := nearest(value, option.choices):
            return f"did you mean {json.dumps(near)}?"
    if DEFAULTS[name] is None:
        return "leave it out for the default"
    return f"write {json.dumps(DEFAULTS[name])} for the default"
