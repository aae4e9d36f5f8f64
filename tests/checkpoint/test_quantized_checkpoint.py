"""Quantized checkpoints that are damaged, hostile or do not fit: a clear error, never a traceback."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint, source_hash
from fastvlm_convert.checkpoint.quantized_checkpoint import FILE_NAME, is_quantized, read_record
from fastvlm_convert.cli.inspect import describe
from fastvlm_convert.errors import CheckpointError, RecipeError
from fastvlm_convert.quantization.prepared_weights import prepare_weights
from fastvlm_convert.quantization.weight_plan import plan_weights
from fastvlm_convert.quantized.weight import QuantizedWeight, dense_view
from fastvlm_convert.runtime.loaded import load_folded_reference, load_reference
from tests.bundles import mixed_recipe, recipe
from tests.checkpoint.test_fuzz import flipped, junked, tally
from tests.checkpoints import LLAVA, edit_json, golden_checkpoint

GATE = "decoder.layers.0.mlp.gate_proj"
DOWN = "decoder.layers.0.mlp.down_proj"
QUERY = "decoder.layers.0.self_attn.q_proj"


@pytest.fixture
def made(golden_quantized, tmp_path):
    return shutil.copytree(golden_quantized, tmp_path / "quantized")


def edit_layer(folder, named, **changes):
    value = json.loads((folder / FILE_NAME).read_text())
    (report,) = [r for r in value["layers"] if r["layer"] == named]
    report.update(changes)
    (folder / FILE_NAME).write_text(json.dumps(value))


def edit_parts(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def read_everything(folder):
    checkpoint = open_checkpoint(folder)
    for weight in dense_view(checkpoint.folded).values():
        assert np.isfinite(weight.array()).all()
    describe(checkpoint)
    return checkpoint


class TestWhole:
    def test_it_has_no_unfolded_weights(self, golden_quantized):
        checkpoint = open_checkpoint(golden_quantized)
        assert checkpoint.weights == {}
        assert list(checkpoint.folded) == list(golden_checkpoint(LLAVA).folded)
        assert golden_checkpoint(LLAVA).quantized is None
        assert source_hash(checkpoint) == source_hash(golden_checkpoint(LLAVA))

    def test_the_engine_gives_what_is_stored(self, golden_quantized):
        checkpoint = open_checkpoint(golden_quantized)
        plans = [plan_weights(c, mixed_recipe()) for c in (checkpoint, golden_checkpoint(LLAVA))]
        ours, theirs = (prepare_weights(plan).weights for plan in plans)
        assert plans[0].layers == plans[1].layers
        num_quantized = 0
        for name, weight in ours.items():
            assert type(weight) is type(theirs[name])
            if isinstance(weight, QuantizedWeight):
                a, b = weight.read(1, 5), theirs[name].read(1, 5)
                assert all(np.array_equal(getattr(a, part), getattr(b, part)) for part in vars(a))
                num_quantized += 1
        assert num_quantized == sum(plan.scheme is not None for plan in plans[0].layers) > 40

    def test_another_recipe_is_refused_unless_its_integers_are_the_same(self, golden_quantized):
        checkpoint = open_checkpoint(golden_quantized)
        assert prepare_weights(plan_weights(checkpoint, mixed_recipe())).weights is checkpoint.folded
        with pytest.raises(RecipeError, match="recipe 'mixed', whose quantize section differs") as caught:
            plan_weights(checkpoint, recipe("int4"))
        assert "leave --recipe out" in caught.value.hint

    def test_torch_runs_it(self, golden_quantized):
        checkpoint = open_checkpoint(golden_quantized)
        expected = dense_view(checkpoint.folded)
        loaded, model = load_folded_reference(checkpoint)
        state = model.state_dict()
        assert np.array_equal(state[f"{GATE}.weight"].numpy(), expected[f"{GATE}.weight"].array())
        pixels = np.zeros((1, 3, *[loaded.images.size] * 2), np.float32)
        np.testing.assert_array_equal(
            load_reference(checkpoint).session.encode_image(pixels), loaded.session.encode_image(pixels)
        )

    def test_an_adapter_is_refused(self, golden_quantized, tmp_path):
        with pytest.raises(CheckpointError, match="cannot be merged into quantized weights") as caught:
            open_checkpoint(golden_quantized, tmp_path)
        assert "--adapter" in caught.value.hint


RECORDS = {
    "another schema": ({"schema": "other"}, "not a quantized.json of fastvlm-convert"),
    "another version": ({"schema_version": 1}, "version 1; this tool reads 2"),
    "no layers": ({"layers": []}, "fc2.weight' is missing"),
    "layers are no list": ({"layers": {}}, "expected a list"),
    "an unknown key": ({"speed": 1}, "unknown setting speed"),
    "half a character": ({"tool": "\ud800"}, "no Unicode"),
    "no recipe": ({"recipe": None}, "malformed"),
}
LAYERS = {
    "unknown scheme": (GATE, {"scheme": "int3"}, "expected 'float' or 'int8'"),
    "bits out of range": (GATE, {"scheme": "int16"}, "expected 'float' or 'int8'"),
    "an impossible block": (GATE, {"block_size": 17}, "impossible block_size 17"),
    "a block that does not divide": (DOWN, {"block_size": 128}, "cannot have blocks: its width 176"),
    "an impossible group": (GATE, {"group_size": 0}, "impossible group_size 0"),
    "figures of another scheme": (GATE, {"stored_bits": 7}, "contradict its scheme"),
    "no figures": (GATE, {"squared_sum": None}, "contradict its scheme"),
    "figures that are none": (GATE, {"sqnr_db": float("nan")}, "are not finite"),
    "a reason that is no text": (GATE, {"reason": [1]}, "expected a text or null"),
    "a vector as a layer": (GATE, {"layer": "decoder.norm"}, r"'decoder.norm.weight.q' is missing"),
    "a negative dimension": (GATE, {"shape": [-1, 64]}, "impossible shape"),
    "an absurd dimension": (GATE, {"shape": [1 << 40, 1 << 40]}, "absurd shape"),
    "three dimensions": (GATE, {"shape": [176, 8, 8]}, "blocks do not fit a convolution of 8 "),
    "q without k": (QUERY, {"layer": QUERY.replace("q_proj", "qq_proj")}, "missing|disagree"),
    "one dimension": (GATE, {"shape": [64]}, "impossible shape"),
    "another scheme": (GATE, {"scheme": "int8", "stored_bits": 11264 * 8 + 704 * 24}, r"weight.q' is uint8"),
    "another shape": (DOWN, {"shape": [176, 64]}, "disagree about"),
    "twice the same": (DOWN, {"layer": GATE}, "lists a layer twice"),
    "float that is quantized": (
        GATE, {"scheme": "float", "block_size": "channel", "squared_sum": None, "sqnr_db": None},
        f"'{GATE}.weight' is missing",
    ),
}  # fmt: skip
TENSORS = {
    "a part is missing": (lambda t: t.pop(f"{GATE}.weight.scale"), "scale' is missing"),
    "no weights at all": (lambda t: [t.pop(n) for n in list(t)[1:]], "is missing"),
    "a float is missing": (lambda t: t.pop("decoder.norm.weight"), "decoder.norm.weight"),
    "a part of another shape": (
        lambda t: t.update({f"{GATE}.weight.q": torch.zeros(176, 31, dtype=torch.uint8)}), "its scheme needs",
    ),
    "a part of another dtype": (
        lambda t: t.update({f"{GATE}.weight.scale": t[f"{GATE}.weight.scale"].float()}), "its scheme needs",
    ),
    "both float and quantized": (
        lambda t: t.update({f"{GATE}.weight": torch.zeros(176, 64)}), "both in float and quantized",
    ),
    "a norm of another shape": (
        lambda t: t.update({"decoder.norm.weight": torch.zeros(65)}), "expected",
    ),
    "a norm of integers": (
        lambda t: t.update({"decoder.norm.weight": torch.zeros(64, dtype=torch.int8)}), "stored as int8",
    ),
}  # fmt: skip
VALUES = {
    "scales that are NaN": ("scale", lambda t: t.fill_(torch.nan)),
    "scales that are infinite": ("scale", lambda t: t.fill_(torch.inf)),
    "zero points beyond the bits": ("zero_point", lambda t: t.fill_(200)),
}


class TestDamaged:
    @pytest.mark.parametrize("case", RECORDS)
    def test_records(self, made, case):
        changes, message = RECORDS[case]
        edit_json(made / FILE_NAME, changes)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(made)

    @pytest.mark.parametrize("size", ["checkpoint", 1 << 40])
    def test_a_recipe_that_is_not_resolved(self, made, size):
        recipe_ = json.loads((made / FILE_NAME).read_text())["recipe"]
        recipe_["common"]["image_size"] = size
        edit_json(made / FILE_NAME, {"recipe": recipe_})
        with pytest.raises(CheckpointError, match="image_size is"):
            open_checkpoint(made)

    @pytest.mark.parametrize("case", LAYERS)
    def test_layers(self, made, case):
        layer, changes, message = LAYERS[case]
        edit_layer(made, layer, **changes)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(made)

    @pytest.mark.parametrize("case", TENSORS)
    def test_tensors(self, made, case):
        change, message = TENSORS[case]
        edit_parts(made, change)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(made)

    @pytest.mark.parametrize("case", VALUES)
    def test_values_are_judged_when_they_are_read(self, made, case):
        part, change = VALUES[case]
        edit_parts(made, lambda t: change(t[f"{GATE}.weight.{part}"]))
        weights = open_checkpoint(made).folded
        with pytest.raises(CheckpointError, match=f"{GATE}.weight.{part}"):
            weights[f"{GATE}.weight"].dense().array()

    def test_layers_that_exporters_stack_must_be_alike(self, made):
        def to_symmetric(tensors):
            tensors.pop(f"{QUERY}.weight.zero_point")

        edit_parts(made, to_symmetric)
        edit_layer(made, QUERY, symmetric=True, stored_bits=64 * 64 * 4 + 64 * 4 * 16)
        with pytest.raises(CheckpointError, match="are stored together"):
            open_checkpoint(made)

    @pytest.mark.parametrize("content", ["", "{", "[]", "9" * 5000, "[" * 100_000, "\ud800", '{"schema": 3}'])
    def test_a_record_that_is_none(self, made, content):
        (made / FILE_NAME).write_text(content, errors="surrogatepass")
        assert not is_quantized(made)
        with pytest.raises(CheckpointError):
            open_checkpoint(made)

    def test_a_file_that_is_cut_off(self, made):
        path = made / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(CheckpointError, match="truncated"):
            open_checkpoint(made)


class TestFuzz:
    def test_records(self, made):
        value = json.loads((made / FILE_NAME).read_text())
        raw = (made / FILE_NAME).read_bytes()

        def attempt(rng: random.Random) -> None:
            damaged = flipped(raw, rng) if rng.random() < 0.2 else json.dumps(junked(value, rng)).encode()
            (made / FILE_NAME).write_bytes(damaged)
            read_record(made)
            describe(open_checkpoint(made))

        good, bad = tally(200, attempt)
        assert good
        assert bad > 100

    def test_layers(self, made):
        value = json.loads((made / FILE_NAME).read_text())

        def attempt(rng: random.Random) -> None:
            layers = value["layers"].copy()
            at = rng.randrange(len(layers))
            layers[at] = junked(layers[at], rng)
            (made / FILE_NAME).write_text(json.dumps({**value, "layers": layers}))
            open_checkpoint(made)

        good, bad = tally(150, attempt)
        assert good
        assert bad > 75

    def test_headers(self, made):
        path = made / "model.safetensors"
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])

        def attempt(rng: random.Random) -> None:
            changed = json.dumps(junked(header, rng)).encode()
            path.write_bytes(len(changed).to_bytes(8, "little") + changed + raw[8 + length :])
            open_checkpoint(made)

        _, bad = tally(100, attempt)
        assert bad > 50

    def test_bytes(self, made):
        path = made / "model.safetensors"
        raw = path.read_bytes()

        def attempt(rng: random.Random) -> None:
            path.write_bytes(flipped(raw, rng))
            read_everything(made)

        good, bad = tally(40, attempt)
        assert good
        assert bad
