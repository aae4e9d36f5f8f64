"""The table of the server's settings in docs/serve.md, written from the code.

Run `make docs` (`python -m tests.settings_table`) after a setting has changed.
"""

from collections.abc import Iterator
from pathlib import Path

from fastvlm_convert.serve.settings import PREFIX, Settings
from fastvlm_convert.serve.settings_sources import allowed_values

DOCUMENT = Path(__file__).parent.parent / "docs" / "serve.md"
BEGIN = "<!-- written by `make docs` from the settings: change the code, not this block -->\n"
END = "<!-- end of the settings -->\n"


def rows() -> Iterator[str]:
    """One a setting."""
    for name, field in Settings.model_fields.items():
        default = field.default
        if isinstance(default, bool):
            shown = str(default).lower()
        elif isinstance(default, float):
            shown = f"{default:g}"
        else:
            shown = "-" if default in (None, ()) else str(default)
        yield f"| `{PREFIX}{name.upper()}` | {shown} | {field.description} | {allowed_values(field)} |"


def table() -> str:
    """As it should stand in the document."""
    return "\n".join(["| setting | default | what | allowed |", "|---|---|---|---|", *rows()])


def stored() -> str:
    """As it stands there."""
    return DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].strip()


def main() -> None:
    """Write it."""
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{table()}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
