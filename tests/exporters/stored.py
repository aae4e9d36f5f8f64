"""What the engine makes of a golden checkpoint, and what a package holds, read with coremltools."""

from pathlib import Path
from typing import Any

import coremltools
from coremltools.converters.mil.frontend.milproto.load import load as load_program

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.exporters.coreml.paths import FILES
from fastvlm_convert.quantization.data_free import quantize_weights
from fastvlm_convert.quantized.layer_plan import plan_layers
from fastvlm_convert.quantized.weight import AnyWeight
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.weights.fold import fold
from tests.checkpoints import GOLDEN, LLAVA

CHECKPOINT = GOLDEN / LLAVA / "checkpoint"


def shapes() -> dict[str, tuple[int, ...]]:
    """Weight names and their shapes, folded."""
    return {n: w.shape for n, w in fold(open_checkpoint(CHECKPOINT).weights).items()}


def engine(chosen: Recipe) -> dict[str, AnyWeight]:
    """The weights that a recipe makes, without data."""
    return quantize_weights(fold(open_checkpoint(CHECKPOINT).weights), plan_layers(shapes(), chosen))


def decompressions(bundle: Path, package: str, function: str) -> dict[str, Any]:
    """The operations of a package that decompress weights, by the name of what they give."""
    path = bundle / f"coreml/{package}.mlpackage"
    spec = coremltools.models.utils.load_spec(str(path / FILES[1]))
    program = load_program(spec, spec.specificationVersion, str((path / FILES[2]).parent))
    return {
        op.outputs[0].name: op
        for op in program.functions[function].operations
        if op.op_type.startswith("constexpr_")
    }
