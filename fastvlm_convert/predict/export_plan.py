"""What an export is about to do: known from config and headers alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastvlm_convert.bundle.client_files import PROMPT_FORMAT, apple_files, client_files
from fastvlm_convert.bundle.folder import BUNDLE
from fastvlm_convert.bundle.license import license_files
from fastvlm_convert.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fastvlm_convert.errors import RecipeError, TargetError
from fastvlm_convert.exporters.onnx.sizes import onnx_dry_run
from fastvlm_convert.io_names import APPLE_FOLDER, IMAGE_TOKEN
from fastvlm_convert.manifest import Artifact, Contract, Target
from fastvlm_convert.predict.placeholder_weights import placeholder_weights
from fastvlm_convert.predict.sizes import predicted_sizes
from fastvlm_convert.predict.support import check_target
from fastvlm_convert.quantization.prepared_weights import plan_checkpoint, resolve
from fastvlm_convert.quantized.layer_plan import LayerPlan
from fastvlm_convert.recipe import Recipe, shipped_recipes
from fastvlm_convert.weights.model_config import ModelConfig, at_image_size
from fastvlm_convert.weights.rescale import repaired_config


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
    checkpoint_path: Path, recipe: Recipe | None, targets: Sequence[Target], adapter: Path | None = None
) -> Prepared:
    """Open a checkpoint and see that the recipe and the targets fit it; reads config and headers alone.

    Args:
        checkpoint_path: The checkpoint's folder.
        recipe: How to convert; None takes the recipe of a quantized checkpoint.
        targets: Formats to export.
        adapter: PEFT folder that is merged in, or None.

    Raises:
        ConversionError: They do not.
    """
    checkpoint = open_checkpoint(checkpoint_path, adapter)
    recipe, image_size, image_mode = resolve(checkpoint, recipe or _stored_recipe(checkpoint))
    config = repaired_config(at_image_size(checkpoint.config, image_size), recipe.repairs)
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


def predicted_artifacts(prepared: Prepared, targets: Sequence[Target]) -> dict[str, int]:
    """Bytes of every graph, program and weight file of an export (see `predict.sizes`)."""
    return predicted_sizes(
        prepared.config,
        prepared.plans,
        prepared.recipe,
        targets,
        image_token_id=prepared.contract.image_token_id,
    )


def predicted_files(prepared: Prepared, targets: Sequence[Target]) -> dict[str, int]:
    """Bytes of every file but the manifest that an export writes, by its path relative to the bundle.

    Exact but for the metadata in the programs of Core ML packages (see `predict.sizes`).
    """
    config, token_id = prepared.config, prepared.contract.image_token_id
    weights = placeholder_weights(config, prepared.plans)
    artifacts, sizes = (
        onnx_dry_run(config, weights, prepared.recipe, token_id) if "onnx" in targets else ([], {})
    )
    sizes |= predicted_artifacts(prepared, [target for target in targets if target != "onnx"])
    beside = files_beside(prepared, targets, artifacts)
    return sizes | {name: len(content) for name, content in beside.items()}


def files_beside(
    prepared: Prepared, targets: Sequence[Target], artifacts: Sequence[Artifact]
) -> dict[str, bytes]:
    """Everything that is neither an artifact nor the manifest, by its path relative to the bundle."""
    checkpoint, config, contract = prepared.checkpoint, prepared.config, prepared.contract
    files = client_files(checkpoint.tokenizer, config, contract, artifacts)
    if "coreml" in targets and prepared.recipe.coreml.drop_in:
        apple = apple_files(checkpoint.tokenizer, config, contract)
        files |= {f"{APPLE_FOLDER}/{name}": content for name, content in apple.items()}
    if checkpoint.license is not None:
        files |= license_files(checkpoint.license, prepared.recipe, BUNDLE.name)
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
