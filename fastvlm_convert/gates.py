"""What `verify` requires of a bundle: a recipe's gates."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Final

from fastvlm_convert.dataclass_io import about, check_ranges, setting

_DECIBELS: Final[dict[str, Any]] = {"minimum": 0, "maximum": 200}
_NATS: Final[dict[str, Any]] = {"minimum": 0, "maximum": 100}
_SHARE: Final[dict[str, Any]] = {"minimum": 0, "maximum": 1}


@dataclass(frozen=True)
class Gates:
    """What `verify` requires."""

    min_sqnr_db: float = field(
        metadata=about(
            "Minimum signal-to-noise ratio of every numeric stage against the reference, in dB.",
            **_DECIBELS,
        )
    )
    identical_text: bool = field(
        metadata=about("Whether the greedy answers must match the reference token for token.")
    )
    fp16_cache_min_sqnr_db: float = setting(
        60,
        "The same for the logits of a Core ML decoder that computes in float32 but whose cache, being state, "
        "is float16.",
        **_DECIBELS,
    )
    device_min_sqnr_db: float = setting(
        40, "The same where Core ML itself runs, or the interpreter rounds like a device.", **_DECIBELS
    )
    quantizer_max_kl_nats: float = setting(
        0.02,
        "With quantized layers: maximum mean divergence of the answers, end to end, that the integers alone "
        "cause: that of the reference with these weights from the reference with float weights. The other "
        "gates then compare the bundle with the reference that holds its weights.",
        **_NATS,
    )
    quantizer_min_top1: float = setting(
        0.97,
        "Minimum share of the answers' tokens that are still the likeliest with the integers.",
        **_SHARE,
    )
    runtime_max_kl_nats: float = setting(
        0.01,
        "With quantized layers: maximum mean divergence, end to end, that the export and the runtime's own "
        "shortcuts cause, such as ONNX Runtime's int8 activations.",
        **_NATS,
    )
    max_new_tokens: int = setting(
        64, "Maximum number of tokens of a compared answer.", minimum=1, maximum=1024
    )

    def __post_init__(self) -> None:
        check_ranges(self, *(f.name for f in dataclasses.fields(self) if f.name != "identical_text"))
