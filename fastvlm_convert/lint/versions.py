"""Pairs of versions that are known to go wrong together. Rules and `doctor` read the same table."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from fastvlm_convert.lint.platform import Version, version_text
from fastvlm_convert.outcomes import Severity


@dataclass(frozen=True)
class Versions:
    """Versions of one thing.

    Attributes:
        name: A distribution, or a system (`macos`, `arm64`).
        since: The first that is meant, or None.
        before: The first that is no longer meant, or None.
    """

    name: str
    since: Version | None = None
    before: Version | None = None

    def holds(self, version: Version) -> bool:
        """Whether a version is meant."""
        return (self.since is None or version >= self.since) and (
            self.before is None or version < self.before
        )

    def __str__(self) -> str:
        """For people: `numpy 2.4 or newer`, `onnxruntime before 1.25`."""
        since = "" if self.since is None else version_text(self.since)
        before = "" if self.before is None else f"before {version_text(self.before)}"
        words = (self.name, since, "" if before or not since else "or newer", before)
        return " ".join(word for word in words if word)


@dataclass(frozen=True)
class BadPair:
    """Two things that go wrong together.

    Attributes:
        id: Its name.
        first: The one that is to blame.
        second: What it does not go with.
        severity: What it means.
        reason: What goes wrong.
        source: Public report that says so.
        advice: What to do.
    """

    id: str
    first: Versions
    second: Versions
    severity: Severity
    reason: str
    source: str
    advice: str


FLOAT16_MATMULNBITS: Final = BadPair(
    id="onnxruntime-arm64",
    first=Versions("onnxruntime", before=(1, 25)),
    second=Versions("arm64"),
    severity="warning",
    reason="MatMulNBits with float16 inputs had no int8 kernel on ARM64 up to 1.24.3 and was about 6 times "
    "slower than with float32",
    source="https://github.com/microsoft/onnxruntime/issues/27251",
    advice="use ONNX Runtime 1.25 or newer, or export with decoder.compute: float32",
)
STATEFUL_PALETTES: Final = BadPair(
    id="coremltools-macos-26",
    first=Versions("coremltools", since=(9, 0), before=(9, 1)),
    second=Versions("macos", since=(26,)),
    severity="warning",
    reason="programs with states and 4-bit palettes, built with coremltools 9.0, crash on macOS 26 after 100 "
    "to 200 predictions; built with 8.3 they do not",
    source="https://github.com/apple/coremltools/issues/2716",
    advice="predict some hundred tokens on your device before you ship it, or use int8 rows",
)
EIGHT_BIT_MATMULNBITS: Final = BadPair(
    id="onnxruntime-8-bit",
    first=Versions("onnxruntime", before=(1, 22)),
    second=Versions("fastvlm-convert"),
    severity="error",
    reason="ONNX Runtime before 1.22 refuses MatMulNBits with 8 bits, which the recipes' heads have",
    source="https://github.com/microsoft/onnxruntime/pull/24384",
    advice="use ONNX Runtime 1.22 or newer",
)
NUMPY_SCALARS: Final = BadPair(
    id="coremltools-numpy",
    first=Versions("coremltools", before=(9, 1)),
    second=Versions("numpy", since=(2, 4)),
    severity="warning",
    reason="coremltools' torch front end fails with numpy 2.4: only 0-dimensional arrays can be converted to "
    "Python scalars",
    source="https://github.com/apple/coremltools/issues/2633",
    advice="install numpy before 2.4; exports do not use that front end, but other tools do",
)
BAD_PAIRS: Final = (FLOAT16_MATMULNBITS, STATEFUL_PALETTES, EIGHT_BIT_MATMULNBITS, NUMPY_SCALARS)


def bad_pairs(present: Mapping[str, Version]) -> Iterator[BadPair]:
    """The pairs that are there together.

    Args:
        present: Versions by name, of distributions and of the system.
    """
    for pair in BAD_PAIRS:
        sides = (pair.first, pair.second)
        if all(side.name in present and side.holds(present[side.name]) for side in sides):
            yield pair
