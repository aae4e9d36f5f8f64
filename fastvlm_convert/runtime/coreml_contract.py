"""What the manifest of a Core ML bundle must list, so that `CoreMLSession` can feed it."""

from collections.abc import Iterator
from typing import Final

from fastvlm_convert.io_names import (
    DECODE,
    EMBED,
    HIDDEN_STATES,
    HIDDEN_STATES_OUT,
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
    numbered,
)
from fastvlm_convert.manifest import Artifact, Manifest
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


def chain(manifest: Manifest, function: str) -> tuple[Artifact, ...]:
    """The functions that one step runs one after the other, the last without a number.

    Args:
        manifest: A manifest that `check_manifest` has seen.
        function: `prefill` or `decode`.

    Returns:
        One for each package of the decoder; nothing where there is no such function.
    """
    found = {a.function: a for a in manifest.artifacts if (a.target, a.component) == (_TARGET, "decoder")}
    return tuple(found[numbered(function, n)] for n in _numbers(set(found)) if numbered(function, n) in found)


def _numbers(functions: set[str]) -> list[int | None]:
    """Numbers of the packages that hold functions of the decoder, in the order in which they run."""
    count = next(n for n in range(len(functions) + 1) if numbered(DECODE, n + 1) not in functions)
    return [*range(1, count + 1), None]


def _rules(manifest: Manifest, artifacts: Artifacts) -> Rules:
    settings = manifest.recipe.coreml
    vision = artifacts.get(("vision", ""))
    is_image = vision is not None and any(spec.name == IMAGE for spec in vision.inputs)
    picture: Specs = {PIXEL_VALUES: (FLOATS, (1, 3, "S", "S"))}
    if is_image:
        picture = {IMAGE: (("rgb_image",), ("S", "S"))}
    rules: dict[tuple[str, str], tuple[Specs, Specs]] = {
        ("vision", ""): (picture, {IMAGE_FEATURES: (FLOATS, (1, "N", "H"))}),
        ("embed", EMBED): (
            {INPUT_IDS: (("int32",), (1, None))},
            {INPUTS_EMBEDS: (FLOATS, (1, None, "H"))},
        ),
    }
    steps: dict[str, int | None] = {DECODE: None}
    if settings.sequence_lengths == "fixed":
        steps = {DECODE: 1, PREFILL: settings.prefill_chunk}
    numbers = _numbers({function for component, function in artifacts if component == "decoder"})
    for function, tokens in steps.items():
        for number, rule in _steps(manifest, tokens, numbers):
            rules["decoder", numbered(function, number)] = rule
    return rules


def _steps(
    manifest: Manifest, tokens: int | None, numbers: list[int | None]
) -> Iterator[tuple[int | None, tuple[Specs, Specs]]]:
    """What each function of a chain takes and gives; every package has the cache of its own layers."""
    is_state = manifest.recipe.coreml.kv_cache == "state"
    given = INPUTS_EMBEDS
    for number in numbers:
        shape: Shape = (f"L{number}", "G", manifest.contract.context_length, "D")
        dtypes = ("float16_state",) if is_state else FLOATS
        caches: Specs = dict.fromkeys((KEY_CACHE, VALUE_CACHE), (dtypes, shape))
        made: Specs = {} if is_state else dict.fromkeys((KEY_CACHE_OUT, VALUE_CACHE_OUT), (FLOATS, shape))
        inputs: Specs = {given: (FLOATS, (1, tokens, "H")), POSITION: (("int32",), (1,)), **caches}
        if number is None and tokens != 1:
            inputs = {**inputs, LAST_INDEX: (("int32",), (1,))}
        result: Specs = {HIDDEN_STATES_OUT: (FLOATS, (1, tokens, "H"))}
        if number is None:
            result = {LOGITS: (FLOATS, (1, 1, "V"))}
        yield number, (inputs, {**result, **made})
        given = HIDDEN_STATES
