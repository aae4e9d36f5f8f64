"""One way to run a target of a bundle, and what it must reach."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fastvlm_convert.io_names import Precision
from fastvlm_convert.manifest import Manifest
from fastvlm_convert.predict.export_plan import ExportPlan
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.runtime.loaded import LoadedModel
from fastvlm_convert.verification.answers import KnownEncoder
from fastvlm_convert.verification.check import Check
from fastvlm_convert.verification.compare import NUMERIC_STAGES, StageGates
from fastvlm_convert.verification.layers import CandidateValues, ReferenceValues

Inspect = Callable[[Path, ExportPlan], list[Check]]
# Holds how a running target computes against a plan of the export and the reference's values.
Judge = Callable[[Path, ExportPlan, LoadedModel, ReferenceValues], list[Check]]
# Runs a bundle's model on the reference's inputs and adds what its operations give.
Expose = Callable[[Path, Manifest, LoadedModel, CandidateValues], None]


@dataclass(frozen=True)
class Execution:
    """One way to run a target.

    Attributes:
        name: For progress.
        precision: How exactly the runtime computes; None as it does for users.
        gates: What it must reach.
        max_questions: How many questions it is asked; None for all. Some executions are very slow.
        expose: Shows what operations give; None where the runtime hands out no such values.
        inspect: Holds what the target's files say of themselves against a plan of the export; at most one
            execution of a target has it.
        judge: Checks of an execution that no stage shows.
        encoder: What is known of its encoder; one object for all executions that run the same encoder in the
            same way.
    """

    name: str
    precision: Precision | None
    gates: StageGates
    max_questions: int | None = None
    expose: Expose | None = None
    inspect: Inspect | None = None
    judge: Judge | None = None
    encoder: KnownEncoder = field(default_factory=KnownEncoder)


def least_everywhere(min_sqnr_db: float) -> dict[str, float]:
    """The same signal to noise for every numeric stage."""
    return dict.fromkeys(NUMERIC_STAGES, min_sqnr_db)


def full_gates(recipe: Recipe) -> StageGates:
    """All that a recipe demands, of an execution that rounds nothing."""
    gates = recipe.gates
    return StageGates(
        least_everywhere(gates.min_sqnr_db), gates.identical_text, gates.max_new_tokens, most_kl_nats(recipe)
    )


def most_kl_nats(recipe: Recipe) -> float | None:
    """Most divergence end to end of an exported model; None where the recipe quantizes nothing."""
    return recipe.gates.runtime_max_kl_nats if recipe.quantize else None
