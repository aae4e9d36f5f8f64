"""Where a bundle is going to run."""

import re
from dataclasses import dataclass
from typing import Final

from fastvlm_convert.errors import UsageError, did_you_mean

Version = tuple[int, ...]

COMPUTE_UNITS: Final = ("all", "cpuAndNeuralEngine", "cpuAndGPU", "cpuOnly")  # as in MLModelConfiguration
PROVIDERS: Final = ("cpu", "xnnpack", "nnapi", "coreml", "webgpu")

_VERSION: Final = re.compile(r"\d{1,4}(\.\d{1,4}){0,2}")


@dataclass(frozen=True)
class Platform:
    """Where a bundle is going to run; None is what nobody has said.

    Attributes:
        ios: Version of iOS.
        android: Version of Android.
        onnxruntime: Version of ONNX Runtime.
        provider: Execution provider of ONNX Runtime, one of `PROVIDERS`.
        compute_units: What Core ML may use, one of `COMPUTE_UNITS`.
    """

    ios: Version | None = None
    android: Version | None = None
    onnxruntime: Version | None = None
    provider: str | None = None
    compute_units: str | None = None

    @property
    def has_neural_engine(self) -> bool | None:
        """Whether Core ML may run a model on the Neural Engine."""
        return None if self.compute_units is None else self.compute_units in COMPUTE_UNITS[:2]


ANYWHERE: Final = Platform()


def version_of(text: str, what: str) -> Version:
    """A version of one to three numbers.

    Raises:
        UsageError: It is something else.
    """
    if _VERSION.fullmatch(text) is None:
        raise UsageError(f"{what} is '{text}'", hint=f"give numbers, like {what} 26 or {what} 1.22.0")
    return tuple(int(part) for part in text.split("."))


def version_numbers(text: str) -> Version:
    """The numbers that a version begins with: (2, 4) of `2.4rc1`."""
    match = re.match(r"\d+(\.\d+)*", text)
    return () if match is None else tuple(int(part) for part in match.group().split("."))


def version_text(version: Version) -> str:
    """As people write it."""
    return ".".join(map(str, version))


def is_below(version: Version | None, floor: Version) -> bool | None:
    """Whether a version is older than another; None where it is not known."""
    return None if version is None else version < floor


def is_from(version: Version | None, floor: Version) -> bool | None:
    """Whether a version is another or newer; None where it is not known."""
    return None if version is None else version >= floor


def known(text: str | None, names: tuple[str, ...], what: str) -> str | None:
    """A name out of a list.

    Raises:
        UsageError: There is no such name.
    """
    if text is not None and text not in names:
        raise UsageError(
            f"{what} does not know '{text}'",
            hint=f"{did_you_mean(text, names)}choose one of: {', '.join(names)}",
        )
    return text
