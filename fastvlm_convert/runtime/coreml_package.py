"""A package run by Core ML itself, on a Mac."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import coremltools
import numpy as np

from fastvlm_convert.errors import BundleError
from fastvlm_convert.exporters.coreml.paths import FILES


class CoreMLPackage:
    """Implements `coreml_session.Runner`; not run on any machine but a Mac.

    Functions of one package share one state, which Core ML allows where their states are equal.

    Raises:
        BundleError: Core ML refuses the package.
    """

    executed_by = "Core ML"
    trouble: str | None = None  # Core ML does not say where a value came from

    def __init__(self, path: Path) -> None:
        self._path = path
        self._models: dict[str, coremltools.models.MLModel] = {}
        self._state: Any = None
        spec = coremltools.models.utils.load_spec(str(path / FILES[1]))
        self._functions = {f.name: bool(f.state) for f in spec.description.functions}
        if not self._functions:
            self._functions = {"main": bool(spec.description.state)}

    def run(self, function: str, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Run a function; states persist until `reset`."""
        model = self._model(function)
        if not self._functions[function]:
            return dict(model.predict(dict(inputs)))
        if self._state is None:
            self._state = model.make_state()
        return dict(model.predict(dict(inputs), state=self._state))

    def reset(self) -> None:
        """Set all states to zero."""
        self._state = None

    def _model(self, function: str) -> Any:  # noqa: ANN401
        if function not in self._models:
            try:
                self._models[function] = coremltools.models.MLModel(
                    str(self._path),
                    compute_units=coremltools.ComputeUnit.CPU_AND_GPU,
                    function_name=function if len(self._functions) > 1 else None,
                )
            except RuntimeError as error:
                raise BundleError(f"Core ML refuses the package: {error}", where=self._path) from error
        return self._models[function]
