"""MLX folders read back with safetensors: names, layouts, and the integers of the engine, bit for bit."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.errors import TargetError
from fastvlm_convert.manifest import load_manifest
from fastvlm_convert.pipeline import export, plan
from fastvlm_convert.predict.export_plan import plan_export, predicted_artifacts
from fastvlm_convert.quantized.weight import QuantizedWeight
from fastvlm_convert.recipe import Recipe, load_recipe, without_data
from fastvlm_convert.recipe_settings import QuantizeRule
from fastvlm_convert.weights.fold import fold
from tests.bundles import FP16, FP32, recipe
from tests.checkpoints import GOLDEN, HF, LLAVA, SHARDED, edit_tensors, read_tensors
from tests.exporters.stored import CHECKPOINT, engine

DEMO = Path(__file__).parents[3] / "checkpoints" / "fastvlm-demo"
VISION = "vision_tower.vision_model"
COMMON = {"tokenizer.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"}


def in_blocks(scheme: str, block: int | str, symmetric: bool, compute: str = "float16") -> Recipe:
    """One scheme in the language model and the projector, which is all that Apple's app takes."""
    base = recipe(FP16, decoder={"compute": compute}, coreml={"drop_in": True})
    rules = (
        QuantizeRule(("decoder.*", "projector.*"), scheme, block, symmetric),
        QuantizeRule(("*",), "int8"),
    )
    return replace(base, quantize=rules)


def made(settings: Recipe, folder: Path, checkpoint: Path = CHECKPOINT) -> Path:
    export(checkpoint, folder / "bundle", recipe=settings, targets="mlx")
    return folder / "bundle"


def tensors(bundle: Path, folder: str) -> dict[str, np.ndarray]:
    return load_file(bundle / folder / "model.safetensors")


def config(bundle: Path, folder: str) -> dict:
    return json.loads((bundle / folder / "config.json").read_text())


def unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """As MLX reads them: the lowest bits of a word first."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    values = (words[..., None] >> shifts) & np.uint32(2**bits - 1)
    return values.reshape(len(words), -1)


def dequantized(stored: dict[str, np.ndarray], module: str, group: int, bits: int) -> np.ndarray:
    """MLX's formula, in float64."""
    q = unpacked(stored[f"{module}.weight"], bits).astype(np.float64)
    parts = (stored[f"{module}.{part}"].astype(np.float64) for part in ("scales", "biases"))
    scales, biases = (np.repeat(part, group, axis=1) for part in parts)
    return q * scales + biases


def language_names(layers: int, tied: bool) -> set[str]:
    """Qwen2's, under the prefix that both clients have."""
    root = "language_model.model"
    names = {f"{root}.embed_tokens.weight", f"{root}.norm.weight"}
    for i in range(layers):
        layer = f"{root}.layers.{i}"
        names |= {f"{layer}.{n}_layernorm.weight" for n in ("input", "post_attention")}
        names |= {f"{layer}.self_attn.{p}_proj.{part}" for p in "qkv" for part in ("weight", "bias")}
        names |= {f"{layer}.self_attn.o_proj.weight"}
        names |= {f"{layer}.mlp.{p}_proj.weight" for p in ("gate", "up", "down")}
    return names if tied else names | {"language_model.lm_head.weight"}


def test_the_library_gets_apples_names_and_its_own_layouts(tmp_path):
    bundle = made(recipe(FP32), tmp_path)
    stored, source = tensors(bundle, "mlx"), read_tensors(CHECKPOINT)
    apples = "model.vision_tower.vision_tower.model"
    expected = {
        name.replace(apples, VISION).replace("patch_embed", "patch_embed.blocks").replace("model.mm", "mm")
        for name in source
        if "vision_tower" in name or "mm_projector" in name
    }
    expected = {name for name in expected if "num_batches_tracked" not in name}
    assert set(stored) == expected | language_names(2, tied=True)
    kernel = f"{VISION}.patch_embed.blocks.1.reparam_conv.weight"
    assert stored[kernel].shape[-2:] == (3, 1)  # width before channels is how mlx-vlm tells its own layout
    original = source[f"{apples}.patch_embed.0.reparam_conv.weight"].numpy()
    name = f"{VISION}.patch_embed.blocks.0.reparam_conv.weight"
    assert np.array_equal(stored[name], original.transpose(0, 2, 3, 1))
    name = "language_model.model.layers.1.mlp.down_proj.weight"
    assert np.array_equal(stored[name], source["model.layers.1.mlp.down_proj.weight"].numpy())
    with safe_open(bundle / "mlx" / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "mlx"}


