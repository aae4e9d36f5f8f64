"""Core ML packages as coremltools sees them; what they compute is tested with the interpreter."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import coremltools
import pytest
from coremltools.converters.mil.frontend.milproto.load import load as load_program

from fastvlm_convert import __version__
from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.errors import RecipeError, TargetError
from fastvlm_convert.exporters.coreml.metadata import metadata_of
from fastvlm_convert.exporters.coreml.paths import APPLE_PACKAGE, FILES
from fastvlm_convert.exporters.job import Statement
from fastvlm_convert.manifest import load_manifest
from fastvlm_convert.pipeline import export, plan
from fastvlm_convert.predict.export_plan import plan_export
from tests.bundles import FP16, FP32, load_graph, recipe
from tests.checkpoints import GOLDEN, LLAVA, SHARDED, edit_tensors, read_tensors

CHECKPOINT = GOLDEN / LLAVA / "checkpoint"


@pytest.fixture(scope="module", params=[FP32, FP16])
def bundle(request, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("coreml") / request.param
    export(CHECKPOINT, output, recipe=recipe(request.param), targets=["onnx", "coreml"])
    return output


def spec_of(package: Path):
    return coremltools.models.utils.load_spec(str(package / FILES[1]))


def operations(package: Path, function: str) -> list:
    (block,) = spec_of(package).mlProgram.functions[function].block_specializations.values()
    return list(block.operations)


def weight_bytes(package: Path) -> int:
    return (package / FILES[2]).stat().st_size


def test_functions_inputs_and_states(bundle):
    artifacts = {a.function: a for a in load_manifest(bundle).artifacts if a.target == "coreml"}
    assert set(artifacts) == {"main", "decode", "prefill", "embed"}
    border = artifacts["decode"].compute
    assert [(t.name, t.dtype, t.shape) for t in artifacts["main"].inputs] == [
        ("image", "rgb_image", (256, 256))
    ]
    assert [(t.name, t.dtype, t.shape) for t in artifacts["main"].outputs] == [
        ("image_features", border, (1, 16, 64))
    ]
    states = [("k_cache", "float16_state", (2, 2, 2048, 16)), ("v_cache", "float16_state", (2, 2, 2048, 16))]
    assert [(t.name, t.dtype, t.shape) for t in artifacts["prefill"].inputs] == [
        ("inputs_embeds", border, (1, 64, 64)),
        ("position", "int32", (1,)),
        ("last_index", "int32", (1,)),
        *states,
    ]
    assert [(t.name, t.dtype, t.shape) for t in artifacts["decode"].inputs] == [
        ("inputs_embeds", border, (1, 1, 64)),
        ("position", "int32", (1,)),
        *states,
    ]
    assert [(t.name, t.shape) for t in artifacts["embed"].inputs] == [("input_ids", (1, "1..64"))]
    assert [(t.name, t.dtype, t.shape) for t in artifacts["decode"].outputs] == [
        ("logits", border, (1, 1, 512))
    ]


def test_all_functions_share_one_set_of_weights(bundle):
    """Tied table included: the file holds each weight once, whatever the number of functions."""
    manifest = load_manifest(bundle)
    stored = 2 if manifest.recipe.decoder.storage == "float16" else 4
    parameters = 512 * 64 + 2 * (64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 176)
    rotary = 2 * 2048 * 16
    size = weight_bytes(bundle / "coreml/decoder.mlpackage")
    assert stored * (parameters + rotary) <= size < 1.1 * stored * (parameters + rotary)


def test_operations_are_called_as_in_onnx(bundle):
    for component, package, function in (("decoder", "decoder", "prefill"), ("vision", "vision", "main")):
        ours = operations(bundle / f"coreml/{package}.mlpackage", function)
        names = {output.name for operation in ours for output in operation.outputs}
        theirs = {
            n.name for n in load_graph(bundle, component).graph.node if n.op_type in ("FusedMatMul", "Conv")
        }
        theirs = {n.removesuffix("_product") for n in theirs} - {"lm_head", "logits"}
        assert theirs <= names
        assert len(theirs) > 8


def test_coremltools_itself_loads_every_function(bundle):
    for package in ("vision", "decoder"):
        path = bundle / f"coreml/{package}.mlpackage"
        spec = spec_of(path)
        program = load_program(spec, spec.specificationVersion, str((path / FILES[2]).parent))
        program.validate()


def test_metadata(bundle):
    """What Xcode shows of a package, read as coremltools reads it."""
    for package in ("vision", "decoder"):
        metadata = spec_of(bundle / f"coreml/{package}.mlpackage").description.metadata
        assert metadata.author == "fastvlm-convert, from a FastVLM checkpoint"
        assert metadata.versionString == __version__
        assert metadata.license == "No license file came with the model."
        assert metadata.shortDescription
    facts = dict(spec_of(bundle / "coreml/vision.mlpackage").description.metadata.userDefined)
    recipe_name = load_manifest(bundle).recipe.name
    assert facts == {
        "image_size": "256", "num_image_tokens": "16", "image_mode": "pad", "recipe": recipe_name
    }  # fmt: skip
    facts = dict(spec_of(bundle / "coreml/decoder.mlpackage").description.metadata.userDefined)
    assert facts["context_length"] == "2048"
    assert "<|im_start|>user\n<image>" in facts["prompt"]


def test_every_input_and_output_says_what_it_is(bundle):
    vision = spec_of(bundle / "coreml/vision.mlpackage").description
    assert "image_mode" in vision.input[0].shortDescription
    assert "take the place of <image>" in vision.output[0].shortDescription
    functions = {f.name: f for f in spec_of(bundle / "coreml/decoder.mlpackage").description.functions}
    said = {
        (function, feature.name): feature.shortDescription
        for function, described in functions.items()
        for feature in (*described.input, *described.output, *described.state)
    }
    assert all(said.values())
    assert said["embed", "input_ids"] == "token ids"
    assert said["embed", "inputs_embeds"] == "one row for each token id"
    assert "the last chunk is padded at its end" in said["prefill", "inputs_embeds"]
    assert "chunk" not in said["decode", "inputs_embeds"] + said["decode", "position"]


def test_the_license_itself_stands_in_the_packages(llava, tmp_path):
    text = "Apple Machine Learning Research Model\n\nLicense Agreement \u2014 in full\n" * 90
    (llava / "LICENSE").write_text(text, encoding="utf-8")
    planned = plan(llava, recipe=recipe(FP16), targets=["coreml"])
    export(llava, tmp_path / "bundle", recipe=recipe(FP16), targets=["coreml"])
    for package in ("vision", "decoder"):
        path = tmp_path / f"bundle/coreml/{package}.mlpackage"
        assert spec_of(path).description.metadata.license == text
        name = f"coreml/{package}.mlpackage/{FILES[1]}"
        assert planned.files[name] == (tmp_path / "bundle" / name).stat().st_size


def test_the_package_for_apples_app_claims_nothing_that_it_is_not(llava, tmp_path):
    """No projector, no padding, no prompt: the app brings these."""
    settings = recipe(FP16, coreml={"drop_in": True})
    statement = Statement(plan_export(open_checkpoint(llava), recipe(FP16), ["coreml"]).contract, "text")
    said = metadata_of(APPLE_PACKAGE, statement, settings)
    assert set(said.details) == {"image_size", "num_image_tokens", "recipe"}
    assert "without projector" in said.description
    assert "not yet projected" in said.feature("main", "image_features")
    assert set(said.features) == {"images", "image_features"}


def test_two_exports_are_byte_identical(bundle, tmp_path):
    """Also from another process with another hash seed, under another path."""
    manifest = load_manifest(bundle)
    code = (
        "import sys; from fastvlm_convert import export;"
        "export(sys.argv[1], sys.argv[3], recipe=sys.argv[2], targets=['onnx', 'coreml'])"
    )
    again = tmp_path / "elsewhere" / "again"
    subprocess.run(
        [sys.executable, "-c", code, CHECKPOINT, manifest.recipe.name, again],
        check=True,
        env={"PYTHONHASHSEED": "7", "FASTVLM_CONVERT_CACHE": str(tmp_path / "empty")},
        capture_output=True,
    )
    names = [name for name in manifest.files if name.startswith("coreml/")]
    assert len(names) == 6
    for name in names:
        assert (again / name).read_bytes() == (bundle / name).read_bytes(), name


def test_exports_where_torch_is_not_installed(tmp_path):
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['onnxruntime'] = None;"
        "from fastvlm_convert.cli.main import main; raise SystemExit(main(sys.argv[1:]))"
    )
    arguments = ["export", CHECKPOINT, "--target", "coreml", "--recipe", "fp16", "-o", tmp_path / "bundle"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "bundle/coreml/decoder.mlpackage" / FILES[2]).is_file()


@pytest.mark.parametrize("lengths", ["range", "enumerated"])
def test_flexible_lengths(lengths, tmp_path):
    settings = recipe(FP16, coreml={"sequence_lengths": lengths, "prefill_chunk": 16})
    export(CHECKPOINT, tmp_path / "bundle", recipe=settings, targets=["coreml"])
    artifacts = {a.function: a for a in load_manifest(tmp_path / "bundle").artifacts}
    assert set(artifacts) == {"main", "decode", "embed"}
    assert artifacts["decode"].inputs[0].shape == (1, {"range": "1..16", "enumerated": "1|16"}[lengths], 64)


def test_tensor_input_and_cache(tmp_path):
    settings = recipe(FP32, coreml={"image_input": "tensor", "kv_cache": "tensors"})
    export(CHECKPOINT, tmp_path / "bundle", recipe=settings, targets=["coreml"])
    artifacts = {a.function: a for a in load_manifest(tmp_path / "bundle").artifacts}
    assert artifacts["main"].inputs[0].name == "pixel_values"
    assert [t.name for t in artifacts["decode"].outputs] == ["logits", "k_cache_out", "v_cache_out"]
    assert artifacts["decode"].inputs[2].dtype == "float32"


def test_islands_in_float32(tmp_path):
    """Neighbours that stay in float32 form one island: a cast where it begins and one where it ends."""
    ops = ("l0_gate", "l0_up", "l0_silu", "l0_gated", "l0_down")
    plain, kept = (
        Counter(o.type for o in operations(_export(settings, tmp_path / name), "decode"))
        for name, settings in (("plain", recipe(FP16)), ("kept", recipe(FP16, decoder={"float32_ops": ops})))
    )
    # One cast in, one out, and one for each of the three weights.
    assert kept["cast"] - plain["cast"] == 5
    assert kept["linear"] == plain["linear"]


def _export(settings, output: Path) -> Path:
    export(CHECKPOINT, output, recipe=settings, targets=["coreml"])
    return output / "coreml/decoder.mlpackage"


def test_a_pattern_that_matches_nothing(tmp_path):
    settings = recipe(FP16, decoder={"float32_ops": ("l0_gaet",)})
    with pytest.raises(RecipeError, match="'l0_gaet' matches no operation"):
        export(CHECKPOINT, tmp_path / "bundle", recipe=settings, targets=["coreml"])
    assert not list(tmp_path.iterdir())


def test_onnx_refuses_islands(tmp_path):
    settings = recipe(FP16, decoder={"float32_ops": ("l0_gate",)})
    with pytest.raises(TargetError, match="only Core ML"):
        export(CHECKPOINT, tmp_path / "bundle", recipe=settings, targets=["onnx"])


def test_untied_and_odd_head_sizes_are_fine(tmp_path):
    settings = recipe(FP16, common={"image_size": 256})
    export(GOLDEN / SHARDED / "checkpoint", tmp_path / "bundle", recipe=settings, targets=["coreml"])
    size = weight_bytes(tmp_path / "bundle/coreml/decoder.mlpackage")
    assert size > 2 * 2 * 453 * 112  # table and head apart


def test_apples_app_wants_its_own_dimensions(tmp_path):
    settings = recipe(FP32, coreml={"drop_in": True})
    with pytest.raises(TargetError, match="Apple's app takes 1024 pixels and features of 3072"):
        export(CHECKPOINT, tmp_path / "bundle", recipe=settings, targets=["coreml"])


def test_a_weight_beyond_float16(llava, tmp_path):
    name = "model.layers.0.mlp.gate_proj.weight"
    weight = read_tensors(llava)[name]
    weight[0, 0] = 1e5
    edit_tensors(llava, {name: weight})
    with pytest.raises(RecipeError, match=r"l0_gate_weight.*65504"):
        export(llava, tmp_path / "bundle", recipe=recipe(FP16), targets=["coreml"])
    assert not (tmp_path / "bundle").exists()
