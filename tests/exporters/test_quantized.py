"""The same integers in both targets, bit for bit the engine's, read back with public libraries."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.errors import RecipeError, TargetError
from fastvlm_convert.manifest import load_manifest
from fastvlm_convert.metrics import sqnr_db
from fastvlm_convert.pipeline import export
from fastvlm_convert.predict.export_plan import files_beside, plan_export, predicted_artifacts
from fastvlm_convert.quantized.layer_plan import plan_layers
from fastvlm_convert.quantized.schemes import AffineMatrix
from fastvlm_convert.quantized.weight import QuantizedWeight, stacked
from fastvlm_convert.recipe import Recipe, load_recipe, shipped_recipes
from fastvlm_convert.recipe_settings import QuantizeRule
from fastvlm_convert.runtime.loaded import load_bundle, load_engine
from fastvlm_convert.weights.fold import fold
from tests.bundles import FP16, FP32, check_sizes, graph_path, recipe
from tests.exporters.stored import CHECKPOINT, decompressions, engine, shapes

# Names of quantized tensors in the graphs -> layers of the checkpoint.
DECODER = {
    "l0_qkv": [f"decoder.layers.0.self_attn.{p}_proj" for p in "qkv"],
    "l1_o": ["decoder.layers.1.self_attn.o_proj"],
    "l0_gate": ["decoder.layers.0.mlp.gate_proj"],
    "l1_down": ["decoder.layers.1.mlp.down_proj"],
}
VISION = {
    "stem_0": ["vision.stem.0"],
    "s0b0_mixer": ["vision.stages.0.blocks.0.mixer"],
    "s0b0_fc1": ["vision.stages.0.blocks.0.ffn.fc1"],  # of width 8, so without blocks
    "s2b1_fc1": ["vision.stages.2.blocks.1.ffn.fc1"],
    "s3b0_qkv": ["vision.stages.3.blocks.0.attention.qkv"],
    "s4b0_fc2": ["vision.stages.4.blocks.0.ffn.fc2"],
    "projector_fc2": ["projector.fc2"],
}


def rules(scheme: str, block: int, symmetric: bool) -> tuple[QuantizeRule, ...]:
    """Blocks wherever they fit, whole rows elsewhere in the encoder."""
    pointwise = ("vision.*.fc1", "vision.*.fc2", "vision.*.qkv", "vision.*.proj", "projector.*")
    return (
        QuantizeRule(("decoder.*",), scheme, block, symmetric),
        QuantizeRule(pointwise, scheme, block, symmetric),
        QuantizeRule(("*",), "int8", "channel", symmetric),
    )


def settings(scheme: str, block: int, symmetric: bool, name: str = FP32) -> Recipe:
    base = recipe(name, coreml={"kv_cache": "tensors"})
    return replace(base, quantize=rules(scheme, block, symmetric))


@pytest.fixture(
    scope="module",
    params=[
        ("int4", 16, True),
        ("int4", 16, False),
        ("int8", 16, True),
        ("int8", 16, False),
        ("int4", 128, False),  # which divides few widths; the others get 64, 32, 16 or whole rows
    ],
    ids=lambda p: f"{p[0]}-b{p[1]}-{'sym' if p[2] else 'asym'}",
)
def made(request, tmp_path_factory) -> tuple[Path, Recipe]:
    chosen = settings(*request.param)
    output = tmp_path_factory.mktemp("quantized") / "bundle"
    export(CHECKPOINT, output, recipe=chosen, targets=["onnx", "coreml"])
    return output, chosen


def expected(weights: dict, layers: list[str]) -> AffineMatrix | None:
    found = [weights[f"{layer}.weight"] for layer in layers]
    if not isinstance(found[0], QuantizedWeight):
        return None
    whole = stacked(found)
    return whole.read(0, whole.rows)


def unpacked(values: np.ndarray, bits: int, columns: int) -> np.ndarray:
    if bits == 8:
        return values
    both = np.stack([values & 15, values >> 4], -1).reshape(*values.shape[:-1], -1)
    return both[..., :columns]


def onnx_tensors(bundle: Path, component: str) -> dict[str, np.ndarray]:
    model = onnx.load(graph_path(bundle, component))
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def same(engine: AffineMatrix, q: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> None:
    """Integers, scales and zero points, and the product that every target computes."""
    shape = engine.q.shape
    assert np.array_equal(q.reshape(shape), engine.q)
    assert np.array_equal(scale.reshape(engine.scale.shape), engine.scale)
    assert np.array_equal(zero.reshape(engine.zero_point.shape), engine.zero_point)
    blocks = engine.scale.shape[1]
    centred = q.reshape(shape[0], blocks, -1).astype(np.float32) - zero.reshape(shape[0], blocks, 1)
    product = centred.astype(np.float32) * scale.reshape(shape[0], blocks, 1).astype(np.float32)
    assert np.array_equal(product.reshape(shape), engine.dequantized())


def test_onnx_decoder_holds_the_engines_integers(made):
    bundle, chosen = made
    weights, tensors = engine(chosen), onnx_tensors(bundle, "decoder")
    for op, layers in {**DECODER, "logits": ["decoder.embed_tokens"]}.items():
        matrix = expected(weights, layers)
        assert matrix is not None
        scheme, (rows, columns) = matrix.scheme, matrix.q.shape
        q = unpacked(tensors[f"{op}_q"].reshape(rows, -1), scheme.bits, columns)
        zero = np.full(matrix.scale.shape, scheme.middle, np.uint8)
        if not scheme.symmetric:
            zero = unpacked(tensors[f"{op}_zero_point"], scheme.bits, zero.shape[1])
        assert tensors[f"{op}_scale"].dtype == np.float16
        same(matrix, q, tensors[f"{op}_scale"], zero)


def test_onnx_vision_holds_the_engines_integers(made):
    bundle, chosen = made
    weights, tensors = engine(chosen), onnx_tensors(bundle, "vision")
    checked = 0
    for op, layers in VISION.items():
        matrix = expected(weights, layers)
        if matrix is None:
            continue
        name, scheme = f"{op}_weight", matrix.scheme
        q = tensors[f"{name}_q"].astype(np.int16) + (scheme.middle if scheme.symmetric else 0)
        zero = np.full(matrix.scale.shape, scheme.middle, np.uint8)
        if not scheme.symmetric:
            zero = tensors[f"{name}_zero_point"].astype(np.uint8)
        same(matrix, q, tensors[f"{name}_scale"], zero)
        checked += 1
    assert checked >= 5


@pytest.mark.parametrize(("package", "function", "names"), [
    ("decoder", "decode", {**DECODER, "embed_tokens": ["decoder.embed_tokens"]}),
    ("decoder", "embed", {"embed_tokens": ["decoder.embed_tokens"]}),
    ("vision", "main", VISION),
])  # fmt: skip
def test_core_ml_holds_the_engines_integers(made, package, function, names):
    bundle, chosen = made
    found = decompressions(bundle, package, function)
    weights = engine(chosen)
    checked = 0
    for op, layers in names.items():
        matrix = expected(weights, layers)
        if matrix is None:
            assert f"{op}_weight" not in found
            continue
        operation, scheme = found[f"{op}_weight"], matrix.scheme
        q = operation.data.val.astype(np.int16) + (scheme.middle if scheme.symmetric else 0)
        scale = operation.scale.val
        assert np.array_equal(scale.astype(np.float16).astype(scale.dtype), scale)
        zero = np.full(matrix.scale.shape, scheme.middle, np.uint8)
        if not scheme.symmetric:
            zero = operation.offset.val.astype(np.uint8)
        same(matrix, q, scale.astype(np.float16), zero)
        checked += 1
    assert checked >= min(5, len(names))


def test_the_lowering_is_exact(made):
    """Both targets against torch holding the same weights; without ONNX Runtime's int8 activations."""
    bundle, chosen = made
    reference = load_engine(open_checkpoint(CHECKPOINT), chosen, 2048).session
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (1, 3, 256, 256)).astype(np.float32) / np.float32(255)
    ids = rng.integers(0, 430, 24)
    for target in ("onnx", "coreml"):
        session = load_bundle(bundle, target, "exact").session
        assert sqnr_db(reference.encode_image(pixels), session.encode_image(pixels)) >= 100
        assert np.array_equal(reference.embed(ids), session.embed(ids))
        embeds = reference.embed(ids)
        assert sqnr_db(reference.prefill(embeds), session.prefill(embeds)) >= 100
        step = embeds[:1]
        assert sqnr_db(reference.decode(step), session.decode(step)) >= 100


