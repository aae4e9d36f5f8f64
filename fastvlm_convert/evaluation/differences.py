"""The answers that differ, side by side: for people as Markdown, for programs as JSON lines."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from fastvlm_convert.errors import OutputError, shown
from fastvlm_convert.evaluation.results import Evaluation, ItemResult

SUFFIXES: Final = (".md", ".jsonl")


def check_suffix(path: Path) -> None:
    """See that a file's ending says how to write it.

    Raises:
        OutputError: It does not.
    """
    if path.suffix not in SUFFIXES:
        raise OutputError(
            f"the ending {shown(path.suffix)} is not known",
            where=path,
            hint="end the name with .md for people or .jsonl for programs",
        )


def differing(evaluation: Evaluation) -> list[ItemResult]:
    """The questions that models answer with different texts; of one model, those that it answers wrongly."""
    if len(evaluation.models) > 1:
        return [item for item in evaluation.items if item.differs]
    metric = evaluation.dataset.metric
    return [item for item in evaluation.items if (item.responses[0].scores[metric] or 0.0) < 1]


def differences_text(evaluation: Evaluation, suffix: str) -> str:
    """The content of the file.

    Args:
        evaluation: What was found.
        suffix: `.md` or `.jsonl`.
    """
    names = [model.name for model in evaluation.models]
    items = differing(evaluation)
    if suffix == ".jsonl":
        return "".join(f"{_json_line(names, item)}\n" for item in items)
    asked = evaluation.dataset.num_items
    kind = "Differing answers" if len(names) > 1 else "Wrong answers"
    lines = [f"# {kind}: {len(items)} of {asked} questions of {_plain(evaluation.dataset.name)}", ""]
    for item in items:
        lines += [f"## {_plain(item.id)}", "", f"{_plain(item.image)}: {_plain(item.question)}", ""]
        lines += [*_table(names, item, evaluation.dataset.metric), ""]
    return "\n".join(lines)


def _table(names: Sequence[str], item: ItemResult, metric: str) -> list[str]:
    rows = ["| | answer | score |", "|---|---|---|"]
    rows.append(f"| *expected* | {_plain(' / '.join(dict.fromkeys(item.answers)))} | |")
    for name, response in zip(names, item.responses, strict=True):
        score = dict(response.scores)[metric]  # type: ignore[index]
        shown_score = "" if score is None else f"{score:.2f}"
        rows.append(f"| {_plain(name)} | {_plain(response.text)} | {shown_score} |")
    return rows


def _json_line(names: Sequence[str], item: ItemResult) -> str:
    responses = {name: asdict(response) for name, response in zip(names, item.responses, strict=True)}
    return json.dumps({**asdict(item), "responses": responses})


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    line = " ".join(text.split())
    return "".join(f"\\{char}" if char in _MARKUP else char for char in line)


_MARKUP: Final = frozenset("\\`*_{}[]<>#|!~&")
