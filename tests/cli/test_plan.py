import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fastvlm_convert.pipeline import quantize
from fastvlm_convert.predict.memory import COMPILER
from fastvlm_convert.recipe import load_recipe, shipped_recipes, without_data
from fastvlm_convert.weights.safetensors_file import read_header
from tests.checkpoints import GOLDEN, LLAVA, SHARDED
from tests.test_architecture import HEAVY

DEMO = Path(__file__).parents[2] / "checkpoints" / "fastvlm-demo"
BOTH = ("--target", "onnx", "--target", "coreml")


def written(folder: Path, change, base: str = "int4") -> Path:
    """A recipe of one's own."""
    value = yaml.safe_load(shipped_recipes()[base].read_text())
    change(value)
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(value))
    return path


def test_document(cli):
    result = cli("plan", DEMO, "--recipe", "int4", *BOTH, "--json")
    assert (result.code, result.err) == (0, "")
    document = result.document
    assert (document["command"], document["status"], document["recipe"]) == ("plan", "passed", "int4")
    assert document["targets"] == ["onnx", "coreml"]
    groups = {(g["component"], g["layers"]): g for g in document["groups"]}
    mlp = groups["decoder", "mlp gate/up/down"]
    weights, bits = 4 * 3 * 256 * 512, 4 + (16 + 4) / 64
    assert mlp == {
        "component": "decoder",
        "layers": "mlp gate/up/down",
        "num_layers": 12,
        "num_weights": weights,
        "scheme": "int4 block 64, asymmetric",
        "solver": "gptq",
        "reason": None,
        "bytes_before": 2 * weights,
        "bytes_after": weights * bits / 8,
        "bits_per_weight": bits,
    }
    assert groups["embedding", "table (also the head)"]["scheme"] == "int8 block 128"
    bits = sum(g["bits_per_weight"] * g["num_weights"] for g in document["groups"])
    assert document["bits_per_weight"] == pytest.approx(bits / document["num_weights"])
    assert document["total_bytes"] == sum(document["files"].values())
    assert document["kv_cache_bytes"]["onnx"] == {
        str(n): 4 * 2 * 4 * 4 * 32 * n for n in (1024, 2048, 4096)
    }  # fmt: skip
    assert document["needs_data"]
    stages = {stage["stage"]: stage["peak_memory_bytes"] for stage in document["stages"]}
    assert list(stages) == ["answers", "token weights", "encoder", "layers", "onnx", "coreml", "bundle"]
    assert 6e8 < document["peak_memory_bytes"] == max(stages.values()) < 1.2e9


def test_what_is_searched_needs_no_data_and_little_memory(cli):
    document = cli("plan", DEMO, "--recipe", "int8", *BOTH, "--json").document
    assert not document["needs_data"]
    assert 3e8 < document["peak_memory_bytes"] < 5e8


def test_for_people(cli):
    result = cli("plan", DEMO, "--recipe", "int4", *BOTH)
    assert result.code == 0
    assert result.err == ""
    lines = [line.split("about") for line in result.out.splitlines()]
    assert "token weights" in [line[0].strip() for line in lines if len(line) == 2]
    for text in (
        "1x1 convolutions", "int8 channel", "onnx/decoder_model_merged_q4.onnx_data",
        "1.5 MB", "2048 tokens (recipe)", "6.23 bits per weight over 4.81 M weights",
    ):  # fmt: skip
        assert text in result.out, result.out


def test_what_stays_in_float_says_why(cli, tmp_path):
    own = written(tmp_path, lambda r: r["quantize"].insert(0, {"layers": ["*.o_proj"], "scheme": "float"}))
    result = cli("plan", DEMO, "--recipe", own, "--target", "coreml")
    assert "float16: rule '*.o_proj'" in result.out
    (kept,) = (
        g for g in cli("plan", DEMO, "--recipe", own, "--target", "coreml", "--json").document["groups"]
        if g["reason"]
    )  # fmt: skip
    assert (kept["num_layers"], kept["scheme"], kept["solver"]) == (4, None, None)
    assert kept["bits_per_weight"] == 16


