"""What a model has answered so far, so that an interrupted evaluation goes on where it was.

A journal is a file of JSON lines in the user's cache, one model's. Its first line says to what it is bound:
the model, the questions with their pictures, the settings, and what executes; the file's name is a hash of
that, so another model's or dataset's journal is never even opened. Every line has a checksum. A line that
does not match, such as one that a crash cut short, is left out, and its question is asked again.
"""

import dataclasses
import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self, TextIO

from fastvlm_convert.atomic_file import whole_file
from fastvlm_convert.errors import ConversionError
from fastvlm_convert.json_file import parse_json
from fastvlm_convert.regular_file import read_text
from fastvlm_convert.user_cache import Kind

# The version counts up when pictures, prompts or the decoding of answers change, or the file.
JOURNALS: Final = Kind("evaluations", "answers of unfinished evaluations", (1,), ".jsonl", digits=32)
SCHEMA: Final = "fastvlm-convert/evaluation-journal/2"
_MAX_BYTES: Final = 1 << 30
_CHECKSUM: Final = "checksum"
_FIELDS: Final = {"id", "text", "finished"}
_FEW: Final = 5


@dataclass(frozen=True)
class Answered:
    """What a model said.

    Attributes:
        text: Its answer.
        finished: Whether it ended the answer itself, rather than the limit of tokens.
    """

    text: str
    finished: bool


@dataclass(frozen=True)
class Binding:
    """What answers depend on.

    Attributes:
        model_sha256: Hash of the model's files.
        target: Which of a bundle's targets runs; None for a checkpoint.
        executed_by: What executes it.
        dataset_sha256: Hash of questions and pictures.
        max_new_tokens: Longest answer in tokens; None is the default.
        instruction: What follows every question, or None.
        method: Version of the code that prepares pictures and prompts.
    """

    model_sha256: str
    target: str | None
    executed_by: str
    dataset_sha256: str
    max_new_tokens: int | None
    instruction: str | None
    method: int = JOURNALS.version[0]

    @property
    def path(self) -> Path:
        """Where the journal is."""
        name = hashlib.sha256(_compact(dataclasses.asdict(self)).encode()).hexdigest()
        return JOURNALS.path(name[: JOURNALS.digits])


class Journal:
    """An open journal, to which answers are added.

    Args:
        answers: What it held.
        notes: What the user should know of it.
        path: Where it is, or None where none can be kept.
        file: It, open for appending.
    """

    def __init__(
        self,
        answers: Mapping[str, Answered],
        notes: tuple[str, ...],
        path: Path | None = None,
        file: TextIO | None = None,
    ) -> None:
        self.answers = dict(answers)
        self.notes = notes
        self.path = path
        self._file = file

    def add(self, name: str, answered: Answered) -> None:
        """Note an item's answer; it outlives the process."""
        self.answers[name] = answered
        if self._file is not None:
            self._file.write(_line({"id": name, **dataclasses.asdict(answered)}))
            self._file.flush()

    @classmethod
    def without_file(cls, reason: str) -> Self:
        """A journal where none can be kept."""
        return cls({}, (f"no journal can be kept, so an interrupted run would start over: {reason}",))


@contextmanager
def open_journal(binding: Binding) -> Iterator[Journal]:
    """The journal of a model's answers, new or as an interrupted run left it.

    Raises:
        ConversionError: Another process is adding to it.
    """
    path = binding.path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_suffix(".lock").open("w")
    except OSError as error:
        yield Journal.without_file(f"{error.strerror} ({error.filename})")
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConversionError(
                "this model is being evaluated on these questions already",
                where=path,
                hint="wait for the other run, or end it; the next one goes on where it was",
            ) from error
        head = {"schema": SCHEMA, **dataclasses.asdict(binding)}
        answers, notes = _read(path, head)
        # Rewritten rather than appended to: after a line that was cut short, the next would be damaged too.
        with whole_file(path) as partial, partial.open("w", encoding="utf-8") as file:
            file.write(_line(head))
            file.writelines(_line({"id": name, **dataclasses.asdict(a)}) for name, a in answers.items())
        with path.open("a", encoding="utf-8") as file:
            yield Journal(answers, notes, path, file)


def remove_journal(path: Path) -> None:
    """Forget a journal whose evaluation is complete and reported."""
    for file in (path, path.with_suffix(".lock")):
        with suppress(OSError):  # what cannot be removed harms nobody
            file.unlink(missing_ok=True)


def _read(path: Path, head: Mapping[str, Any]) -> tuple[dict[str, Answered], tuple[str, ...]]:
    """The answers in a journal, and what was wrong with it."""
    try:
        lines = read_text(path, _MAX_BYTES).split("\n")
    except FileNotFoundError:
        return {}, ()
    except (OSError, ValueError) as error:
        return {}, (f"the journal {path} cannot be read and is begun anew: {error}",)
    if _value(lines[0]) != head:
        return {}, (f"the journal {path} is not of this evaluation (line 1) and is begun anew",)
    answers, damaged = {}, []
    for number, line in enumerate(lines[1:], 2):
        value = _value(line)
        if value is not None and value.keys() == _FIELDS:
            answers[value["id"]] = Answered(value["text"], value["finished"])
        elif line:
            damaged.append(number)
    notes = [f"{len(answers)} answers come from the journal of an interrupted run, {path}"] if answers else []
    if damaged:
        some = ", ".join(str(number) for number in damaged[:_FEW]) + (", ..." if len(damaged) > _FEW else "")
        notes.append(f"damaged lines of {path} are left out, their questions asked again: {some}")
    return answers, tuple(notes)


def _line(value: Mapping[str, Any]) -> str:
    return _compact({**value, _CHECKSUM: _checksum(value)}) + "\n"


def _value(line: str) -> dict[str, Any] | None:
    """What a line says, or None if it is damaged."""
    try:
        value = parse_json(line)
    except ValueError:
        return None
    if not isinstance(value, dict) or value.pop(_CHECKSUM, None) != _checksum(value):
        return None
    return value


def _checksum(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(_compact(value).encode()).hexdigest()[:16]


def _compact(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
