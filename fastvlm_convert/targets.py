"""The formats that a model can be exported to, by the names that users type.

Names and places alone: whoever reads a name, a manifest for example, can refuse it without loading a backend.
"""

from typing import Final

from fastvlm_convert.errors import TargetError, did_you_mean

Target = str

# Module of each backend's record (see `exporters.backends`).
BACKENDS: Final[dict[Target, str]] = {
    "onnx": "fastvlm_convert.exporters.onnx.backend",
    "coreml": "fastvlm_convert.exporters.coreml.backend",
    "mlx": "fastvlm_convert.exporters.mlx.backend",
}

# What a call without targets exports. A format that is added later does not join them, because bundles that
# people ship would grow by another copy of all weights.
DEFAULT_TARGETS: Final[tuple[Target, ...]] = ("onnx", "coreml")


def known_target(name: str) -> Target:
    """A target by its name.

    Raises:
        TargetError: There is no such target.
    """
    if name not in BACKENDS:
        raise TargetError(
            f"unknown target '{name}'", hint=f"{did_you_mean(name, BACKENDS)}targets: {', '.join(BACKENDS)}"
        )
    return name
