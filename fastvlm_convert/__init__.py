"""fastvlm-convert: FastVLM checkpoints to verified ONNX and Core ML bundles.

What is listed here is the Python API (docs/python.md). Names are imported when they are first used, so that
`import fastvlm_convert` loads no library.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
    from fastvlm_convert.pipeline import export, plan, quantize
    from fastvlm_convert.recipe import load_recipe
    from fastvlm_convert.runtime.loaded import load_bundle
    from fastvlm_convert.verification.bundle import verify

__version__ = "0.1.0"

__all__ = ["export", "load_bundle", "load_recipe", "open_checkpoint", "plan", "quantize", "verify"]

_MODULES = {
    "export": "pipeline",
    "load_bundle": "runtime.loaded",
    "load_recipe": "recipe",
    "open_checkpoint": "checkpoint.checkpoint",
    "plan": "pipeline",
    "quantize": "pipeline",
    "verify": "verification.bundle",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name not in _MODULES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
