import dataclasses
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.dataclass_io import from_plain
from fastvlm_convert.errors import RecipeError
from fastvlm_convert.manifest import load_manifest
from fastvlm_convert.pipeline import export, quantize
from fastvlm_convert.predict.export_plan import plan_export, predicted_files
from fastvlm_convert.predict.recipe_sizes import describe
from fastvlm_convert.quantization.weight_plan import plan_weights
from fastvlm_convert.recipe import Recipe, load_recipe, shipped_recipes, without_data
from tests.bundles import check_sizes, recipe
from tests.checkpoints import GOLDEN, SETS, SHARDED, golden_checkpoint

DEMO = Path(__file__).parent.parent / "checkpoints" / "fastvlm-demo"
CONFIGS = sorted(
    path for path in (Path(__file__).parent.parent / "configs").glob("*.yaml") if path.name != "serve.yaml"
)

RECIPES = {name: load_recipe(name) for name in shipped_recipes()}


def keys_of(kind: type) -> dict[str, Any]:
    """Names of a dataclass's fields, nested as the fields are."""
    hints = typing.get_type_hints(kind)
    return {
        field.name: keys_of(hints[field.name]) if dataclasses.is_dataclass(hints[field.name]) else None
        for field in dataclasses.fields(kind)
    }


def keys_in(value: object) -> dict[str, Any] | None:
    return {key: keys_in(inner) for key, inner in value.items()} if isinstance(value, dict) else None


def test_shipped_recipes_are_those_in_the_repository():
    assert {"fp32", "fp16"} <= set(shipped_recipes())
    assert sorted(path.stem for path in CONFIGS) == sorted(shipped_recipes())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
class TestShipped:
    def test_states_every_setting(self, path):
        assert keys_in(yaml.safe_load(path.read_text())) == keys_of(Recipe)

    def test_is_named_after_its_file(self, path):
        assert load_recipe(path.stem).name == path.stem
        assert load_recipe(str(path)) == load_recipe(path.stem)

    def test_is_rebuilt_from_its_own_data(self, path):
        settings = load_recipe(path.stem)
        assert from_plain(Recipe, settings.to_dict()) == settings

    def test_exports_in_the_sizes_that_were_predicted(self, path, tmp_path):
        """To every target that takes it; the demo, because blocks are as large there as in real models."""
        settings = load_recipe(path.stem)
        targets = [name for name, facts in describe(settings).targets.items() if not facts.refused]
        assert targets
        if settings.vision.activations == "float":
            quick = without_data(settings)  # of weights, sizes do not depend on the solver
        else:
            few = dataclasses.replace(settings.calibration, num_samples=2)
            quick = dataclasses.replace(settings, calibration=few)
        predicted = predicted_files(plan_export(open_checkpoint(DEMO), quick, targets))
        result = export(DEMO, tmp_path / "bundle", recipe=quick, targets=targets)
        assert set(settings.notes) <= set(result.warnings)
        manifest = load_manifest(tmp_path / "bundle")
        assert manifest.recipe.notes == settings.notes
        assert set(predicted) == set(manifest.files)
        if settings.vision.activations != "float":  # how many layers will stay float nobody knows before
            for target in targets:
                *_, graph, data = manifest.artifact(target, "vision").files
                for file, off in ((graph, 0.3), (data, 0.02)):
                    assert predicted[file] == pytest.approx(manifest.files[file].size, rel=off)
                    predicted[file] = manifest.files[file].size
        check_sizes(predicted, tmp_path / "bundle")
        stored = {artifact.component: artifact.storage for artifact in manifest.artifacts}
        assert stored == {
            "vision": settings.vision.storage,
            "decoder": settings.decoder.storage,
            "embed": settings.embed.storage,
        }


