"""The stages in order; the only module that knows them all."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from fastvlm_convert import __version__
from fastvlm_convert.bundle.client_files import PROMPT_FORMAT, apple_files, client_files
from fastvlm_convert.bundle.folder import new_folder
from fastvlm_convert.bundle.licence import NO_LICENCE, licence_files
from fastvlm_convert.checkpoint.checkpoint import Checkpoint, content_hash, open_checkpoint
from fastvlm_convert.contract import APPLE_FOLDER, IMAGE_TOKEN, op_component
from fastvlm_convert.errors import MissingDependencyError, TargetError
from fastvlm_convert.export.checks import check_target
from fastvlm_convert.export.job import ExportJob
from fastvlm_convert.export.onnx.sizes import onnx_dry_run
from fastvlm_convert.export.sizes import predicted_sizes
from fastvlm_convert.fp16_range import MIN_HEADROOM, RangeReport, load_report
from fastvlm_convert.manifest import (
    FILE_NAME,
    Artifact,
    Contract,
    Manifest,
    Source,
    Status,
    Target,
    file_entries,
)
from fastvlm_convert.preprocess import ImageMode
from fastvlm_convert.quantize.engine import engine_weights, plan_checkpoint
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.runtime.loaded import at_image_size
from fastvlm_convert.weights.config import ModelConfig
from fastvlm_convert.weights.hollow import hollow_weights
from fastvlm_convert.weights.plan import LayerPlan

OnProgress = Callable[[str, float], None]


@dataclass(frozen=True)
class ExportResult:
    """A finished export.

    Attributes:
        bundle: The folder.
        manifest: What it holds.
        warnings: What the user should know.
    """

    bundle: Path
    manifest: Manifest
    warnings: tuple[str, ...]


def export(
    checkpoint_path: Path,
    recipe: Recipe,
    targets: Sequence[Target],
    output: Path,
    *,
    adapter: Path | None = None,
    overwrite: bool = False,
    on_progress: OnProgress = lambda stage, share: None,
) -> ExportResult:
    """Convert a checkpoint to a bundle.

    Args:
        checkpoint_path: The checkpoint's folder; it is only read.
        recipe: How to convert.
        targets: Formats to export.
        output: Folder to make; it appears whole or not at all.
        adapter: PEFT folder that is merged in, or None.
        overwrite: Whether an existing bundle may be replaced.
        on_progress: Called with the name of the stage and the share of it that is done, 0..1.

    Raises:
        ConversionError: The input, the recipe, the target or the output does not allow it.
    """
    protected = [checkpoint_path] if adapter is None else [checkpoint_path, adapter]
    prepared = prepare(checkpoint_path, recipe, targets, adapter)
    exporters = [_exporter(target) for target in targets]  # a missing library shows before the work begins
    checkpoint, config, recipe = prepared.checkpoint, prepared.config, prepared.recipe
    contract = prepared.contract
    with new_folder(output, overwrite, protected) as folder:
        licence = NO_LICENCE if checkpoint.licence is None else checkpoint.licence.name
        job = ExportJob(
            config,
            engine_weights(checkpoint, recipe, on_progress),
            recipe,
            contract,
            licence,
            folder,
            lambda share: None,
        )
        artifacts: list[Artifact] = []
        for target, write in zip(targets, exporters, strict=True):
            artifacts += write(replace(job, on_progress=partial(on_progress, target)))
        for name, content in _files_beside(prepared, targets, artifacts).items():
            (folder / name).write_bytes(content)
        on_progress("hashes", 0.0)
        sha256 = content_hash(checkpoint.files)
        scan = load_report(sha256)
        manifest = Manifest(
            tool=__version__,
            libraries=_library_versions(targets),
            source=Source(checkpoint.layout, sha256, licence),
            recipe=recipe,
            artifacts=tuple(artifacts),
            contract=contract,
            fp16_range=_range_status(scan),
            files=file_entries(folder),
        )
        (folder / FILE_NAME).write_text(manifest.to_json(), encoding="utf-8")
        on_progress("hashes", 1.0)
    return ExportResult(output, manifest, tuple(_warnings(checkpoint, manifest, scan)))


@dataclass(frozen=True)
class Prepared:
    """What an export is about to do; no weight has been read.

    Attributes:
        checkpoint: The checkpoint, adapter merged in.
        config: Dimensions, with the image size to export.
        recipe: The recipe, with every setting resolved.
        plans: What happens to every layer.
        contract: What the bundle will promise.
    """

    checkpoint: Checkpoint
    config: ModelConfig
    recipe: Recipe
    plans: tuple[LayerPlan, ...]
    contract: Contract


def prepare(
    checkpoint_path: Path, recipe: Recipe, targets: Sequence[Target], adapter: Path | None = None
) -> Prepared:
    """Open a checkpoint and see that the recipe and the targets fit it; reads config and headers alone.

    Raises:
        ConversionError: They do not.
    """
    checkpoint = open_checkpoint(checkpoint_path, adapter)
    recipe, image_size, image_mode = _resolve(checkpoint, recipe)
    config = at_image_size(checkpoint.config, image_size)
    plans = plan_checkpoint(checkpoint, recipe)
    for target in targets:
        check_target(target, config, recipe, plans)
    contract = Contract(
        image_size=image_size,
        image_mode=image_mode,
        num_image_tokens=config.vision.num_image_tokens,
        image_token=IMAGE_TOKEN,
        image_token_id=checkpoint.tokenizer.image_token_id,
        prompt=PROMPT_FORMAT,
        eos_token_ids=checkpoint.eos_token_ids,
        context_length=recipe.common.max_context_length,
    )
    _check_context(contract)
    return Prepared(checkpoint, config, recipe, plans, contract)


def predicted_files(prepared: Prepared, targets: Sequence[Target]) -> dict[str, int]:
    """Bytes of every file but the manifest that an export writes, by its path relative to the bundle.

    Exact but for the programs of Core ML packages, which are estimated (see `export.sizes`).
    """
    token_id = prepared.contract.image_token_id
    sizes = predicted_sizes(
        prepared.config, prepared.plans, prepared.recipe, targets, image_token_id=token_id
    )
    weights = hollow_weights(prepared.config, prepared.plans)
    artifacts = (
        onnx_dry_run(prepared.config, weights, prepared.recipe, token_id)[0] if "onnx" in targets else []
    )
    beside = _files_beside(prepared, targets, artifacts)
    return sizes | {name: len(content) for name, content in beside.items()}


def _files_beside(
    prepared: Prepared, targets: Sequence[Target], artifacts: Sequence[Artifact]
) -> dict[str, bytes]:
    """Everything that is neither an artifact nor the manifest, by its path relative to the bundle."""
    checkpoint, config, contract = prepared.checkpoint, prepared.config, prepared.contract
    files = client_files(checkpoint.tokenizer, config, contract, artifacts)
    if "coreml" in targets and prepared.recipe.coreml.drop_in:
        apple = apple_files(checkpoint.tokenizer, config, contract)
        files |= {f"{APPLE_FOLDER}/{name}": content for name, content in apple.items()}
    if checkpoint.licence is not None:
        files |= licence_files(checkpoint.licence, prepared.recipe)
    return files


@dataclass(frozen=True)
class _Exporter:
    """What people call a target, and the packages whose versions shape its bytes."""

    name: str
    libraries: tuple[str, ...]


_EXPORTERS: dict[Target, _Exporter] = {
    "onnx": _Exporter("ONNX", ("onnx",)),
    "coreml": _Exporter("Core ML", ("coremltools",)),
}
TARGETS: tuple[Target, ...] = tuple(_EXPORTERS)


def _exporter(target: Target) -> Callable[[ExportJob], list[Artifact]]:
    """A target's exporter, imported late: `plan` needs none, and coremltools takes seconds."""
    try:
        module: Any = import_module(f"fastvlm_convert.export.{target}.write")
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of(error, f"the {_EXPORTERS[target].name} target") from error
    write: Callable[[ExportJob], list[Artifact]] = getattr(module, f"export_{target}")
    return write