def test_what_is_folded_is_undone_by_nothing(tmp_path):
    """BatchNorm and LayerScale are in their neighbors; what stands in their places changes no value."""
    stored = tensors(made(recipe(FP32), tmp_path), "mlx")
    block = f"{VISION}.network.0.0"
    norm = f"{block}.convffn.conv.bn"
    gain = stored[f"{norm}.weight"] / np.sqrt(stored[f"{norm}.running_var"] + np.float32(1e-5))
    assert np.array_equal(gain, np.ones_like(gain))
    assert not stored[f"{norm}.running_mean"].any()
    scales = {name: value for name, value in stored.items() if "layer_scale" in name}
    assert len(scales) == 1 + 1 + 2 + 2 + 2
    assert all(value.shape[:2] == (1, 1) and (value == 1).all() for value in scales.values())
    folded = fold(open_checkpoint(CHECKPOINT).weights)
    assert np.array_equal(stored[f"{norm}.bias"], folded["vision.stages.0.blocks.0.ffn.conv.bias"].array())


def test_vectors_decide_what_a_part_computes_in(tmp_path):
    """MLX computes in the wider dtype of two operands."""
    stored = tensors(made(recipe(FP16), tmp_path), "mlx")  # the encoder computes in float32
    first = f"{VISION}.patch_embed.blocks.0.reparam_conv.weight"
    for name, value in stored.items():
        in_encoder = "vision_tower" in name or "mm_projector" in name
        is_wide = in_encoder and (max(value.shape) == value.size or name == first)
        assert value.dtype == (np.float32 if is_wide else np.float16), name
    wide = made(recipe(FP16, decoder={"compute": "float32"}), tmp_path / "wide")
    dtypes = {name: value.dtype for name, value in tensors(wide, "mlx").items() if "language" in name}
    assert {d for n, d in dtypes.items() if n.endswith(("norm.weight", ".bias"))} == {np.dtype("float32")}
    assert {d for n, d in dtypes.items() if n.endswith("proj.weight")} == {np.dtype("float16")}