def test_smaller_blocks_say_why(cli):
    checkpoint = GOLDEN / LLAVA / "checkpoint"
    result = cli("plan", checkpoint, "--recipe", "int4", *BOTH)
    assert result.code == 0
    assert "int8 block 64: its width 64 is no multiple" in result.out
    assert "block_size 128, so 64" in result.out
    groups = cli("plan", checkpoint, "--recipe", "int4", *BOTH, "--json").document["groups"]
    assert [(g["scheme"], g["reason"]) for g in groups if g["reason"]] == [
        ("int4 block 16, asymmetric", "its width 176 is no multiple of block_size 64, so 16"),
        ("int8 block 64", "its width 64 is no multiple of block_size 128, so 64"),
    ]


def test_a_context_of_ones_own_is_shown(cli, tmp_path):
    own = written(tmp_path, lambda r: r["common"].update(max_context_length=640), base="fp32")
    result = cli("plan", GOLDEN / LLAVA / "checkpoint", "--recipe", own, *BOTH, "--json")
    caches = result.document["kv_cache_bytes"]
    assert list(caches["onnx"]) == ["640", "1024", "2048", "4096"]
    assert caches["onnx"]["640"] == 2 * caches["coreml"]["640"]  # float32, and float16 as it is state


def test_it_says_what_the_decoder_computes_in_on_each_target(cli, tmp_path):
    every = [*BOTH, "--target", "mlx"]
    document = cli("plan", DEMO, "--recipe", "int4", *every, "--json").document
    assert document["decoder_compute"] == {"onnx": "float32", "coreml": "float16", "mlx": "float16"}
    half = written(tmp_path, lambda r: r["decoder"].update(compute="float16"))
    document = cli("plan", DEMO, "--recipe", half, *every, "--json").document
    assert document["decoder_compute"] == dict.fromkeys(("onnx", "coreml", "mlx"), "float16")
    table = cli("plan", DEMO, "--recipe", "int4", *every).out.partition("KV cache")[2].splitlines()
    assert "decoder computes in" in table[0]
    found = {line.split()[0]: line.split()[-1] for line in table if "float" in line}
    assert found == {"onnx": "float32", "coreml": "float16", "mlx": "float16"}


