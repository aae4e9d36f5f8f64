"""What `verify` requires of a bundle: a recipe's gates."""

from dataclasses import dataclass, field
from typing import Final

from fastvlm_convert.dataclass_io import about, check_ranges, setting
from fastvlm_convert.errors import RecipeError

_LARGEST_GATES: Final = {"db": 200.0, "nats": 100.0, "top1": 1.0}  # by the last word of a gate's name


@dataclass(frozen=True)
class Gates:
    """What `verify` requires."""

    min_sqnr_db: float = field(
        metadata=about(
            "Minimum signal-to-noise ratio of every numeric stage against the reference, in dB.",
            minimum=0,
            maximum=200.0,
        )
    )
    identical_text: bool = field(
        metadata=about("Whether the greedy answers must match the reference token for token.")
    )
    fp16_cache_min_sqnr_db: float = setting(
        60,
        "The same for the logits of a Core ML decoder that computes in float32 but whose cache, being state, "
        "is float16.",
    )
    device_min_sqnr_db: float = setting(
        40, "The same where Core ML itself runs, or the interpreter rounds like a device."
    )
    quantizer_max_kl_nats: float = setting(
        0.02,
        "With quantized layers: maximum mean divergence of the answers, end to end, that the integers alone "
        "cause: that of the reference with these weights from the reference with float weights. The other "
        "gates then compare the bundle with the reference that holds its weights.",
    )
    quantizer_min_top1: float = setting(
        0.97, "Minimum share of the answers' tokens that are still the likeliest with the integers."
    )
    runtime_max_kl_nats: float = setting(
        0.01,
        "With quantized layers: maximum mean divergence, end to end, that the export and the runtime's own "
        "shortcuts cause, such as ONNX Runtime's int8 activations.",
    )
    max_new_tokens: int = setting(
        64, "Maximum number of tokens of a compared answer.", minimum=1, maximum=1024
    )

    def __post_init__(self) -> None:
        check_ranges(self, "max_new_tokens")
        for gate, value in vars(self).items():
            most = _LARGEST_GATES.get(gate.rpartition("_")[2])
            if most is not None and not 0 <= value <= most:  # nor NaN, which no figure fails
                raise RecipeError(f"{gate} is {value:g}, expected 0 to {most:g}")