@pytest.mark.parametrize("compute", ["float16", "float32"])
@pytest.mark.parametrize(
    ("scheme", "block", "symmetric"),
    [
        ("int4", 32, True), ("int4", 64, True), ("int8", 64, True), ("int8", "channel", True),
        ("int4", 64, False), ("int8", 32, False),
    ],
)  # fmt: skip
def test_mlx_holds_the_engines_integers(tmp_path, scheme, block, symmetric, compute):
    chosen = in_blocks(scheme, block, symmetric, compute)
    bundle, weights, checked = made(chosen, tmp_path), engine(chosen), 0
    for folder in ("mlx", "apple-app"):
        stored, said = tensors(bundle, folder), config(bundle, folder)["quantization"]
        for layer, module in {
            "decoder.embed_tokens": "language_model.model.embed_tokens",
            "decoder.layers.0.self_attn.q_proj": "language_model.model.layers.0.self_attn.q_proj",
            "decoder.layers.1.mlp.gate_proj": "language_model.model.layers.1.mlp.gate_proj",
            "projector.fc1": "mm_projector.0" if folder == "mlx" else "multi_modal_projector.linear_0",
        }.items():
            weight = weights[f"{layer}.weight"]
            assert isinstance(weight, QuantizedWeight)
            matrix, bits = weight.read(0, weight.rows), weight.scheme.bits
            group = said.get(module, said)["group_size"]
            assert said.get(module, said)["bits"] == bits
            assert stored[f"{module}.weight"].dtype == np.uint32
            assert np.array_equal(unpacked(stored[f"{module}.weight"], bits), matrix.q)
            scales = np.repeat(matrix.scale, stored[f"{module}.scales"].shape[1] // matrix.scale.shape[1], 1)
            assert np.array_equal(stored[f"{module}.scales"], scales)
            found, exact = dequantized(stored, module, group, bits), matrix.dequantized()
            if symmetric or compute == "float32" or layer == "projector.fc1":  # which is float32, too
                assert np.array_equal(found, exact)
            else:  # the product of a scale and a zero point is rounded to eleven bits
                offset = np.abs(matrix.scale.astype(float) * matrix.zero_point).max()
                assert 0 < np.abs(found - exact).max() <= offset * 2.0**-11
            checked += 1
    assert checked == 8


def test_what_groups_cannot_hold_is_the_floats_of_its_integers(tmp_path):
    """Blocks of 16, convolutions, and layers that a rule leaves in float."""
    chosen = replace(
        recipe(FP32),
        quantize=(
            QuantizeRule(("*.down_proj",), "float"),
            QuantizeRule(("*.gate_proj",), "int4", 16),
            QuantizeRule(("decoder.*",), "int8", 32),
            QuantizeRule(("*",), "int8"),
        ),
    )
    stored, weights = tensors(made(chosen, tmp_path), "mlx"), engine(chosen)
    for layer, module in {
        "decoder.layers.0.mlp.gate_proj": "language_model.model.layers.0.mlp.gate_proj",
        "decoder.layers.0.mlp.down_proj": "language_model.model.layers.0.mlp.down_proj",
        "vision.stages.4.blocks.0.attention.qkv": f"{VISION}.network.10.0.token_mixer.qkv",
    }.items():
        weight = weights[f"{layer}.weight"]
        floats = weight.dense() if isinstance(weight, QuantizedWeight) else weight
        assert np.array_equal(stored[f"{module}.weight"], floats.array())
        assert f"{module}.scales" not in stored
    assert "language_model.model.layers.0.mlp.up_proj.scales" in stored
    notes = plan(CHECKPOINT, recipe=chosen, targets="mlx").notes
    assert any("groups of 32, 64 or 128, so 2 layers (decoder.layers.0.mlp.gate_proj" in n for n in notes)
    assert any("convolutions take no integers" in n for n in notes)


def test_layers_of_other_groups_are_named(tmp_path):
    """int4: 4 bits in the decoder, 8 in the table and the projector."""
    bundle = made(without_data(load_recipe("int4")), tmp_path, DEMO)
    said = config(bundle, "mlx")["quantization"]
    assert (said.pop("group_size"), said.pop("bits")) == (64, 4)
    assert said == {
        "mm_projector.0": {"group_size": 128, "bits": 8},
        "mm_projector.2": {"group_size": 128, "bits": 8},
        "language_model.model.embed_tokens": {"group_size": 128, "bits": 8},
    }
    artifacts = {a.component: a.precision for a in load_manifest(bundle).artifacts}
    assert artifacts == dict.fromkeys(("vision", "embed", "decoder"), "q4f16")


@pytest.mark.parametrize("golden", [LLAVA, HF, SHARDED])
def test_apples_app_finds_its_names_and_no_others(golden, tmp_path):
    chosen = recipe(FP16, coreml={"drop_in": True})
    checkpoint = GOLDEN / golden / "checkpoint"
    bundle = made(chosen, tmp_path, checkpoint)
    decoder = open_checkpoint(checkpoint).config.decoder
    projector = {f"multi_modal_projector.linear_{i}.{p}" for i in (0, 2) for p in ("weight", "bias")}
    stored = tensors(bundle, "apple-app")
    assert set(stored) == projector | language_names(decoder.num_layers, decoder.tied)
    assert {p.name for p in (bundle / "apple-app").iterdir()} == {*COMMON, "config.json", "model.safetensors"}
    said = config(bundle, "apple-app")
    assert said["model_type"] == "llava_qwen2"
    assert said["tie_word_embeddings"] is decoder.tied
    assert said["image_token_index"] == load_manifest(bundle).contract.image_token_id
    assert stored["language_model.model.embed_tokens.weight"].shape[0] == said["vocab_size"]
    assert not {"quantization", "vision_config", "rope_scaling"} & set(said)
    hidden = said["hidden_size"]
    assert stored["multi_modal_projector.linear_0.weight"].shape == (hidden, said["mm_hidden_size"])
    tokenizer = json.loads((bundle / "apple-app" / "tokenizer.json").read_text())
    assert "<image>" in [token["content"] for token in tokenizer["added_tokens"]]
    preprocessing = json.loads((bundle / "apple-app" / "preprocessor_config.json").read_text())
    assert preprocessing["processor_class"] == "LlavaProcessor"
    assert {"image_mean", "image_std", "size", "crop_size"} <= set(preprocessing)


def test_apples_quantization_is_one_pair(tmp_path):
    """What its Codable struct reads: `int8` has blocks of 32, and whole rows where nothing else is needed."""
    chosen = replace(without_data(load_recipe("int8")), coreml=recipe(FP16, coreml={"drop_in": True}).coreml)
    bundle = made(chosen, tmp_path)
    assert config(bundle, "apple-app")["quantization"] == {"group_size": 32, "bits": 8}
    assert tensors(bundle, "apple-app")["multi_modal_projector.linear_0.scales"].shape == (64, 256 // 32)


def test_the_library_has_a_config_of_its_own(tmp_path):
    bundle = made(recipe(FP16, common={"max_context_length": 512}), tmp_path)
    said = config(bundle, "mlx")
    assert said["image_token_index"] == -200  # with the token's id it would drop the picture without a word
    assert config(bundle, ".")["image_token_index"] == 432
    assert said["tokenizer_model_max_length"] == 512
    assert not (bundle / "apple-app").exists()
    assert {p.name for p in (bundle / "mlx").iterdir()} == {*COMMON, "config.json", "model.safetensors"}


@pytest.mark.parametrize("name", ["fp32", "fp16", "int8", "int4", "int4-small", "android-int4"])
def test_sizes_are_known_before_anything_is_written(name, tmp_path):
    settings = without_data(load_recipe(name))
    planned = plan_export(open_checkpoint(DEMO), settings, ["mlx"])
    bundle = made(settings, tmp_path, DEMO)
    predicted = predicted_artifacts(planned)
    assert predicted.sizes == {"mlx/model.safetensors": (bundle / "mlx" / "model.safetensors").stat().st_size}
    assert tuple(predicted.artifacts) == load_manifest(bundle).artifacts
    assert plan(DEMO, recipe=settings, targets="mlx").files.keys() == load_manifest(bundle).files.keys()


def test_both_targets_fill_the_folder_of_apples_app():
    """The package of Core ML and the weights of MLX, in the dimensions of a published model."""
    from fastvlm_convert.exporters.backends import backend_of
    from fastvlm_convert.predict.placeholder_weights import placeholder_weights
    from fastvlm_convert.predict.sizes import predict_artifacts
    from fastvlm_convert.quantized.layer_plan import plan_layers
    from fastvlm_convert.weights.published import published_config

    size, chosen = published_config("0.5b"), recipe(FP16, coreml={"drop_in": True})
    plans = plan_layers({n: w.shape for n, w in placeholder_weights(size, ()).items()}, chosen)
    for target in ("coreml", "mlx"):
        backend_of(target).check(size, chosen, plans)
    found = predict_artifacts(size, plans, chosen, ["coreml", "mlx"]).sizes
    names = {name.split("/")[1] for name in found if name.startswith("apple-app/")}
    assert names == {"fastvithd.mlpackage", "model.safetensors"}
    folders = [backend_of(t).app_folders(size, chosen, plans) for t in ("coreml", "mlx")]
    assert all("apple-app" in folder for folder in folders)
    # 494 M parameters of the language model and 3.6 M of the projector, two bytes each.
    assert found["apple-app/model.safetensors"] == pytest.approx(2 * (494.0e6 + 3.56e6), rel=0.002)


def test_bytes_depend_on_inputs_alone(tmp_path):
    chosen = in_blocks("int4", 32, False)
    a, b = made(chosen, tmp_path / "a"), made(chosen, tmp_path / "b")
    assert load_manifest(a).files == load_manifest(b).files


def test_a_weight_beyond_float16(llava, tmp_path):
    name = "model.layers.0.mlp.gate_proj.weight"
    weight = read_tensors(llava)[name]
    weight[0, 0] = 1e5
    edit_tensors(llava, {name: weight})
    with pytest.raises(Exception, match=r"layers.0.mlp.gate_proj.weight.*65504"):
        made(recipe(FP16), tmp_path, llava)
    assert not (tmp_path / "bundle").exists()


def test_the_placeholder_needs_a_row_in_apples_app():
    """The demo's table ends before `<image>`; only the app looks it up."""
    chosen = recipe(FP16, coreml={"drop_in": True})
    with pytest.raises(TargetError, match=r"looks '<image>' \(id 335\) up .* has 335 rows"):
        plan(DEMO, recipe=chosen, targets="mlx")
    assert plan(DEMO, recipe=FP16, targets="mlx").files
