"""How each target of a bundle is executed on this machine."""

from collections.abc import Callable
from typing import Final

from fastvlm_convert.manifest import Manifest
from fastvlm_convert.targets import Target
from fastvlm_convert.verification.coreml_executions import coreml_executions
from fastvlm_convert.verification.execution import Execution
from fastvlm_convert.verification.mlx_executions import mlx_executions
from fastvlm_convert.verification.onnx_executions import onnx_executions

EXECUTIONS: Final[dict[Target, Callable[[Manifest, bool], list[Execution]]]] = {
    "onnx": onnx_executions,
    "coreml": coreml_executions,
    "mlx": mlx_executions,
}


def executions(manifest: Manifest, target: Target, interpret: bool) -> list[Execution]:
    """How to execute a target here.

    Args:
        manifest: The bundle's.
        target: The target.
        interpret: Whether to interpret programs on a machine that can run them, too.
    """
    return EXECUTIONS[target](manifest, interpret)
