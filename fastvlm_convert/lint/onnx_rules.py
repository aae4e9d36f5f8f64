"""Rules about ONNX graphs."""

from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

from fastvlm_convert.lint.facts import Facts, OnnxGraph, OnnxNode
from fastvlm_convert.lint.platform import Platform, Version, is_below, is_from, version_text
from fastvlm_convert.lint.providers import PROVIDERS, RUN_ON_CPU, WEB_LACKS
from fastvlm_convert.lint.rule import Hit, NotCheckedError, Rule, named
from fastvlm_convert.lint.versions import EIGHT_BIT_MATMULNBITS, FLOAT16_MATMULNBITS

_NBITS: Final = "MatMulNBits"
_INT8_ACTIVATIONS: Final = 4  # its accuracy_level
_NNAPI_SINCE: Final = (8, 1)
_NNAPI_DEPRECATED: Final = (15,)
# What a graph needs -> the oldest ONNX Runtime that runs it. Run with 1.16 to 1.32 (docs/android.md).
_IR_VERSIONS: Final[dict[int, Version]] = {10: (1, 18)}


def _uses_cpu(platform: Platform) -> bool:
    return platform.provider in (None, "cpu")


def _slow_float16(platform: Platform) -> bool | None:
    if not _uses_cpu(platform):
        return False
    given = platform.onnxruntime
    return None if given is None else FLOAT16_MATMULNBITS.first.holds(given)


def _float16_products(facts: Facts, platform: Platform) -> Iterator[Hit]:
    del platform
    for graph in facts.graphs:
        slow = [
            node.name
            for node in _of_type(graph, _NBITS)
            if len(node.inputs) > 2
            and graph.dtype_of(node.inputs[2]) == "float16"  # its scales are of the dtype of its input
        ]
        if slow:
            yield Hit(f"{_NBITS} in float16: {named(slow)}", graph.file)


def _of_type(graph: OnnxGraph, op: str) -> Iterator[OnnxNode]:
    return (node for node in graph.nodes if node.op == op)


def _int8_activations(facts: Facts, platform: Platform) -> Iterator[Hit]:
    del platform
    if facts.int8_activations == "passed":
        return
    proof = {
        "failed": "verify found that this changes the answers",
        "not_run": "nothing is recorded about what this does to the answers",
    }[facts.int8_activations]
    for graph in facts.graphs:
        rounded = [
            n.name for n in _of_type(graph, _NBITS) if n.integers.get("accuracy_level") == _INT8_ACTIVATIONS
        ]
        if rounded:
            what = f"products with accuracy_level {_INT8_ACTIVATIONS}: {named(rounded)}"
            yield Hit(f"{what}; {proof}", graph.file)


def _accuracy_level_matters(platform: Platform) -> bool:
    return platform.provider in (None, "cpu", "webgpu")


def _missing_kernels(facts: Facts, platform: Platform) -> Iterator[Hit]:
    provider = platform.provider
    if provider in PROVIDERS:
        known = PROVIDERS[provider]
        for graph in facts.graphs:
            yield from _left_out(graph, _ops(graph) - known.supported, known.title)
    elif provider == "webgpu":
        for graph in facts.graphs:
            yield from _left_out(graph, WEB_LACKS & _ops(graph), "the WebGPU build")


def _left_out(graph: OnnxGraph, missing: set[str] | frozenset[str], title: str) -> Iterator[Hit]:
    if missing:
        counts = Counter(node.full_op for node in graph.nodes if node.full_op in missing)
        ops = named(op.removeprefix("ai.onnx:") for op, _ in counts.most_common())
        share = f"{counts.total()} of {len(graph.nodes)} nodes"
        yield Hit(f"{title} has no kernel for {share}; operators: {ops}", graph.file)


def _ops(graph: OnnxGraph) -> set[str]:
    return {node.full_op for node in graph.nodes}


def _other_provider(platform: Platform) -> bool:
    return not _uses_cpu(platform)


def _unknown_operators(facts: Facts, platform: Platform) -> Iterator[Hit]:
    del platform
    others = {op for graph in facts.graphs for op in _ops(graph)} - RUN_ON_CPU
    missing = others - _cpu_kernels() if others else set()
    for graph in facts.graphs:
        if unknown := sorted(missing & _ops(graph)):
            yield Hit(f"ONNX Runtime's CPU provider has no kernel for {', '.join(unknown)}", graph.file)


