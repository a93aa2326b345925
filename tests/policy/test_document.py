"""The JSON schema accepts what the policy accepts, and nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings

from distr_compile.estimators import ESTIMATORS
from distr_compile.policy import Policy

from .common import DEFAULTS, FIELDS, PLAIN, RULES, error_of


def conforms(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    """The part of JSON schema that the policy's schema uses; anything else fails the test."""
    annotations = {"$schema", "$defs", "title", "description", "default"}
    if "$ref" in schema:
        return conforms(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root)
    for keyword, wanted in schema.items():
        if keyword == "type":
            kinds = {"object": dict, "array": list, "string": str, "integer": int}
            ok = isinstance(value, kinds[wanted]) and not isinstance(value, bool)
        elif keyword == "anyOf":
            ok = any(conforms(value, option, root) for option in wanted)
        elif keyword == "allOf":
            ok = all(conforms(value, part, root) for part in wanted)
        elif keyword == "enum":
            ok = value in wanted
        elif keyword == "minimum":
            ok = isinstance(value, int) and value >= wanted
        elif keyword == "maximum":
            ok = isinstance(value, int) and value <= wanted
        elif keyword == "not":
            ok = not conforms(value, wanted, root)
        elif keyword == "minLength":
            ok = isinstance(value, str) and len(value) >= wanted
        elif keyword == "minProperties":
            ok = isinstance(value, dict) and len(value) >= wanted
        elif keyword == "required":
            ok = isinstance(value, dict) and set(wanted) <= set(value)
        elif keyword == "additionalProperties":
            ok = isinstance(value, dict) and set(value) <= set(schema["properties"])
        elif keyword == "properties":
            ok = isinstance(value, dict) and all(
                conforms(value[key], part, root) for key, part in wanted.items() if key in value
            )
        elif keyword == "items":
            ok = isinstance(value, list) and all(conforms(item, wanted, root) for item in value)
        else:
            assert keyword in annotations, keyword
            ok = True
        if not ok:
            return False
    return True


@settings(deadline=None)
@given(default=DEFAULTS, rules=RULES)
def test_schema_accepts_what_the_policy_accepts(
    default: dict[str, Any], rules: list[dict[str, Any]]
) -> None:
    schema = Policy.json_schema()
    assert conforms({"default": default, "rule": rules}, schema, schema)
    assert conforms(Policy(default, rules).to_dict(), schema, schema)


@pytest.mark.parametrize(
    "document",
    [
        {"rules": []},
        {"default": {"group_sise": 2}},
        {"default": {"layers": "a"}},
        {"default": 1},
        {"rule": {"layers": "a", "exact": "keep"}},
        {"rule": [{"layers": "a"}]},
        {"rule": [{"exact": "keep", "group_size": 1}]},
        {"rule": [{"layers": "", "exact": "keep"}]},
        {"default": {"group_size": 2, "rank": 16}},
        {"rule": [{"layers": "a", "group_size": 2, "rank": 16}]},
        *(
            {"default": {key: value}}
            for key, value in [
                ("group_size", 0),
                ("group_size", True),
                ("group_size", 2.5),
                ("group_size", "2"),
                ("rank", 15),
                ("rounds", 0),
                ("rounds", 3),
                ("causal", "no"),
                ("estimator", "mean"),
                ("grouping_block", 0),
                ("grouping_block", "all"),
                ("grouping_block", 2**63),
                ("group_size", 2**63),
                ("min_seq_len", -1),
                ("exact", "no"),
                ("exact", None),
            ]
        ),
    ],
)
def test_schema_rejects_what_the_policy_rejects(document: dict[str, Any]) -> None:
    schema = Policy.json_schema()
    assert not conforms(document, schema, schema)
    error_of(document)


def test_schema_tells_an_editor_what_it_needs() -> None:
    schema = Policy.json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    tables = schema["$defs"]
    assert tuple(tables["Default"]["properties"]) == FIELDS
    assert tuple(tables["Rule"]["properties"]) == ("layers", *FIELDS)
    for table, has_defaults in (("Default", True), ("Rule", False)):
        for name, part in tables[table]["properties"].items():
            assert len(part["description"]) > 40, name
            assert ("default" in part) == (has_defaults and PLAIN[name] is not None), name
    assert tables["Default"]["properties"]["estimator"]["enum"] == list(ESTIMATORS)
    assert "const" not in json.dumps(schema)  # draft 4, which editors read, has no such keyword