def test_embeddings_are_what_the_integers_stand_for(made):
    """To the bit: numpy's product, and that of ONNX Runtime's own operator over the same tensors."""
    bundle, chosen = made
    matrix = expected(engine(chosen), ["decoder.embed_tokens"])
    assert matrix is not None
    rows, columns = matrix.q.shape
    found = load_bundle(bundle, "onnx").session.embed(np.arange(rows))
    assert np.array_equal(found, matrix.dequantized())

    tensors, scheme = onnx_tensors(bundle, "embed"), matrix.scheme
    names = ["embed_tokens_q", "embed_tokens_scale"]
    inputs = ["embed_tokens_q", "ids", "scale"]
    if not scheme.symmetric:
        names.append("embed_tokens_zero_point")
        inputs.append("embed_tokens_zero_point")
    fused = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]> g (int64[n] ids) => (float[n, c] y)'
        "{ scale = Cast <to = 1> (embed_tokens_scale)"
        "y = com.microsoft.GatherBlockQuantized <gather_axis = 0, quantize_axis = 1, "
        f"bits = {scheme.bits}, block_size = {columns // matrix.scale.shape[1]}> ({', '.join(inputs)}) }}"
    )
    fused.graph.initializer.extend(numpy_helper.from_array(tensors[name], name) for name in names)
    session = onnxruntime.InferenceSession(fused.SerializeToString(), providers=["CPUExecutionProvider"])
    assert np.array_equal(session.run(None, {"ids": np.arange(rows)})[0], found)


