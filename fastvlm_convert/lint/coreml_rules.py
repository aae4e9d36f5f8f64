"""Rules about Core ML packages. Most come from reports about Apple's runtimes, which nobody can test here."""

from collections.abc import Iterator, Mapping
from typing import Final

from fastvlm_convert.lint.facts import CoreMLProgram, Facts, MilFunction, MilOperation, Tensor
from fastvlm_convert.lint.platform import (
    Platform,
    Version,
    is_below,
    is_from,
    version_numbers,
    version_text,
)
from fastvlm_convert.lint.rule import Hit, Rule, named
from fastvlm_convert.lint.versions import STATEFUL_PALETTES

_ATTENTION: Final = "scaled_dot_product_attention"
_GATHERS: Final = ("gather", "gather_along_axis", "gather_nd")
_INT4: Final = ("int4", "uint4")
_WIDE: Final = 8064  # the widest that was reported right; the recipes' `split_wider_than`
_STATE_STEP: Final = 32
_IOS_26: Final = (26,)
_IOS_18: Final = (18,)
# Specification version -> the oldest iOS that reads it.
_OLDEST_IOS: Final[Mapping[int, Version]] = {6: (15,), 7: (16,), 8: (17,), 9: (18,), 10: (26,)}


def _on_ios_26(platform: Platform) -> bool | None:
    return is_from(platform.ios, _IOS_26)


def _on_neural_engine(platform: Platform) -> bool | None:
    return platform.has_neural_engine


def _on_neural_engine_of_ios_26(platform: Platform) -> bool | None:
    conditions = (_on_neural_engine(platform), _on_ios_26(platform))
    return False if False in conditions else None if None in conditions else True


def _fused_attention(facts: Facts, platform: Platform) -> Iterator[Hit]:
    del platform
    for program in facts.programs:
        if fused := program.operations(_ATTENTION):
            yield Hit(f"fused attention: {named(o.name for o in fused)}", program.file)


def _wide_layers(facts: Facts, platform: Platform) -> Iterator[Hit]:
    del platform
    for program in facts.programs:
        wide = [o.name for o in _weights(program) if max((n or 0 for n in o.shape[:2]), default=0) > _WIDE]
        if wide:
            yield Hit(f"quantized weights with an edge above {_WIDE}: {named(wide)}", program.file)


def _weights(program: CoreMLProgram) -> list[MilOperation]:
    """What unpacks weights; of two steps, the scale of a palette for example, both."""
    return program.operations("constexpr_blockwise_shift_scale", "constexpr_lut_to_dense")


def _blocks(facts: Facts, platform: Platform) -> Iterator[Hit]:
    del platform
    for program in facts.programs:
        in_blocks = [o.name for o in program.operations("constexpr_blockwise_shift_scale") if _has_blocks(o)]
        if in_blocks:
            yield Hit(f"integers in blocks: {named(in_blocks)}", program.file)


def _has_blocks(operation: MilOperation) -> bool:
    """Whether several scales lie along an axis of inputs, which are all but the first."""
    scale = operation.constants.get("scale")
    data = operation.constants.get("data")
    if scale is None or data is None:  # what it scales is no integer, but a palette
        return False
    return any(count > 1 for count in scale.shape[1:])


def _palettes(facts: Facts, platform: Platform) -> Iterator[Hit]:
    del platform
    if not STATEFUL_PALETTES.first.holds(version_numbers(facts.manifest.libraries.get("coremltools", ""))):
        return
    for program in facts.programs:
        tables = [o.name for o in program.operations("constexpr_lut_to_dense") if _bits(o) == 4]
        if tables and any(f.states for f in program.functions):
            yield Hit(f"4-bit palettes in a program with states: {named(tables)}", program.file)


def _bits(operation: MilOperation) -> int | None:
    indices: Tensor | None = operation.constants.get("indices")
    return None if indices is None else int(indices.dtype.removeprefix("uint"))


def _scaled_palettes(facts: Facts, platform: Platform) -> Iterator[Hit]:
    del platform
    for program in facts.programs:
        palettes = {o.name for o in program.operations("constexpr_lut_to_dense")}
        scaled = [
            o.name
            for o in program.operations("constexpr_blockwise_shift_scale")
            if palettes & set(o.inputs.get("data", ()))
        ]
        if scaled:
            yield Hit(f"palettes with a scale per channel: {named(scaled)}", program.file)


def _rounded_activations(facts: Facts, platform: Platform) -> Iterator[Hit]:
    for program in facts.programs:
        rounded = [o.name for o in program.operations("quantize")]
        if not rounded or (program.compute == "float16" and platform.has_neural_engine):
            continue
        why = f", and {program.compute} arithmetic" if program.compute != "float16" else ""
        yield Hit(f"activations rounded to integers{why}: {named(rounded)}", program.file)


def _gathers(facts: Facts, platform: Platform) -> Iterator[Hit]:
    del platform
    for program in facts.programs:
        for function in program.functions:
            if gathers := [o.name for o in function.operations if o.type in _GATHERS]:
                yield Hit(f"gathers in function {function.name}: {named(gathers)}", program.file)


def _state_widths(facts: Facts, platform: Platform) -> Iterator[Hit]:
    del platform
    for program in facts.programs:
        odd = {
            name: shape[-1]
            for function in program.functions
            for name, shape in function.states.items()
            if shape and shape[-1] is not None and shape[-1] % _STATE_STEP
        }
        for name, width in odd.items():
            yield Hit(f"state {name} is {width} wide, no multiple of {_STATE_STEP}", program.file)


