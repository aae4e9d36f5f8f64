"""Plain data, as YAML and JSON hold it, to frozen dataclasses; strict, with errors for people."""

import dataclasses
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from fastvlm_convert.errors import ConversionError, RecipeError, shown
from fastvlm_convert.json_file import read_json_file

_T = TypeVar("_T")
_FEW = 4  # unknown settings that a message names
_LARGEST = int(sys.float_info.max)

_DESCRIPTION, _LIMITS = "description", "limits"  # of a field's metadata


def about(
    description: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    exclusive_minimum: float | None = None,
    multiple_of: int | None = None,
    choices: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Metadata of a dataclass's field: what it means, and limits that its type cannot express.

    `schema_of` turns them into keywords of a JSON schema. A dataclass enforces its limits itself, with
    `check_ranges` where a minimum and a maximum are all there is.

    Args:
        description: For people; a sentence or two.
        minimum: Least number allowed.
        maximum: Largest number allowed.
        exclusive_minimum: Number that must be exceeded.
        multiple_of: What numbers must be multiples of.
        choices: The only numbers allowed.
    """
    limits = {
        "minimum": minimum,
        "exclusiveMinimum": exclusive_minimum,
        "maximum": maximum,
        "multipleOf": multiple_of,
        "enum": None if choices is None else list(choices),
    }
    return {_DESCRIPTION: description, _LIMITS: {key: n for key, n in limits.items() if n is not None}}


def setting(default: _T, description: str, **limits: Any) -> _T:  # noqa: ANN401
    """A dataclass's field with a default, described by `about`.

    Returns:
        The field; to a type checker, its default.
    """
    field: Any = dataclasses.field(default=default, metadata=about(description, **limits))
    return field


def check_ranges(settings: object, *names: str) -> None:
    """See that numbers lie within the minimum and maximum of their fields.

    Args:
        settings: An instance of a dataclass.
        names: Its fields to check.

    Raises:
        RecipeError: Names the first that does not, and what is allowed.
    """
    fields = {field.name: field for field in dataclasses.fields(settings)}  # type: ignore[arg-type]
    for name in names:
        limits, value = fields[name].metadata[_LIMITS], getattr(settings, name)
        below, highest = limits.get("exclusiveMinimum"), limits["maximum"]
        if below is not None:
            allowed = f"above {below} and at most {_number(highest)}"
            is_allowed = below < value <= highest
        else:
            allowed = f"{limits['minimum']} to {_number(highest)}"
            is_allowed = limits["minimum"] <= value <= highest
        if not is_allowed:
            raise RecipeError(f"{name} is {_number(value)}, expected {allowed}")


def _number(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def has_schema(path: Path, schema: str) -> bool:
    """Whether a JSON file says it follows a schema, of whatever version and however damaged the rest."""
    try:
        value = read_json_file(path)
    except (OSError, ValueError):
        return False
    return isinstance(value, dict) and value.get("schema") == schema


def from_plain(kind: type[_T], value: object, prefix: str = "") -> _T:
    """Build a dataclass from plain data, as YAML and JSON hold it.

    Args:
        kind: The dataclass; its fields may be dataclasses, tuples, dictionaries, literals and plain types.
        value: The data.
        prefix: Where it stands, for messages.

    Raises:
        RecipeError: A setting is unknown, missing, of the wrong type or impossible.
    """
    place = prefix.rstrip(".") or f"the {kind.__name__.lower()}"
    if not isinstance(value, dict):
        raise RecipeError(f"{place} is {shown(value)}, expected settings")
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = [shown(key).strip("'") for key in value if key not in fields]
    if unknown:
        raise RecipeError(
            f"unknown setting {', '.join(prefix + key for key in unknown[:_FEW])}",
            hint=f"allowed in {place}: {', '.join(fields)}",
        )
    required = [n for n, f in fields.items() if f.default is dataclasses.MISSING]
    missing = [prefix + name for name in required if name not in value]
    if missing:
        raise RecipeError(
            f"missing setting {', '.join(missing)}", hint=f"{place} needs: {', '.join(required)}"
        )
    hints = typing.get_type_hints(kind)
    built = {name: _value(hints[name], given, f"{prefix}{name}") for name, given in value.items()}
    try:
        return kind(**built)
    except ConversionError as error:  # the settings are legal one by one, but not together
        raise type(error)(f"{prefix}{error.args[0]}", hint=error.given_hint) from error


_KINDS = {
    int: "an integer", float: "a number", bool: "true or false", str: "a text",
    tuple: "a list", dict: "a mapping", types.NoneType: "null",
}  # fmt: skip


def _value(hint: Any, given: object, place: str) -> Any:  # noqa: ANN401
    if dataclasses.is_dataclass(hint):
        return from_plain(hint, given, f"{place}.")  # type: ignore[arg-type]
    origin = typing.get_origin(hint)
    if origin is tuple and isinstance(given, list | tuple):
        return tuple(_value(typing.get_args(hint)[0], v, f"{place}[{i}]") for i, v in enumerate(given))
    if origin is dict and isinstance(given, dict):
        return {key: _value(typing.get_args(hint)[1], v, f"{place}.{key}") for key, v in given.items()}
    is_union = origin in (typing.Union, types.UnionType)
    kinds = typing.get_args(hint) if is_union else (hint,)
    settings = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
    if settings and isinstance(given, dict):
        return from_plain(settings[0], given, f"{place}.")  # type: ignore[arg-type]
    literals = [v for k in kinds if typing.get_origin(k) is Literal for v in typing.get_args(k)]
    plain = [k for k in kinds if typing.get_origin(k) is not Literal]
    if any(type(given) is type(v) and given == v for v in literals):  # False is no 0 here
        return given
    if type(given) in plain:
        return given
    if type(given) is int and float in plain and abs(given) <= _LARGEST:
        return float(given)
    allowed = [shown(v) for v in literals]
    allowed += ["settings" if k in settings else _KINDS[typing.get_origin(k) or k] for k in plain]
    raise RecipeError(f"{place} is {shown(given)}, expected {' or '.join(allowed)}")


_SCHEMA_KINDS = {int: "integer", float: "number", bool: "boolean", str: "string", types.NoneType: "null"}


def schema_of(kind: type) -> dict[str, Any]:
    """JSON schema (draft 2020-12) of the plain data from which `from_plain` builds a dataclass.

    Args:
        kind: The dataclass. Descriptions and limits are those of its fields, see `about`; rules between
            fields have no place in a schema.
    """
    hints = typing.get_type_hints(kind)
    properties, required = {}, []
    for field in dataclasses.fields(kind):
        schema = _schema(hints[field.name], field.metadata.get(_LIMITS, {}))
        if _DESCRIPTION in field.metadata:
            schema["description"] = field.metadata[_DESCRIPTION]
        if field.default is dataclasses.MISSING:
            required.append(field.name)
        elif not dataclasses.is_dataclass(field.default):
            schema["default"] = list(field.default) if isinstance(field.default, tuple) else field.default
        properties[field.name] = schema
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _schema(hint: Any, limits: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ANN401
    """The schema of a type; limits hold for its numbers, not for its literals."""
    if dataclasses.is_dataclass(hint):
        return schema_of(hint)  # type: ignore[arg-type]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        return {"type": "array", "items": _schema(arguments[0], {}), **limits}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(arguments[1], {}), **limits}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_schema(member, limits) for member in arguments]}
    return {"type": _SCHEMA_KINDS[hint], **limits}
