"""Bytes that are predicted of packages, against those that coremltools writes."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from coremltools.converters.mil.frontend.milproto.load import load as load_program
from coremltools.libmilstoragepython import _BlobStorageWriter
from coremltools.models.utils import load_spec

from fastvlm_convert.exporters.coreml.data import ALIGNMENT, CountedData
from fastvlm_convert.exporters.coreml.graph import Graph, Lengths
from fastvlm_convert.exporters.coreml.lower import lower
from fastvlm_convert.exporters.coreml.metadata import FEATURES, Metadata
from fastvlm_convert.exporters.coreml.paths import APPLE_PACKAGE, DECODER_PACKAGE, FILES, VISION_PACKAGE
from fastvlm_convert.exporters.coreml.proto import write_package
from fastvlm_convert.exporters.coreml.proto_size import package_bytes
from fastvlm_convert.exporters.coreml.values import FLEXIBLE, Value
from fastvlm_convert.recipe_settings import FloatSettings, QuantizeRule
from fastvlm_convert.weights.fold import fold
from fastvlm_convert.weights.rescale import repaired_config
from tests.bundles import FP16, FP32, MIXED_RULES, recipe
from tests.checkpoints import LLAVA, SHARDED, golden_checkpoint
from tests.exporters.stored import engine

SAID = {
    name: text for package in (DECODER_PACKAGE, VISION_PACKAGE) for name, text in FEATURES[package].items()
} | {"images": "RGB"}
METADATA = Metadata("\u00e4" * 100, "LICENSE", {"prompt": "x" * 200, "empty": ""}, SAID)
FLOATS = FloatSettings("float16", "float16")
PALETTES = (
    QuantizeRule(("decoder.*",), "palette4", group_size=16, channel_scale=True),
    QuantizeRule(("*",), "palette6", group_size=8),
)
RECIPES = {
    "fixed": recipe(FP16, coreml={"prefill_chunk": 8}),
    "tensors": recipe(
        FP32, coreml={"image_input": "tensor", "kv_cache": "tensors", "sequence_lengths": "range"}
    ),
    "enumerated": recipe(
        FP16,
        coreml={"sequence_lengths": "enumerated"},
        repairs={"residual_shift": 2, "float32_scores": (0,), "separate_key_bias": (1,)},
    ),
    "islands": recipe(
        FP16,
        decoder={"float32_ops": ("l0_*", "lm_head")},
        vision={"compute": "float16", "float32_ops": ("stem_*",)},
    ),
    "decomposed": recipe(FP16, coreml={"attention": "decomposed"}, decoder={"float32_ops": ("l0_attn",)}),
    "split": recipe(FP16, coreml={"split_wider_than": 70}, vision={"compute": "float16"}),
    "split_integers": replace(recipe(FP16, coreml={"split_wider_than": 64}), quantize=MIXED_RULES),
    "split_palettes": replace(recipe(FP16, coreml={"split_wider_than": 64}), quantize=PALETTES),
    "integers": replace(recipe(FP32), quantize=MIXED_RULES),
    "palettes": replace(recipe(FP16), quantize=PALETTES),
}  # fmt: skip


def assert_exact(graphs, folder):
    program, weights = package_bytes(graphs, METADATA)
    write_package(folder, graphs, METADATA)
    assert program == (folder / FILES[1]).stat().st_size
    if (folder / FILES[2]).is_file():
        assert weights == (folder / FILES[2]).stat().st_size
    else:
        assert weights == ALIGNMENT  # a header alone, which coremltools does not write


@pytest.mark.parametrize("name", RECIPES)
def test_packages_are_exactly_as_long_as_predicted(name, tmp_path):
    class Both:
        def save(self, graphs, name):
            assert_exact(graphs, tmp_path / name)

    config = repaired_config(golden_checkpoint(LLAVA).config, RECIPES[name].repairs)
    artifacts = lower(config, engine(RECIPES[name]), RECIPES[name], Both(), lambda count: None)
    assert len(artifacts) == (4 if RECIPES[name].coreml.sequence_lengths == "fixed" else 3)


def test_a_head_of_its_own(tmp_path):
    class Both:
        def save(self, graphs, name):
            assert_exact(graphs, tmp_path / name)

    checkpoint = golden_checkpoint(SHARDED)
    lower(checkpoint.config, fold(checkpoint.weights), recipe(FP16), Both(), lambda count: None)


@pytest.mark.parametrize("name", [FP32, FP16, "int8"])
def test_the_package_for_apples_app(name, tmp_path):
    """It computes in float32, but stores floats as the encoder does: not twice the bytes of its twin."""

    class Both:
        def save(self, graphs, package):
            assert_exact(graphs, tmp_path / package)

    settings = recipe(name, coreml={"drop_in": True})
    config = golden_checkpoint(LLAVA).config
    artifacts = lower(config, engine(settings), settings, Both(), lambda count: None)
    (ours,) = (a for a in artifacts if a.files[0].startswith(APPLE_PACKAGE))
    assert (ours.storage, ours.compute) == (settings.vision.storage, "float32")
    theirs, twin = ((tmp_path / p / FILES[2]).stat().st_size for p in (APPLE_PACKAGE, VISION_PACKAGE))
    if name != "int8":
        assert 0.9 * twin < theirs < 1.01 * twin
    spec = load_spec(str(tmp_path / APPLE_PACKAGE / FILES[1]))
    assert spec.specificationVersion == 7  # iOS 16
    load_program(spec, 7, str((tmp_path / APPLE_PACKAGE / FILES[2]).parent)).validate()


def graph_of(shape, lengths=None) -> tuple[Graph, Value]:
    graph = Graph("main", {}, FLOATS, lambda count: None)
    return graph, graph.input("pixel_values", "float16", shape, lengths=lengths)


@pytest.mark.parametrize("elements", [1, 9, 10, 33])
def test_small_arrays_stand_in_the_program(elements, tmp_path):
    graph, x = graph_of((1, elements))
    table = graph.constant("table", (1, elements), lambda: np.ones((1, elements)), "float16")
    graph.output(graph.op("add", "logits", x=x, y=table))
    assert_exact([graph], tmp_path / "p")
    in_file = (tmp_path / "p" / FILES[2]).is_file()
    assert in_file == (elements >= 10)


@pytest.mark.parametrize("lengths", [Lengths(1, 300, True), Lengths(1, 300, False), Lengths(1, 1, True)])
def test_flexible_lengths(lengths, tmp_path):
    graph, x = graph_of((1, FLEXIBLE, 200), lengths)
    graph.output(graph.op("relu", "logits", x=x))
    assert_exact([graph], tmp_path / "p")


def test_arrays_lie_where_coremltools_puts_them(tmp_path):
    writer = _BlobStorageWriter(str(tmp_path / "weight.bin"))
    counted = CountedData()
    for size in (10, 63, 64, 65, 1000):
        assert counted.append(size) == writer.write_uint8_data(np.zeros(size, np.uint8))
    del writer
    assert counted.size == (tmp_path / "weight.bin").stat().st_size


LIES: Mapping[str, Value] = {
    "dtype": Value("logits", "float32", (1, 8)),
    "shape": Value("logits", "float16", (1, 9)),
    "name": Value("other", "float16", (1, 8)),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_graph_that_is_not_what_coremltools_makes_of_it_is_noticed(lie, tmp_path):
    graph, x = graph_of((1, 8))
    graph.output(graph.op("relu", "logits", x=x))
    graph.nodes[0] = replace(graph.nodes[0], outputs=(LIES[lie],))
    with pytest.raises(AssertionError, match="relu gives 'logits' fp16"):
        write_package(tmp_path / "p", [graph], METADATA)


def test_a_default_that_a_graph_does_not_know_is_noticed(tmp_path):
    graph, x = graph_of((1, 8))
    y = graph.input("image", "float16", (8, 1))
    graph.output(graph.op("matmul", "logits", x=x, y=y))
    inputs = {key: value for key, value in graph.nodes[0].inputs.items() if key != "transpose_x"}
    graph.nodes[0] = replace(graph.nodes[0], inputs=inputs)
    with pytest.raises(AssertionError, match="coremltools gave matmul 'logits' other inputs"):
        write_package(tmp_path / "p", [graph], METADATA)


def test_value_names_are_unique():
    graph, x = graph_of((1, 8))
    graph.op("relu", "same", x=x)
    with pytest.raises(AssertionError, match="function 'main' has two values called 'same'"):
        graph.op("relu", "same", x=x)
