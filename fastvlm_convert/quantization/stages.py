"""The stages of quantization: whose results are kept in the user's cache, and how long they take.

A version counts up in the commit after which the same inputs give other results; tests/quantization/
test_stages.py notices where integers are found without data. A release alone changes none.
"""

from typing import Final

from fastvlm_convert.user_cache import Kind

# data_free.py, search.py, block_passes.py, palettes.py, clustering.py: other integers, scales, zero points or
# tables.
SEARCHED: Final = Kind("searched", "integers found without data", (3,), ".bin")

# answers.py, model/, prompt.py, preprocess.py: other answers, or other image tokens.
ANSWERS: Final = Kind("answers", "answers to calibration questions", (4,), ".npz")

# static_activations.py, activation_ranges.py, weights/equalize.py, model/vision.py: other ranges or biases.
ACTIVATIONS: Final = Kind("activations", "ranges of activations", (3, *SEARCHED.version), ".npz")

# calibrate.py and all that it calls. Solved layers make up for what earlier stages did.
SOLVED: Final = Kind("solved", "layers solved with data", (10, *ANSWERS.version, *SEARCHED.version), "")

# Of a calibration's time, in the order of its stages; measured at the 0.5B shape (docs/performance.md).
SHARES: Final = {"answers": 0.31, "token weights": 0.09, "encoder": 0.02, "layers": 0.58}
