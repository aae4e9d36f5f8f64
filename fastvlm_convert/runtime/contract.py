"""What a bundle's manifest must say of its artifacts, so that a session can feed them.

A manifest may have been edited, or belong to other files: names, dtypes and shapes are compared with what a
session relies on before anything is run, and the graphs themselves with the manifest.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from fastvlm_convert.errors import BundleError, shortened, shown
from fastvlm_convert.io_names import (
    ATTENTION_MASK,
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
    TensorSpec,
    past_key,
    past_value,
    present_key,
    present_value,
)
from fastvlm_convert.manifest import Artifact, Manifest

AGAIN: Final = "copy the bundle again, or export the bundle again"

# A dimension that must be the same number wherever its letter stands; None is free.
_Shape = tuple[int | str | None, ...]
_Specs = Mapping[str, tuple[tuple[str, ...], _Shape]]

_FLOATS: Final = ("float16", "float32")
_MAX_LAYERS: Final = 1024
_MAX_ROWS: Final = 1 << 24  # of a vocabulary whose size no shape states


def check_artifacts(manifest: Manifest, target: str) -> None:
    """See that the artifacts of a target are those that its session runs.

    Args:
        manifest: The bundle's manifest.
        target: The target; one without rules of its own is left to its session.

    Raises:
        BundleError: One is missing, or has other inputs or outputs.
    """
    artifacts: dict[tuple[str, str], Artifact] = {
        (a.component, a.function if target == "coreml" and a.component != "vision" else ""): a
        for a in manifest.artifacts
        if a.target == target
    }
    if len(artifacts) < sum(a.target == target for a in manifest.artifacts):
        raise _error(f"it lists a {target} artifact twice")
    rules = {"onnx": _onnx, "coreml": _coreml}.get(target)
    if rules is None:
        return
    known: dict[str, int] = {"S": manifest.contract.image_size, "N": manifest.contract.num_image_tokens}
    for (component, function), (inputs, outputs) in rules(manifest, artifacts).items():
        what = f"{target} {component} {function}".strip()
        if (component, function) not in artifacts:
            raise _error(f"it has no {what}")
        artifact = artifacts[component, function]
        _check(f"the inputs of {what}", artifact.inputs, inputs, known)
        _check(f"the outputs of {what}", artifact.outputs, outputs, known)
    vocabulary = known.get("V", _MAX_ROWS)
    if not all(0 <= token < vocabulary for token in manifest.contract.eos_token_ids):
        raise _error(
            f"eos_token_ids is {shown(manifest.contract.eos_token_ids)}, expected below {vocabulary}"
        )


def check_graph(what: str, listed: Sequence[TensorSpec], found: Sequence[TensorSpec]) -> None:
    """See that a graph has the inputs or outputs that the manifest lists.

    Args:
        what: Which they are, for the message.
        listed: By the manifest.
        found: In the graph.

    Raises:
        BundleError: They differ.
    """
    graph = {spec.name: spec for spec in found}
    for spec in listed:
        if graph.get(spec.name) != spec:
            there = _text(graph[spec.name]) if spec.name in graph else "nothing"
            raise BundleError(
                f"{what} are not what the manifest says: it lists {_text(spec)}, the graph has {there}",
                hint=AGAIN,
            )
    if len(found) != len(listed):
        raise BundleError(f"{what} are {len(found)}, the manifest lists {len(listed)}", hint=AGAIN)


_Rules = dict[tuple[str, str], tuple[_Specs, _Specs]]
_Artifacts = Mapping[tuple[str, str], Artifact]


def _onnx(manifest: Manifest, artifacts: _Artifacts) -> _Rules:
    decoder = artifacts.get(("decoder", ""))
    layers = 0 if decoder is None else (len(decoder.inputs) - 2) // 2
    if decoder is not None and not 1 <= layers <= _MAX_LAYERS:
        raise _error(f"onnx decoder has {len(decoder.inputs)} inputs")
    cache: tuple[str, ...] = _FLOATS
    if decoder is not None:
        cache = tuple(spec.dtype for spec in decoder.inputs if spec.name == past_key(0)) or _FLOATS
    tensors = (cache, (None, "G", None, "D"))
    past = [name for i in range(layers) for name in (past_key(i), past_value(i))]
    present = [name for i in range(layers) for name in (present_key(i), present_value(i))]
    if decoder is not None:
        _check_order(decoder.inputs, past)
        _check_order(decoder.outputs, present)
    hidden: _Shape = (None, None, "H")
    return {
        ("vision", ""): (
            {PIXEL_VALUES: (("float32",), (None, 3, "S", "S"))},
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


def _coreml(manifest: Manifest, artifacts: _Artifacts) -> _Rules:
    settings = manifest.recipe.coreml
    vision = artifacts.get(("vision", ""))
    is_image = vision is not None and any(spec.name == IMAGE for spec in vision.inputs)
    picture: _Specs = {PIXEL_VALUES: (_FLOATS, (1, 3, "S", "S"))}
    if is_image:
        picture = {IMAGE: (("rgb_image",), ("S", "S"))}
    is_state = settings.kv_cache == "state"
    shape: _Shape = ("L", "G", manifest.contract.context_length, "D")
    dtypes = ("float16_state",) if is_state else _FLOATS
    caches: _Specs = dict.fromkeys((KEY_CACHE, VALUE_CACHE), (dtypes, shape))
    made: _Specs = {} if is_state else dict.fromkeys((KEY_CACHE_OUT, VALUE_CACHE_OUT), (_FLOATS, shape))
    is_fixed = settings.sequence_lengths == "fixed"
    rules: _Rules = {
        ("vision", ""): (picture, {IMAGE_FEATURES: (_FLOATS, (1, "N", "H"))}),
        ("embed", EMBED): (
            {INPUT_IDS: (("int32",), (1, None))},
            {INPUTS_EMBEDS: (_FLOATS, (1, None, "H"))},
        ),
    }
    steps: dict[str, int | None] = (
        {DECODE: 1, PREFILL: settings.prefill_chunk} if is_fixed else {DECODE: None}
    )
    for function, tokens in steps.items():
        last: _Specs = {} if tokens == 1 else {LAST_INDEX: (("int32",), (1,))}
        inputs: _Specs = {INPUTS_EMBEDS: (_FLOATS, (1, tokens, "H")), POSITION: (("int32",), (1,))}
        outputs: _Specs = {LOGITS: (_FLOATS, (1, 1, "V")), **made}
        rules["decoder", function] = ({**inputs, **last, **caches}, outputs)
    return rules


def _check(what: str, specs: Sequence[TensorSpec], expected: _Specs, known: dict[str, int]) -> None:
    names = [spec.name for spec in specs]
    if sorted(names) != sorted(expected):
        few = shortened(", ".join(names), 100) or "none"
        raise _error(f"{what} are {few}; expected {shortened(', '.join(expected), 100)}")
    for spec in specs:
        dtypes, shape = expected[spec.name]
        if spec.dtype not in dtypes or not _fits(spec.shape, shape, known):
            axes = ", ".join(
                "any" if n is None else str(known.get(n, n) if isinstance(n, str) else n) for n in shape
            )
            raise _error(f"{what}: {_text(spec)}, expected {' or '.join(dtypes)} [{axes}]")


def _fits(given: Sequence[int | str], shape: _Shape, known: dict[str, int]) -> bool:
    if not given and shape[:1] == (1,):  # Core ML states no shape of what depends on a flexible input
        return True
    if len(given) != len(shape):
        return False
    for there, expected in zip(given, shape, strict=True):
        if isinstance(there, int) and there < 1:
            return False
        if isinstance(expected, str):
            if not isinstance(there, int) or known.setdefault(expected, there) != there:
                return False
        elif expected is not None and there != expected:
            return False
    return True


def _check_order(specs: Iterable[TensorSpec], expected: Sequence[str]) -> None:
    """The session pairs what goes into the cache with what comes out of it by their order."""
    names = [spec.name for spec in specs if spec.name in set(expected)]
    if names != list(expected):
        raise _error(f"the cache of onnx decoder is {shortened(', '.join(names), 100)}")


def _text(spec: TensorSpec) -> str:
    axes = shortened(", ".join("?" if n is None else str(n) for n in spec.shape), 80)
    return f"{shortened(spec.name, 60)}: {shortened(spec.dtype, 20)} [{axes}]"


def _error(problem: str) -> BundleError:
    return BundleError(f"malformed manifest: {problem}", hint=AGAIN)
