"""What the manifest of an ONNX bundle must list, so that `OnnxWeights` can feed it."""

from collections.abc import Iterable, Sequence
from typing import Final

from fastvlm_convert.errors import shortened
from fastvlm_convert.io_names import (
    ATTENTION_MASK,
    IMAGE_FEATURES,
    INPUT_IDS,
    INPUTS_EMBEDS,
    LOGITS,
    MERGE,
    PIXEL_VALUES,
    TensorSpec,
    past_key,
    past_value,
    present_key,
    present_value,
)
from fastvlm_convert.manifest import Manifest, takes_pictures
from fastvlm_convert.runtime.contract import FLOATS, Artifacts, Rules, Shape, check_artifacts, malformed

_TARGET: Final = "onnx"
_MAX_LAYERS: Final = 1024


def check_manifest(manifest: Manifest) -> None:
    """See that the artifacts are those that the session runs.

    Raises:
        BundleError: One is missing, or has other inputs or outputs.
    """
    artifacts: Artifacts = {
        (a.component, a.function if a.function == MERGE else ""): a
        for a in manifest.artifacts
        if a.target == _TARGET
    }
    check_artifacts(manifest, _TARGET, artifacts, _rules(artifacts))


def _rules(artifacts: Artifacts) -> Rules:
    decoder = artifacts.get(("decoder", ""))
    layers = 0 if decoder is None else (len(decoder.inputs) - 2) // 2
    if decoder is not None and not 1 <= layers <= _MAX_LAYERS:
        raise malformed(f"onnx decoder has {len(decoder.inputs)} inputs")
    cache: tuple[str, ...] = FLOATS
    if decoder is not None:
        cache = tuple(spec.dtype for spec in decoder.inputs if spec.name == past_key(0)) or FLOATS
    tensors = (cache, (None, "G", None, "D"))
    past = [name for i in range(layers) for name in (past_key(i), past_value(i))]
    present = [name for i in range(layers) for name in (present_key(i), present_value(i))]
    if decoder is not None:
        _check_order(decoder.inputs, past)
        _check_order(decoder.outputs, present)
    vision = artifacts.get(("vision", ""))
    size: Shape = (None, None) if vision is not None and takes_pictures(vision) else ("S", "S")
    hidden: Shape = (None, None, "H")
    merge: Rules = {
        ("embed", MERGE): (
            {INPUT_IDS: (("int64",), (None, None)), IMAGE_FEATURES: (("float32",), (None, "H"))},
            {INPUTS_EMBEDS: (("float32",), hidden)},
        )
    }
    return {
        **(merge if ("embed", MERGE) in artifacts else {}),  # the session does without
        ("vision", ""): (
            {PIXEL_VALUES: (("float32",), (None, 3, *size))},
            {IMAGE_FEATURES: (("float32",), (None, "H"))},
        ),
        ("embed", ""): (
            {INPUT_IDS: (("int64",), (None, None))},
            {INPUTS_EMBEDS: (("float32",), hidden)},
        ),
        ("decoder", ""): (
            {
                INPUTS_EMBEDS: (("float32",), hidden),
                ATTENTION_MASK: (("int64",), (None, None)),
                **dict.fromkeys(past, tensors),
            },
            {LOGITS: (("float32",), (None, 1, "V")), **dict.fromkeys(present, tensors)},
        ),
    }


def _check_order(specs: Iterable[TensorSpec], expected: Sequence[str]) -> None:
    """The session pairs what goes into the cache with what comes out of it by their order."""
    names = [spec.name for spec in specs if spec.name in set(expected)]
    if names != list(expected):
        raise malformed(f"the cache of onnx decoder is {shortened(', '.join(names), 100)}")
