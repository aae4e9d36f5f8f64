"""Constants as Swift: an enum without cases."""

from typing import Any, Final

from fastvlm_convert.bundle.constants.contract import ClientContract, Graph, Tensor, facts
from fastvlm_convert.bundle.constants.literals import (
    CLASS,
    HEADER,
    braced_escape,
    camel_name,
    joined,
    quoted,
)

_TYPES: Final[dict[Any, str]] = {
    bool: "Bool",
    int: "Int",
    float: "Double",
    str: "String",
    tuple[int, ...]: "[Int]",
    tuple[float, ...]: "[Double]",
    tuple[str, ...]: "[String]",
    Graph: "Graph",
}
_CLASSES: Final = """\
    /// A graph's input or output; a dimension that the caller chooses is -1.
    public struct Tensor: Equatable, Sendable {
        public let name: String
        public let dtype: String
        public let shape: [Int]
    }

    /// One graph, or one function of a package, and what goes in and comes out.
    public struct Graph: Equatable, Sendable {
        public let path: String
        public let files: [String]
        public let function: String
        public let inputs: [Tensor]
        public let outputs: [Tensor]
    }
"""


def render(contract: ClientContract) -> str:
    """The content of `BundleConstants.swift`."""
    lines = [f"// {HEADER}", "", f"public enum {CLASS} {{", _CLASSES.rstrip("\n")]
    for fact in facts(contract):
        mark = "?" if fact.is_optional else ""
        lines.append(f"\n    /// {fact.comment}")
        lines.append(
            f"    public static let {camel_name(fact.name)}: {_TYPES[fact.type]}{mark} = "
            f"{_literal(fact.value)}"
        )
    return "\n".join([*lines, "}", ""])


def _literal(value: Any) -> str:  # noqa: ANN401
    match value:
        case None:
            return "nil"
        case bool():
            return str(value).lower()
        case str():
            return quoted(value, braced_escape)
        case tuple():
            return f"[{joined(map(_literal, value))}]"
        case Graph() | Tensor():
            parts = (f"{name}: {_literal(inner)}" for name, inner in vars(value).items())
            return f"{type(value).__name__}({joined(parts)})"
    return repr(value)