def _resolve(checkpoint: Checkpoint, recipe: Recipe) -> tuple[Recipe, int, ImageMode]:
    """The recipe with values where it says `checkpoint`; image size and mode."""
    size, mode = recipe.common.image_size, recipe.common.image_mode
    size = checkpoint.config.vision.image_size if size == "checkpoint" else size
    mode = checkpoint.image_mode if mode == "checkpoint" else mode
    return replace(recipe, common=replace(recipe.common, image_size=size, image_mode=mode)), size, mode


def _library_versions(targets: Sequence[Target]) -> dict[str, str]:
    used = {name for target in targets for name in _EXPORTERS[target].libraries}
    return {name: metadata.version(name) for name in sorted({"numpy", "tokenizers", *used})}


def _range_status(scan: RangeReport | None) -> Status:
    """What a scan of this very checkpoint, if there was one, says of float16's range."""
    if scan is None:
        return "not_run"
    return "failed" if scan.risky() else "passed"


def _check_context(contract: Contract) -> None:
    if contract.num_image_tokens >= contract.context_length:
        raise TargetError(
            f"one image of {contract.image_size} pixels takes {contract.num_image_tokens} tokens, "
            f"the context has {contract.context_length}",
            hint="raise common.max_context_length or lower common.image_size in the recipe",
        )


def _warnings(checkpoint: Checkpoint, manifest: Manifest, scan: RangeReport | None) -> list[str]:
    warnings = [
        f"config.json says {d.key} is {d.config}, the tensors say {d.tensors}; the tensors were followed"
        for d in checkpoint.disagreements
    ]
    precision = {"vision": manifest.recipe.vision, "decoder": manifest.recipe.decoder}
    risky = [op.op for op in scan.risky()] if scan else []
    in_float16 = [op for op in risky if precision[op_component(op)].computes_in(op) == "float16"]
    if in_float16:
        warnings.append(
            f"the range scan found less than {MIN_HEADROOM:.0f}x headroom to float16's limit at "
            f"{', '.join(in_float16)}; keep them in float32 (float32_ops in the recipe)"
        )
    if manifest.source.licence == NO_LICENCE:
        warnings.append("the checkpoint has no licence file; see that you may pass the bundle on")
    if manifest.contract.context_length > checkpoint.config.decoder.max_position_embeddings:
        warnings.append(
            f"the context of {manifest.contract.context_length} tokens is longer than the "
            f"{checkpoint.config.decoder.max_position_embeddings} the model was trained for"
        )
    return warnings
