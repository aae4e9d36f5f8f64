"""The few keywords of JSON schema (draft 2020-12) that `recipes --schema` uses: checked and drawn."""

import math
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

_KINDS = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": int | float,
}
_KNOWN = {
    "$schema", "title", "description", "default", "type", "properties", "required", "additionalProperties",
    "items", "enum", "anyOf", "minimum", "maximum", "exclusiveMinimum", "multipleOf",
}  # fmt: skip

_LETTERS = "aZ09 *.:-#'\"[]{}&!|>%@`,?\\\t\n\x00\x07\x85\u2028\ufeff\U0001f600é"  # what YAML must quote, too


def problems(schema: dict[str, Any], value: Any, place: str = "") -> Iterator[str]:
    """What of a value contradicts a schema; an unknown keyword is an error of the schema."""
    assert set(schema) <= _KNOWN, set(schema) - _KNOWN
    if "anyOf" in schema and all(any(problems(s, value)) for s in schema["anyOf"]):
        yield f"{place} is none of the alternatives"
    if "enum" in schema and not any(type(v) is type(value) and v == value for v in schema["enum"]):
        yield f"{place} is no choice"
    if "type" in schema:
        is_bool = isinstance(value, bool)
        if not isinstance(value, _KINDS[schema["type"]]) or is_bool != (schema["type"] == "boolean"):
            yield f"{place} is no {schema['type']}"
            return
    if isinstance(value, dict):
        yield from _object_problems(schema, value, place)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from problems(schema.get("items", {}), item, f"{place}[{i}]")
    elif isinstance(value, int | float):
        yield from _number_problems(schema, value, place)


def _object_problems(schema: dict[str, Any], value: dict[Any, Any], place: str) -> Iterator[str]:
    properties, others = schema.get("properties", {}), schema.get("additionalProperties", {})
    yield from (f"{place}.{key} is missing" for key in schema.get("required", ()) if key not in value)
    for key, inner in value.items():
        if key in properties:
            yield from problems(properties[key], inner, f"{place}.{key}")
        elif others is False:
            yield f"{place}.{key} is unknown"
        else:
            yield from problems(others, inner, f"{place}.{key}")


def _number_problems(schema: dict[str, Any], value: float, place: str) -> Iterator[str]:
    if not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        yield f"{place} is out of range"
    if "exclusiveMinimum" in schema and value <= schema["exclusiveMinimum"]:
        yield f"{place} is too small"
    if "multipleOf" in schema and value % schema["multipleOf"]:
        yield f"{place} is no multiple"


def values(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Plain data that a schema allows."""
    if "anyOf" in schema:
        return st.one_of([values(alternative) for alternative in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    match schema["type"]:
        case "object":
            return st.fixed_dictionaries({key: values(s) for key, s in schema["properties"].items()})
        case "array":
            return st.lists(values(schema["items"]), max_size=3)
        case "integer":
            step = schema.get("multipleOf", 1)
            low, high = schema.get("minimum", -(2**40)), schema.get("maximum", 2**40)
            return st.integers(-(-low // step), high // step).map(lambda n: n * step)
        case "number":
            low = schema.get("minimum", schema.get("exclusiveMinimum"))
            strict = "exclusiveMinimum" in schema
            high = schema.get("maximum", 1e300)
            return st.floats(low, high, exclude_min=strict, allow_nan=False).filter(math.isfinite)
        case "boolean":
            return st.booleans()
    return st.text(_LETTERS, max_size=12)
