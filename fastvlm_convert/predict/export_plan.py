"""What an export is about to do: decided once, from config and headers alone, and handed on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastvlm_convert.bundle.client_files import app_files, client_files
from fastvlm_convert.bundle.folder import BUNDLE
from fastvlm_convert.bundle.license import license_files
from fastvlm_convert.checkpoint.checkpoint import Checkpoint
from fastvlm_convert.errors import RecipeError, TargetError
from fastvlm_convert.exporters.backends import Prediction, backend_of
from fastvlm_convert.exporters.job import ModelInputs
from fastvlm_convert.io_names import IMAGE_TOKEN
from fastvlm_convert.manifest import Artifact, Contract, takes_pictures
from fastvlm_convert.predict.sizes import predict_artifacts
from fastvlm_convert.quantization.weight_plan import WeightPlan, plan_weights
from fastvlm_convert.recipe import Recipe, shipped_recipes
from fastvlm_convert.targets import Target


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
    inputs = ModelInputs(plan.contract.image_token_id, plan.images)
    return predict_artifacts(plan.config, plan.layers, plan.recipe, plan.targets, inputs)


def predicted_files(plan: ExportPlan) -> dict[str, int]:
    """Bytes of every file but the manifest that an export writes, by its path relative to the bundle.

    Exact but for the metadata in the programs of Core ML packages (see `predict.sizes`).
    """
    predicted = predicted_artifacts(plan)
    beside = files_beside(plan, predicted.artifacts)
    return {**predicted.sizes, **{name: len(content) for name, content in beside.items()}}


def files_beside(plan: ExportPlan, artifacts: Sequence[Artifact]) -> dict[str, bytes]:
    """Everything that is neither an artifact nor the manifest, by its path relative to the bundle."""
    checkpoint, config, contract = plan.checkpoint, plan.config, plan.contract
    added: dict[str, Any] = {}
    in_folders: dict[str, bytes] = {}
    for target in plan.targets:
        backend = backend_of(target)
        added |= backend.client_config([a for a in artifacts if a.target == target])
        folder = backend.app_folder(plan.recipe)
        if folder is not None:
            files = app_files(checkpoint.tokenizer, config, contract)
            in_folders |= {f"{folder}/{name}": content for name, content in files.items()}
    in_graph = any(takes_pictures(artifact) for artifact in artifacts)
    files = client_files(checkpoint.tokenizer, config, contract, added, in_graph) | in_folders
    if checkpoint.license is not None:
        files |= license_files(checkpoint.license, plan.recipe, BUNDLE.name)
    return files


def context_warnings(plan: ExportPlan) -> list[str]:
    """What is odd about the context that a recipe asks for."""
    trained = plan.checkpoint.config.decoder.max_position_embeddings
    if plan.contract.context_length <= trained:
        return []
    return [
        f"the context of {plan.contract.context_length} tokens is longer than the {trained} the model was "
        "trained for"
    ]


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
