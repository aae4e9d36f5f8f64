import json
from dataclasses import replace

import pytest

from fastvlm_convert.predict.recipe_facts import SHIPPED_FACTS
from fastvlm_convert.predict.recipe_sizes import describe
from fastvlm_convert.recipe import load_recipe, shipped_recipes
from fastvlm_convert.recipe_schema import recipe_schema
from fastvlm_convert.recipe_settings import QuantizeRule
from tests.shipped_recipe_facts import facts_of_shipped_recipes


def test_the_list_names_every_recipe(cli):
    result = cli("recipes")
    assert result.code == 0
    for name in shipped_recipes():
        assert f"\n{name} " in result.out
    assert "int4/32" in result.out
    assert "fastvlm-convert recipes NAME > mine.yaml" in result.err


def test_the_document_says_what_each_makes(cli):
    result = cli("recipes", "--json")
    assert (result.code, result.err) == (0, "")
    recipes = {recipe["name"]: recipe for recipe in result.document["recipes"]}
    assert list(recipes) == list(shipped_recipes())
    int4 = recipes["int4"]
    assert int4["description"] == load_recipe("int4").description
    assert int4["stored_as"] == {
        "vision": ["int8"],
        "projector": ["int8"],
        "decoder": ["int4/64"],
        "embedding": ["int8/128"],
    }
    exported = {"bytes": 467_333_212, "refused": None}
    assert recipes["ios-int4"]["targets"]["onnx"] == exported
    assert recipes["fp32"]["stored_as"]["decoder"] == ["float32"]
    assert recipes["web-q4f16"]["targets"]["onnx"]["bytes"] > exported["bytes"] + 130e6


def test_the_list_is_read_from_a_file_that_is_what_the_exporters_predict():
    assert SHIPPED_FACTS.read_text(encoding="utf-8") == facts_of_shipped_recipes(), "run `make docs`"


def test_a_target_that_cannot_take_a_recipe_says_why():
    palettes = replace(load_recipe("int4"), quantize=(QuantizeRule(("*",), "palette4"),))
    targets = describe(palettes).targets
    assert targets["onnx"].bytes is None
    assert "vision.stem.0" in targets["onnx"].refused
    assert targets["coreml"].refused is None
    whole_rows = replace(palettes, quantize=(QuantizeRule(("*",), "int8"),))
    assert "MatMulNBits needs blocks" in describe(whole_rows).targets["onnx"].refused


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_file_is_printed_as_it_is(cli, name, tmp_path):
    result = cli("recipes", name)
    assert (result.code, result.err) == (0, "")
    assert result.out == shipped_recipes()[name].read_text()
    (tmp_path / "mine.yaml").write_text(result.out)
    assert load_recipe(str(tmp_path / "mine.yaml")) == load_recipe(name)


def test_a_file_as_a_document(cli):
    document = cli("recipes", "fp16", "--json").document
    assert document["recipe"] == json.loads(json.dumps(load_recipe("fp16").to_dict()))
    assert document["text"] == shipped_recipes()["fp16"].read_text()


def test_the_schema_is_printed_alone(cli):
    for flags in ([], ["--json"]):
        result = cli("recipes", "--schema", *flags)
        assert (result.code, result.err) == (0, "")
        assert json.loads(result.out) == recipe_schema()


def test_an_unknown_name_lists_the_known_ones(cli):
    result = cli("recipes", "int3")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(
        "error: unknown recipe 'int3'\nhint: did you mean 'int4' or 'int8'? shipped recipes: "
    )
    assert all(name in result.err for name in shipped_recipes())


def test_a_name_and_the_schema(cli):
    result = cli("recipes", "fp16", "--schema")
    assert (result.code, result.out) == (2, "")
    assert result.err == "error: --schema is the same for every recipe\nhint: omit the recipe name\n"
