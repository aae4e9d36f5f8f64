"""The JSON schema of recipe files."""

from typing import Any, Final

from fastvlm_convert.dataclass_io import Limits, schema_of
from fastvlm_convert.io_names import PATCH_SIZE
from fastvlm_convert.recipe import (
    BLOCK_SIZES,
    MAX_ANSWER_LENGTH,
    MAX_CONTEXT_LENGTH,
    MAX_GROUP_SIZE,
    MAX_IMAGE_SIZE,
    MAX_PREFILL_CHUNK,
    MAX_RESIDUAL_SHIFT,
    MAX_SAMPLES,
    MAX_SQNR_DB,
    MIN_CONTEXT_LENGTH,
    MIN_IMAGE_SIZE,
    CalibrationSettings,
    CommonSettings,
    CoreMLSettings,
    Gates,
    QuantizeRule,
    Recipe,
    RepairSettings,
)

# What single values must fulfil, for editors; the classes of `recipe` check the same.
_LIMITS: Final[Limits] = {
    (CommonSettings, "image_size"): {
        "minimum": MIN_IMAGE_SIZE, "maximum": MAX_IMAGE_SIZE, "multipleOf": PATCH_SIZE
    },
    (CommonSettings, "max_context_length"): {"minimum": MIN_CONTEXT_LENGTH, "maximum": MAX_CONTEXT_LENGTH},
    (QuantizeRule, "block_size"): {"enum": list(BLOCK_SIZES)},
    (QuantizeRule, "group_size"): {"minimum": 1, "maximum": MAX_GROUP_SIZE},
    (CalibrationSettings, "num_samples"): {"minimum": 1, "maximum": MAX_SAMPLES},
    (CalibrationSettings, "max_tokens"): {"minimum": 1, "maximum": MAX_CONTEXT_LENGTH},
    (CalibrationSettings, "damping"): {"exclusiveMinimum": 0, "maximum": 1},
    (RepairSettings, "residual_shift"): {"minimum": 0, "maximum": MAX_RESIDUAL_SHIFT},
    (CoreMLSettings, "prefill_chunk"): {"minimum": 1, "maximum": MAX_PREFILL_CHUNK},
    (Gates, "min_sqnr_db"): {"minimum": 0, "maximum": MAX_SQNR_DB},
    (Gates, "max_new_tokens"): {"minimum": 1, "maximum": MAX_ANSWER_LENGTH},
}  # fmt: skip


def recipe_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of recipe files, with which editors complete and check them.

    It knows every key, type, choice and range; rules between settings only the loader knows.
    """
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Recipe of fastvlm-convert",
        **schema_of(Recipe, _LIMITS),
    }
