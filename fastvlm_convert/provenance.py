"""Where an output comes from: source, library versions, and what its makers should know about the source."""

from collections.abc import Sequence
from importlib import metadata
from typing import Final

from fastvlm_convert.bundle.license import NO_LICENSE
from fastvlm_convert.checkpoint.checkpoint import Checkpoint, source_hash
from fastvlm_convert.exporters.backends import backend_of
from fastvlm_convert.manifest import Source
from fastvlm_convert.quantization.calibration import Calibration
from fastvlm_convert.targets import Target

_LIBRARIES: Final = ("numpy", "tokenizers")  # they shape every bundle's bytes


def source_of(checkpoint: Checkpoint, data: Calibration | None) -> Source:
    """Where an output comes from; a quantized checkpoint passes on what it was made of."""
    stored = checkpoint.quantized
    calibration = data.sha256 if data else stored.record.source.calibration if stored else None
    license = NO_LICENSE if checkpoint.license is None else checkpoint.license.name
    return Source(checkpoint.layout, source_hash(checkpoint), license, calibration)


def library_versions(targets: Sequence[Target]) -> dict[str, str]:
    """Versions of the libraries that shape the bytes of a bundle."""
    used = {name for target in targets for name in backend_of(target).libraries}
    return {name: metadata.version(name) for name in sorted({*_LIBRARIES, *used})}


def source_warnings(checkpoint: Checkpoint, made: str) -> list[str]:
    """What is odd about a checkpoint, for those who pass on what is made of it.

    Args:
        checkpoint: The checkpoint.
        made: What people call the folder.
    """
    warnings = [
        f"config.json says {d.key} is {d.config}, the tensors say {d.tensors}; the tensors were followed"
        for d in checkpoint.disagreements
    ]
    warnings += checkpoint.notes
    if checkpoint.license is None:
        warnings.append(f"the checkpoint has no license file; see that you may pass the {made} on")
    return warnings
