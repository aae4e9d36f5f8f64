"""What a checkpoint says of its pictures, followed or said."""

import json

import pytest

from fastvlm_convert.checkpoint.picture_settings import picture_settings
from fastvlm_convert.errors import CheckpointError
from fastvlm_convert.preprocess import ImageSettings
from tests.checkpoints import edit_json

CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def settings_of(folder, layout="fast_vlm"):
    return picture_settings(json.loads((folder / "config.json").read_text()), layout, folder)


def processor(folder, **changes):
    edit_json(folder / "preprocessor_config.json", changes)


def test_transformers_processor(hf):
    found = settings_of(hf)
    assert found.image == ImageSettings(256, "pad")
    assert found.origins["image_size"] == "preprocessor_config.json: crop_size.height"
    processor(hf, crop_size={"height": 512, "width": 512}, resample=2, rescale_factor=0.01, **CLIP)
    found = settings_of(hf)
    mean, std = (tuple(x) for x in CLIP.values())
    assert found.image == ImageSettings(512, "pad", "bilinear", 0.01, mean, std)
    assert found.origins["normalization"] == "preprocessor_config.json: image_mean"
    processor(hf, do_normalize=False, do_rescale=False)
    assert settings_of(hf).image == ImageSettings(512, "pad", "bilinear", 1.0)


def test_a_processor_within_another_file_goes_first(hf):
    nested = {"image_processor": {"crop_size": {"height": 512, "width": 512}}, "patch_size": 64}
    edit_json(hf / "processor_config.json", nested)
    found = settings_of(hf)
    assert found.image.size == 512
    assert found.origins["image_size"] == "processor_config.json: crop_size.height"


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({"crop_size": 320}, 320),
        ({"crop_size": None, "size": {"shortest_edge": 384}}, 384),
        ({"do_center_crop": False, "size": {"height": 448, "width": 448}}, 448),
        ({"crop_size": None, "size": None}, 256),  # image_seq_length says 16
    ],
)
def test_ways_to_state_the_size(hf, changes, size):
    processor(hf, **changes)
    assert settings_of(hf).image.size == size


def test_what_is_done_otherwise_is_said(hf, llava):
    assert "says do_center_crop" in settings_of(hf).notes[0]
    processor(hf, do_center_crop=False, size={"height": 256, "width": 256})
    assert "stretches" in settings_of(hf).notes[0]
    edit_json(hf / "config.json", {"image_aspect_ratio": "square"})
    found = settings_of(hf)
    assert (found.image.mode, found.notes) == ("crop", ())
    assert settings_of(llava, "llava_qwen2").notes == ()
    (llava / "preprocessor_config.json").write_text(json.dumps(CLIP))
    found = settings_of(llava, "llava_qwen2")
    assert found.image == ImageSettings(256, "pad")
    assert "Apple's code never reads it" in found.notes[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop_size": {"height": True, "width": 256}}, "crop_size.height is true, expected an integer"),
        ({"crop_size": {"height": 256, "width": 320}}, "crop_size is 256 by 320, expected a square"),
        ({"image_mean": [0, 1]}, r"image_mean is \[0, 1\], expected three numbers"),
        ({"image_mean": [0, 1, float("nan")]}, "expected three numbers"),
        ({"image_std": [1, 0, 1]}, "expected positive numbers"),
        ({"rescale_factor": "1/255"}, "rescale_factor is '1/255', expected a positive number"),
        ({"resample": 9}, "resample is 9, expected a number from 0 to 5"),
        ({"do_normalize": 1}, "do_normalize is 1, expected true or false"),
    ],
)
def test_malformed_settings_are_refused(hf, changes, message):
    processor(hf, **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        settings_of(hf)
    assert "preprocessor_config.json" in str(caught.value)


@pytest.mark.parametrize(("size", "message"), [(100, "no multiple of 64"), (8192, "no multiple of 64 up to")])
def test_impossible_sizes_are_refused(hf, size, message):
    processor(hf, crop_size={"height": size, "width": size})
    with pytest.raises(CheckpointError, match=message):
        settings_of(hf)
