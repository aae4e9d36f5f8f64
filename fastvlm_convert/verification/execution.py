"""One way to run a target of a bundle, and what it must reach."""

from dataclasses import dataclass

from fastvlm_convert.io_names import Precision
from fastvlm_convert.recipe import Gates
from fastvlm_convert.verification.compare import NUMERIC_STAGES, StageGates


@dataclass(frozen=True)
class Execution:
    """One way to run a target.

    Attributes:
        name: For progress.
        precision: How exactly the runtime computes; None as it does for users.
        gates: What it must reach.
        max_questions: How many questions it is asked; None for all. Some executions are very slow.
    """

    name: str
    precision: Precision | None
    gates: StageGates
    max_questions: int | None = None


def least_everywhere(min_sqnr_db: float) -> dict[str, float]:
    """The same signal to noise for every numeric stage."""
    return dict.fromkeys(NUMERIC_STAGES, min_sqnr_db)


def full_gates(gates: Gates) -> StageGates:
    """All that a recipe demands, of an execution that rounds nothing."""
    return StageGates(least_everywhere(gates.min_sqnr_db), gates.identical_text, gates.max_new_tokens)
