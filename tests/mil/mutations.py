"""Ways to damage a package; the same for the test, the long fuzz and whoever repeats a finding."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastvlm_convert.errors import ConversionError
from fastvlm_convert.mil import Interpreter
from fastvlm_convert.mil.profile import example_inputs
from fastvlm_convert.mil.survey import survey_package

# A damaged shape may ask for any input; what is larger is the caller's doing, not the package's.
MAX_INPUT = 1 << 16
MODEL, WEIGHTS, MANIFEST = (
    Path("Data/com.apple.CoreML/model.mlmodel"),
    Path("Data/com.apple.CoreML/weights/weight.bin"),
    Path("Manifest.json"),
)


@dataclass(frozen=True)
class Seed:
    """A sound package in memory."""

    name: str
    files: dict[Path, bytes]

    @classmethod
    def read(cls, package: Path) -> "Seed":
        found = {p.relative_to(package): p.read_bytes() for p in package.rglob("*") if p.is_file()}
        return cls(package.stem, found)

    def write(self, folder: Path, changed: dict[Path, bytes | None]) -> None:
        """The package with some files changed, or removed (None)."""
        for path, content in {**self.files, **changed}.items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                target.unlink(missing_ok=True)
            elif not target.exists() or target.read_bytes() != content:
                target.write_bytes(content)


def damage(seed: Seed, number: int) -> dict[Path, bytes | None]:
    """The damage of a number: what becomes of which file."""
    rng = np.random.default_rng([number, *seed.name.encode()])
    odds = rng.random()
    path = MODEL if odds < 0.75 else WEIGHTS if odds < 0.93 and WEIGHTS in seed.files else MANIFEST
    content = seed.files[path]
    kind = rng.random()
    if kind < 0.02:
        return {path: None}
    if kind < 0.12:
        return {path: content[: int(rng.integers(0, len(content)))]}
    changed = bytearray(content)
    # Records of weights are few bytes among many: aim at them.
    reach = min(len(content), 512) if path == WEIGHTS and rng.random() < 0.7 else len(content)
    for _ in range(int(rng.choice([1, 1, 1, 2, 3, 8]))):
        at = int(rng.integers(0, max(min(reach, len(changed)), 1)))
        how = rng.random()
        if how < 0.35:
            changed[at : at + 1] = bytes([changed[at] ^ (1 << int(rng.integers(0, 8)))])
        elif how < 0.7:
            changed[at : at + 1] = bytes(
                [int(rng.choice([0, 1, 2, 127, 128, 255, int(rng.integers(0, 256))]))]
            )
        elif how < 0.8:
            changed[at:at] = bytes(rng.integers(0, 256, int(rng.integers(1, 9)), dtype=np.uint8))
        elif how < 0.9:
            del changed[at : at + int(rng.integers(1, 9))]
        else:
            other = int(rng.integers(0, max(len(changed) - 64, 1)))
            changed[at : at + 32] = changed[other : other + 32]
    return {path: bytes(changed)}


def attempt(package: Path) -> str:
    """Survey, load and run a package; the outcome: `ran`, or the kind of error that a user would see.

    Raises:
        Exception: Anything but a `ConversionError`, which is a finding.
    """
    try:
        survey_package(package)
        interpreter = Interpreter(package)
        for name, function in interpreter.functions.items():
            shapes = [v.example_shape for v in (*function.inputs, *function.states)]
            if sum(int(np.prod(s, dtype=float)) for s in shapes) > MAX_INPUT:
                return "too large to try"
            state = None if interpreter.stages else interpreter.make_state(name)
            interpreter.predict(example_inputs(function), state, name)
            str(interpreter)
    except ConversionError as error:
        return type(error).__name__ if str(error) else "an error without a message"
    return "ran"


def clear(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
