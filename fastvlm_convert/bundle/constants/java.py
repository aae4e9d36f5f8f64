"""Constants as Java: a class in package `fastvlm`, for Java 8 and later."""

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
    bool: "boolean",
    int: "int",
    float: "double",
    str: "String",
    tuple[int, ...]: "List<Integer>",
    tuple[float, ...]: "List<Double>",
    tuple[str, ...]: "List<String>",
    Graph: "Graph",
}
_CLASSES: Final = """\
    private BundleConstants() {}

    /** A graph's input or output; a dimension that the caller chooses is -1. */
    public static final class Tensor {
        public final String name;
        public final String dtype;
        public final List<Integer> shape;

        Tensor(String name, String dtype, List<Integer> shape) {
            this.name = name;
            this.dtype = dtype;
            this.shape = shape;
        }
    }

    /** One graph: what a runtime opens, every file that it needs, and what goes in and comes out. */
    public static final class Graph {
        public final String path;
        public final List<String> files;
        public final String function;
        public final List<Tensor> inputs;
        public final List<Tensor> outputs;

        Graph(String path, List<String> files, String function, List<Tensor> inputs, List<Tensor> outputs) {
            this.path = path;
            this.files = files;
            this.function = function;
            this.inputs = inputs;
            this.outputs = outputs;
        }
    }

    @SafeVarargs
    private static <T> List<T> list(T... items) {
        List<T> found = new ArrayList<>();
        for (T item : items) {
            found.add(item);
        }
        return Collections.unmodifiableList(found);
    }
"""


def render(contract: ClientContract) -> str:
    """The content of `BundleConstants.java`."""
    imports = [f"import java.util.{name};" for name in ("ArrayList", "Collections", "List")]
    lines = [f"// {HEADER}", f"package {PACKAGE};", "", *imports, "", f"public final class {CLASS} {{"]
    lines.append(_CLASSES.rstrip("\n"))
    for fact in facts(contract):
        lines.append(f"\n    /** {fact.comment}{' May be null.' if fact.is_optional else ''} */")
        declared = f"public static final {_TYPES[fact.type]} {upper_name(fact.name)}"
        lines.append(f"    {declared} = {_literal(fact.value)};")
    return "\n".join([*lines, "}", ""])


def _literal(value: Any) -> str:  # noqa: ANN401
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case str():
            return quoted(value, utf16_escape)
        case tuple():
            return f"list({joined(map(_literal, value))})"
        case Graph():
            parts = (value.path, value.files, value.function, value.inputs, value.outputs)
            return f"new Graph({joined(map(_literal, parts))})"
        case Tensor():
            return f"new Tensor({joined(map(_literal, (value.name, value.dtype, value.shape)))})"
    return repr(value)
