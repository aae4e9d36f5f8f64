"""What calibrates by default: photographs, printed matter, scenes and text, the same on every machine."""

from fastvlm_convert.mix.samples import KINDS, TURNS, MixedSample, mixed_samples

__all__ = ["KINDS", "TURNS", "MixedSample", "mixed_samples"]
