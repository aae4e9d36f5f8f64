"""fastvlm_manifest.json: what a bundle holds. The bundle writes it, runtimes and checks read it."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Final, Literal

from fastvlm_convert.dataclass_io import from_plain, has_schema
from fastvlm_convert.errors import BundleError, MalformedManifestError, RecipeError, shown
from fastvlm_convert.io_names import (
    COMPONENTS,
    HEIGHT,
    PIXEL_VALUES,
    WIDTH,
    Component,
    FloatName,
    PrecisionName,
    TensorSpec,
    num_image_tokens,
)
from fastvlm_convert.json_file import read_json_file
from fastvlm_convert.preprocess import ImageMode, ImageSettings, Resampling
from fastvlm_convert.prompt import PromptFormat
from fastvlm_convert.recipe_settings import MAX_CONTEXT_LENGTH
from fastvlm_convert.regular_file import open_file
from fastvlm_convert.resolved_recipe import ResolvedRecipe
from fastvlm_convert.targets import BACKENDS, Target

FILE_NAME: Final = "fastvlm_manifest.json"
SCHEMA: Final = "fastvlm-convert/bundle"
SCHEMA_VERSION: Final = 2
PROGRESS_FILE: Final = "fastvlm-convert.progress"  # in a folder under construction
OLD_FILE_NAME: Final = "manifest.json"  # of version 1
VERIFICATION_FILE: Final = "verification.json"
SIGNATURE_FILE: Final = "model.sig"
BESIDE: Final = (VERIFICATION_FILE, SIGNATURE_FILE)  # what is said about a bundle, outside its hashed files

_AGAIN: Final = "copy the bundle again, or export the bundle again"
_MAKE_ONE: Final = "make one with: fastvlm-convert export"

Status = Literal["passed", "failed", "not_run"]


@dataclass(frozen=True)
class Artifact:
    """One exported part of the model.

    Attributes:
        target: Format.
        component: Part of the model.
        storage: Dtype of its weights in the file.
        compute: Dtype of its arithmetic.
        precision: What transformers.js calls the precision; one name for all parts with integers.
        files: Files relative to the bundle; the first is the one a runtime opens.
        inputs: What the graph reads.
        outputs: What it gives.
        function: Which of a component's functions it is: of those in a Core ML package, or of the two ONNX
            embeddings, `main` that looks up and `merge` that also puts image features in their places.
    """

    target: Target
    component: Component
    storage: FloatName
    compute: FloatName
    precision: PrecisionName
    files: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    function: str = "main"

    def __post_init__(self) -> None:
        if self.target not in BACKENDS:
            known = " or ".join(repr(target) for target in BACKENDS)
            raise BundleError(f"target is {self.target!r}, expected {known}")


def takes_pictures(artifact: Artifact) -> bool:
    """Whether a graph prepares pictures itself, so that it is given them in their own size."""
    return any(s.name == PIXEL_VALUES and s.shape[2:] == (HEIGHT, WIDTH) for s in artifact.inputs)


@dataclass(frozen=True)
class Contract:
    """What an app must know to feed the model.

    Attributes:
        image_size: Edge of the square input in pixels.
        image_mode: How an image is made square.
        resampling: Pillow's filter that resizes it.
        rescale_factor: What its 8-bit values are multiplied by.
        image_mean: Subtracted then, by channel.
        image_std: What the result is divided by, by channel.
        num_image_tokens: Tokens one image becomes.
        image_token: Placeholder in the prompt.
        image_token_id: Its id.
        prompt: One picture and one question, with {question} where the user's text goes.
        conversation: The texts around the turns of longer conversations.
        eos_token_ids: Ids at which an answer ends.
        context_length: Tokens the KV cache holds.
    """

    image_size: int
    image_mode: ImageMode
    resampling: Resampling
    rescale_factor: float
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    num_image_tokens: int
    image_token: str
    image_token_id: int
    prompt: str
    conversation: PromptFormat
    eos_token_ids: tuple[int, ...]
    context_length: int

    def __post_init__(self) -> None:
        if self.image_size < 1 or self.num_image_tokens != num_image_tokens(self.image_size):
            raise BundleError(
                f"num_image_tokens {self.num_image_tokens} does not fit image_size {self.image_size}"
            )
        numbers = (self.rescale_factor, *self.image_mean, *self.image_std)
        if len(numbers) != 7 or not all(math.isfinite(x) for x in numbers) or min(self.image_std) <= 0:
            raise BundleError("image_mean and image_std are not three finite numbers each, std above 0")
        if self.prompt != self.conversation.single_turn:
            raise BundleError("prompt is not what conversation writes for one question")
        if not self.eos_token_ids or min(self.eos_token_ids) < 0 or self.image_token_id < 0:
            ids = f"eos_token_ids {shown(self.eos_token_ids)}, image_token_id {shown(self.image_token_id)}"
            raise BundleError(f"{ids}: expected ids of tokens")
        if not 0 < self.context_length <= MAX_CONTEXT_LENGTH:
            raise BundleError(f"context_length is {self.context_length}, expected 1 to {MAX_CONTEXT_LENGTH}")

    @property
    def images(self) -> ImageSettings:
        """How pictures are prepared."""
        mean, std = ((x[0], x[1], x[2]) for x in (self.image_mean, self.image_std))
        return ImageSettings(
            self.image_size, self.image_mode, self.resampling, self.rescale_factor, mean, std
        )


@dataclass(frozen=True)
class Source:
    """Where a bundle comes from.

    Attributes:
        layout: Layout of the checkpoint.
        sha256: Hash of the checkpoint's files, adapter included.
        license: File name of the license's copy, or `not_found`.
        calibration: Hash of the data that layers were solved with, if any.
    """

    layout: str
    sha256: str
    license: str
    calibration: str | None = None


@dataclass(frozen=True)
class FileEntry:
    """Size and hash of one file of the bundle."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything a bundle says about itself.

    Attributes:
        tool: Version of fastvlm-convert.
        libraries: Versions of the libraries that wrote the artifacts.
        source: The checkpoint.
        recipe: The recipe, with every setting resolved.
        artifacts: What was exported.
        contract: What an app must know.
        fp16_range: Whether activations were proven to stay within float16's range.
        files: Every file but the manifest and what is said about the bundle afterwards (`BESIDE`).
    """

    tool: str
    libraries: dict[str, str]
    source: Source
    recipe: ResolvedRecipe
    artifacts: tuple[Artifact, ...]
    contract: Contract
    fp16_range: Status
    files: dict[str, FileEntry]

    def artifact(self, target: Target, component: Component, function: str | None = None) -> Artifact:
        """The artifact of one part; the first where it has several functions and none is named.

        Raises:
            BundleError: The bundle has none.
        """
        for artifact in self.artifacts:
            same = (artifact.target, artifact.component) == (target, component)
            if same and function in (None, artifact.function):
                return artifact
        what = component if function is None else f"{component} {function}"
        raise BundleError(f"the bundle has no {target} {what}")

    @property
    def targets(self) -> tuple[Target, ...]:
        """Formats in the bundle, each once."""
        return tuple(dict.fromkeys(artifact.target for artifact in self.artifacts))

    def to_json(self) -> str:
        """The content of fastvlm_manifest.json."""
        value = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}
        return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def file_entries(bundle: Path) -> dict[str, FileEntry]:
    """Size and hash of every file that a manifest lists, by its path relative to the bundle, sorted."""
    paths = {p.relative_to(bundle).as_posix(): p for p in bundle.rglob("*") if p.is_file()}
    return {name: file_entry(paths[name]) for name in sorted(paths) if name not in (PROGRESS_FILE, *BESIDE)}


def file_entry(path: Path) -> FileEntry:
    """Size and hash of one file.

    Raises:
        OSError: It cannot be read.
    """
    with open_file(path) as file:
        return FileEntry(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def manifest_sha256(bundle: Path) -> str:
    """Hash of a bundle's manifest, which stands for the whole bundle: it lists the hashes of the others."""
    return file_entry(bundle / FILE_NAME).sha256


