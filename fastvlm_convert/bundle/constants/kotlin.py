"""Constants as Kotlin: an object in package `fastvlm`, for Kotlin 1.3 and later."""

from typing import Any, Final

from fastvlm_convert.bundle.constants.contract import ClientContract, Graph, Tensor, facts
from fastvlm_convert.bundle.constants.literals import (
    CLASS,
    HEADER,
    PACKAGE,
    joined,
    quoted,
    upper_name,
    utf16_escape,
)

_TYPES: Final[dict[Any, str]] = {
    bool: "Boolean",
    int: "Int",
    float: "Double",
    str: "String",
    tuple[int, ...]: "List<Int>",
    tuple[float, ...]: "List<Double>",
    tuple[str, ...]: "List<String>",
    Graph: "BundleGraph",
}
_CLASSES: Final = """\
/** A graph's input or output; a dimension that the caller chooses is -1. */
class BundleTensor(val name: String, val dtype: String, val shape: List<Int>)

/** One graph: what a runtime opens, every file that it needs, and what goes in and comes out. */
class BundleGraph(
    val path: String,
    val files: List<String>,
    val function: String,
    val inputs: List<BundleTensor>,
    val outputs: List<BundleTensor>
)
"""


def render(contract: ClientContract) -> str:
    """The content of `BundleConstants.kt`."""
    lines = [f"// {HEADER}", f"package {PACKAGE}", "", _CLASSES, f"object {CLASS} {{"]
    for fact in facts(contract):
        mark = "?" if fact.is_optional else ""
        lines.append(f"    /** {fact.comment} */")
        lines.append(f"    val {upper_name(fact.name)}: {_TYPES[fact.type]}{mark} = {_literal(fact.value)}\n")
    return "\n".join([*lines[:-1], lines[-1].rstrip("\n"), "}", ""])


def _literal(value: Any) -> str:  # noqa: ANN401
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case str():
            return quoted(value, utf16_escape, also="$")
        case tuple():
            return f"listOf({joined(map(_literal, value))})"
        case Graph():
            parts = (value.path, value.files, value.function, value.inputs, value.outputs)
            return f"BundleGraph({joined(map(_literal, parts))})"
        case Tensor():
            return f"BundleTensor({joined(map(_literal, (value.name, value.dtype, value.shape)))})"
    return repr(value)
