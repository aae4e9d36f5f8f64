"""What a bundle says about itself: its manifest and its list of layers. No weights are read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fastvlm_convert.arithmetic import num_elements
from fastvlm_convert.bundle.layers_file import StoredLayer, read_layers
from fastvlm_convert.manifest import Manifest, load_manifest, manifest_sha256
from fastvlm_convert.report.sources.not_run import NotRun
from fastvlm_convert.weights.parts import PARTS, part_of

_NAMES: Final = {"vision": "encoder"}  # what people call a part
_NO_LAYERS: Final = NotRun("the bundle has no layers.json: an earlier version exported it", None)


@dataclass(frozen=True)
class PartSize:
    """Weights of one part of the model.

    Attributes:
        name: The part's.
        num_layers: Matrices and convolutions.
        num_weights: Weights in them.
        stored_bytes: Bytes by the way in which they are stored, scales and zero points included.
    """

    name: str
    num_layers: int
    num_weights: int
    stored_bytes: dict[str, float]

    @property
    def bits_per_weight(self) -> float:
        """Stored bits by weight."""
        return 8 * sum(self.stored_bytes.values()) / self.num_weights


@dataclass(frozen=True)
class Skipped:
    """Layers that are not stored as their rule said.

    Attributes:
        scheme: How they are stored.
        reason: Why.
        layers: Their names.
    """

    scheme: str
    reason: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class ArtifactSize:
    """Files of one component in one format.

    Attributes:
        target: The format.
        component: The component.
        storage: Dtype of its floats in the file.
        compute: Dtype of its arithmetic.
        size: Bytes; a file that several components share counts at the first of them.
        shared_with: The component whose files hold the rest, or None.
    """

    target: str
    component: str
    storage: str
    compute: str
    size: int
    shared_with: str | None


@dataclass(frozen=True)
class BundleFacts:
    """A bundle as the page tells of it.

    Attributes:
        name: Of its folder.
        manifest: Its manifest.
        manifest_sha256: Hash of it, which stands for the whole bundle.
        artifacts: Files by target and component.
        parts: Weights by part of the model.
        skipped: Layers that are not stored as their rule said; empty where the bundle does not list layers.
    """

    name: str
    manifest: Manifest
    manifest_sha256: str
    artifacts: tuple[ArtifactSize, ...]
    parts: tuple[PartSize, ...] | NotRun
    skipped: tuple[Skipped, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.manifest.files.values())

    @property
    def target_bytes(self) -> dict[str, int]:
        """Bytes of the files of each target."""
        sizes = dict.fromkeys(self.manifest.targets, 0)
        for artifact in self.artifacts:
            sizes[artifact.target] += artifact.size
        return sizes

    @property
    def bits_per_weight(self) -> float | None:
        """Stored bits by weight, of all layers."""
        if isinstance(self.parts, NotRun):
            return None
        stored = sum(sum(part.stored_bytes.values()) for part in self.parts)
        return 8 * stored / sum(part.num_weights for part in self.parts)


def read_bundle(bundle: Path) -> BundleFacts:
    """What there is to tell of a bundle.

    Raises:
        BundleError: It is incomplete, or its manifest or list of layers is damaged.
    """
    manifest = load_manifest(bundle)
    layers = read_layers(bundle)
    return BundleFacts(
        name=bundle.resolve().name,
        manifest=manifest,
        manifest_sha256=manifest_sha256(bundle),
        artifacts=tuple(_artifacts(manifest)),
        parts=_NO_LAYERS if not layers else _parts(layers),
        skipped=_skipped(layers or ()),
    )


def _artifacts(manifest: Manifest) -> list[ArtifactSize]:
    owners: dict[str, str] = {}
    found = []
    for artifact in manifest.artifacts:
        own = [file for file in dict.fromkeys(artifact.files) if file not in owners]
        others = {owners[file] for file in artifact.files if file in owners} - {artifact.component}
        owners |= dict.fromkeys(own, artifact.component)
        if own or others:
            name = artifact.component + (f" ({artifact.function})" if artifact.function != "main" else "")
            size = sum(manifest.files[file].size for file in own)
            shared = ", ".join(sorted(others)) or None
            found.append(
                ArtifactSize(artifact.target, name, artifact.storage, artifact.compute, size, shared)
            )
    return found


def _parts(layers: tuple[StoredLayer, ...]) -> tuple[PartSize, ...]:
    found = []
    for part in PARTS:
        own = [layer for layer in layers if part_of(layer.layer) == part]
        sizes: dict[str, float] = {}
        for layer in own:
            sizes[layer.scheme] = sizes.get(layer.scheme, 0.0) + layer.stored_bits / 8
        if own:
            num_weights = sum(num_elements(layer.shape) for layer in own)
            found.append(PartSize(_NAMES.get(part, part), len(own), num_weights, sizes))
    return tuple(found)


def _skipped(layers: tuple[StoredLayer, ...]) -> tuple[Skipped, ...]:
    groups: dict[tuple[str, str], list[str]] = {}
    for layer in layers:
        if layer.reason is not None:
            groups.setdefault((layer.scheme, layer.reason), []).append(layer.layer)
    return tuple(Skipped(scheme, reason, tuple(names)) for (scheme, reason), names in groups.items())
