"""What a recipe makes of FastVLM-0.5B, by the exporters' own dry run."""

from collections.abc import Sequence
from typing import Final

from fastvlm_convert.errors import TargetError
from fastvlm_convert.exporters.backends import backend_of
from fastvlm_convert.predict.placeholder_weights import placeholder_weights
from fastvlm_convert.predict.recipe_facts import RecipeFacts, TargetFacts
from fastvlm_convert.predict.sizes import predict_artifacts
from fastvlm_convert.quantized.layer_groups import group_layers, scheme_name
from fastvlm_convert.quantized.layer_plan import LayerPlan, plan_layers
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.targets import BACKENDS, Target
from fastvlm_convert.weights.model_config import ModelConfig
from fastvlm_convert.weights.published import published_config

_SIZE: Final = "0.5b"  # the model whose sizes are shown


def describe(recipe: Recipe) -> RecipeFacts:
    """What a recipe makes of FastVLM-0.5B."""
    config = published_config(_SIZE)
    folded = placeholder_weights(config, ())
    plans = plan_layers({name: weight.shape for name, weight in folded.items()}, recipe)
    stored: dict[str, list[str]] = {}
    for group in group_layers(plans):
        names = stored.setdefault(group.component, [])
        text = scheme_name(group.scheme) or f"float{group.stored_bits // group.num_weights}"
        if text not in names:
            names.append(text)
    return RecipeFacts(
        name=recipe.name,
        description=recipe.description,
        stored_as={component: tuple(names) for component, names in stored.items()},
        targets={target: _target_facts(target, config, plans, recipe) for target in BACKENDS},
    )


def _target_facts(
    target: Target, config: ModelConfig, plans: Sequence[LayerPlan], recipe: Recipe
) -> TargetFacts:
    """Bytes of the artifacts, or why the target cannot take the recipe."""
    try:
        backend_of(target).check(config, recipe, plans)
    except TargetError as error:
        return TargetFacts(None, str(error))
    sizes = predict_artifacts(config, plans, recipe, [target]).sizes
    return TargetFacts(sum(sizes.values()), None)
