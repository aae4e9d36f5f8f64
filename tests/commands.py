"""The commands in our Markdown pages: what a reader would copy into a shell."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TOOL = "fastvlm-convert"
NETWORK = "<!-- needs the network -->"

_BLOCK = re.compile(rf"^(?P<mark>{re.escape(NETWORK)}\n)?```sh\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
_FENCE = re.compile(r"^\s*```(\w*)\n(.*?)^\s*```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A block of shell commands.

    Attributes:
        commands: One list of words each; comments are dropped.
        needs_network: Whether the page marks it so.
    """

    commands: tuple[tuple[str, ...], ...]
    needs_network: bool


def words(line: str) -> tuple[str, ...]:
    """A line as a shell splits it, without its comment."""
    return tuple(shlex.split(line, comments=True))


def shell_blocks(page: Path) -> list[Block]:
    """The blocks of a page that are marked as shell commands, in order."""
    found = []
    for block in _BLOCK.finditer(page.read_text(encoding="utf-8")):
        lines = [words(line) for line in block["body"].splitlines()]
        found.append(Block(tuple(line for line in lines if line), block["mark"] is not None))
    return found


def tool_commands(page: Path) -> list[tuple[str, ...]]:
    """The arguments of every command of ours on a page, in blocks and within sentences."""
    text = page.read_text(encoding="utf-8")
    lines = [line for _, body in _FENCE.findall(text) for line in body.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", _FENCE.sub("", text))
    found = [words(line) for line in lines if line.startswith(f"{TOOL} ")]
    return [line[1 : line.index(">")] if ">" in line else line[1:] for line in found]
