"""What the manifest of a Core ML bundle must list, so that `CoreMLSession` can feed it."""

from typing import Final

from fastvlm_convert.io_names import (
    DECODE,
    EMBED,
    IMAGE,
    IMAGE_FEATURES,
    INPUT_IDS,
    INPUTS_EMBEDS,
    KEY_CACHE,
    KEY_CACHE_OUT,
    LAST_INDEX,
    LOGITS,
    PIXEL_VALUES,
    POSITION,
    PREFILL,
    VALUE_CACHE,
    VALUE_CACHE_OUT,
)
from fastvlm_convert.manifest import Manifest
from fastvlm_convert.runtime.contract import FLOATS, Artifacts, Rules, Shape, Specs, check_artifacts

_TARGET: Final = "coreml"


def check_manifest(manifest: Manifest) -> None:
    """See that the artifacts are those that the session runs.

    Raises:
        BundleError: One is missing, or has other inputs or outputs.
    """
    artifacts: Artifacts = {
        (a.component, "" if a.component == "vision" else a.function): a
        for a in manifest.artifacts
        if a.target == _TARGET
    }
    check_artifacts(manifest, _TARGET, artifacts, _rules(manifest, artifacts))


def _rules(manifest: Manifest, artifacts: Artifacts) -> Rules:
    settings = manifest.recipe.coreml
    vision = artifacts.get(("vision", ""))
    is_image = vision is not None and any(spec.name == IMAGE for spec in vision.inputs)
    picture: Specs = {PIXEL_VALUES: (FLOATS, (1, 3, "S", "S"))}
    if is_image:
        picture = {IMAGE: (("rgb_image",), ("S", "S"))}
    is_state = settings.kv_cache == "state"
    shape: Shape = ("L", "G", manifest.contract.context_length, "D")
    dtypes = ("float16_state",) if is_state else FLOATS
    caches: Specs = dict.fromkeys((KEY_CACHE, VALUE_CACHE), (dtypes, shape))
    made: Specs = {} if is_state else dict.fromkeys((KEY_CACHE_OUT, VALUE_CACHE_OUT), (FLOATS, shape))
    is_fixed = settings.sequence_lengths == "fixed"
    rules: dict[tuple[str, str], tuple[Specs, Specs]] = {
        ("vision", ""): (picture, {IMAGE_FEATURES: (FLOATS, (1, "N", "H"))}),
        ("embed", EMBED): (
            {INPUT_IDS: (("int32",), (1, None))},
            {INPUTS_EMBEDS: (FLOATS, (1, None, "H"))},
        ),
    }
    steps: dict[str, int | None] = (
        {DECODE: 1, PREFILL: settings.prefill_chunk} if is_fixed else {DECODE: None}
    )
    for function, tokens in steps.items():
        last: Specs = {} if tokens == 1 else {LAST_INDEX: (("int32",), (1,))}
        inputs: Specs = {INPUTS_EMBEDS: (FLOATS, (1, tokens, "H")), POSITION: (("int32",), (1,))}
        outputs: Specs = {LOGITS: (FLOATS, (1, 1, "V")), **made}
        rules["decoder", function] = ({**inputs, **last, **caches}, outputs)
    return rules
