"""The errors a user can meet. Each says what was given, where, what is allowed and what to do next.

Only the command line turns them into exit codes: every `ConversionError` is exit code 2. A gate that
fails is no error but a result (exit code 1).
"""


def printable(text: str) -> str:
    """Text with what cannot be printed escaped.

    Names in a damaged or hostile file can hold anything, a terminal's control codes too.
    """
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


class ConversionError(Exception):
    """Base of all errors that are meant for the user.

    Attributes:
        where: The file, folder or setting the error is about, or None.
        hint: What to do next, or None.
    """

    def __init__(self, what: str, *, where: object = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.where = None if where is None else str(where)
        self.hint = hint

    def __str__(self) -> str:
        """The message as one printable line, with the place it is about."""
        what = super().__str__()
        line = what if self.where is None else f"{what} ({self.where})"
        return printable(line)


class CheckpointError(ConversionError):
    """The checkpoint is missing, damaged, hostile or not a FastVLM."""


class TokenizerError(ConversionError):
    """The tokenizer files are missing or damaged, or cannot express a text."""


class ImageError(ConversionError):
    """An image cannot be read or is not acceptable."""


class RecipeError(ConversionError):
    """A recipe is malformed or asks for something impossible."""


class TargetError(ConversionError):
    """A target's runtime cannot execute what would be exported."""


class BundleError(ConversionError):
    """A bundle is missing, damaged or of another version."""


class OutputError(ConversionError):
    """The output cannot be written where it was asked for."""


class PromptError(ConversionError):
    """A prompt, or the answer asked for, does not fit the model."""


# Packages that a plain installation leaves out, and the extras that bring them.
EXTRAS = {"torch": "torch", "onnx": "onnx", "onnxruntime": "onnx", "coremltools": "coreml"}


class MissingDependencyError(ConversionError):
    """A package that this command needs, and that only an extra installs, is not there."""

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
        return cls(
            f"{what} needs {name}, which is not installed",
            hint=f"pip install '.[{EXTRAS[name]}]' in a clone of fastvlm-convert, or '.[all]'",
        )
