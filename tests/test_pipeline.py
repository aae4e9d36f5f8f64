import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fastvlm_convert import pipeline
from fastvlm_convert.checkpoint.checkpoint import content_hash, open_checkpoint, source_hash
from fastvlm_convert.errors import TargetError
from fastvlm_convert.float16.report import OpRange, RangeReport, save_report
from fastvlm_convert.manifest import load_manifest
from fastvlm_convert.pipeline import export, quantize
from fastvlm_convert.quantization import weight_plan
from fastvlm_convert.quantization.prepared_weights import PreparedWeights, prepare_weights
from fastvlm_convert.quantized.layer_plan import plan_layers
from fastvlm_convert.quantized.weight import dense_view
from fastvlm_convert.recipe import without_data
from tests.bundles import FP16, FP32, export_bundle, mixed_recipe, recipe, write_recipe
from tests.checkpoints import GOLDEN, LLAVA, edit_json, tree_state

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "checkpoints" / "fastvlm-demo"

# Makes imports fail as if the packages were not installed, then runs the command line.
WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
from fastvlm_convert.cli.main import main
code = main(sys.argv[1:])
assert not set(sys.modules) & {missing}, set(sys.modules) & {missing}
raise SystemExit(code)
"""


def run_without(missing: set[str], *argv: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT.format(missing=missing), *map(str, argv)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", [FP32, FP16])
def test_two_exports_are_byte_identical(name, tmp_path, monkeypatch):
    first = export_bundle(GOLDEN / LLAVA / "checkpoint", tmp_path / "a", recipe(name))
    monkeypatch.setattr(time, "time", lambda: 1e9)
    second = export_bundle(GOLDEN / LLAVA / "checkpoint", tmp_path / "b", recipe(name))
    assert contents(first) == contents(second)


def test_an_export_elsewhere_is_byte_identical(fp16_bundle, tmp_path, monkeypatch):
    """In another process, from another folder, under other names, at another time, with other hash seeds."""
    checkpoint = tmp_path / "somewhere else" / "renamed"
    shutil.copytree(GOLDEN / LLAVA / "checkpoint", checkpoint)
    for path in checkpoint.iterdir():
        path.chmod(0o600)
        os.utime(path, (1, 1))
    monkeypatch.chdir(checkpoint.parent)
    arguments = ("export", "renamed", "--target", "onnx", "--recipe", "fp16", "-o")
    for seed in ("1", "2"):
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r});"
        code += "from fastvlm_convert.cli.main import main; raise SystemExit(main(sys.argv[1:]))"
        subprocess.run(
            [sys.executable, "-c", code, *arguments, f"out{seed}"],
            check=True,
            capture_output=True,
            env={**os.environ, "PYTHONHASHSEED": seed, "TZ": "Asia/Tokyo", "LC_ALL": "C"},
        )
        assert contents(Path(f"out{seed}")) == contents(fp16_bundle)


def test_export_runs_where_torch_is_not_installed(tmp_path, fp32_bundle):
    missing = {"torch", "coremltools", "onnxruntime", "safetensors", "transformers"}
    arguments = ("--target", "onnx", "--recipe", "fp32", "-o", tmp_path / "bundle")
    done = run_without(missing, "export", GOLDEN / LLAVA / "checkpoint", *arguments)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "bundle") == contents(fp32_bundle)


def test_what_needs_torch_says_so(fp32_bundle):
    """This also proves that the block above blocks."""
    done = run_without({"torch"}, "run", GOLDEN / LLAVA / "checkpoint", "Hi")
    assert done.returncode == 2
    hint = "hint: pip install '.[torch]' in a clone of fastvlm-convert, or '.[all]'"
    assert done.stderr == f"error: running a checkpoint needs torch, which is not installed\n{hint}\n"
    done = run_without({"torch"}, "scan", GOLDEN / LLAVA / "checkpoint", "--images", GOLDEN / LLAVA)
    assert done.returncode == 2
    hint = "hint: pip install '.[torch]' in a clone of fastvlm-convert, or '.[all]'"
    assert done.stderr == f"error: running a checkpoint needs torch, which is not installed\n{hint}\n"
    done = run_without({"onnxruntime", "torch"}, "run", fp32_bundle, "Hi")
    assert done.returncode == 2
    assert "error: running ONNX bundles needs onnxruntime, which is not installed" in done.stderr


def test_export_without_onnx_says_so(tmp_path):
    arguments = ("--target", "onnx", "--recipe", "fp32", "-o", tmp_path / "bundle")
    done = run_without({"onnx"}, "export", GOLDEN / LLAVA / "checkpoint", *arguments)
    assert done.returncode == 2
    assert (
        "error: the ONNX target needs onnx, which is not installed\nhint: pip install '.[onnx]'"
        in done.stderr
    )


def test_a_bundle_runs_without_torch_and_onnx(fp32_bundle):
    done = run_without({"torch", "onnx", "coremltools"}, "run", fp32_bundle, "--max-new-tokens", 4, "Hi")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [FP32, FP16])
def test_the_checkpoint_is_only_read(llava, tmp_path, name):
    (llava / "LICENSE").write_text("MIT")
    before = tree_state(llava)
    export(llava, tmp_path / "bundle", recipe=recipe(name), targets=["onnx"])
    assert tree_state(llava) == before


def test_progress_runs_from_nothing_to_everything(llava, tmp_path):
    shares: dict[str, list[float]] = {}

    def note(stage: str, share: float) -> None:
        shares.setdefault(stage, []).append(share)

    export(llava, tmp_path / "bundle", recipe=recipe(), targets=["onnx"], on_progress=note)
    assert set(shares) == {"hashes", "onnx", "bundle"}
    for values in shares.values():
        assert values == sorted(values)
        assert values[-1] == 1.0
    assert len(shares["onnx"]) > 50


def test_what_the_config_gets_wrong_is_warned_of(llava, tmp_path):
    edit_json(llava / "config.json", {"num_hidden_layers": 9})
    result = export(llava, tmp_path / "bundle", recipe=recipe(), targets=["onnx"])
    expected = "config.json says num_hidden_layers is 9, the tensors say 2; the tensors were followed"
    assert expected in result.warnings


def test_a_context_beyond_the_training_is_warned_of(llava, tmp_path):
    settings = recipe(common={"max_context_length": 4096})
    result = export(llava, tmp_path / "bundle", recipe=settings, targets=["onnx"])
    (finding,) = [found for found in result.findings if found.id == "context-beyond-training"]
    assert finding.message == "the context of 4096 tokens is longer than the 2048 the model was trained for"


def test_an_image_that_fills_the_context_is_refused(llava, tmp_path):
    settings = recipe(common={"max_context_length": 64, "image_size": 512})
    with pytest.raises(TargetError, match="one image of 512 pixels takes 64 tokens, the context has 64"):
        export(llava, tmp_path / "out" / "bundle", recipe=settings, targets=["onnx"])
    assert not (tmp_path / "out").exists()


def test_the_checkpoints_own_image_mode_is_followed(llava, tmp_path):
    edit_json(llava / "config.json", {"image_aspect_ratio": "square"})
    export(llava, tmp_path / "bundle", recipe=recipe(), targets=["onnx"])
    manifest = load_manifest(tmp_path / "bundle")
    assert manifest.contract.image_mode == manifest.recipe.common.image_mode == "crop"


def test_quantizing_needs_neither_torch_nor_an_exporter(tmp_path, golden_quantized):
    settings = write_recipe(mixed_recipe(), tmp_path / "mixed.yaml")
    missing = {"torch", "onnxruntime", "coremltools"}
    output = tmp_path / "out"
    done = run_without(missing, "quantize", GOLDEN / LLAVA / "checkpoint", "--recipe", settings, "-o", output)
    assert done.returncode == 0, done.stderr
    done = run_without({*missing, "onnx"}, "inspect", golden_quantized)
    assert done.returncode == 0, done.stderr


def test_a_quantized_checkpoint_is_judged_by_its_own_scan_or_the_float_ones(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTVLM_CONVERT_CACHE", str(tmp_path / "cache"))
    mixed, quantized = mixed_recipe(), tmp_path / "quantized"
    halves = replace(mixed, decoder=replace(mixed.decoder, compute="float16"))
    quantize(GOLDEN / LLAVA / "checkpoint", quantized, recipe=halves)
    checkpoint = open_checkpoint(quantized)

    def status(number: int) -> str:
        return export(quantized, tmp_path / str(number), targets=["onnx"]).manifest.fp16_range

    assert status(0) == "not_run"
    save_report(RangeReport(source_hash(checkpoint), 1, (OpRange("logits", 1.0, 0.0),)))
    assert status(1) == "passed"
    save_report(RangeReport(content_hash(checkpoint.files), 1, (OpRange("logits", 1e5, 0.0),)))
    assert status(2) == "failed"


@pytest.mark.parametrize("target", ["onnx", "coreml"])
def test_weights_that_do_not_shrink_as_planned_fail_the_export(target, tmp_path, monkeypatch):
    """As if the engine had left the decoder's widest layers in float."""

    def engine(*arguments: object) -> PreparedWeights:
        made = prepare_weights(*arguments)
        wide = {name: w for name, w in made.weights.items() if name.endswith("down_proj.weight")}
        return replace(made, weights={**made.weights, **dense_view(wide)})

    monkeypatch.setattr(pipeline, "prepare_weights", engine)
    with pytest.raises(TargetError, match="bytes of weights, the plan says") as caught:
        export(DEMO, tmp_path / "out" / "bundle", recipe=without_data(recipe("int4")), targets=[target])
    assert "decoder" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_command_plans_once(tmp_path, monkeypatch):
    planned = []

    def counted(*arguments: object) -> object:
        planned.append(arguments)
        return plan_layers(*arguments)

    monkeypatch.setattr(weight_plan, "plan_layers", counted)
    settings = without_data(recipe("int4"))
    export(DEMO, tmp_path / "bundle", recipe=settings, targets=["onnx", "coreml"])
    assert len(planned) == 1
    quantize(DEMO, tmp_path / "quantized", recipe=settings)
    assert len(planned) == 2
