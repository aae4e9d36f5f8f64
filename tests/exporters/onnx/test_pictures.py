"""Pictures prepared inside the vision graph, against Pillow and the reference's own preprocessing."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.errors import BundleError, TargetError
from fastvlm_convert.exporters.onnx.data import CountedData
from fastvlm_convert.exporters.onnx.graph import Graph
from fastvlm_convert.exporters.onnx.pictures import RESIZED_IN_GRAPH, prepare_pictures
from fastvlm_convert.exporters.onnx.proto import write_graph
from fastvlm_convert.generate import generate
from fastvlm_convert.io_names import BATCH, HEIGHT, PIXEL_VALUES, PREPARED_PIXELS, WIDTH
from fastvlm_convert.manifest import load_manifest
from fastvlm_convert.metrics import sqnr_db
from fastvlm_convert.pictures import load_image
from fastvlm_convert.pipeline import export
from fastvlm_convert.predict.export_plan import plan_export
from fastvlm_convert.preprocess import ImageSettings, pixel_values
from fastvlm_convert.verification.bundle import verify
from tests.bundles import (
    copy_bundle,
    edit_manifest,
    export_bundle,
    graph_path,
    load_graph,
    open_bundle,
    recipe,
)
from tests.checkpoints import GOLDEN, LLAVA, edit_json, golden_cases

SIZE = 256
CHECKPOINT = GOLDEN / LLAVA / "checkpoint"
CASES = [case for case in golden_cases() if case.name == LLAVA]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

SETTINGS = {
    "pad": ImageSettings(SIZE, "pad"),
    "crop": ImageSettings(SIZE, "crop"),
    "pad_on_color": ImageSettings(SIZE, "pad", mean=(0.5, 0.25, 1.0)),
    "pad_normalized": ImageSettings(320, "pad", "bicubic", 0.0041, MEAN, STD),
    "crop_normalized": ImageSettings(320, "crop", "bicubic", 1 / 127.5, MEAN, STD),
    "pad_bilinear": ImageSettings(SIZE, "pad", "bilinear", mean=MEAN, std=STD),
    "crop_bilinear": ImageSettings(SIZE, "crop", "bilinear"),
}  # fmt: skip
SHAPES = [  # width and height
    (SIZE, SIZE), (SIZE + 1, SIZE - 1), (SIZE - 1, SIZE), (320, 320),
    (640, 480), (480, 640), (1000, 1000), (1920, 1080), (513, 769),
    (1, 1), (2, 3), (7, 5), (37, 41), (100, 100), (31, 64),
    (1, 60), (60, 1), (1, 300), (300, 1), (700, 9), (9, 700),
]  # fmt: skip


def picture(width: int, height: int, kind: str = "noise") -> Image.Image:
    """Noise, or hard edges, whose overshoot is clipped between the passes."""
    rng = np.random.default_rng(width * 10_000 + height)
    if kind == "noise":
        return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    return Image.fromarray(255 * rng.integers(0, 2, (height, width, 3), np.uint8))


def as_sent(*pictures: Image.Image) -> np.ndarray:
    """As transformers.js and others send them: 8-bit values times 1/255."""
    pixels = np.stack([np.asarray(p) for p in pictures]).transpose(0, 3, 1, 2)
    return pixels.astype(np.float32) * np.float32(1 / 255)


@pytest.fixture(scope="module", params=SETTINGS)
def front(request, tmp_path_factory) -> tuple[onnxruntime.InferenceSession, ImageSettings, Path]:
    """What prepares pictures, as a graph of its own."""
    settings = SETTINGS[request.param]
    graph = Graph("front", CountedData("none"), "float32", "float32", lambda count: None)
    pictures = graph.input(PIXEL_VALUES, "float32", [BATCH, 3, HEIGHT, WIDTH])
    assert prepare_pictures(graph, pictures, settings) == PREPARED_PIXELS
    graph.output(PREPARED_PIXELS, "float32", [BATCH, 3, settings.size, settings.size])
    path = tmp_path_factory.mktemp("front") / "front.onnx"
    write_graph(graph, path)
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]), settings, path


@pytest.mark.parametrize("kind", ["noise", "edges"])
def test_pixels_are_pillows_to_the_bit(front, kind):
    session, settings, _ = front
    compared = 0
    for width, height in SHAPES:
        if settings.mode == "crop" and max(width, height) > 60 * min(width, height):
            continue  # the reference holds the whole strip, scaled up
        image = picture(width, height, kind)
        (found,) = session.run(None, {PIXEL_VALUES: as_sent(image)})
        assert np.array_equal(found, pixel_values(image, settings)), (width, height)
        compared += 1
    assert compared > 15


def test_pictures_of_one_size_may_come_together(front):
    session, settings, _ = front
    pictures = [picture(90, 70), picture(90, 70, "edges")]
    (found,) = session.run(None, {PIXEL_VALUES: as_sent(*pictures)})
    assert np.array_equal(found, np.concatenate([pixel_values(p, settings) for p in pictures]))


def test_it_runs_where_there_is_no_float64(front):
    """ONNX Runtime's WebGPU build for browsers was made without it, for every provider."""
    model = onnx.load(front[2])
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    types = {v.type.tensor_type.elem_type for v in inferred.value_info}
    types |= {t.data_type for t in inferred.initializer}
    assert onnx.TensorProto.INT64 in types
    assert onnx.TensorProto.DOUBLE not in types
    assert {node.domain for node in inferred.node} == {""}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> dict[str, Path]:
    """The same model with and without preprocessing in the graph."""
    folder = tmp_path_factory.mktemp("pictures")
    return {
        way: export_bundle(CHECKPOINT, folder / way, recipe(onnx={"preprocessing": way}))
        for way in ("in_graph", "client")
    }


