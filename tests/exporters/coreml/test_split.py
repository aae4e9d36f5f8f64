"""Wide matrices in parts, and attention step by step: what is computed stays the same."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastvlm_convert.errors import RecipeError
from fastvlm_convert.exporters.coreml.graph import Node
from fastvlm_convert.exporters.coreml.lower import lower
from fastvlm_convert.exporters.coreml.split import column_parts, joined, row_spans, rows_of
from fastvlm_convert.metrics import sqnr_db
from fastvlm_convert.mil import Interpreter
from fastvlm_convert.pipeline import export
from fastvlm_convert.predict.placeholder_weights import placeholder_weights
from fastvlm_convert.quantized.layer_plan import plan_layers
from fastvlm_convert.quantized.weight import AnyWeight, dense_view
from fastvlm_convert.recipe import Recipe, load_recipe, shipped_recipes
from fastvlm_convert.recipe_settings import CoreMLSettings, QuantizeRule
from fastvlm_convert.weights.published import published_config
from fastvlm_convert.weights.source import computed
from tests.bundles import FP32, MIXED_RULES, recipe
from tests.exporters.stored import CHECKPOINT, engine

DOWN = "decoder.layers.0.mlp.down_proj.weight"  # 64 x 176
PALETTES = (QuantizeRule(("*",), "palette4", group_size=16, channel_scale=True),)
RULES = {
    "float": (),
    "int4_blocks": (QuantizeRule(("*",), "int4", 16, symmetric=False),),
    "int8_rows": (QuantizeRule(("*",), "int8"),),
    "palettes": PALETTES,
}


def array(weight: AnyWeight) -> np.ndarray:
    return dense_view({"": weight})[""].array()


@pytest.mark.parametrize("rules", RULES)
def test_parts_are_the_whole(rules):
    weight = engine(replace(recipe(FP32), quantize=RULES[rules]))[DOWN]
    rows = [rows_of(weight, span) for span in row_spans(weight, 20)]
    columns = column_parts(weight, 70)
    assert len(rows) == 4
    assert [part.shape for part in columns] == [
        (64, n) for n in ((48, 64, 64), (58, 59, 59))[rules != "int4_blocks"]
    ]
    np.testing.assert_array_equal(np.concatenate([array(part) for part in rows]), array(weight))
    np.testing.assert_array_equal(np.concatenate([array(part) for part in columns], 1), array(weight))
    np.testing.assert_array_equal(array(joined(rows)), array(weight))


def test_a_weight_in_columns_is_read_once():
    reads = []
    values = np.arange(60, dtype=np.float32).reshape(6, 10)
    weight = computed(values.shape, "float32", lambda: reads.append(1) or values)
    parts = [array(part) for part in column_parts(weight, 4)]
    np.testing.assert_array_equal(np.concatenate(parts, 1), values)
    assert len(reads) == 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, dict[str, np.ndarray]]:
    return {name: run(SETTINGS[name], tmp_path_factory.mktemp(name)) for name in SETTINGS}


SETTINGS = {
    "integers": replace(recipe(FP32), quantize=MIXED_RULES),
    "palettes": replace(recipe(FP32), quantize=PALETTES),
}


def run(settings: Recipe, folder: Path) -> dict[str, np.ndarray]:
    """What the functions of a bundle give for the same inputs."""
    export(CHECKPOINT, folder / "bundle", recipe=settings, targets=["coreml"])
    rng = np.random.default_rng(0)
    decoder = Interpreter(folder / "bundle/coreml/decoder.mlpackage")
    vision = Interpreter(folder / "bundle/coreml/vision.mlpackage")
    ids = rng.integers(0, 512, (1, 60)).astype(np.int32)
    ids[0, :8] = 0, 63, 64, 127, 128, 448, 510, 511  # the edges of parts
    rows = decoder.predict({"input_ids": ids}, None, "embed")["inputs_embeds"]
    chunk = np.zeros((1, 64, 64), np.float32)
    chunk[:, :60] = rows
    state = decoder.make_state("prefill")
    numbers = {"position": np.array([0], np.int32), "last_index": np.array([59], np.int32)}
    logits = decoder.predict({"inputs_embeds": chunk, **numbers}, state, "prefill")["logits"]
    picture = rng.integers(0, 256, (256, 256, 3)).astype(np.uint8)
    return {"rows": rows, "logits": logits, **vision.predict({"image": picture})}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_split_bundle_computes_the_same(name, whole, tmp_path):
    split = run(changed(SETTINGS[name], split_wider_than=64), tmp_path)
    np.testing.assert_array_equal(split["rows"], whole[name]["rows"])  # looked up, so bit for bit
    for output in ("logits", "image_features"):
        assert sqnr_db(whole[name][output], split[output]) >= 100


@pytest.mark.parametrize("name", SETTINGS)
def test_attention_step_by_step_computes_the_same(name, whole, tmp_path):
    decomposed = run(changed(SETTINGS[name], attention="decomposed"), tmp_path)
    for output in ("logits", "image_features"):
        assert (sqnr_db(whole[name][output], decomposed[output]) or np.inf) >= 100


def changed(settings: Recipe, **values: object) -> Recipe:
    return replace(settings, coreml=replace(settings.coreml, **values))


def operations(settings: Recipe, size: str) -> list[Node]:
    """The operations of every function of a published model."""
    config = published_config(size)
    folded = placeholder_weights(config, ())
    plans = plan_layers({name: weight.shape for name, weight in folded.items()}, settings)
    found: list[Node] = []

    class Files:
        def save(self, graphs, name):
            found.extend(node for graph in graphs for node in graph.nodes)

    lower(config, placeholder_weights(config, plans), settings, Files(), lambda count: None)
    return found


@pytest.mark.parametrize("size", ["0.5b", "1.5b", "7b"])
@pytest.mark.parametrize("name", [n for n in shipped_recipes() if n.startswith("ios")])
def test_ios_recipes_avoid_what_ios_26_computes_wrongly(name, size):
    found = operations(load_recipe(name), size)
    assert not any(node.kind == "scaled_dot_product_attention" for node in found)
    widths = [max(node.inputs["weight"].shape) for node in found if node.kind == "linear"]
    tables = [node.inputs["x"].shape[0] for node in found if node.kind == "gather"]
    assert 4096 < max(widths + tables) < 8096


def test_a_limit_that_makes_no_sense():
    with pytest.raises(RecipeError, match="split_wider_than is 63, expected at least 64, or 'never'"):
        CoreMLSettings(split_wider_than=63)
