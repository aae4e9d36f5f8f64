"""Constants as JavaScript: an ES module with a named export each."""

from typing import Any, Final

from fastvlm_convert.bundle.constants.contract import ClientContract, Graph, Tensor, facts
from fastvlm_convert.bundle.constants.literals import HEADER, camel_name, joined, quoted, utf16_escape

_TENSOR: Final = "{name: string, dtype: string, shape: readonly number[]}"
_TYPES: Final[dict[Any, str]] = {
    bool: "boolean",
    int: "number",
    float: "number",
    str: "string",
    tuple[int, ...]: "readonly number[]",
    tuple[float, ...]: "readonly number[]",
    tuple[str, ...]: "readonly string[]",
    Graph: "Graph",
}
_TYPEDEFS: Final = f"""\
/**
 * A graph's input or output; a dimension that the caller chooses is -1.
 * @typedef {{{_TENSOR}}} Tensor
 */

/**
 * One graph: what a runtime opens, every file that it needs, and what goes in and comes out.
 * @typedef {{{{path: string, files: readonly string[], function: string,
 *   inputs: readonly Tensor[], outputs: readonly Tensor[]}}}} Graph
 */
"""


def render(contract: ClientContract) -> str:
    """The content of `bundle_constants.js`."""
    lines = [f"// {HEADER}", "", _TYPEDEFS.rstrip("\n")]
    for fact in facts(contract):
        mark = " | null" if fact.is_optional else ""
        lines.append(f"\n/** {fact.comment} @type {{{_TYPES[fact.type]}{mark}}} */")
        lines.append(f"export const {camel_name(fact.name)} = {_literal(fact.value)};")
    return "\n".join([*lines, ""])


def _literal(value: Any) -> str:  # noqa: ANN401
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case str():
            return quoted(value, utf16_escape)
        case tuple():
            return f"Object.freeze([{joined(map(_literal, value))}])"
        case Graph() | Tensor():
            parts = (f"{name}: {_literal(inner)}" for name, inner in vars(value).items())
            return f"Object.freeze({{{joined(parts)}}})"
    return repr(value)
