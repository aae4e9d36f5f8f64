"""A Core ML package: a folder with a manifest, a program in protobuf, and weight files beside it."""

import json
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from fastvlm_convert.errors import BundleError
from fastvlm_convert.mil.blob import WeightFile
from fastvlm_convert.mil.proto import model

# Specification versions that have ML programs: iOS 15, 16, 17, 18 and 26.
SPECIFICATION_VERSIONS: Final = {6: "iOS 15", 7: "iOS 16", 8: "iOS 17", 9: "iOS 18", 10: "iOS 26"}
PIPELINES: Final = frozenset({"pipeline", "pipelineClassifier", "pipelineRegressor"})

_MODEL_PATH: Final = "@model_path/"
_MAX_MANIFEST_BYTES: Final = 1 << 20
# Programs take a few megabytes, because weights lie beside them; parsed, one can take 30 times its size.
_MAX_PROGRAM_BYTES: Final = 32 << 20
_MAX_STAGES: Final = 64


@dataclass
class Package:
    """An opened package, or one stage of a pipeline in it.

    Attributes:
        path: Its folder.
        folder: The folder the program lies in; weight files are named relative to it.
        spec: The protobuf `Model`: an ML program or a pipeline.
    """

    path: Path
    folder: Path
    spec: Any
    _files: dict[str, WeightFile] = field(default_factory=dict)

    @property
    def deployment_target(self) -> str:
        """The oldest system it says it runs on."""
        return SPECIFICATION_VERSIONS[self.spec.specificationVersion]

    def stages(self) -> "tuple[Package, ...]":
        """The models of a pipeline in their order; none if it is an ML program.

        Raises:
            BundleError: A stage is neither an ML program nor a pipeline, or there are none or too many.
        """
        kind = self.spec.WhichOneof("Type")
        if kind not in PIPELINES:
            return ()
        pipeline = self.spec.pipeline if kind == "pipeline" else getattr(self.spec, kind).pipeline
        if not 0 < len(pipeline.models) <= _MAX_STAGES:
            raise BundleError(
                f"the pipeline has {len(pipeline.models)} stages, expected 1 to {_MAX_STAGES}",
                where=self.path,
            )
        for i, stage in enumerate(pipeline.models):
            _check_kind(stage, self.path, f"stage {i} of the pipeline")
        return tuple(Package(self.path, self.folder, stage, self._files) for stage in pipeline.models)

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
        BundleError: It does not exist, is no package, is damaged, or holds neither an ML program nor a
            pipeline of a known version.
    """
    _check_folder(path)
    file = _inside(path, path / "Data", _root_item(path), "program")
    try:
        spec = model.Model.FromString(_content(file, _MAX_PROGRAM_BYTES, "the program"))
    except DecodeError as error:
        raise BundleError(f"the program is no valid protobuf: {error}", where=file) from error
    _check_kind(spec, file, "the model")
    return Package(path, file.parent, spec)


def _check_kind(spec: Any, where: Path, what: str) -> None:  # noqa: ANN401  a protobuf message
    kind = spec.WhichOneof("Type")
    if kind != "mlProgram" and kind not in PIPELINES:
        shown = "empty" if kind is None else f"of type {kind}"
        raise BundleError(
            f"{what} is {shown}; only ML programs can be run, and pipelines of them",
            where=where,
            hint="convert it again with convert_to='mlprogram'",
        )
    if spec.specificationVersion not in SPECIFICATION_VERSIONS:
        known = ", ".join(f"{v} ({name})" for v, name in SPECIFICATION_VERSIONS.items())
        raise BundleError(
            f"unknown specification version {spec.specificationVersion}; known are {known}", where=where
        )


def _check_folder(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BundleError("there is no such package", where=path) from error
    except (OSError, ValueError) as error:  # unsearchable, a loop of links, too long; a zero byte
        raise BundleError(f"cannot open the package: {_reason(error)}", where=path) from error
    if not stat.S_ISDIR(mode):
        raise BundleError(
            "not a Core ML package: a .mlpackage is a folder",
            where=path,
            hint=".mlmodel files and compiled .mlmodelc folders cannot be read",
        )


def _content(file: Path, limit: int, what: str) -> bytes:
    """The bytes of a regular file; reading a pipe would block, and a device never ends."""
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            raise BundleError(f"{what} is not a regular file", where=file)
        if status.st_size > limit:
            raise BundleError(f"{what} has {status.st_size} bytes, expected at most {limit}", where=file)
        with file.open("rb") as stream:
            return stream.read(limit)
    except OSError as error:
        raise BundleError(f"cannot read {what}: {_reason(error)}", where=file) from error


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _root_item(path: Path) -> str:
    """Path of the program as the manifest gives it, relative to `Data`."""
    file = path / "Manifest.json"
    try:
        manifest = json.loads(_content(file, _MAX_MANIFEST_BYTES, "the package's manifest").decode())
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested too deep
        raise BundleError(f"the package's manifest is not valid JSON: {error}", where=file) from error
    try:
        item = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
    except (KeyError, TypeError, IndexError) as error:
        raise BundleError("the package's manifest names no root model", where=file) from error
    if not isinstance(item, str):
        raise BundleError(f"the package's manifest gives the path {str(item)[:80]}", where=file)
    return item


def _inside(package: Path, folder: Path, relative: str, what: str) -> Path:
    """The existing file `relative` to a folder; refuses whatever lies outside the package."""
    try:
        file = (folder / relative).resolve()
        inside = file.is_relative_to(package.resolve())
        exists = inside and file.exists()
        regular = exists and file.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a zero byte, a loop of links
        raise BundleError(
            f"the path of the {what} is impossible: {relative[:80]!r}", where=package
        ) from error
    if not inside:
        raise BundleError(f"the path of the {what} leaves the package: {relative[:80]!r}", where=package)
    if not exists:
        raise BundleError(f"the {what} '{relative[:80]}' is missing", where=package)
    if not regular:
        raise BundleError(f"the {what} '{relative[:80]}' is not a regular file", where=package)
    return file
