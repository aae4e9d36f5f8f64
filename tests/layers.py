"""What imports what inside the package, read from its source, and the picture of it in docs/architecture.md.

Run `make docs` (`python -m tests.layers`) to redraw the picture after imports or docstrings have changed.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fastvlm_convert"
NAME = PACKAGE.name
FILES = sorted(PACKAGE.rglob("*.py"))
DOCUMENT = ROOT / "docs" / "architecture.md"
BEGIN = "<!-- drawn by `make docs` from the imports: change the code, not this block -->\n"
END = "<!-- end of the drawing -->\n"


def part_of(path: Path) -> str:
    """The top-level module or folder that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(source: str) -> Iterator[tuple[str, int]]:
    """Every module that a source imports anywhere, inside functions too, with the line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            assert node.module is not None
            if node.module == NAME:  # `from package import part`
                yield from ((f"{NAME}.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield node.module, node.lineno


def parts_imported(source: str) -> Iterator[tuple[str, int]]:
    """The parts of our own package that a source imports; names that the package itself defines are none."""
    for module, line in imports_of(source):
        names = module.split(".")
        if names[0] == NAME and len(names) > 1 and is_part(names[1]):
            yield names[1], line


def is_part(name: str) -> bool:
    """Whether a name is a top-level module or folder of the package."""
    return (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()


def import_graph() -> dict[str, set[str]]:
    """The parts that each part imports, itself left out."""
    graph: dict[str, set[str]] = {}
    for path in FILES:
        if path != PACKAGE / "__init__.py":
            part = part_of(path)
            used = {other for other, _ in parts_imported(path.read_text(encoding="utf-8"))}
            graph[part] = graph.get(part, set()) | used - {part}
    return graph


def reachable(graph: dict[str, set[str]], part: str) -> set[str]:
    """Everything that a part needs, directly or through others."""
    found: set[str] = set()
    waiting = [part]
    while waiting:
        new = graph[waiting.pop()] - found
        found |= new
        waiting.extend(new)
    return found


def arrows(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The imports that follow from no others: a -> c is dropped beside a -> b -> c."""
    return {
        part: {used for used in direct if not any(used in reachable(graph, other) for other in direct)}
        for part, direct in graph.items()
    }


def heights(graph: dict[str, set[str]]) -> dict[str, int]:
    """How many imports a part stands above the ground, along the longest way down."""
    found: dict[str, int] = {}

    def height(part: str) -> int:
        if part not in found:
            found[part] = 1 + max((height(used) for used in graph[part]), default=-1)
        return found[part]

    for part in graph:
        height(part)
    return found


def purpose(part: str) -> str:
    """The first line of a part's docstring."""
    folder, module = PACKAGE / part / "__init__.py", PACKAGE / f"{part}.py"
    source = (folder if folder.exists() else module).read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def drawing() -> str:
    """The diagram of the layers, and a table of what each part is for, in Markdown."""
    graph = {part: used for part, used in import_graph().items() if not part.startswith("__")}
    height, reduced = heights(graph), arrows(graph)
    order = sorted(graph, key=lambda part: (-height[part], part))
    lines = ["```mermaid", "flowchart TD"]
    lines += [f"  {part} --> {' & '.join(sorted(reduced[part]))}" for part in order if reduced[part]]
    lines += ["```", "", "| height | part | what it is for |", "|---|---|---|"]
    for part in order:
        name = part if (PACKAGE / part).is_dir() else f"{part}.py"
        text = purpose(part).replace("|", r"\|")
        lines.append(f"| {height[part]} | [`{name}`](../{NAME}/{name}) | {text} |")
    return "\n".join(lines) + "\n"


def redraw() -> None:
    """Write the drawing into the document."""
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{drawing()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    redraw()
