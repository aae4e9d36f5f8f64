"""What an export is about to do: decided once, from config and headers alone, and handed on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from fastvlm_convert import __version__
from fastvlm_convert.bundle.client_files import app_files, client_files
from fastvlm_convert.bundle.description import describing_files
from fastvlm_convert.bundle.folder import BUNDLE
from fastvlm_convert.bundle.layers_file import LAYERS_FILE, layers_json
from fastvlm_convert.bundle.license import NO_LICENSE, license_files, license_text
from fastvlm_convert.checkpoint.checkpoint import Checkpoint
from fastvlm_convert.errors import RecipeError, TargetError
from fastvlm_convert.exporters.backends import Prediction, backend_of
from fastvlm_convert.exporters.job import Statement
from fastvlm_convert.heap import return_freed_memory
from fastvlm_convert.io_names import IMAGE_TOKEN
from fastvlm_convert.manifest import Artifact, Contract, FileEntry, Manifest, Source, takes_pictures
from fastvlm_convert.predict.sizes import predict_artifacts
from fastvlm_convert.quantization.weight_plan import WeightPlan, plan_weights
from fastvlm_convert.recipe import Recipe, shipped_recipes
from fastvlm_convert.targets import Target

_ANY_HASH: Final = "0" * 64  # as long as every other


@dataclass(frozen=True)
class ExportPlan(WeightPlan):
    """What an export is about to do; no weight has been read.

    Attributes:
        targets: Formats to export, each once; every one can take the model and the recipe.
        contract: What the bundle will promise.
    """

    targets: tuple[Target, ...]
    contract: Contract


def plan_export(checkpoint: Checkpoint, recipe: Recipe | None, targets: Sequence[Target]) -> ExportPlan:
    """See that a recipe and targets fit a checkpoint, and decide what an export does.

    Args:
        checkpoint: The checkpoint, adapter merged in.
        recipe: How to convert; None takes the recipe of a quantized checkpoint.
        targets: Formats to export.

    Raises:
        RecipeError: The recipe does not fit the model.
        TargetError: A target cannot take the model or the recipe.
    """
    plan = plan_weights(checkpoint, recipe or _stored_recipe(checkpoint))
    for target in targets:
        backend_of(target).check(plan.config, plan.recipe, plan.layers)
        backend_of(target).check_pictures(plan.recipe, plan.images)
    images, prompt = plan.images, plan.prompt
    contract = Contract(
        image_size=images.size,
        image_mode=images.mode,
        resampling=images.resampling,
        rescale_factor=images.rescale_factor,
        image_mean=images.mean,
        image_std=images.std,
        num_image_tokens=plan.config.vision.num_image_tokens,
        image_token=IMAGE_TOKEN,
        image_token_id=checkpoint.tokenizer.image_token_id,
        prompt=prompt.single_turn,
        conversation=prompt,
        eos_token_ids=checkpoint.eos_token_ids,
        context_length=plan.recipe.common.max_context_length,
    )
    _check_context(contract)
    return ExportPlan(checkpoint, plan.recipe, plan.config, plan.layers, tuple(targets), contract)


def predicted_artifacts(plan: ExportPlan) -> Prediction:
    """Every graph, program and weight file of an export (see `predict.sizes`)."""
    return predict_artifacts(plan.config, plan.layers, plan.recipe, plan.targets, statement_of(plan))


def statement_of(plan: ExportPlan) -> Statement:
    """What the bundle's files say of the model.

    Raises:
        CheckpointError: The license cannot be read.
    """
    return Statement(plan.contract, license_text(plan.checkpoint.license))


def predicted_files(plan: ExportPlan) -> dict[str, int]:
    """Bytes of every file but the manifest that an export writes, by its path relative to the bundle."""
    return dict(predicted_bundle(plan).sizes)


def predicted_bundle(plan: ExportPlan) -> Prediction:
    """Every file but the manifest that an export writes, and what the artifacts among them are."""
    predicted = predicted_artifacts(plan)
    beside = files_beside(plan, predicted.artifacts)
    sizes = {**predicted.sizes, **{name: len(content) for name, content in beside.items()}}
    entries = {name: FileEntry(size, _ANY_HASH) for name, size in sorted(sizes.items())}
    described = description_of(plan, _any_source(plan), predicted.artifacts, entries)
    sizes |= {name: len(content) for name, content in described.items()}
    return Prediction(sizes, predicted.artifacts, predicted.notes)


def description_of(
    plan: ExportPlan, source: Source, artifacts: Sequence[Artifact], files: Mapping[str, FileEntry]
) -> dict[str, bytes]:
    """The model card and the bill of materials, by name.

    Args:
        plan: What was done.
        source: Where it comes from.
        artifacts: What was written.
        files: Everything that was written, client files included.
    """
    manifest = Manifest(
        tool=__version__,
        libraries={},
        source=source,
        recipe=plan.recipe,
        artifacts=tuple(artifacts),
        contract=plan.contract,
        fp16_range="not_run",
        files=dict(files),
    )
    license = plan.checkpoint.license
    text = None if license is None else license_text(license)
    return describing_files(manifest, plan.config, text)


def _any_source(plan: ExportPlan) -> Source:
    """Where the output will come from, before any file was hashed: what is written of it is as long."""
    checkpoint = plan.checkpoint
    stored = checkpoint.quantized
    is_calibrated = plan.is_calibrated if stored is None else stored.record.source.calibration is not None
    license = NO_LICENSE if checkpoint.license is None else checkpoint.license.name
    return Source(checkpoint.layout, _ANY_HASH, license, _ANY_HASH if is_calibrated else None)


def files_beside(plan: ExportPlan, artifacts: Sequence[Artifact]) -> dict[str, bytes]:
    """Everything that is neither an artifact nor the manifest, by its path relative to the bundle."""
    checkpoint, config, contract = plan.checkpoint, plan.config, plan.contract
    added: dict[str, Any] = {}
    documents: dict[str, dict[str, Any]] = {}
    folders: dict[str, dict[str, Any]] = {}
    for target in plan.targets:
        backend = backend_of(target)
        own = [a for a in artifacts if a.target == target]
        added |= backend.client_config(own)
        documents |= backend.client_documents(config, contract, checkpoint.tokenizer.end_of_text_id, own)
        for folder, said in backend.app_folders(config, plan.recipe, plan.layers).items():
            folders[folder] = folders.get(folder, {}) | said
    in_graph = any(takes_pictures(artifact) for artifact in artifacts)
    files = client_files(checkpoint.tokenizer, config, contract, added, documents, in_graph)
    for folder, said in folders.items():
        for name, content in app_files(checkpoint.tokenizer, config, contract, said).items():
            files[f"{folder}/{name}"] = content
    files[LAYERS_FILE] = layers_json(plan.layers)
    if checkpoint.license is not None:
        files |= license_files(checkpoint.license, plan.recipe, BUNDLE.name)
    return_freed_memory()  # a tokenizer takes many times its file's size while the file is made
    return files


def _stored_recipe(checkpoint: Checkpoint) -> Recipe:
    """What a checkpoint was quantized with."""
    if checkpoint.quantized is None:
        raise RecipeError(
            "a float checkpoint needs a recipe",
            where=checkpoint.path,
            hint=f"shipped recipes: {', '.join(shipped_recipes())}; or give the path of a .yaml file",
        )
    return checkpoint.quantized.record.recipe


def _check_context(contract: Contract) -> None:
    if contract.num_image_tokens >= contract.context_length:
        raise TargetError(
            f"one image of {contract.image_size} pixels takes {contract.num_image_tokens} tokens, "
            f"the context has {contract.context_length}",
            hint="raise common.max_context_length or lower common.image_size in the recipe",
        )
