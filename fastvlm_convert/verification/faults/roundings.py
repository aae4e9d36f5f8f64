"""Which of an encoder's roundings of activations a fault is planted in, the same for all targets."""

from collections.abc import Sequence
from typing import Final

from fastvlm_convert.verification.faults.fault import NotApplicableError

WIDER: Final = 1.1  # times as wide as the step was found to be

_GIVEN: Final = "_integers"
_READ: Final = "_input_integers"


def middle_rounding(names: Sequence[str]) -> str:
    """The operation that rounds what a convolution in the middle of the encoder gives.

    Args:
        names: Operations that round, in the order in which they run.

    Raises:
        NotApplicableError: Nothing is rounded.
    """
    given = [name for name in names if name.endswith(_GIVEN) and not name.endswith(_READ)]
    if not given:
        raise NotApplicableError("the encoder's activations are floats")
    return given[len(given) // 2]
