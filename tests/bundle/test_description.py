"""What describes a bundle: a model card, a bill of materials, and the list of layers."""

import ast
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from fastvlm_convert.bundle.layers_file import LAYERS_FILE, layers_json, read_layers
from fastvlm_convert.bundle.mlbom import MLBOM_FILE
from fastvlm_convert.bundle.model_card import CARD_FILE, base_model
from fastvlm_convert.checkpoint.checkpoint import content_hash, open_checkpoint
from fastvlm_convert.errors import BundleError
from fastvlm_convert.manifest import load_manifest
from fastvlm_convert.pipeline import export, plan
from fastvlm_convert.quantized.layer_report import scheme_text
from fastvlm_convert.weights.published import DECODERS, published_config
from tests.bundles import mixed_recipe
from tests.checkpoints import GOLDEN, LLAVA, edit_json

CHECKPOINT = GOLDEN / LLAVA / "checkpoint"
NODE_MODULES = Path(__file__).parents[1] / "clients" / "node_modules"
APPLE = "Apple Machine Learning Research Model License Agreement\n"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """Integers and floats, for both targets, with a license."""
    folder = tmp_path_factory.mktemp("described")
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    for path in CHECKPOINT.iterdir():
        (checkpoint / path.name).write_bytes(path.read_bytes())
    (checkpoint / "LICENSE").write_text(APPLE)
    export(checkpoint, folder / "bundle", recipe=mixed_recipe(), targets=["onnx", "coreml"])
    return folder / "bundle"


@pytest.fixture(scope="module")
def card(bundle):
    return (bundle / CARD_FILE).read_text()


def front_matter(card: str) -> dict:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


