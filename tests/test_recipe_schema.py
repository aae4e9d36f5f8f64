import copy
import dataclasses
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, reject
from hypothesis import strategies as st

from fastvlm_convert.dataclass_io import about, check_ranges, from_plain, schema_of, setting
from fastvlm_convert.errors import RecipeError
from fastvlm_convert.float16.repairs import recipe_text
from fastvlm_convert.recipe import Recipe, load_recipe, shipped_recipes
from fastvlm_convert.recipe_schema import recipe_schema
from tests.schema import problems, values

SCHEMA = recipe_schema()
SHIPPED = {name: yaml.safe_load(path.read_text()) for name, path in shipped_recipes().items()}
BASE = SHIPPED["int4"]
# One of each type, at and beyond every limit, and what looks like another type.
VALUES = (
    None, True, 0, 1, -64, 16, 48, 64, 128, 192, 256, 320, 500, 1025, 1536, 1600, 4097, 131072, 131136,
    0.0, 0.5, 1.5, 201.0, "", "text", "channel", "checkpoint", "float16", "pad", "int4", "gptq", "search",
    [], ["*"], [1], {}, {"storage": "float32"},
)  # fmt: skip


def leaves(value: Any, place: tuple = ()) -> list[tuple]:
    """The places of all settings, lists' first members included."""
    found = [place] if place else []
    if isinstance(value, dict):
        return found + [p for key, inner in value.items() for p in leaves(inner, (*place, key))]
    if isinstance(value, list) and value:
        return found + leaves(value[0], (*place, 0))
    return found


def changed(place: tuple, value: Any) -> dict[str, Any]:
    recipe = copy.deepcopy(BASE)
    inner = recipe
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return recipe


def loads(recipe: Any, folder) -> str | None:
    """What the loader finds wrong, or None."""
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(recipe))
    try:
        load_recipe(str(path))
    except RecipeError as error:
        return str(error)
    return None


# Rules between settings, which a schema has no words for.
BETWEEN = (
    "which needs storage", "is no multiple of coreml.prefill_chunk", "shared_table needs one storage",
    "has neither block_size nor zero points", "belong to palettes", "has no use for it",
)  # fmt: skip


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_are_valid(name):
    assert list(problems(SCHEMA, SHIPPED[name])) == []


@pytest.mark.parametrize("place", leaves(BASE), ids=lambda p: ".".join(map(str, p)))
def test_the_schema_and_the_loader_agree_on_every_value(place, tmp_path):
    for value in VALUES:
        recipe = changed(place, value)
        error = loads(recipe, tmp_path)
        if error is not None and any(rule in error for rule in BETWEEN):
            continue
        assert (next(problems(SCHEMA, recipe), None) is None) == (error is None), (place, value, error)


@pytest.mark.parametrize("place", leaves(BASE), ids=lambda p: ".".join(map(str, p)))
def test_they_agree_on_what_is_missing_and_unknown(place, tmp_path):
    missing, unknown = copy.deepcopy(BASE), copy.deepcopy(BASE)
    for recipe, change in ((missing, "remove"), (unknown, "add")):
        inner = recipe
        for key in place[:-1]:
            inner = inner[key]
        if change == "remove":
            del inner[place[-1]]
        elif isinstance(inner, dict):
            inner["another"] = 1
        error = loads(recipe, tmp_path)
        assert (next(problems(SCHEMA, recipe), None) is None) == (error is None), error


def test_both_refuse_some_and_take_some(tmp_path):
    """So that the tests above compare something."""
    outcomes = [loads(changed(("common", "image_size"), value), tmp_path) is None for value in VALUES]
    assert 2 <= sum(outcomes) <= len(VALUES) - 10


@given(st.sampled_from(sorted(SHIPPED)), st.data())
def test_a_recipe_survives_plain_data_and_our_yaml(name, data):
    """Whatever settings the schema allows, if the loader takes them together."""
    value = copy.deepcopy(SHIPPED[name])
    for section in data.draw(st.sets(st.sampled_from(sorted(value)), max_size=3)):
        value[section] = data.draw(values(SCHEMA["properties"][section]))
    try:
        recipe = from_plain(Recipe, value)
    except RecipeError as error:
        if any(rule in str(error) for rule in BETWEEN):
            reject()
        raise
    assert from_plain(Recipe, recipe.to_dict()) == recipe
    assert from_plain(Recipe, yaml.safe_load(recipe_text(recipe, ()))) == recipe


def test_it_says_what_each_setting_is():
    def check(schema: dict[str, Any]) -> int:
        count = 0
        for name, inner in schema["properties"].items():
            assert inner["description"].endswith("."), name
            count += 1
            nested = inner.get("items", inner)
            if "properties" in nested:
                count += check(nested)
        return count

    assert check(SCHEMA) > 40
    context = SCHEMA["properties"]["common"]["properties"]["max_context_length"]
    assert context == {
        "type": "integer",
        "minimum": 64,
        "maximum": 131072,
        "description": "Tokens the KV cache can hold, image tokens included.",
        "default": 2048,
    }


def test_kinds_of_fields():
    @dataclasses.dataclass(frozen=True)
    class Inner:
        value: float = dataclasses.field(metadata=about("First line and second."))

    @dataclasses.dataclass(frozen=True)
    class Outer:
        inner: Inner
        names: dict[str, int]
        items: tuple[Inner, ...] = ()
        choice: int | Literal["all"] = setting("all", "How many.", minimum=1)

    inner = {
        "type": "object",
        "properties": {"value": {"type": "number", "description": "First line and second."}},
        "required": ["value"],
        "additionalProperties": False,
    }
    assert schema_of(Outer) == {
        "type": "object",
        "properties": {
            "inner": inner,
            "names": {"type": "object", "additionalProperties": {"type": "integer"}},
            "items": {"type": "array", "items": inner, "default": []},
            "choice": {
                "anyOf": [{"type": "integer", "minimum": 1}, {"enum": ["all"]}],
                "description": "How many.",
                "default": "all",
            },
        },
        "required": ["inner", "names"],
        "additionalProperties": False,
    }


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("count", 0, "count is 0, expected 1 to 131072"),
        ("count", 1234567, "count is 1234567, expected 1 to 131072"),
        ("share", 0.0, "share is 0, expected above 0 and at most 1"),
        ("share", 1.5, "share is 1.5, expected above 0 and at most 1"),
        ("share", float("nan"), "share is nan, expected above 0 and at most 1"),
        ("db", -0.5, "db is -0.5, expected 0 to 200"),
    ],
)
def test_ranges_are_checked(name, value, message):
    @dataclasses.dataclass(frozen=True)
    class Settings:
        count: int = setting(1, "How many.", minimum=1, maximum=131072)
        share: float = setting(1.0, "Which part.", exclusive_minimum=0, maximum=1)
        db: float = setting(200.0, "How loud.", minimum=0, maximum=200.0)

    check_ranges(Settings(), "count", "share", "db")  # the limits themselves are allowed
    with pytest.raises(RecipeError) as error:
        check_ranges(Settings(**{name: value}), "count", "share", "db")
    assert str(error.value) == message
