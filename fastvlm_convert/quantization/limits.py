"""How much is in memory at a time during a calibration; `predict.memory` counts with the same numbers."""

from typing import Final

MAX_ACTIVATION_BYTES: Final = 512 << 20  # of a block's widest activation, over all samples that solve it
MAX_PIXELS: Final = 32 << 20  # of the images that solve the encoder's layers: 32 of 1024 x 1024
LOGIT_ROWS: Final = 256  # tokens whose logits are computed at a time