def test_the_look_up_needs_no_operator_that_browsers_lack(made):
    """ONNX Runtime's WebGPU build has neither GatherBlockQuantized nor anything that takes a float64."""
    model = onnx.load(graph_path(made[0], "embed"), load_external_data=False)
    assert {node.domain for node in model.graph.node} == {""}
    assert not {t.data_type for t in model.graph.initializer} & {onnx.TensorProto.DOUBLE}
    onnx.checker.check_model(str(graph_path(made[0], "embed")), full_check=True)


def test_sizes_are_known_before_anything_is_written(made):
    bundle, chosen = made
    plan = plan_export(open_checkpoint(CHECKPOINT), chosen, ["onnx", "coreml"])
    check_sizes(predicted_artifacts(plan).sizes, bundle)


def test_files_are_as_small_as_planned(made):
    bundle, chosen = made
    folded = fold(open_checkpoint(CHECKPOINT).weights)
    plans = plan_layers({n: w.shape for n, w in folded.items()}, chosen)
    planned = sum(p.stored_bits for p in plans if p.layer.startswith("decoder.")) / 8
    rotary = 2 * 2048 * 8 * 4
    small = 4 * sum(w.size for n, w in folded.items() if n.startswith("decoder.") and len(w.shape) == 1)
    size = Path(f"{graph_path(bundle, 'decoder')}_data").stat().st_size
    pages = 4096 * 40  # every tensor begins on one
    assert planned + rotary <= size <= planned + rotary + small + pages


def test_files_are_called_as_clients_look_them_up(made):
    bundle, chosen = made
    precisions = {a.component: a.precision for a in load_manifest(bundle).artifacts if a.target == "onnx"}
    named, suffix = ("q4", "_q4") if chosen.quantize[0].scheme == "int4" else ("q8", "_quantized")
    assert precisions == dict.fromkeys(("vision", "embed", "decoder"), named)
    names = {p.name for p in (bundle / "onnx").iterdir()}
    assert {
        f"{stem}{suffix}.onnx" for stem in ("vision_encoder", "embed_tokens", "decoder_model_merged")
    } < names
    configured = json.loads((bundle / "config.json").read_text())["transformers.js_config"]
    assert set(configured["dtype"].values()) == {named}
    assert set(configured["use_external_data_format"]) == {
        name.removesuffix("_data") for name in names if name.endswith("_data")
    }