class TestCard:
    def test_hugging_face_reads_its_front_matter(self, card, bundle):
        assert front_matter(card) == {
            "license": "apple-amlr",
            "license_link": "LICENSE",
            "library_name": "transformers.js",
            "pipeline_tag": "image-text-to-text",
            "tags": ["fastvlm", "onnx", "coreml"],
        }
        from huggingface_hub import ModelCard  # the very parser

        assert ModelCard.load(bundle / CARD_FILE).data.pipeline_tag == "image-text-to-text"

    def test_another_license_is_named_as_such_and_none_as_unknown(self, llava, tmp_path, fp32_bundle):
        (llava / "LICENSE.txt").write_text("MIT License\n")
        export(llava, tmp_path / "bundle", recipe="fp32", targets="onnx")
        matter = front_matter((tmp_path / "bundle" / CARD_FILE).read_text())
        assert (matter["license"], matter["license_link"]) == ("other", "LICENSE.txt")
        assert matter["license_name"]
        assert front_matter((fp32_bundle / CARD_FILE).read_text())["license"] == "unknown"
        assert "The checkpoint brought no license" in (fp32_bundle / CARD_FILE).read_text()

    @pytest.mark.parametrize("size", DECODERS)
    def test_the_published_models_are_recognized_by_their_dimensions(self, size):
        assert base_model(published_config(size)) == f"apple/FastVLM-{size.upper()}"
        assert base_model(published_config(size, num_layers=3)) is None

    def test_it_has_code_for_every_platform_with_the_names_of_this_bundle(self, card, bundle):
        manifest = load_manifest(bundle)
        languages = re.findall(r"^```(\w+)$", card, re.MULTILINE)
        assert {"sh", "python", "js", "kotlin", "swift"} <= set(languages)
        for component in ("vision", "embed", "decoder"):
            assert f'open("{manifest.artifact("onnx", component).files[0]}")' in card
        for name in ("decode", "prefill", "embed"):
            assert f'let {name} = try model("decoder", function: "{name}")' in card
        assert "setOf(431L, 429L)" in card
        assert "eosTokenIds: Set<Int> = [431, 429]" in card
        for code in re.findall(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL):
            ast.parse(code)

    def test_its_python_runs(self, card, bundle, tmp_path, monkeypatch, capsys):
        code = re.search(r"^```python\n(import fastvlm_convert.*?)^```$", card, re.MULTILINE | re.DOTALL)[1]
        monkeypatch.chdir(tmp_path)
        (tmp_path / "BUNDLE").symlink_to(bundle)
        (tmp_path / "photo.jpg").write_bytes((GOLDEN / LLAVA / "image0.png").read_bytes())
        exec(compile(code, "README.md", "exec"), {})
        assert capsys.readouterr().out

    @pytest.mark.slow
    def test_its_javascript_runs(self, card, bundle, tmp_path):
        if not (NODE_MODULES / "@huggingface" / "transformers").is_dir() or shutil.which("node") is None:
            pytest.skip("needs node and @huggingface/transformers in tests/clients/node_modules")
        code = re.search(r"^```js\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)[1]
        (tmp_path / "snippet.mjs").write_text(code)
        (tmp_path / "node_modules").symlink_to(NODE_MODULES)
        shutil.copytree(bundle, tmp_path / "BUNDLE")
        (tmp_path / "photo.jpg").write_bytes((GOLDEN / LLAVA / "image0.png").read_bytes())
        done = subprocess.run(
            ["node", "snippet.mjs"], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert (done.returncode, bool(done.stdout)) == (0, True), done.stderr

    def test_a_bundle_of_one_target_shows_nothing_of_the_other(self, fp32_bundle):
        card = (fp32_bundle / CARD_FILE).read_text()
        assert "kotlin" in card
        assert "swift" not in card

    def test_sizes_are_those_of_the_files(self, card, bundle):
        rows = dict(re.findall(r"^\| `([^`]+)` \| +([\d.]+) \|$", card, re.MULTILINE))
        listed = {file for a in load_manifest(bundle).artifacts for file in a.files}
        assert set(rows) == listed
        for name, size in rows.items():
            assert float(size) == round((bundle / name).stat().st_size / 1e6, 2)

    def test_it_says_how_it_was_made(self, card, bundle):
        manifest = load_manifest(bundle)
        assert f"checkpoint: SHA-256 `{manifest.source.sha256}`" in card
        assert "calibration data: none" in card
        assert "recipe `mixed`" in card
        assert "`decoder.*`: int4" in card
        for link in re.findall(r"\]\(([\w.]+)\)", card):
            assert (bundle / link).is_file() or link == "verification.json"

    def test_calibration_is_told(self, llava, tmp_path):
        from fastvlm_convert.recipe import load_recipe

        settings = load_recipe("int4")
        if plan(llava, recipe=settings, targets="onnx").plan.is_calibrated:
            predicted = plan(llava, recipe=settings, targets="onnx").files[CARD_FILE]
            made = export(llava, tmp_path / "bundle", recipe=settings, targets="onnx")
            text = (made.bundle / CARD_FILE).read_text()
            assert f"calibration data: SHA-256 `{made.manifest.source.calibration}`" in text
            assert len(text.encode()) == predicted


class TestBillOfMaterials:
    def test_it_follows_the_published_schema(self, bundle):
        validation = pytest.importorskip("cyclonedx.validation.json", reason="needs cyclonedx-python-lib")
        from cyclonedx.schema import SchemaVersion

        text = (bundle / MLBOM_FILE).read_text()
        assert validation.JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
        broken = text.replace('"machine-learning-model"', '"machine"')
        assert validation.JsonStrictValidator(SchemaVersion.V1_6).validate_str(broken) is not None

    def test_it_names_the_ancestor_and_every_file_with_its_hash(self, bundle):
        bom, manifest = json.loads((bundle / MLBOM_FILE).read_text()), load_manifest(bundle)
        model = bom["metadata"]["component"]
        assert model["type"] == "machine-learning-model"
        (ancestor,) = model["pedigree"]["ancestors"]
        assert ancestor["type"] == "machine-learning-model"
        assert ancestor["hashes"] == [{"alg": "SHA-256", "content": manifest.source.sha256}]
        files = {c["name"]: c["hashes"][0]["content"] for c in bom["components"]}
        expected = {name: entry.sha256 for name, entry in manifest.files.items() if name != MLBOM_FILE}
        assert files == expected

    def test_it_has_neither_time_nor_serial_number(self, bundle):
        text = (bundle / MLBOM_FILE).read_text()
        assert "timestamp" not in text
        assert "serialNumber" not in text

    def test_it_is_hashed_like_everything_else(self, bundle):
        assert {MLBOM_FILE, CARD_FILE, LAYERS_FILE} <= set(load_manifest(bundle).files)


class TestLayers:
    def test_they_are_the_planned_ones(self, bundle):
        planned = plan(CHECKPOINT, recipe=mixed_recipe(), targets="onnx").plan.layers
        layers = read_layers(bundle)
        assert [layer.layer for layer in layers] == [p.layer for p in planned]
        for layer, p in zip(layers, planned, strict=True):
            assert (layer.shape, layer.stored_bits, layer.reason) == (p.shape, p.stored_bits, p.reason)
            assert layer.scheme == ("float16" if p.scheme is None else scheme_text(p.scheme))
            assert (layer.solver is None) == (p.scheme is None)
        assert layers_json(planned) == (bundle / LAYERS_FILE).read_bytes()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda v: v.update(schema="x"), "no list of layers"),
            (lambda v: v.update(schema_version=9), "version 9; this tool reads 1"),
            (lambda v: v["layers"][0].pop("shape"), "missing setting"),
            (lambda v: v["layers"][0].update(layer="elsewhere"), "belongs to no part of the model"),
        ],
    )
    def test_a_damaged_list_is_said(self, bundle, tmp_path, change, message):
        (tmp_path / LAYERS_FILE).write_bytes((bundle / LAYERS_FILE).read_bytes())
        edit_json(tmp_path / LAYERS_FILE, {})
        value = json.loads((tmp_path / LAYERS_FILE).read_text())
        change(value)
        (tmp_path / LAYERS_FILE).write_text(json.dumps(value))
        with pytest.raises(BundleError, match=message):
            read_layers(tmp_path)

    def test_a_bundle_of_an_earlier_version_has_none(self, tmp_path):
        assert read_layers(tmp_path) is None


def test_a_bundle_of_the_same_checkpoint_elsewhere_is_the_same(bundle, tmp_path):
    checkpoint = tmp_path / "another" / "place"
    checkpoint.mkdir(parents=True)
    for path in CHECKPOINT.iterdir():
        (checkpoint / path.name).write_bytes(path.read_bytes())
    (checkpoint / "LICENSE").write_text(APPLE)
    export(checkpoint, tmp_path / "bundle", recipe=mixed_recipe(), targets=["onnx", "coreml"])
    assert content_hash(open_checkpoint(checkpoint).files) == load_manifest(bundle).source.sha256
    for name in (CARD_FILE, MLBOM_FILE, LAYERS_FILE, "fastvlm_manifest.json"):
        assert (tmp_path / "bundle" / name).read_bytes() == (bundle / name).read_bytes()
