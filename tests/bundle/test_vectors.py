"""Golden vectors: what is in the file is what the bundle's own runtime was given and gave."""

import base64
import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from fastvlm_convert.bundle.vectors import ODD_TEXTS, golden_vectors
from fastvlm_convert.errors import BundleError
from fastvlm_convert.manifest import FILE_NAME
from fastvlm_convert.preprocess import pixel_values
from fastvlm_convert.progress import ignore_share
from fastvlm_convert.runtime.loaded import load_bundle


@pytest.fixture(scope="module")
def vectors(fp16_bundle):
    """The vectors of a bundle as an app's test reads them."""
    model = load_bundle(fp16_bundle)
    return json.loads(golden_vectors(fp16_bundle, "onnx", model, ignore_share).to_json())


def image_of(case) -> Image.Image:
    picture = case["picture"]
    return Image.frombytes(
        "RGB", (picture["width"], picture["height"]), base64.b64decode(picture["rgb_base64"])
    )


def check_samples_of(sampled, array):
    """See that sampled values are those of an array."""
    assert sampled["shape"] == list(array.shape)
    assert np.array_equal(np.float32(sampled["values"]), array.ravel()[sampled["indices"]])
    assert len(sampled["indices"]) >= 64


def test_they_belong_to_the_bundle(vectors, fp16_bundle):
    assert (vectors["schema"], vectors["schema_version"]) == ("fastvlm-convert/vectors", 1)
    assert vectors["manifest_sha256"] == hashlib.sha256((fp16_bundle / FILE_NAME).read_bytes()).hexdigest()
    assert vectors["executed_by"].startswith("onnxruntime ")


def test_pictures_are_wide_tall_smaller_and_larger(vectors, fp16_bundle):
    size = load_bundle(fp16_bundle).images.size
    shapes = {c["name"]: (c["picture"]["width"], c["picture"]["height"]) for c in vectors["cases"]}
    assert shapes["wide"][0] > shapes["wide"][1]
    assert shapes["tall"][0] < shapes["tall"][1]
    assert max(shapes["wide"]) < size < shapes["banner"][0]


@pytest.mark.parametrize("number", range(3))
def test_a_case_is_what_the_runtime_computes(vectors, fp16_bundle, number):
    case, model = vectors["cases"][number], load_bundle(fp16_bundle)
    image = image_of(case)
    pixels = pixel_values(image, model.images)
    assert case["pixel_values_sha256"] == hashlib.sha256(pixels.tobytes()).hexdigest()
    check_samples_of(case["pixel_values"], pixels)
    eight_bits = np.rint(pixels[0].transpose(1, 2, 0) * 255).astype(np.uint8)
    assert case["square_sha256"] == hashlib.sha256(eight_bits.tobytes()).hexdigest()
    check_samples_of(case["image_features"], model.session.encode_image(pixels))
    prompt = model.prompt(case["question"], [image])
    assert case["segments"] == [segment.tolist() for segment in prompt.segments]
    stream = model.ask(image, case["question"], max_new_tokens=48)
    answer = stream.finish()
    assert case["text"] == stream.text
    assert case["token_ids"] == list(answer.token_ids)
    assert case["finished"] == answer.finished
    assert len(case["margins"]) == answer.timings.answer_tokens
    first = (case["token_ids"] + [i for i in case["top_token_ids"] if i in model.eos_token_ids])[0]
    assert case["top_token_ids"][0] == first
    assert case["first_logits"]["indices"][:8] == case["top_token_ids"]
    best, second = case["first_logits"]["values"][:2]
    assert case["margins"][0] == pytest.approx(best - second, rel=1e-3, abs=1e-6)


def test_texts_are_what_the_tokenizer_says(vectors, fp16_bundle):
    model = load_bundle(fp16_bundle)
    assert {t["text"] for t in vectors["texts"]} <= set(ODD_TEXTS)
    assert len(vectors["texts"]) > 8
    dot = Image.new("RGB", (1, 1))
    for text in vectors["texts"]:
        segments = model.prompt(text["text"], [dot]).segments
        assert text["segments"] == [s.tolist() for s in segments]
        assert model.tokenizer.decode(text["token_ids"]) == text["decoded"]
        assert not set(text["token_ids"]) & {model.tokenizer.image_token_id, *model.eos_token_ids}


def test_nan_is_no_golden_value(fp16_bundle):
    model = load_bundle(fp16_bundle)
    model.session.encode_image = lambda pixels: np.full((1, 1), np.nan, np.float32)
    with pytest.raises(BundleError, match="image_features hold NaN or infinity"):
        golden_vectors(fp16_bundle, "onnx", model, ignore_share)