@pytest.mark.parametrize(
    "name", [n for n, r in RECIPES.items() if r.quantize and r.vision.activations == "float"]
)
def test_narrow_checkpoints_are_quantized_whole_by_every_recipe_that_quantizes(name, tmp_path):
    """Widths down to 8: no layer stays in float, and the checkpoint made holds what was planned."""
    quick = without_data(load_recipe(name))
    plans = {golden: plan_weights(golden_checkpoint(golden), quick).layers for golden in SETS}
    for planned in plans.values():
        assert all(plan.scheme is not None for plan in planned)
        assert any(plan.reason is not None for plan in planned)
    made = quantize(GOLDEN / SHARDED / "checkpoint", tmp_path / "made", recipe=quick)
    opened = open_checkpoint(tmp_path / "made")
    assert opened.quantized is not None
    assert opened.quantized.record.plans == made.record.plans == plans[SHARDED]


def test_the_recipe_for_the_neural_engine_says_that_it_is_unproven():
    """No integers in blocks, which are reported wrong there; what is reported of the rest `lint` tells."""
    settings = load_recipe("ios-ane")
    assert {rule.block_size for rule in settings.quantize} == {"channel"}
    assert (settings.vision.compute, settings.decoder.compute) == ("float16", "float16")
    assert "never ran it" in " ".join(settings.notes)
    assert "experimental" in settings.description


def test_recipes_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_recipe("fp32").common.image_size = 512  # type: ignore[misc]


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    value = yaml.safe_load(shipped_recipes()["fp32"].read_text())
    change(value)
    return value


BAD = {
    "unknown_section": (lambda r: r.update(tpu={}), "unknown setting tpu", "allowed in the recipe: name,"),
    "unknown_key": (
        lambda r: r["common"].update(image_sise=512),
        "unknown setting common.image_sise",
        "allowed in common: image_size, image_mode, max_context_length",
    ),
    "key_is_no_text": (lambda r: r["onnx"].update({1: 2}), "unknown setting onnx.1", "shared_table"),
    "missing_section": (lambda r: r.pop("decoder"), "missing setting decoder", "the recipe needs: name,"),
    "missing_key": (
        lambda r: r["vision"].pop("compute"),
        "missing setting vision.compute",
        "vision needs: storage, compute",
    ),
    "section_is_no_mapping": (lambda r: r.update(vision="float16"), "vision is 'float16', expected", None),
    "wrong_type": (
        lambda r: r["common"].update(max_context_length="long"),
        "common.max_context_length is 'long', expected an integer",
        None,
    ),
    "number_for_flag": (lambda r: r["onnx"].update(shared_table=1), "expected true or false", None),
    "flag_for_number": (lambda r: r["gates"].update(max_new_tokens=True), "expected an integer", None),
    "unknown_dtype": (
        lambda r: r["vision"].update(storage="fp16"),
        "vision.storage is 'fp16', expected 'float32' or 'float16'",
        None,
    ),
    "unknown_mode": (
        lambda r: r["common"].update(image_mode="stretch"),
        "common.image_mode is 'stretch', expected 'pad' or 'crop' or 'checkpoint'",
        None,
    ),
    "list_for_value": (lambda r: r["common"].update(image_mode=["pad"]), "expected 'pad' or 'crop'", None),
    "size_no_multiple_of_64": (
        lambda r: r["common"].update(image_size=500),
        "common.image_size is 500",
        None,
    ),
    "size_too_small": (lambda r: r["common"].update(image_size=192), "from 256 to 1536", None),
    "size_too_large": (lambda r: r["common"].update(image_size=1600), "from 256 to 1536", None),
    "negative_size": (lambda r: r["common"].update(image_size=-64), "common.image_size is -64", None),
    "context_too_short": (
        lambda r: r["common"].update(max_context_length=8),
        "common.max_context_length is 8, expected 64 to 131072",
        None,
    ),
    "context_too_long": (lambda r: r["common"].update(max_context_length=1 << 30), "64 to 131072", None),
    "compute_below_storage": (
        lambda r: r["decoder"].update(compute="float16"),
        "decoder.compute is 'float16', which needs storage 'float16'",
        "set storage to float16, or compute to float32",
    ),
    "compute_left_open_below_storage": (
        lambda r: r["decoder"].update(compute="auto"),
        "decoder.compute is 'auto', which needs storage 'float16'",
        "set storage to float16, or compute to float32",
    ),
    "vision_compute_left_open": (
        lambda r: r["vision"].update(compute="auto"),
        "vision.compute is 'auto', expected 'float32' or 'float16'",
        None,
    ),
    "shared_table_of_two_dtypes": (
        lambda r: r["embed"].update(storage="float16"),
        "onnx.shared_table needs one storage",
        "set onnx.shared_table to false",
    ),
    "accuracy_level_between": (
        lambda r: r["onnx"].update(accuracy_level=2),
        "onnx.accuracy_level is 2, expected 0 or 4",
        None,
    ),
    "accuracy_level_is_a_flag": (
        lambda r: r["onnx"].update(accuracy_level=False),
        "onnx.accuracy_level is false, expected 0 or 4",
        None,
    ),
    "note_is_no_text": (lambda r: r.update(notes=[1]), "notes[0] is 1, expected a text", None),
    "gate_not_a_number": (
        lambda r: r["gates"].update(min_sqnr_db=float("nan")),
        "gates.min_sqnr_db is nan, expected 0 to 200",
        None,
    ),
    "gate_infinite": (lambda r: r["gates"].update(min_sqnr_db=float("inf")), "expected 0 to 200", None),
    "no_new_tokens": (
        lambda r: r["gates"].update(max_new_tokens=0),
        "gates.max_new_tokens is 0, expected 1 to 1024",
        None,
    ),
}


