"""Rules about what is in a bundle, whichever format it has."""

from collections.abc import Iterator, Sequence
from typing import Final

from fastvlm_convert.delivery.stores import STORES, files_for, store_fit
from fastvlm_convert.lint.duplicates import shared_bytes
from fastvlm_convert.lint.facts import CoreMLProgram, Facts, MilFunction, OnnxGraph, Tensor
from fastvlm_convert.lint.platform import Platform
from fastvlm_convert.lint.rule import Hit, Rule, always, named

_MANY: Final = 1024  # elements; smaller constants are no weights
_ROTARY_INPUTS: Final = slice(7, 9)  # cos_cache and sin_cache of GroupQueryAttention
_WEB: Final = "webgpu"


def _float32_left(facts: Facts, platform: Platform) -> Iterator[Hit]:
    del platform
    for graph in facts.graphs:
        if graph.artifact.storage == "float16":
            known = _rotary_tables(graph) | _scales(graph)
            yield from _hits(graph, [t for t in graph.tensors if t.name not in known])
    for program in facts.programs:
        if program.storage == "float16":
            yield from _hits(program, _weights(program))


def _rotary_tables(graph: OnnxGraph) -> set[str]:
    """Tables of angles, which are of the dtype that attention computes in."""
    return {
        name
        for node in graph.nodes
        if node.op == "GroupQueryAttention"
        for name in node.inputs[_ROTARY_INPUTS]
    }


def _scales(graph: OnnxGraph) -> set[str]:
    """Scales of integers, which are of the dtype of the floats that these become."""
    return {node.inputs[1] for node in graph.nodes if node.op == "DequantizeLinear"}


def _weights(program: CoreMLProgram) -> list[Tensor]:
    """Constants without those in the dtype of the arithmetic.

    They are the scales and tables that weights are made from, and biases in steps of integer products.
    """
    stepped = {function.name: _stepped_biases(function) for function in program.functions}
    found = {
        tensor.region: tensor
        for function in program.functions
        for operation in function.operations
        for key, tensor in operation.constants.items()
        if not (operation.type.startswith("constexpr_") and key in ("scale", "offset", "lut"))
        and operation.name not in stepped[function.name]
    }
    return list(found.values())


def _stepped_biases(function: MilFunction) -> set[str]:
    """Biases of operations that multiply integers."""
    integers = {(o.name,) for o in function.operations if o.type == "dequantize"}
    stepped = [o for o in function.operations if o.inputs.get("x") in integers]
    return {name for operation in stepped for name in operation.inputs.get("bias", ())}


def _hits(file: OnnxGraph | CoreMLProgram, tensors: Sequence[Tensor]) -> Iterator[Hit]:
    left = [t for t in tensors if t.dtype in ("float32", "float64") and _count(t) >= _MANY]
    if left:
        size = sum(_count(t) for t in left)
        what = f"float32 weights in a file of float16: {named(t.name for t in left)}, {size:,} elements"
        yield Hit(what, file.file)


def _count(tensor: Tensor) -> int:
    count = 1
    for n in tensor.shape:
        count *= n
    return count


def _stored_twice(facts: Facts, platform: Platform) -> Iterator[Hit]:
    del platform
    for target, groups in facts.duplicates.items():
        for group in groups:
            names = " and ".join(sorted({t.name for t in group}))
            files = sorted({t.region.file for t in group if t.region is not None})
            yield Hit(
                f"{target}: {names} hold the same {shared_bytes(group):,} bytes, stored {len(group)} times",
                ", ".join(files),
            )


def _not_in_a_browser(platform: Platform) -> bool:
    return platform.provider != _WEB


def _stores(facts: Facts, platform: Platform) -> Iterator[Hit]:
    del platform
    manifest = facts.manifest
    sizes = {name: entry.size for name, entry in manifest.files.items()}
    for store in STORES.values():
        if set(store.targets) & set(manifest.targets):
            fit = store_fit(store, files_for(store, sizes, manifest.artifacts), manifest.artifacts)
            if not fit.fits:
                yield Hit(f"{store.title}: {fit.reason}")


def _context(facts: Facts, platform: Platform) -> Iterator[Hit]:
    del platform
    length, trained = facts.manifest.contract.context_length, facts.max_positions
    if trained is not None and length > trained:
        yield Hit(f"the context of {length} tokens is longer than the {trained} the model was trained for")


RULES: Final = (
    Rule(
        id="float32-in-float16",
        severity="warning",
        reason="weights that a conversion to float16 leaves in float32 take twice the room for nothing",
        source="https://github.com/microsoft/onnxconverter-common/issues/195",
        advice="export again; where another tool wrote the file, convert its weights",
        check=_float32_left,
        targets=("onnx", "coreml"),
    ),
    Rule(
        id="duplicated-tensor",
        severity="warning",
        reason="a tied head and embedding that are stored apart cost one more table, up to half of a "
        "small model",
        source="https://github.com/microsoft/onnxruntime-genai/pull/1690",
        advice="set onnx.shared_table to true, unless browsers load the bundle (--execution-provider webgpu)",
        check=_stored_twice,
        scope="outside browsers",
        applies=_not_in_a_browser,
        targets=("onnx", "coreml"),
    ),
    Rule(
        id="store-limit",
        severity="warning",
        reason="stores refuse what is larger than their limits for one pack and for an app",
        source="https://developer.android.com/google/play/on-device-ai",
        advice="quantize more, or serve the files yourself; `bundle pack` tells the compressed sizes",
        check=_stores,
        applies=always,
    ),
    Rule(
        id="context-beyond-training",
        severity="warning",
        reason="beyond the positions that a model was trained for its answers get bad",
        source="https://github.com/microsoft/MInference/issues/29",
        advice="lower common.max_context_length, which saves memory too",
        check=_context,
    ),
)