def test_it_loads_no_heavy_library():
    script = (
        "import sys\nfrom fastvlm_convert.cli.main import main\n"
        f"code = main(sys.argv[1:])\nassert not {HEAVY!r} & set(sys.modules), {HEAVY!r} & set(sys.modules)\n"
        "raise SystemExit(code)"
    )
    for arguments in (("plan", DEMO, "--recipe", "int4", *BOTH, "--json"), ("recipes", "--json")):
        done = subprocess.run(
            [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["status"] == "passed"


def no_rule(recipe):
    recipe["quantize"] = recipe["quantize"][:2]


BAD = {
    "unknown_key": (lambda r: r.update(quantise=[]), "unknown setting quantise"),
    "impossible_block": (lambda r: r["quantize"][1].update(block_size=48), "block_size is 48"),
    "block_that_does_not_fit": (
        lambda r: r["quantize"][2].update(block_size=32, on_indivisible="error"),
        "blocks do not fit a convolution of 3 x 3",
    ),
    "pattern_that_fits_nothing": (
        lambda r: r["quantize"].insert(0, {"layers": ["decodr.*"], "scheme": "int8"}),
        "'decodr.*' fits no layer",
    ),
    "no_rule": (no_rule, "no rule fits layer 'vision.stem.0'"),
    "scheme_the_target_lacks": (
        lambda r: r["quantize"][1].update(block_size="channel"),
        "ONNX Runtime's MatMulNBits needs blocks",
    ),
    "palettes": (
        lambda r: r["quantize"].insert(0, {"layers": ["projector.*"], "scheme": "palette4"}),
        "ONNX",
    ),
    "float32_ops": (lambda r: r["decoder"].update(float32_ops=["l*_attn"]), "only Core ML packages"),
    "drop_in": (lambda r: r["coreml"].update(drop_in=True), "Apple's app takes 1024 pixels"),
    "context": (lambda r: r["common"].update(max_context_length=64, image_size=1024) or
                r["coreml"].update(prefill_chunk=64), "takes 256 tokens, the context has 64"),
}  # fmt: skip


@pytest.fixture(scope="module")
def unreadable(tmp_path_factory) -> Path:
    """The demo with its header whole and NaN for every weight: reading one is an error."""
    folder = tmp_path_factory.mktemp("unreadable")
    for file in (path for path in DEMO.iterdir() if path.is_file()):
        (folder / file.name).write_bytes(file.read_bytes())
    content = bytearray((folder / "model.safetensors").read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start:] = b"\xff" * (len(content) - start)
    (folder / "model.safetensors").write_bytes(content)
    return folder


@pytest.mark.parametrize("name", BAD)
def test_a_bad_recipe_is_refused_before_any_weight_is_read(cli, unreadable, tmp_path, name):
    change, message = BAD[name]
    own = written(tmp_path, change)
    planned = cli("plan", unreadable, "--recipe", own, *BOTH)
    exported = cli("export", unreadable, "--recipe", own, *BOTH, "-o", tmp_path / "bundle")
    assert (planned.code, exported.code) == (2, 2)
    assert message in planned.err
    assert exported.err == planned.err
    assert planned.out == exported.out == ""
    assert not (tmp_path / "bundle").exists()


def test_a_good_recipe_is_planned_without_reading_one(cli, unreadable, tmp_path):
    planned = cli("plan", unreadable, "--recipe", "int4", *BOTH, "--json")
    assert planned.document == cli("plan", DEMO, "--recipe", "int4", *BOTH, "--json").document | {
        "checkpoint": str(unreadable)
    }
    exported = cli("export", unreadable, "--recipe", "int4", "--target", "onnx", "-o", tmp_path / "bundle")
    assert exported.code == 2
    assert "NaN" in exported.err


def test_what_a_target_cannot_take_is_refused(cli):
    result = cli("plan", GOLDEN / SHARDED / "checkpoint", "--recipe", "fp16", *BOTH)
    assert result.code == 2
    assert "head size is 8; ONNX Runtime's GroupQueryAttention" in result.err
    assert cli("plan", GOLDEN / SHARDED / "checkpoint", "--recipe", "fp16", "--target", "coreml").code == 0


def test_unknown_target(cli):
    result = cli("plan", DEMO, "--recipe", "fp16", "--target", "tflite")
    assert (result.code, result.out) == (2, "")
    assert result.err == "error: unknown target 'tflite'\nhint: targets: onnx, coreml, mlx\n"


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("demo") / "quantized"
    quantize(DEMO, output, recipe=without_data(load_recipe("int4")))
    return output


def test_a_quantized_checkpoint_is_planned_with_its_own_recipe(cli, quantized, tmp_path):
    document = cli("plan", quantized, *BOTH, "--json").document
    own = written(tmp_path, lambda r: [rule.update(solver="search") for rule in r["quantize"]])
    direct = cli("plan", DEMO, "--recipe", own, *BOTH, "--json").document
    assert document["files"] == direct["files"]
    assert document["recipe"] == "int4"
    before = {(g["component"], g["layers"]): g.pop("bytes_before") for g in document["groups"]}
    for group in direct["groups"]:
        group.pop("bytes_before")
    assert document["groups"] == direct["groups"]
    assert not document["needs_data"]
    assert document["peak_memory_bytes"] == direct["peak_memory_bytes"] - COMPILER  # nothing is searched
    # Of 64 weights their integers, a float16 scale and a zero point in a byte.
    assert before["decoder", "mlp gate/up/down"] == 4 * 3 * 256 * 512 * (32 + 2 + 1) // 64
    stored = read_header(quantized / "model.safetensors").items()
    matrices = [t.num_bytes for n, t in stored if ".weight" in n and "norm" not in n]
    assert sum(before.values()) == sum(matrices)


def test_what_was_solved_needs_no_data_again(cli, quantized, tmp_path):
    """The solver is part of the record; the integers are there."""
    copied = Path(shutil.copytree(quantized, tmp_path / "solved"))
    content = json.loads((copied / "quantized.json").read_text())
    for part in (*content["recipe"]["quantize"], *content["layers"]):
        part["solver"] = "gptq" if part["scheme"] == "int4" else part["solver"]
    (copied / "quantized.json").write_text(json.dumps(content))
    document = cli("plan", copied, *BOTH, "--json").document
    assert "gptq" in {group["solver"] for group in document["groups"]}
    assert not document["needs_data"]
    assert document["peak_memory_bytes"] < 5e8


def test_another_recipe_than_the_stored_one_is_refused(cli, quantized):
    result = cli("plan", quantized, "--recipe", "int8", *BOTH)
    assert result.code == 2
    assert "the checkpoint was quantized with recipe 'int4'" in result.err


def test_a_float_checkpoint_needs_a_recipe(cli):
    result = cli("plan", DEMO, *BOTH)
    assert result.code == 2
    assert "a float checkpoint needs a recipe" in result.err
