"""MLX runs what mlx-vlm loads; skipped where it is not installed."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.errors import BundleError
from fastvlm_convert.generate import generate
from fastvlm_convert.metrics import sqnr_db
from fastvlm_convert.pictures import load_image
from fastvlm_convert.pipeline import export
from fastvlm_convert.recipe import load_recipe
from fastvlm_convert.recipe_settings import QuantizeRule
from fastvlm_convert.runtime.loaded import load_bundle, load_engine
from fastvlm_convert.verification.bundle import verify
from tests.bundles import FP16, FP32, copy_bundle, edit_manifest, recipe
from tests.checkpoints import GOLDEN, golden_cases

pytest.importorskip("mlx.core", reason="MLX is not installed: pip install '.[mlx]'")

CHECKPOINT = GOLDEN / "tiny-llava" / "checkpoint"
SCHEMES = {
    "int8-b32": (QuantizeRule(("decoder.*", "projector.*"), "int8", 32), QuantizeRule(("*",), "int8")),
    "int4-b64-asym": (
        QuantizeRule(("decoder.*", "projector.*"), "int4", 64, symmetric=False),
        QuantizeRule(("*",), "int8"),
    ),
    "mixed": (
        QuantizeRule(("decoder.embed_tokens",), "int8", 32),
        QuantizeRule(("*.down_proj",), "int4", 16),
        QuantizeRule(("decoder.*",), "int4", 64),
        QuantizeRule(("*",), "int8"),
    ),
}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """The three golden checkpoints, exported once."""
    made: dict[tuple[str, str], Path] = {}

    def bundle(golden: str, name: str) -> Path:
        if (golden, name) not in made:
            output = tmp_path_factory.mktemp("mlx") / "bundle"
            export(GOLDEN / golden / "checkpoint", output, recipe=name, targets="mlx")
            made[golden, name] = output
        return made[golden, name]

    return bundle


@pytest.mark.parametrize("name", [FP32, FP16])
@pytest.mark.parametrize("case", golden_cases(), ids=str)
def test_it_says_what_the_original_code_says(bundles, case, name):
    model = load_bundle(bundles(case.name, name))
    prompt = model.prompt(case.question, [load_image(case.image)])
    assert list(generate(model.session, prompt, (), 24).token_ids) == case.greedy_token_ids


@pytest.mark.parametrize("name", SCHEMES)
def test_integers_are_computed_with_exactly(name, tmp_path):
    chosen = replace(recipe(FP32), name=name, quantize=SCHEMES[name])
    export(CHECKPOINT, tmp_path / "bundle", recipe=chosen, targets="mlx")
    reference = load_engine(open_checkpoint(CHECKPOINT), chosen, 2048).session
    session = load_bundle(tmp_path / "bundle").session
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (1, 3, 256, 256)).astype(np.float32) / np.float32(255)
    ids = rng.integers(0, 430, 24)
    assert np.array_equal(reference.embed(ids), session.embed(ids))
    assert sqnr_db(reference.encode_image(pixels), session.encode_image(pixels)) >= 100
    embeds = reference.embed(ids)
    assert sqnr_db(reference.prefill(embeds), session.prefill(embeds)) >= 100
    assert sqnr_db(reference.decode(embeds[:1]), session.decode(embeds[:1])) >= 100
    for one in (reference, session):
        one.prefill(embeds[:5])
    assert sqnr_db(reference.extend(embeds[5:8], 64), session.extend(embeds[5:8], 64)) >= 100


def test_it_is_verified(bundles, tmp_path):
    """As shipped, where float16 may round, and in float32, where it must not matter."""
    result = verify(bundles("tiny-llava", FP16), CHECKPOINT, questions=_questions(tmp_path))
    checks = [check for check in result.checks if check.target == "mlx"]
    assert {check.status for check in checks} == {"passed"}
    executed = {check.executed_by for check in checks} - {None}
    assert len(executed) == 2
    assert all(by.startswith("mlx ") for by in executed)


def _questions(folder: Path) -> Path:
    pictures = folder / "pictures"
    pictures.mkdir()
    (pictures / "a.png").write_bytes((GOLDEN / "tiny-llava" / "image1.png").read_bytes())
    return pictures


def test_a_changed_scale_is_found(bundles, tmp_path):
    chosen = replace(load_recipe(FP16), quantize=SCHEMES["int8-b32"])
    export(CHECKPOINT, tmp_path / "made", recipe=chosen, targets="mlx")
    weights = tmp_path / "made" / "mlx" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    begin = 8 + length + header["language_model.model.layers.0.mlp.gate_proj.scales"]["data_offsets"][0]
    content[begin : begin + 2] = np.float16(1).tobytes()
    weights.write_bytes(content)
    result = verify(tmp_path / "made", CHECKPOINT, questions=_questions(tmp_path))
    failed = {(check.target, check.stage) for check in result.checks if check.status == "failed"}
    assert {("bundle", "files"), ("mlx", "prefill_logits")} <= failed


def answer(bundle: Path) -> None:
    session = load_bundle(bundle).session
    session.prefill(session.embed(np.arange(4)))


def other_config(**changes):
    def change(folder: Path) -> None:
        config = folder / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))

    return change


def break_header(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:8] + bytes(100) + content[108:])


DAMAGED = {
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
    "no object": (lambda folder: (folder / "config.json").write_text("[]"), "not a config.json"),
    "sizes": (other_config(num_attention_heads=0), "impossible"),
    "a missing size": (other_config(hidden_size=None), "hidden_size"),
    "groups": (
        other_config(quantization={"group_size": 7, "bits": 4}),
        "expected a group_size of 32, 64 or 128",
    ),
    "layers": (other_config(num_hidden_layers=3), "the MLX weights lack 'language_model.model.layers.2"),
    "heads": (other_config(num_attention_heads=2), "MLX refuses the weights"),
    "weights": (break_header, "MLX refuses the weights"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_folders_are_refused(bundles, tmp_path, kind):
    bundle = copy_bundle(bundles("tiny-llava", FP16), tmp_path)
    damage, message = DAMAGED[kind]
    damage(bundle / "mlx")
    for entry in ("config.json", "model.safetensors"):  # so that the sizes are not what is refused
        size = (bundle / "mlx" / entry).stat().st_size
        edit_manifest(bundle, lambda m, e=entry, s=size: m["files"][f"mlx/{e}"].update(size=s))
    with pytest.raises(BundleError) as caught:
        answer(bundle)
    assert message in str(caught.value)
    assert caught.value.hint