def is_bundle(folder: Path) -> bool:
    """Whether a folder holds a manifest of this tool, of whatever version and however damaged the rest."""
    return any(has_schema(folder / name, SCHEMA) for name in (FILE_NAME, OLD_FILE_NAME))


def load_manifest(bundle: Path) -> Manifest:
    """Read and validate a bundle's manifest, and see that the files it names are there in full size.

    Raises:
        BundleError: It is missing, of another version, malformed, or the bundle is incomplete.
    """
    manifest = read_manifest(bundle)
    for problem in chain(contradictions(manifest), _problems(bundle, manifest)):
        raise BundleError(problem, where=bundle, hint="copy the bundle again, or export it again")
    return manifest


def read_manifest(bundle: Path) -> Manifest:
    """Read a bundle's manifest, and nothing else.

    Raises:
        MalformedManifestError: It is damaged.
        BundleError: It is missing, of another version, or no manifest of this tool.
    """
    path = bundle / FILE_NAME
    try:
        value = read_json_file(path)
    except NotADirectoryError as error:
        what = "a bundle is a folder, this is a file"
        raise BundleError(what, where=bundle, hint="give the folder that `export` made") from error
    except FileNotFoundError as error:
        if not bundle.exists():
            raise BundleError("there is no such bundle", where=bundle, hint=_MAKE_ONE) from error
        if has_schema(bundle / OLD_FILE_NAME, SCHEMA):
            raise BundleError(
                f"a bundle of version 1; this tool reads {SCHEMA_VERSION}",
                where=bundle,
                hint="export the bundle again",
            ) from error
        raise BundleError(f"not a bundle: it has no {FILE_NAME}", where=bundle, hint=_MAKE_ONE) from error
    except OSError as error:
        raise BundleError(f"cannot read: {error.strerror}", where=path, hint=_AGAIN) from error
    except ValueError as error:
        raise MalformedManifestError(f"not valid JSON: {error}", where=path, hint=_AGAIN) from error
    return manifest_of(value, path)


