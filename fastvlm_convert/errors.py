"""The errors a user can meet. Each says what was given, where, what is allowed and what to do next.

Only the command line turns them into exit codes: every `ConversionError` is exit code 2. A gate that
fails is no error but a result (exit code 1).
"""

import reprlib
from collections.abc import Iterable
from difflib import SequenceMatcher
from typing import ClassVar, Final

_ALIKE: Final = 0.7

MAX_MESSAGE: Final = 300  # characters of a message: what a file holds must not flood a terminal
_MAX_SHOWN: Final = 100  # of one value in it


class _Json(reprlib.Repr):
    """Values in the words of JSON and YAML, shortened."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 2, 60, 60

    def repr_NoneType(self, x: None, level: int) -> str:  # noqa: N802  the name that reprlib looks up
        return "null"

    def repr_bool(self, x: bool, level: int) -> str:
        return "true" if x else "false"

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to print more than 4300 digits, and nobody reads more than a few.
        return str(x) if x.bit_length() <= 128 else f"an integer of some {x.bit_length() * 3 // 10} digits"


_JSON: Final = _Json()


def shown(value: object) -> str:
    """A value that a file or a user gave, for a message: as JSON calls it, at most 100 characters."""
    return shortened(_JSON.repr(value), _MAX_SHOWN)


def shortened(text: str, limit: int = MAX_MESSAGE) -> str:
    """A text of at most `limit` characters; of a longer one the middle is left out."""
    if len(text) <= limit:
        return text
    tail = limit // 3
    return f"{text[: limit - tail - 1]}\u2026{text[-tail:]}"


def printable(text: str) -> str:
    """Text with what cannot be printed escaped.

    Names in a damaged or hostile file can hold anything, a terminal's control codes too.
    """
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The question that opens a hint, with a space after it; empty if nothing known is close to the word."""
    likeness = {name: SequenceMatcher(None, name, word).ratio() for name in known}
    best = max(likeness.values(), default=0.0)
    if best < _ALIKE:
        return ""
    return f"did you mean {' or '.join(repr(name) for name, share in likeness.items() if share == best)}? "


class ConversionError(Exception):
    """Base of all errors that are meant for the user.

    Attributes:
        code: A word for programs (`--json`); it stays when the message changes.
        where: The file, folder or setting the error is about, or None.
        hint: What to do next, or None.
        given_hint: The same, where it was given with this very error.
        next_step: The hint of all errors of a kind that bring none of their own.
    """

    code: ClassVar[str] = "conversion"
    next_step: ClassVar[str | None] = None

    def __init__(self, what: str, *, where: object = None, hint: str | None = None) -> None:
        super().__init__(shortened(what))
        self.where = None if where is None else str(where)
        self.given_hint = None if hint is None else shortened(hint, 2 * MAX_MESSAGE)
        self.hint = self.given_hint or self.next_step

    def __str__(self) -> str:
        """The message as one printable line, with the place it is about."""
        what = super().__str__()
        line = what if self.where is None else f"{what} ({shortened(self.where, 2 * MAX_MESSAGE)})"
        return printable(line)


class UsageError(ConversionError):
    """A command line cannot be understood, or asks for two things that exclude each other."""

    code = "usage"


class CheckpointError(ConversionError):
    """The checkpoint is missing, damaged, hostile or not a FastVLM."""

    code = "checkpoint"
    next_step = "see that the folder holds a whole FastVLM checkpoint; download or copy it again"


class TokenizerError(ConversionError):
    """The tokenizer files are missing or damaged, or cannot express a text."""

    code = "tokenizer"
    next_step = "copy the tokenizer's files again, from the model that the weights belong to"


class ImageError(ConversionError):
    """An image cannot be read or is not acceptable."""

    code = "image"
    next_step = "give another image, or save this one as PNG"


class DatasetError(ConversionError):
    """A dataset to evaluate on is missing, malformed or of a layout that is not known."""

    code = "dataset"
    next_step = "docs/evaluate.md shows what is read"


class RecipeError(ConversionError):
    """A recipe is malformed or asks for something impossible."""

    code = "recipe"
    next_step = "`fastvlm-convert recipes NAME > mine.yaml` gives a file to start from"


class TargetError(ConversionError):
    """A target's runtime cannot execute what would be exported."""

    code = "target"
    next_step = "`fastvlm-convert recipes` shows which recipe fits which target"


class BundleError(ConversionError):
    """A bundle is missing, damaged or of another version."""

    code = "bundle"
    next_step = "copy it again, or export it again"


class MalformedManifestError(BundleError):
    """A bundle's manifest is there, but damaged."""


class PhonesError(ConversionError):
    """A table of phones is malformed, or says something impossible."""

    code = "phones"
    next_step = "docs/estimate.md lists the settings of a row, with an example"


class SignatureError(ConversionError):
    """A key cannot be used, or a bundle cannot be signed or has no signature."""

    code = "signature"


class OutputError(ConversionError):
    """The output cannot be written where it was asked for."""

    code = "output"


class MemoryLimitError(ConversionError):
    """A conversion needs more memory than it may have."""

    code = "memory"


class PromptError(ConversionError):
    """A prompt, or the answer asked for, does not fit the model."""

    code = "prompt"


class BenchmarkError(ConversionError):
    """A file of measured figures is damaged, or its figures cannot be compared with these."""

    code = "benchmark"
    next_step = "docs/bench.md says which files are read, and what is in them"


class WorkerError(ConversionError):
    """A process that was started to do a part of the work ended before it was done."""

    code = "worker"


class SettingsError(ConversionError):
    """A setting of the server is unknown, impossible, or does not go with another.

    Attributes:
        settings: Names of those that it is about.
    """

    code = "settings"
    next_step = "`fastvlm-convert serve --show-settings` lists all settings and where each value is from"

    def __init__(
        self, what: str, settings: tuple[str, ...] = (), *, where: object = None, hint: str | None = None
    ) -> None:
        super().__init__(what, where=where, hint=hint)
        self.settings = settings


# Packages that a plain installation leaves out, and the extras that bring them.
EXTRAS = {
    "torch": "torch", "onnx": "onnx", "onnxruntime": "onnx", "coremltools": "coreml",
    "mlx": "mlx", "huggingface_hub": "hub", "pillow_heif": "heic", "model_signing": "sign",
    "matplotlib": "report", "fastapi": "serve", "uvicorn": "serve", "sse_starlette": "serve",
    "pydantic_settings": "serve", "cachetools": "serve",
    "prometheus_client": "serve", "filetype": "serve", "psutil": "serve",
    "opentelemetry": "otel", "ray": "ray",
}  # fmt: skip


class MissingDependencyError(ConversionError):
    """A package that this command needs, and that only an extra installs, is not there."""

    code = "missing_dependency"

    @classmethod
    def of(cls, error: ModuleNotFoundError, what: str) -> "MissingDependencyError":
        """The error for a failed import.

        Args:
            error: The import's.
            what: What needs the package.

        Raises:
            ModuleNotFoundError: The module is no extra's: an installation that is broken, or a bug.
        """
        name = (error.name or "").partition(".")[0]
        if name not in EXTRAS:
            raise error
        hint = f"pip install '.[{EXTRAS[name]}]' in a clone of fastvlm-convert"
        if EXTRAS[name] != "ray":  # half a gigabyte that few need, and therefore not in `all`
            hint += ", or '.[all]'"
        return cls(f"{what} needs {name}, which is not installed", hint=hint)


def error_class(code: str) -> type[ConversionError]:
    """The class of a code, for an error that another process has reported."""
    return next((kind for kind in ConversionError.__subclasses__() if kind.code == code), ConversionError)
