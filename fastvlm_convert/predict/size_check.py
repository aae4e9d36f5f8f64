"""A guard against lowering that leaves in float what a recipe quantizes: files must shrink as planned."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from fastvlm_convert.errors import TargetError
from fastvlm_convert.manifest import Artifact

TOLERANCE: Final = 0.01
STRUCTURE: Final = 64_000  # bytes of records and pages that a prediction may leave out


def check_sizes(folder: Path, artifacts: Sequence[Artifact], predicted: Mapping[str, int]) -> None:
    """See that every file of weights has the size that was predicted from the plan.

    Args:
        folder: The bundle under construction.
        artifacts: What was written; the weights are the last of an artifact's files.
        predicted: Path relative to the bundle -> bytes.

    Raises:
        TargetError: Names the file, its bytes and those planned.
    """
    for name in sorted({artifact.files[-1] for artifact in artifacts}):
        if name not in predicted:
            raise TargetError("no size was planned for this file of weights", where=name)
        planned, written = predicted[name], (folder / name).stat().st_size
        if abs(written - planned) > TOLERANCE * planned + STRUCTURE:
            raise TargetError(
                f"the file has {written:,} bytes of weights, the plan says {planned:,}",
                where=name,
                hint="some layers are not stored as the recipe asks; this is a fault of the exporter, "
                "please report it with the recipe",
            )