STEMS = ("vision_encoder", "embed_tokens", "decoder_model_merged")
SUFFIXES = {
    "fp32": "",
    "fp16": "_fp16",
    "q8": "_quantized",
    "q4": "_q4",
    "q4f16": "_q4f16",
}  # transformers.js
NAMES = {  # recipe -> the dtype that opens its bundle
    "fp32": "fp32",
    "fp16": "fp16",
    "int8": "q8",
    "int4": "q4",
    "int8-static": "q8",
    "int4-fast": "q4",
    "int4-static": "q4",
    "int4-512": "q4",
    "int4-768": "q4",
    "int4-mixed": "q4",
    "int4-small": "q4",
    "ios-int4": "q4f16",
    "web-q4f16": "q4f16",
    "web-small": "q4f16",
    "android-int4": "q4",
}


def predicted_files(chosen: Recipe) -> tuple[dict[str, str], set[str]]:
    """The dtype of each graph by its file's base name, as config.json has it, and the graphs' file names."""
    plan = plan_export(open_checkpoint(CHECKPOINT), chosen, ["onnx"])
    predicted = predicted_artifacts(plan)
    config = json.loads(files_beside(plan, predicted.artifacts)["config.json"])["transformers.js_config"]
    names = {Path(name).name for name in predicted.sizes if name.endswith(".onnx")}
    names -= {name for name in names if name.startswith("embedding")}  # no client looks it up by its dtype
    cache = next(a.inputs[2].dtype for a in predicted.artifacts if a.component == "decoder")
    assert config["kv_cache_dtype"] == {config["dtype"]["decoder_model_merged"]: cache}
    return config["dtype"], names


@pytest.mark.parametrize("name", sorted(set(shipped_recipes()) - {"ios-ane"}))  # palettes are no ONNX
def test_one_dtype_opens_the_whole_bundle_of_a_shipped_recipe(name):
    dtypes, files = predicted_files(load_recipe(name))
    assert dtypes == dict.fromkeys(STEMS, NAMES[name])
    assert files == {f"{stem}{SUFFIXES[NAMES[name]]}.onnx" for stem in STEMS}


INT4, INT8 = (QuantizeRule(("decoder.*",), scheme, 16) for scheme in ("int4", "int8"))
FLOAT = QuantizeRule(("decoder.*",), "float")
TABLE, VISION8 = QuantizeRule(("decoder.embed_tokens",), "float"), QuantizeRule(("*",), "int8")
REST = QuantizeRule(("*",), "float")


@pytest.mark.parametrize(
    ("base", "given", "dtypes"),
    [
        ("fp16", (TABLE, INT4, REST), ("fp16", "fp16", "q4f16")),
        ("fp32", (TABLE, INT4, REST), ("fp32", "fp32", "q4")),
        ("fp16", (INT4, REST), ("fp16", "q4f16", "q4f16")),  # a tied table has the head's integers
        ("fp16", (TABLE, INT8, REST), ("fp16", "fp16", "q8")),
        ("fp16", (TABLE, INT4, VISION8), ("q4f16", "fp16", "q4f16")),
        ("fp16", (FLOAT, VISION8), ("q8", "fp16", "fp16")),
    ],
)
def test_floats_keep_their_own_name_beside_integers(base, given, dtypes):
    found, files = predicted_files(replace(recipe(base), quantize=given))
    assert found == dict(zip(STEMS, dtypes, strict=True))
    assert files == {f"{stem}{SUFFIXES[dtype]}.onnx" for stem, dtype in zip(STEMS, dtypes, strict=True)}


def test_the_mix_that_public_code_asks_for():
    """`{embed_tokens: "fp16", vision_encoder: "fp16", decoder_model_merged: "q4"}`."""
    chosen = replace(recipe("fp16", decoder={"compute": "float32"}), quantize=(TABLE, INT4, REST))
    found, _ = predicted_files(chosen)
    assert found == {"embed_tokens": "fp16", "vision_encoder": "fp16", "decoder_model_merged": "q4"}


