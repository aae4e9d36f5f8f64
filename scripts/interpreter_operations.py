"""Write the list of operations in docs/interpreter.md anew, from the table that the interpreter runs by.

    python scripts/interpreter_operations.py

A test fails as long as the list in the document is another one.
"""

import sys
from pathlib import Path

from fastvlm_convert.mil import ops  # fills the table  # noqa: F401
from fastvlm_convert.mil.ops.table import CONSTEXPRS, OPS, UNSUPPORTED
from fastvlm_convert.mil.plan import CONTROL

DOCUMENT = Path(__file__).parent.parent / "docs" / "interpreter.md"
BEGIN, END = "<!-- operations: made by scripts/interpreter_operations.py -->", "<!-- end of operations -->"
TITLES = {
    "classify": "classifier", "conv": "convolution", "elementwise": "arithmetic",
    "gather": "gather and scatter", "norm": "normalization", "pool": "pooling", "product": "matrix products",
    "quantize": "quantization", "ranking": "sorting and selection", "reduction": "reductions",
    "shape": "shape and layout",
}  # fmt: skip


def families() -> dict[str, list[str]]:
    """All operations that run, by what they do."""
    found: dict[str, list[str]] = {"program": sorted(CONTROL - {"read_state", "write_state"})}
    for name, op in sorted(OPS.items()):
        family = op.function.__module__.rpartition(".")[2]
        found.setdefault(TITLES.get(family, family), []).append(name)
    found["state"] = sorted({*found["state"], "write_state"})
    found["compressed weights"] = sorted(CONSTEXPRS)
    return dict(sorted(found.items()))


def section() -> str:
    """The section of the document, with its markers."""
    known = families()
    lines = [BEGIN, "", "| family | operations |", "|---|---|"]
    lines += [f"| {family} | {', '.join(f'`{name}`' for name in names)} |" for family, names in known.items()]
    lines += ["", f"{sum(map(len, known.values()))} in all. Not run:", ""]
    lines += [f"- `{name}`: {reason}" for name, reason in sorted(UNSUPPORTED.items())]
    return "\n".join([*lines, "", END])


def with_section(text: str) -> str:
    """The document with the section made anew."""
    before, _, rest = text.partition(BEGIN)
    _, marker, after = rest.partition(END)
    if not marker:
        sys.exit(f"{DOCUMENT} lacks the markers {BEGIN} and {END}")
    return before + section() + after


if __name__ == "__main__":
    DOCUMENT.write_text(with_section(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