def test_the_graph_and_the_manifest_take_any_height_and_width(bundles):
    graph = load_graph(bundles["in_graph"], "vision").graph
    shape = [d.dim_param or d.dim_value for d in graph.input[0].type.tensor_type.shape.dim]
    assert shape == ["batch_size", 3, "height", "width"]
    (spec,) = load_manifest(bundles["in_graph"]).artifact("onnx", "vision").inputs
    assert spec.shape == ("batch_size", 3, "height", "width")
    onnx.checker.check_model(str(graph_path(bundles["in_graph"], "vision")), full_check=True)


@pytest.mark.parametrize("shape", [(640, 480), (30, 90), (1, 200), (256, 256)], ids=str)
def test_image_tokens_are_those_of_prepared_pixels(bundles, shape):
    """Equal pixels; ONNX Runtime may add up a convolution in another order where shapes are not fixed."""
    image = picture(*shape)
    vision = onnxruntime.InferenceSession(
        graph_path(bundles["in_graph"], "vision"), providers=["CPUExecutionProvider"]
    )
    (found,) = vision.run(["image_features"], {PIXEL_VALUES: as_sent(image)})
    client = open_bundle(bundles["client"])
    expected = client.session.encode_image(pixel_values(image, client.images))
    assert sqnr_db(expected, found) > 110


@pytest.mark.parametrize("case", CASES, ids=str)
def test_answers_are_those_of_the_original_code(bundles, case):
    loaded = open_bundle(bundles["in_graph"])
    image = load_image(case.image)
    prompt = loaded.prompt(case.question, [image])
    assert prompt.images[0].shape == (1, 3, image.height, image.width)
    assert np.array_equal(loaded.session.prepare(prompt.images[0]), case.array("pixel_values"))
    answer = generate(loaded.session, prompt, (), len(case.greedy_token_ids))
    assert list(answer.token_ids) == list(case.greedy_token_ids)


