"""What is found about activations is kept; recipes that ask for it are refused where nobody follows."""

from pathlib import Path

import numpy as np
import pytest

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.errors import RecipeError, TargetError
from fastvlm_convert.pipeline import export, plan, quantize
from fastvlm_convert.quantization.calibration import Calibration, read_calibration
from fastvlm_convert.quantization.prepared_weights import PreparedWeights, prepare_weights
from fastvlm_convert.quantization.weight_plan import plan_weights
from fastvlm_convert.questions import Question
from fastvlm_convert.recipe import load_recipe, without_data
from tests.bundles import export_bundle, recipe

SETTINGS = recipe("int8-static", calibration={"num_samples": 2})


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FASTVLM_CONVERT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def prepared(checkpoint: Path, data: Calibration | None = None) -> tuple[PreparedWeights, list[str]]:
    """The weights, and the shares that the stage reported."""
    planned = plan_weights(open_checkpoint(checkpoint), SETTINGS)
    stages: list[str] = []
    made = prepare_weights(
        planned,
        data or read_calibration(None, SETTINGS.calibration, planned.checkpoint.tokenizer),
        lambda stage, share: stages.append(f"{stage} {share:.2f}"),
    )
    return made, stages


def stage_file(cache: Path) -> Path:
    (path,) = cache.rglob("activations/**/*.npz")
    return path


class TestCache:
    def test_a_second_run_finds_what_the_first_one_made(self, llava, own_cache):
        first, stages = prepared(llava)
        again, again_stages = prepared(llava)
        assert len(stages) > 2
        assert again_stages == ["activation ranges 1.00"]
        assert again.activations == first.activations
        for name, weight in first.weights.items():
            assert getattr(again.weights[name], "activations", None) == getattr(weight, "activations", None)

    @pytest.mark.parametrize(
        "damage",
        [
            None,
            pytest.param(b"", marks=pytest.mark.slow),
            pytest.param(b"PK\x03\x04 no archive", marks=pytest.mark.slow),
        ],
        ids=["cut", "empty", "no zip"],
    )
    def test_a_damaged_file_is_made_again(self, llava, own_cache, damage):
        first, _ = prepared(llava)
        path = stage_file(own_cache)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
        again, stages = prepared(llava)
        assert len(stages) > 2
        assert again.activations == first.activations
        with np.load(path) as arrays:
            assert arrays.files
        assert path.read_bytes() == whole

    @pytest.mark.slow
    def test_other_pictures_give_other_ranges(self, llava, own_cache):
        first, _ = prepared(llava)
        data = read_calibration(None, SETTINGS.calibration, open_checkpoint(llava).tokenizer)
        darker = tuple(
            Question(tuple(image.point(lambda value: value // 4) for image in q.images), q.text)
            for q in data.questions
        )
        other, stages = prepared(llava, Calibration(darker, "darker"))
        assert len(stages) > 2
        differing = [
            name
            for name, weight in first.weights.items()
            if getattr(other.weights[name], "activations", None) != getattr(weight, "activations", None)
        ]
        assert differing

    @pytest.mark.slow
    def test_exports_are_the_same_bytes(self, llava, tmp_path, monkeypatch):
        bundles = []
        for name in "ab":
            monkeypatch.setenv("FASTVLM_CONVERT_CACHE", str(tmp_path / f"cache-{name}"))
            bundles.append(export_bundle(llava, tmp_path / name, SETTINGS))
        files = [{p.name: p.read_bytes() for p in bundle.rglob("*") if p.is_file()} for bundle in bundles]
        assert files[0] == files[1]


class TestRefused:
    def test_data_without_a_picture(self, llava, own_cache):
        with pytest.raises(RecipeError, match="holds no picture"):
            prepared(llava, Calibration((Question((), "What is a square?"),), "text"))

    def test_pictures_that_are_not_at_hand(self, llava, own_cache):
        with pytest.raises(RecipeError, match="taken from pictures that are not at hand"):
            prepared(llava, Calibration((), "unknown"))

    def test_no_data_at_all(self):
        with pytest.raises(RecipeError, match="cannot do without data"):
            without_data(load_recipe("int8-static"))

    @pytest.mark.parametrize(
        ("target", "bits", "why"),
        [("coreml", "int16", "8 bits alone"), ("mlx", "int8", "weights alone"), ("mlx", "int16", "weights")],
    )
    def test_targets_that_cannot_follow(self, llava, target, bits, why, tmp_path):
        settings = recipe("int8-static", vision={"activations": bits})
        with pytest.raises(TargetError, match=why) as caught:
            plan(llava, recipe=settings, targets=target)
        assert "to onnx" in str(caught.value.hint)
        with pytest.raises(TargetError, match=why):
            export(llava, tmp_path / "bundle", recipe=settings, targets=["onnx", target])
        assert not (tmp_path / "bundle").exists()

    def test_a_quantized_checkpoint(self, llava, golden_quantized, tmp_path):
        with pytest.raises(RecipeError, match="holds weights alone"):
            quantize(llava, tmp_path / "quantized", recipe=SETTINGS)
        with pytest.raises(RecipeError, match="holds weights alone"):
            plan(golden_quantized, recipe=SETTINGS, targets="onnx")

    def test_float16_arithmetic_in_onnx(self, llava):
        settings = recipe("int8-static", vision={"compute": "float16"})
        with pytest.raises(TargetError, match=r"and vision\.compute float16, but ONNX") as caught:
            plan(llava, recipe=settings, targets="onnx")
        assert str(caught.value.hint) == "set vision.compute to float32 for ONNX"