@pytest.mark.parametrize(("change", "message", "hint"), BAD.values(), ids=BAD.keys())
def test_refused(change, message, hint, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(changed(change)))
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path))
    assert message in str(caught.value)
    assert str(caught.value).endswith(f"({path})")
    assert (hint or "recipes NAME > mine.yaml` gives a file to start from") in str(caught.value.hint)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the recipe is null, expected settings"),
        (b"- fp32\n", "the recipe is ['fp32'], expected settings"),
        (b"name: [", "not valid YAML"),
        (b"name: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        (b"name: \xff\xfe\n", "cannot read"),
        (b"[" * 5000, "not valid YAML"),
    ],
    ids=["empty", "list", "broken", "code", "not_utf8", "deep"],
)
def test_refused_file(content: bytes, message, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path))
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_unknown_name_lists_the_shipped_ones():
    with pytest.raises(RecipeError, match="unknown recipe 'int3'") as caught:
        load_recipe("int3")
    assert all(name in str(caught.value.hint) for name in shipped_recipes())


def test_missing_file(tmp_path):
    with pytest.raises(RecipeError, match="there is no such recipe"):
        load_recipe(str(tmp_path / "none.yaml"))


def test_folder_named_like_a_recipe(tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(RecipeError, match="cannot read"):
        load_recipe(str(tmp_path / "folder.yaml"))


def test_a_message_stays_short_whatever_the_file_holds(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(changed(lambda r: r["common"].update(image_mode=["pad"] * 2000))))
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path))
    assert len(str(caught.value)) < 500


def test_an_integer_is_accepted_where_a_number_is_expected():
    built = from_plain(Recipe, changed(lambda r: r["gates"].update(min_sqnr_db=90)))
    assert built.gates.min_sqnr_db == 90.0
    assert isinstance(built.gates.min_sqnr_db, float)


def test_values_that_are_chosen():
    settings = recipe("fp32", common={"image_size": 320, "image_mode": "crop"})
    assert (settings.common.image_size, settings.common.image_mode) == (320, "crop")


def test_from_plain_reads_tuples_and_dictionaries():
    @dataclasses.dataclass(frozen=True)
    class Box:
        sizes: tuple[int | str, ...]
        names: dict[str, int]

    assert from_plain(Box, {"sizes": [1, "n"], "names": {"a": 1}}) == Box((1, "n"), {"a": 1})
    with pytest.raises(RecipeError, match=r"sizes\[1\] is 2.5, expected an integer or a text"):
        from_plain(Box, {"sizes": [1, 2.5], "names": {}})
    with pytest.raises(RecipeError, match=r"names.a is 'x', expected an integer"):
        from_plain(Box, {"sizes": [], "names": {"a": "x"}})
    with pytest.raises(RecipeError, match=r"sizes is 'abc', expected a list"):
        from_plain(Box, {"sizes": "abc", "names": {}})