def _oldest_system(facts: Facts, platform: Platform) -> Iterator[Hit]:
    for program in facts.programs:
        version = program.specification_version
        oldest = _OLDEST_IOS[version]
        needs = sorted({need for f in program.functions for need in _needs_ios_18(f)})
        if needs and oldest < _IOS_18:
            what = f"the package says {version} (iOS {version_text(oldest)}), but has {', '.join(needs)}"
            yield Hit(f"{what}, which need iOS 18", program.file)
        floor = max(oldest, _IOS_18) if needs else oldest
        if platform.ios is not None and is_below(platform.ios, floor):
            because = f" for {', '.join(needs)}" if needs else ""
            text = f"it needs iOS {version_text(floor)}{because}, not {version_text(platform.ios)}"
            yield Hit(text, program.file)


def _needs_ios_18(function: MilFunction) -> Iterator[str]:
    if function.states:
        yield "states"
    for operation in function.operations:
        dtypes = {tensor.dtype for tensor in operation.constants.values()}
        if operation.type == "constexpr_blockwise_shift_scale" and dtypes & set(_INT4):
            yield "4-bit integers"
        if operation.type == "constexpr_blockwise_shift_scale" and _has_blocks(operation):
            yield "scales per block"
        if operation.type == "constexpr_lut_to_dense" and operation.constants["lut"].shape[:1] != (1,):
            yield "palettes per group"


RULES: Final = (
    Rule(
        id="coreml-fused-attention",
        severity="error",
        reason="the fused attention operation gives wrong numbers on iOS 26 and macOS 26; products and a "
        "softmax do not",
        source="https://github.com/pytorch/executorch/pull/16144",
        advice="set coreml.attention to decomposed and export again",
        check=_fused_attention,
        scope="iOS 26 and newer",
        applies=_on_ios_26,
        targets=("coreml",),
    ),
    Rule(
        id="coreml-wide-quantized",
        severity="warning",
        reason="quantized layers some 8100 wide gave wrong numbers on iOS 26 and were right when they were "
        "split",
        source="https://github.com/pytorch/executorch/pull/15936",
        advice="set coreml.split_wider_than to 8064 and export again, or prove the layers on a device",
        check=_wide_layers,
        scope="iOS 26 and newer",
        applies=_on_ios_26,
        targets=("coreml",),
    ),
    Rule(
        id="coreml-ane-blocks",
        severity="error",
        reason="integers with a scale per block give wrong results on the Neural Engine without an error "
        "(cosine 0.367); the GPU is right",
        source="https://github.com/apple/coreai-models/issues/279",
        advice="load the models with computeUnits = .cpuAndGPU, or export recipe ios-ane",
        check=_blocks,
        scope="on the Neural Engine",
        applies=_on_neural_engine,
        targets=("coreml",),
    ),
    Rule(
        id="coreml-ane-palettes",
        severity="warning",
        reason=STATEFUL_PALETTES.reason,
        source=STATEFUL_PALETTES.source,
        advice=STATEFUL_PALETTES.advice,
        check=_palettes,
        scope="on the Neural Engine of iOS 26 and newer",
        applies=_on_neural_engine_of_ios_26,
        targets=("coreml",),
    ),
    Rule(
        id="coreml-ane-scaled-palettes",
        severity="warning",
        reason="palettes with a scale per channel do not load on the Neural Engine of macOS 26 "
        "(mps.dequantize, operand #2); one comment says so of others, too",
        source="https://github.com/apple/coremltools/pull/2688",
        advice="set channel_scale to false in the recipe's palette rules if your device refuses to load it",
        check=_scaled_palettes,
        scope="on the Neural Engine of iOS 26 and newer",
        applies=_on_neural_engine_of_ios_26,
        targets=("coreml",),
    ),
    Rule(
        id="coreml-int8-activations",
        severity="warning",
        reason="integer activations can be faster on the Neural Engine (A17 Pro, M4 and newer), which has "
        "float16 alone; Apple reports that CPUs and some GPUs are considerably slower",
        source="https://apple.github.io/coremltools/docs-guides/source/opt-quantization-perf.html",
        advice="measure on your device, or export recipe int8, whose activations are floats",
        check=_rounded_activations,
        scope="unless it computes in float16 on the Neural Engine",
        targets=("coreml",),
    ),
    Rule(
        id="coreml-ane-gather",
        severity="info",
        reason="gathers are among the layers that do not run on the Neural Engine, so looking tokens up is "
        "left to the CPU",
        source="https://github.com/hollance/neural-engine/blob/master/docs/unsupported-layers.md",
        advice="nothing, as long as gathers are in a function of their own, as embed is",
        check=_gathers,
        scope="on the Neural Engine",
        applies=_on_neural_engine,
        targets=("coreml",),
    ),
    Rule(
        id="coreml-ane-state-width",
        severity="error",
        reason="a program whose state is not a multiple of 32 wide fails on the Neural Engine; CPU and GPU "
        "run it",
        source="https://github.com/apple/coremltools/issues/2631",
        advice="load the models with computeUnits = .cpuAndGPU; the width is the model's head size",
        check=_state_widths,
        scope="on the Neural Engine",
        applies=_on_neural_engine,
        targets=("coreml",),
    ),
    Rule(
        id="coreml-ios-version",
        severity="error",
        reason="4-bit integers, scales per block and palettes per group exist since iOS 18 and macOS 15, as "
        "states do",
        source="https://apple.github.io/coremltools/docs-guides/source/opt-whats-new.html",
        advice="raise the app's deployment target, or export int8 rows with coreml.kv_cache: tensors",
        check=_oldest_system,
        targets=("coreml",),
    ),
)