def test_a_changed_scale_is_found(tmp_path):
    """The gate on the lowering fails when one scale in the file is another one."""
    chosen = settings("int4", 16, symmetric=True)
    export(CHECKPOINT, tmp_path / "bundle", recipe=chosen, targets=["onnx"])
    model = onnx.load(graph_path(tmp_path / "bundle", "decoder"), load_external_data=False)
    (tensor,) = [t for t in model.graph.initializer if t.name == "l0_down_scale"]
    offset = int({e.key: e.value for e in tensor.external_data}["offset"])
    path = Path(f"{graph_path(tmp_path / 'bundle', 'decoder')}_data")
    content = bytearray(path.read_bytes())
    content[offset : offset + 2] = np.float16(1.0).tobytes()
    path.write_bytes(content)
    reference = load_engine(open_checkpoint(CHECKPOINT), chosen, 2048).session
    session = load_bundle(tmp_path / "bundle", "onnx", "exact").session
    embeds = reference.embed(np.arange(10))
    assert sqnr_db(reference.prefill(embeds), session.prefill(embeds)) < 60


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([QuantizeRule(("decoder.*",), "int4", 16)], "no rule fits layer 'vision.stem.0'"),
        (
            [QuantizeRule(("*",), "int4", 32, on_indivisible="error")],
            "blocks do not fit a convolution of 3 x 3",
        ),
        (
            [QuantizeRule(("decoder.*",), "int4", 128, on_indivisible="error"),
             QuantizeRule(("*",), "float")],
            "its width 64 is no multiple of block_size 128",
        ),
        (
            [QuantizeRule(("decodr.*",), "int4", 16), QuantizeRule(("*",), "float")],
            "'decodr.*' fits no layer",
        ),
        (
            [QuantizeRule(("*.v_proj",), "int8", 16), QuantizeRule(("decoder.*",), "int4", 16),
             QuantizeRule(("*",), "float")],
            "are stored together, so they need one scheme",
        ),
    ],
)  # fmt: skip
def test_impossible_rules(given, message):
    with pytest.raises(RecipeError) as caught:
        plan_layers(shapes(), replace(recipe(FP16), quantize=tuple(given)))
    assert message in str(caught.value)


def test_accuracy_level(tmp_path):
    """0 keeps activations in float; with 8 bits it would be 250 times slower, so that is refused."""
    chosen = settings("int4", 16, symmetric=True)
    chosen = replace(chosen, onnx=replace(chosen.onnx, accuracy_level=0))
    export(CHECKPOINT, tmp_path / "bundle", recipe=chosen, targets=["onnx"])
    nodes = onnx.load(graph_path(tmp_path / "bundle", "decoder"), load_external_data=False).graph.node
    levels = [
        a.i for n in nodes if n.op_type == "MatMulNBits" for a in n.attribute if a.name == "accuracy_level"
    ]
    assert levels
    assert set(levels) == {0}
    chosen = replace(chosen, quantize=(QuantizeRule(("*.gate_proj",), "int8", 16), *chosen.quantize))
    with pytest.raises(
        TargetError, match=r"'decoder.layers.0.mlp.gate_proj' has 8 bits, and onnx.accuracy_le"
    ):
        export(CHECKPOINT, tmp_path / "slow", recipe=chosen, targets=["onnx"])
    export(CHECKPOINT, tmp_path / "slow", recipe=chosen, targets=["coreml"])


def test_onnx_takes_no_whole_rows_in_the_decoder(tmp_path):
    chosen = replace(recipe(FP16), quantize=(QuantizeRule(("*",), "int8"),))
    with pytest.raises(TargetError, match="MatMulNBits needs blocks"):
        export(CHECKPOINT, tmp_path / "bundle", recipe=chosen, targets=["onnx"])
    export(CHECKPOINT, tmp_path / "bundle", recipe=chosen, targets=["coreml"])