def test_clients_are_told_to_send_the_picture_as_it_is(bundles):
    def read(way: str, name: str) -> dict:
        return json.loads((bundles[way] / name).read_text())

    config = read("in_graph", "preprocessor_config.json")
    assert [config[key] for key in ("do_resize", "do_center_crop", "do_normalize")] == [False] * 3
    assert (config["do_rescale"], config["rescale_factor"]) == (True, 1 / 255)
    processor = read("in_graph", "processor_config.json")
    assert processor["patch_size"] > 1 << 16  # so a picture of any size has no patch
    assert processor["num_additional_image_tokens"] == 16
    assert read("client", "preprocessor_config.json")["do_resize"] is True
    assert read("client", "processor_config.json")["num_additional_image_tokens"] == 0


def test_verify_compares_what_the_graph_prepares(bundles, tmp_path):
    result = verify(bundles["in_graph"], CHECKPOINT)
    checks = {(c.target, c.stage, c.metric): c for c in result.checks}
    assert result.status == "passed"
    assert checks["onnx", "preprocessing", "sqnr_db"].exact

    bundle = copy_bundle(bundles["in_graph"], tmp_path)
    path = graph_path(bundle, "vision")
    model = onnx.load(path, load_external_data=False)
    (table,) = (t for t in model.graph.initializer if t.name == "channel_values")
    table.raw_data = (np.frombuffer(table.raw_data, np.float32) ** np.float32(0.9)).tobytes()
    path.write_bytes(model.SerializeToString())
    failed = {(c.target, c.stage) for c in verify(bundle, CHECKPOINT).checks if c.status == "failed"}
    assert ("onnx", "preprocessing") in failed


def test_a_manifest_that_hides_it_is_refused(bundles, tmp_path):
    bundle = copy_bundle(bundles["in_graph"], tmp_path)
    shape = ["batch_size", 3, 256, 256]
    edit_manifest(bundle, lambda m: m["artifacts"][0]["inputs"][0].update(shape=shape))
    with pytest.raises(
        BundleError, match=r"inputs of onnx/vision_encoder\.onnx are not what the manifest says"
    ):
        open_bundle(bundle)


def test_a_normalizing_checkpoint_is_prepared_whole(hf, tmp_path):
    edit_json(hf / "preprocessor_config.json", {"image_mean": MEAN, "image_std": STD, "resample": 2})
    result = export(hf, tmp_path / "b", recipe=recipe(onnx={"preprocessing": "in_graph"}), targets="onnx")
    loaded = open_bundle(result.bundle)
    image, prepared = picture(90, 70), open_checkpoint(hf).pictures.image
    assert (prepared.is_normalized, prepared.resampling) == (True, "bilinear")
    expected = pixel_values(image, prepared)
    assert np.array_equal(loaded.session.prepare(pixel_values(image, loaded.images)), expected)
    again = loaded.session.prepare(loaded.unprepared(expected))
    assert np.array_equal(again, expected)


def test_filters_that_no_graph_follows_are_refused(hf):
    in_graph = recipe(onnx={"preprocessing": "in_graph"})
    edit_json(hf / "preprocessor_config.json", {"resample": 1})
    with pytest.raises(TargetError, match="resized with lanczos") as caught:
        plan_export(open_checkpoint(hf), in_graph, ["onnx"])
    assert "bilinear and bicubic" in str(caught.value)
    assert "onnx.preprocessing to client" in str(caught.value.hint)
    plan_export(open_checkpoint(hf), recipe(), ["onnx"])
    plan_export(open_checkpoint(hf), in_graph, ["coreml"])
    assert set(RESIZED_IN_GRAPH) == {"bilinear", "bicubic"}


def test_core_ml_of_the_same_bundle_is_given_squares(tmp_path):
    chosen = replace(recipe("fp16", onnx={"preprocessing": "in_graph"}), name="both")
    result = export(CHECKPOINT, tmp_path / "bundle", recipe=chosen, targets=["onnx", "coreml"])
    shapes = {a.target: a.inputs[0].shape for a in result.manifest.artifacts if a.component == "vision"}
    assert shapes["onnx"][2:] == ("height", "width")
    assert all(isinstance(n, int) for n in shapes["coreml"])
