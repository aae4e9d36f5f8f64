"""What a manifest says of an encoder whose activations are integers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class FloatLayer:
    """A layer of the encoder or the projector that multiplies floats.

    Attributes:
        layer: Its name; attention's own products are called after their block.
        reason: Why.
        share: Of all multiplications, 0..1.
    """

    layer: str
    reason: str
    share: float


@dataclass(frozen=True)
class ActivationReport:
    """What static quantization did to the encoder's activations.

    Attributes:
        bits: Of the integers.
        num_layers: Layers that multiply integers.
        num_equalized: Pairs of layers whose channels were scaled against each other, which is exact.
        cosine: Mean cosine between image tokens with and without all integers of the encoder, on pictures
            that no range was taken from where there were enough.
        float_share: Multiplications of floats, as a share of all; 0..1.
        float_layers: Layers that multiply floats.
    """

    bits: int
    num_layers: int
    num_equalized: int
    cosine: float
    float_share: float
    float_layers: tuple[FloatLayer, ...]
