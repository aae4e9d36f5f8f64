"""What no comparison of numbers shows in an ONNX graph: how exactly its products are to be computed.

Without int8 activations a bundle answers as well or better, only many times slower; and where they were not
asked for, a lucky picture may hide them.
"""

from pathlib import Path
from typing import Final

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from fastvlm_convert.errors import MissingDependencyError
from fastvlm_convert.manifest import Manifest
from fastvlm_convert.predict.export_plan import ExportPlan
from fastvlm_convert.verification.check import Check, equal, not_run

_LEVEL: Final = "accuracy_level"  # of MatMulNBits; here as in the recipe
_DECODER: Final = ("onnx", "decoder")


def check_accuracy_level(manifest: Manifest, bundle: Path, plan: ExportPlan) -> list[Check]:
    """Compare the accuracy level of the decoder's quantized products with the recipe's.

    Args:
        manifest: The bundle's.
        bundle: Its folder.
        plan: What an export of the checkpoint would do.

    Returns:
        One check; none where the recipe quantizes nothing.

    Raises:
        MissingDependencyError: onnx is not installed.
    """
    if not plan.recipe.quantize:
        return []
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of(error, "reading ONNX graphs") from error
    path = bundle / manifest.artifact(*_DECODER).files[0]
    try:
        nodes = onnx.load(path, load_external_data=False).graph.node
    except (DecodeError, OSError) as error:
        return [not_run(*_DECODER, _LEVEL, f"cannot read the graph: {error}")]
    levels = [(node.name, a.i) for node in nodes for a in node.attribute if a.name == _LEVEL]
    expected = plan.recipe.onnx.accuracy_level
    wrong = [f"{name} has {level}" for name, level in levels if level != expected]
    reason = (
        f"{len(wrong)} of {len(levels)} products differ: {', '.join(wrong[:3])}; the recipe says {expected}"
    )
    return [equal(*_DECODER, _LEVEL, len(wrong), reason, None)]
