"""What differs between two bundles: files, layers, sizes, and the quality that was recorded of them."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

from fastvlm_convert.bundle.layers_file import StoredLayer, read_layers
from fastvlm_convert.errors import BundleError
from fastvlm_convert.manifest import VERIFICATION_FILE, Manifest, load_manifest
from fastvlm_convert.verification.compare import END_TO_END
from fastvlm_convert.verification.record import VerificationRecord, read_record
from fastvlm_convert.weights.parts import PARTS, part_of

Figure = float | Literal["equal"]
Change = Literal["only_a", "only_b", "changed", "same"]
_VERSION: Final = re.compile(r" \d[\w.]*")
_FACTS: Final = ("tool", "fp16_range")
# Of a record, the figures that say how good answers are; everything else is in the file itself.
_QUALITY: Final = ("kl_mean_nats", "top1_agreement", "identical_share")


@dataclass(frozen=True)
class FileChange:
    """One file of either bundle.

    Attributes:
        name: Path relative to the bundle.
        change: What differs.
        size_a: Bytes in the first; None where it is not there.
        size_b: Bytes in the second.
    """

    name: str
    change: Change
    size_a: int | None
    size_b: int | None


@dataclass(frozen=True)
class LayerChange:
    """One layer that the two store differently.

    Attributes:
        layer: Its name.
        a: How the first stores it; None where it has no such layer.
        b: How the second does.
    """

    layer: str
    a: StoredLayer | None
    b: StoredLayer | None


@dataclass(frozen=True)
class Quality:
    """What was recorded of a bundle's answers.

    Attributes:
        status: What `verify` found, or `not_run`.
        reason: Why there is nothing, else None.
        figures: By target, what executed it, and metric.
        num_questions: Questions that were asked.
    """

    status: str
    reason: str | None
    figures: Mapping[str, Figure]
    num_questions: int


@dataclass(frozen=True)
class BundleDiff:
    """What differs between two bundles.

    Attributes:
        settings: Settings of recipe, contract and source that differ: path -> (first, second).
        files: Every file of either.
        layers: Layers that differ; None where a bundle does not say how it stores its layers.
        schemes: Of each bundle: layers by part and scheme.
        quality: Of each bundle.
    """

    settings: Mapping[str, tuple[Any, Any]]
    files: tuple[FileChange, ...]
    layers: tuple[LayerChange, ...] | None
    schemes: tuple[Mapping[str, int], Mapping[str, int]]
    quality: tuple[Quality, Quality]

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of all files of each."""
        return sum(f.size_a or 0 for f in self.files), sum(f.size_b or 0 for f in self.files)


def diff_bundles(a: Path, b: Path) -> BundleDiff:
    """Compare two bundles by what their manifests and records say; no file of weights is read.

    Raises:
        BundleError: One of them cannot be read.
    """
    manifests = load_manifest(a), load_manifest(b)
    layers = read_layers(a), read_layers(b)
    is_known = layers[0] is not None and layers[1] is not None
    return BundleDiff(
        settings=_differences(*(_facts(manifest) for manifest in manifests)),
        files=tuple(_file_changes(*manifests)),
        layers=tuple(_layer_changes(layers[0] or (), layers[1] or ())) if is_known else None,
        schemes=(_schemes(layers[0] or ()), _schemes(layers[1] or ())),
        quality=(_quality(a), _quality(b)),
    )


def _facts(manifest: Manifest) -> dict[str, Any]:
    """What a manifest says besides files and interfaces."""
    facts: dict[str, Any] = {key: getattr(manifest, key) for key in _FACTS}
    facts["targets"] = list(manifest.targets)
    for key in ("source", "contract", "recipe"):
        facts |= _flat(asdict(getattr(manifest, key)), key)
    return facts


def _flat(value: Any, path: str) -> dict[str, Any]:  # noqa: ANN401
    if isinstance(value, dict):
        return {key: leaf for k, inner in value.items() for key, leaf in _flat(inner, f"{path}.{k}").items()}
    return {path: list(value) if isinstance(value, tuple) else value}


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    keys = dict.fromkeys((*a, *b))
    return {key: (a.get(key), b.get(key)) for key in keys if a.get(key) != b.get(key)}


def _file_changes(a: Manifest, b: Manifest) -> list[FileChange]:
    changes = []
    for name in sorted({*a.files, *b.files}):
        one, two = a.files.get(name), b.files.get(name)
        change: Change = (
            "only_b" if one is None else "only_a" if two is None else "same" if one == two else "changed"
        )
        changes.append(FileChange(name, change, one.size if one else None, two.size if two else None))
    return changes


def _layer_changes(a: Sequence[StoredLayer], b: Sequence[StoredLayer]) -> list[LayerChange]:
    ones, twos = ({layer.layer: layer for layer in layers} for layers in (a, b))
    names = dict.fromkeys((*ones, *twos))
    return [
        LayerChange(name, ones.get(name), twos.get(name))
        for name in names
        if ones.get(name) != twos.get(name)
    ]


def _schemes(layers: Sequence[StoredLayer]) -> dict[str, int]:
    """`decoder: int4 block 32` -> how many layers."""
    counts = Counter((part_of(layer.layer), layer.scheme) for layer in layers)
    order = sorted(counts, key=lambda key: (PARTS.index(key[0]), key[1]))
    return {f"{part}: {scheme}": counts[part, scheme] for part, scheme in order}


def _quality(bundle: Path) -> Quality:
    try:
        record = read_record(bundle)
    except BundleError as error:
        return Quality("not_run", f"{VERIFICATION_FILE}: {error.args[0]}", {}, 0)
    if record is None:
        why = f"it has no {VERIFICATION_FILE}; `fastvlm-convert verify --record` writes it"
        return Quality("not_run", why, {}, 0)
    return Quality(record.status, None, _figures(record), record.num_questions)


def _figures(record: VerificationRecord) -> dict[str, Figure]:
    """The figures that say how good the answers are, end to end."""
    figures: dict[str, Figure] = {}
    for found in (*record.measurements, *record.checks):
        value: Figure | None = "equal" if found.exact else found.value
        if found.stage == END_TO_END and found.metric in _QUALITY and value is not None:
            by = _VERSION.sub("", found.executed_by or "")  # a newer runtime is the same executor
            figures[f"{found.target}{f', {by}' if by else ''}: {found.metric}"] = value
    return figures