def manifest_of(value: object, path: Path) -> Manifest:
    """The manifest in a parsed fastvlm_manifest.json.

    Args:
        value: What is in the file.
        path: The file, for messages.

    Raises:
        MalformedManifestError: It is damaged.
        BundleError: It is of another version, or no manifest of this tool.
    """
    if not isinstance(value, dict) or value.pop("schema", None) != SCHEMA:
        raise BundleError("not a manifest of fastvlm-convert", where=path, hint=_MAKE_ONE)
    version = value.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"manifest version {shown(version)}; this tool reads {SCHEMA_VERSION}",
            where=path,
            hint="export the bundle again, or use the version of the tool that wrote it",
        )
    try:
        return from_plain(Manifest, value)
    except (BundleError, RecipeError) as error:
        raise MalformedManifestError(
            f"malformed manifest: {error}", where=path, hint=error.given_hint or _AGAIN
        ) from error


def contradictions(manifest: Manifest) -> Iterator[str]:
    """What a manifest says that cannot be, whatever the bundle's folder holds."""
    if not manifest.artifacts:
        yield "the manifest lists no artifact"
    for target in manifest.targets:
        parts = {artifact.component for artifact in manifest.artifacts if artifact.target == target}
        if missing := [part for part in COMPONENTS if part not in parts]:
            yield f"the manifest lists no {target} artifact of {' and '.join(missing)}"
    for artifact in manifest.artifacts:
        if not artifact.files:
            yield f"artifact {artifact.target} {artifact.component} has no files"
        for file in artifact.files:
            if file not in manifest.files:
                yield f"artifact file '{file}' is not among the manifest's files"
    for name in manifest.files:
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts:
            yield f"file '{name}' lies outside the bundle"


def _problems(bundle: Path, manifest: Manifest) -> Iterator[str]:
    for name, entry in manifest.files.items():
        if not (bundle / name).is_file():
            yield f"'{name}' is missing"
        elif (bundle / name).stat().st_size != entry.size:
            yield f"'{name}' has {(bundle / name).stat().st_size} bytes, the manifest says {entry.size}"


def chosen_target(manifest: Manifest, target: Target | None, bundle: Path) -> Target:
    """One of a bundle's targets; its first if none is asked for.

    Raises:
        BundleError: The bundle does not have it.
    """
    if target is None or target in manifest.targets:
        return target or manifest.targets[0]
    raise BundleError(
        f"the bundle has no target '{target}'", where=bundle, hint=f"it has {', '.join(manifest.targets)}"
    )


def changed_files(bundle: Path, manifest: Manifest) -> list[str]:
    """Files whose content is not what the manifest says."""
    return [name for name, entry in manifest.files.items() if file_entry(bundle / name) != entry]
