"""Whether a model's activations stay within float16: the report of a scan, kept in the user's cache."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fastvlm_convert.atomic_file import whole_file
from fastvlm_convert.json_file import read_json_file
from fastvlm_convert.user_cache import Kind
from fastvlm_convert.weights.storage import FLOAT16_MAX

FP16_SMALLEST: Final = 2.0**-24  # below half of it a value becomes zero
MIN_HEADROOM: Final = 2.0

# The version counts up when a scan measures something else, or its operations have other names.
RANGES: Final = Kind("fp16-range", "scans of activations", (2,), ".json", is_of_checkpoint=True)


@dataclass(frozen=True)
class OpRange:
    """What one operation gave over all pictures.

    Attributes:
        op: Name of the operation, as in the exported programs.
        max_abs: Largest magnitude.
        flushed_share: Share of its non-zero values that float16 would turn into zero.
    """

    op: str
    max_abs: float
    flushed_share: float

    @property
    def headroom(self) -> float:
        """How many times larger it could be before float16 overflows."""
        return FLOAT16_MAX / self.max_abs if self.max_abs else float("inf")


@dataclass(frozen=True)
class RangeReport:
    """A scan of a checkpoint.

    Attributes:
        checkpoint_sha256: The checkpoint's hash.
        num_images: Pictures it was run on.
        ops: One entry an operation, in the order they run.
    """

    checkpoint_sha256: str
    num_images: int
    ops: tuple[OpRange, ...]

    def risky(self) -> list[OpRange]:
        """Operations with less than `MIN_HEADROOM`, the riskiest first."""
        return sorted((o for o in self.ops if o.headroom < MIN_HEADROOM), key=lambda o: o.headroom)


def _path(checkpoint_sha256: str) -> Path:
    return RANGES.path(checkpoint_sha256)


def save_report(report: RangeReport) -> Path:
    """Keep a report; returns where."""
    path = _path(report.checkpoint_sha256)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        value = {"version": RANGES.version[0], **dataclasses.asdict(report)}
        partial.write_text(json.dumps(value, indent=1, allow_nan=False))
    return path


def load_report(checkpoint_sha256: str) -> RangeReport | None:
    """The report of a checkpoint, or None where there is none that this version can read."""
    try:
        value = read_json_file(_path(checkpoint_sha256))
        if value["version"] != RANGES.version[0] or value["checkpoint_sha256"] != checkpoint_sha256:
            return None
        ops = tuple(
            OpRange(str(o["op"]), float(o["max_abs"]), float(o["flushed_share"])) for o in value["ops"]
        )
        return RangeReport(checkpoint_sha256, int(value["num_images"]), ops)
    except (OSError, ValueError, KeyError, TypeError):  # a cache that cannot be read is no cache
        return None
