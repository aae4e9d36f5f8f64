"""How much is in memory at a time during a calibration; `predict.memory` counts with the same numbers."""

from collections.abc import Sequence
from typing import Final

from fastvlm_convert.quantized.layer_plan import LayerPlan
from fastvlm_convert.weights.parts import is_language

MAX_ACTIVATION_BYTES: Final = 512 << 20  # of a block's widest activation, over all samples that solve it
MAX_PIXELS: Final = 32 << 20  # of the images that solve the encoder's layers: 32 of 1024 x 1024
LOGIT_ROWS: Final = 64  # tokens whose logits are computed at a time
SAMPLES_BACK: Final = 8  # through which a gradient passes back side by side
AVERAGED_SAMPLES: Final = 16  # whose tokens are averaged by modality: thousands, for two numbers a layer
FINE_BITS: Final = 8


def has_fine_encoder(plans: Sequence[LayerPlan]) -> bool:
    """Whether the encoder's integers need no data and have 8 bits, see `block_solver.SolverTask`."""
    schemes = [(p.scheme, p.solver) for p in plans if p.scheme is not None and not is_language(p.layer)]
    return all(scheme.bits >= FINE_BITS and solver == "search" for scheme, solver in schemes)
