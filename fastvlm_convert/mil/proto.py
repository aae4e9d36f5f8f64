"""The protobuf classes of Core ML's file format, without the rest of coremltools.

Importing coremltools takes seconds, imports torch and prints a dozen lines on a machine without Core ML. Its
generated protobuf modules need none of that, so they are loaded from its folder under a name of our own. The
classes are the very same: protobuf keeps one class a message type in a process.
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Final

from fastvlm_convert.errors import MissingDependencyError

_ALIAS: Final = "_fastvlm_convert_coreml_proto"


def _package() -> str:
    """Name of the package that holds the generated modules."""
    if "coremltools.proto" in sys.modules:
        return "coremltools.proto"
    if _ALIAS not in sys.modules:
        found = importlib.util.find_spec("coremltools")
        if found is None or not found.submodule_search_locations:
            missing = ModuleNotFoundError("No module named 'coremltools'", name="coremltools")
            raise MissingDependencyError.of(missing, "reading a Core ML package")
        folder = Path(found.submodule_search_locations[0]) / "proto"
        spec = importlib.util.spec_from_file_location(
            _ALIAS, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None
        assert spec.loader is not None
        package = importlib.util.module_from_spec(spec)
        sys.modules[_ALIAS] = package
        spec.loader.exec_module(package)
    return _ALIAS


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{_package()}.{name}")


model: Final = _module("Model_pb2")
mil: Final = _module("MIL_pb2")
feature_types: Final = _module("FeatureTypes_pb2")
