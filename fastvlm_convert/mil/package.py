"""A Core ML package: a folder with a manifest, a program in protobuf, and weight files beside it."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from fastvlm_convert.errors import BundleError
from fastvlm_convert.mil.blob import WeightFile
from fastvlm_convert.mil.proto import model

# Specification versions that have ML programs: iOS 15, 16, 17, 18 and 26.
SPECIFICATION_VERSIONS: Final = {6: "iOS 15", 7: "iOS 16", 8: "iOS 17", 9: "iOS 18", 10: "iOS 26"}

_MODEL_PATH: Final = "@model_path/"
_MAX_MANIFEST_BYTES: Final = 1 << 20


@dataclass
class Package:
    """An opened package.

    Attributes:
        path: Its folder.
        folder: The folder the program lies in; weight files are named relative to it.
        spec: The protobuf `Model`.
    """

    path: Path
    folder: Path
    spec: Any
    _files: dict[str, WeightFile] = field(default_factory=dict)

    @property
    def deployment_target(self) -> str:
        """The oldest system it says it runs on."""
        return SPECIFICATION_VERSIONS[self.spec.specificationVersion]

    def weight_file(self, name: str) -> WeightFile:
        """The weight file of a name as the program spells it.

        Raises:
            BundleError: It is missing, unreadable, or outside the package.
        """
        if name not in self._files:
            relative = name.removeprefix(_MODEL_PATH)
            self._files[name] = WeightFile(_inside(self.path, self.folder, relative, "weight file"))
        return self._files[name]


def open_package(path: Path) -> Package:
    """Read a package's manifest and program; its weights stay on disk.

    Raises:
        BundleError: It is no package, damaged, of an unknown version, or holds no ML program.
    """
    if not path.is_dir():
        raise BundleError(
            "not a Core ML package: a .mlpackage is a folder",
            where=path,
            hint=".mlmodel files and compiled .mlmodelc folders cannot be read",
        )
    file = _inside(path, path / "Data", _root_item(path), "program")
    try:
        spec = model.Model.FromString(file.read_bytes())
    except OSError as error:
        raise BundleError(f"cannot read the program: {error.strerror}", where=file) from error
    except DecodeError as error:
        raise BundleError(f"the program is no valid protobuf: {error}", where=file) from error
    kind = spec.WhichOneof("Type")
    if kind != "mlProgram":
        shown = "empty" if kind is None else f"of type {kind}"
        raise BundleError(
            f"the model is {shown}; only ML programs can be run",
            where=file,
            hint="convert it again with convert_to='mlprogram'",
        )
    if spec.specificationVersion not in SPECIFICATION_VERSIONS:
        known = ", ".join(f"{v} ({name})" for v, name in SPECIFICATION_VERSIONS.items())
        raise BundleError(
            f"unknown specification version {spec.specificationVersion}; known are {known}", where=file
        )
    return Package(path, file.parent, spec)


def _root_item(path: Path) -> str:
    """Path of the program as the manifest gives it, relative to `Data`."""
    file = path / "Manifest.json"
    try:
        with file.open("rb") as stream:
            manifest = json.loads(stream.read(_MAX_MANIFEST_BYTES).decode())
    except OSError as error:
        raise BundleError(f"cannot read the package's manifest: {error.strerror}", where=file) from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested too deep
        raise BundleError(f"the package's manifest is not valid JSON: {error}", where=file) from error
    try:
        item = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
    except (KeyError, TypeError, IndexError) as error:
        raise BundleError("the package's manifest names no root model", where=file) from error
    if not isinstance(item, str):
        raise BundleError(f"the package's manifest gives the path {item!r}", where=file)
    return item


def _inside(package: Path, folder: Path, relative: str, what: str) -> Path:
    """The existing file `relative` to a folder; refuses whatever lies outside the package."""
    try:
        file = (folder / relative).resolve()
        inside = file.is_relative_to(package.resolve())
        exists = inside and file.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a zero byte, a loop of links
        raise BundleError(
            f"the path of the {what} is impossible: {relative[:80]!r}", where=package
        ) from error
    if not inside:
        raise BundleError(f"the path of the {what} leaves the package: {relative[:80]!r}", where=package)
    if not exists:
        raise BundleError(f"the {what} '{relative[:80]}' is missing", where=package)
    return file