def _cpu_kernels() -> set[str]:
    """Operators that the installed ONNX Runtime runs on a CPU, those that it writes out with others included.

    Raises:
        NotCheckedError: It is not installed.
    """
    try:
        import onnx
        from onnxruntime.capi import onnxruntime_pybind11_state as state
    except ModuleNotFoundError as error:
        raise NotCheckedError("onnxruntime, whose kernels would be asked for, is not installed") from error
    kernels = {
        f"{kernel.domain or 'ai.onnx'}:{kernel.op_name}"
        for kernel in state.get_all_opkernel_def()
        if kernel.provider == "CPUExecutionProvider"
    }
    schemas: Any = onnx.defs.get_all_schemas()  # its types leave half of it out
    functions = {
        f"ai.onnx:{schema.name}"
        for schema in schemas
        if not schema.domain and (schema.has_function or schema.has_context_dependent_function)
    }
    return kernels | functions | {"ai.onnx:Constant"}


def _old_runtime(facts: Facts, platform: Platform) -> Iterator[Hit]:
    given = platform.onnxruntime
    for graph in facts.graphs:
        for need, since in _needs(graph):
            if given is not None and given < since:
                what = f"{need}, which ONNX Runtime has since {version_text(since)}"
                yield Hit(f"{what}, not {version_text(given)}", graph.file)


def _needs(graph: OnnxGraph) -> Iterator[tuple[str, Version]]:
    if graph.ir_version in _IR_VERSIONS:
        yield f"IR version {graph.ir_version}", _IR_VERSIONS[graph.ir_version]
    since = EIGHT_BIT_MATMULNBITS.first.before
    if since is not None and any(node.integers.get("bits") == 8 for node in _of_type(graph, _NBITS)):
        yield f"{_NBITS} with 8 bits", since


def _names_a_version(platform: Platform) -> bool:
    return platform.onnxruntime is not None


def _nnapi(platform: Platform) -> bool:
    return platform.provider == "nnapi"


def _nnapi_versions(facts: Facts, platform: Platform) -> Iterator[Hit]:
    del facts
    android = platform.android
    if is_below(android, _NNAPI_SINCE):
        yield Hit(f"Android {version_text(android or ())} has no NNAPI; it came with 8.1")
    elif is_from(android, _NNAPI_DEPRECATED) is not False:
        yield Hit("NNAPI is deprecated since Android 15")


RULES: Final = (
    Rule(
        id="onnx-runtime-version",
        severity="error",
        reason="older versions of ONNX Runtime refuse the file format or 8-bit weights as they open it",
        source="https://onnxruntime.ai/docs/reference/compatibility.html",
        advice="link a newer ONNX Runtime",
        check=_old_runtime,
        scope="with --onnxruntime",
        applies=_names_a_version,
        targets=("onnx",),
    ),
    Rule(
        id="onnx-unknown-operator",
        severity="error",
        reason="a session is refused if neither its provider nor the CPU has a kernel for an operator",
        source="https://onnxruntime.ai/docs/reference/operators/OperatorKernels.html",
        advice="export again with this tool, or install the ONNX Runtime that has the operator",
        check=_unknown_operators,
        targets=("onnx",),
    ),
    Rule(
        id="onnx-provider-kernels",
        severity="warning",
        reason="nodes without a kernel in the provider run on the CPU, with copies in between, often slower "
        "than the CPU alone",
        source=PROVIDERS["coreml"].source,
        advice="use the CPU provider; FastVLM's fused operators have kernels nowhere else on a phone",
        check=_missing_kernels,
        scope="with --execution-provider",
        applies=_other_provider,
        targets=("onnx",),
    ),
    Rule(
        id="onnx-float16-matmulnbits",
        severity="warning",
        reason=FLOAT16_MATMULNBITS.reason,
        source=FLOAT16_MATMULNBITS.source,
        advice=FLOAT16_MATMULNBITS.advice,
        check=_float16_products,
        scope="before ONNX Runtime 1.25, on the CPU",
        applies=_slow_float16,
        targets=("onnx",),
    ),
    Rule(
        id="onnx-int8-activations",
        severity="warning",
        reason="accuracy_level 4 rounds activations to int8 and changed the likeliest token of models with "
        "massive activations",
        source="https://github.com/microsoft/onnxruntime/issues/29849",
        advice="`verify --record` measures it; set onnx.accuracy_level to 0 if a gate fails",
        check=_int8_activations,
        scope="unless verification.json says that the answers stay",
        applies=_accuracy_level_matters,
        targets=("onnx",),
    ),
    Rule(
        id="onnx-nnapi",
        severity="warning",
        reason="NNAPI needs Android 8.1 and is deprecated since Android 15",
        source="https://developer.android.com/ndk/guides/neuralnetworks/migration-guide",
        advice="use the CPU provider",
        check=_nnapi_versions,
        scope="with --execution-provider nnapi",
        applies=_nnapi,
        targets=("onnx",),
    ),
)
