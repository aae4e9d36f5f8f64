"""A validator of the few keywords of JSON schema (draft 2020-12) that `recipes --schema` uses."""

from collections.abc import Iterator
from typing import Any

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
