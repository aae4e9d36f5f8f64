"""Packs in the layouts that the stores' tools read; docs/delivery.md cites where they are published."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fastvlm_convert.delivery import stores
from fastvlm_convert.delivery.pack import PACK_FILE, pack
from fastvlm_convert.errors import BundleError, OutputError
from fastvlm_convert.manifest import load_manifest
from fastvlm_convert.pipeline import export
from tests.bundles import copy_bundle, recipe
from tests.checkpoints import GOLDEN, LLAVA, tree_state

DIST = "{http://schemas.android.com/apk/distribution}"
ANDROID = "{http://schemas.android.com/apk/res/android}"


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A bundle for both kinds of phone."""
    output = tmp_path_factory.mktemp("both") / "bundle"
    export(GOLDEN / LLAVA / "checkpoint", output, recipe=recipe("fp16"), targets=["onnx", "coreml"])
    return output


def files_below(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def project(both, tmp_path_factory):
    """What an app's project gets."""
    output = tmp_path_factory.mktemp("play") / "project"
    pack(both, "play", output)
    return output


class TestPlay:
    def test_it_is_a_module_with_the_onnx_files_as_assets(self, project, both):
        manifest = load_manifest(both)
        expected = {name for name in manifest.files if not name.startswith("coreml/")}
        assets = "fastvlm_fp16/src/main/assets/fastvlm_fp16"
        assert files_below(project / assets) == {*expected, "fastvlm_manifest.json"}
        for name in expected:
            assert (project / assets / name).read_bytes() == (both / name).read_bytes()
        assert files_below(project) - {f"{assets}/{n}" for n in files_below(project / assets)} == {
            PACK_FILE, "fastvlm_fp16/build.gradle.kts", "fastvlm_fp16/manifest/AndroidManifest.xml",
        }  # fmt: skip

    def test_its_build_file_is_what_the_plugin_takes(self, project):
        script = (project / "fastvlm_fp16" / "build.gradle.kts").read_text()
        code = re.sub(r"\s+", " ", re.sub(r"//.*", "", script)).strip()
        assert code == (
            'plugins { id("com.android.ai-pack") } '
            'aiPack { packName.set("fastvlm_fp16") dynamicDelivery { deliveryType.set("on-demand") } }'
        )
        assert 'include(":fastvlm_fp16")' in script
        assert 'assetPacks += listOf(":fastvlm_fp16")' in script

    def test_its_manifest_keeps_bundletools_rules(self, project):
        """Of asset packs (`AndroidManifestValidator`), and `ai-pack` among its types of modules."""
        root = ElementTree.parse(project / "fastvlm_fp16" / "manifest" / "AndroidManifest.xml").getroot()
        assert (root.tag, root.get("split")) == ("manifest", "fastvlm_fp16")
        assert re.fullmatch(r"[a-zA-Z][a-zA-Z0-9_]*", root.get("split"))
        assert f"{ANDROID}versionCode" not in root.attrib
        (module,) = root
        assert (module.tag, module.get(f"{DIST}type")) == (f"{DIST}module", "ai-pack")
        assert [child.tag for child in module.find(f"{DIST}delivery")] == [f"{DIST}on-demand"]
        assert module.find(f"{DIST}fusing").get(f"{DIST}include") == "true"

    def test_only_the_two_folders_of_an_asset_pack_hold_files(self, project):
        """bundletool allows assets/ and manifest/ in such a module; the build file is Gradle's."""
        module = project / "fastvlm_fp16"
        assert {name.partition("/")[0] for name in files_below(module)} == {
            "src",
            "manifest",
            "build.gradle.kts",
        }
        assert {name.partition("/")[0] for name in files_below(module / "src" / "main")} == {"assets"}

    def test_a_large_bundle_becomes_several_modules(self, both, tmp_path, monkeypatch):
        small = stores.Store("play", "Play", 700_000, 4_000_000)
        monkeypatch.setitem(stores.STORES, "play", small)
        result = pack(both, "play", tmp_path / "project")
        modules = sorted(p.name for p in (tmp_path / "project").iterdir() if p.is_dir())
        assert modules == ["fastvlm_fp16", "fastvlm_fp16_2"]
        for module, part in zip(modules, result.fit.packs, strict=True):
            assets = tmp_path / "project" / module / "src" / "main" / "assets" / "fastvlm_fp16"
            assert files_below(assets) == set(part.files)
            assert f'packName.set("{module}")' in (assets.parents[3] / "build.gradle.kts").read_text()

    def test_what_does_not_fit_is_refused(self, both, tmp_path, monkeypatch):
        monkeypatch.setitem(stores.STORES, "play", stores.Store("play", "Play", 50_000, 4_000_000))
        with pytest.raises(BundleError, match="it does not fit Play: the pack with onnx/"):
            pack(both, "play", tmp_path / "project")
        assert list(tmp_path.iterdir()) == []


class TestBackgroundAssets:
    def test_the_manifest_selects_the_folder_with_the_core_ml_files(self, both, tmp_path):
        output = tmp_path / "assets"
        pack(both, "background-assets", output)
        assert json.loads((output / "Manifest.json").read_text()) == {
            "assetPackID": "fastvlm_fp16",
            "downloadPolicy": {"onDemand": {}},
            "fileSelectors": [{"directory": "fastvlm_fp16"}],
            "platforms": ["iOS", "macOS"],
        }
        expected = {name for name in load_manifest(both).files if not name.startswith("onnx/")}
        assert files_below(output / "fastvlm_fp16") == {*expected, "fastvlm_manifest.json"}
        assert files_below(output) - {f"fastvlm_fp16/{n}" for n in files_below(output / "fastvlm_fp16")} == {
            "Manifest.json", PACK_FILE,
        }  # fmt: skip

    def test_a_bundle_without_core_ml_is_refused(self, fp32_bundle, tmp_path):
        with pytest.raises(
            BundleError, match="no artifact that Apple-hosted Background Assets could deliver"
        ):
            pack(fp32_bundle, "background-assets", tmp_path / "assets")


@pytest.mark.parametrize("destination", ["play", "background-assets"])
class TestFolder:
    def test_it_is_the_same_every_time_and_leaves_the_bundle_alone(self, both, tmp_path, destination):
        before = tree_state(both)
        contents = []
        for name in ("one", "two"):
            result = pack(both, destination, tmp_path / name)
            assert set(result.files) == files_below(tmp_path / name)
            contents.append({n: (tmp_path / name / n).read_bytes() for n in sorted(result.files)})
            assert result.files == {n: len(content) for n, content in contents[-1].items()}
        assert contents[0] == contents[1]
        assert tree_state(both) == before

    def test_only_a_pack_is_replaced(self, both, tmp_path, destination):
        output = tmp_path / "out"
        pack(both, destination, output)
        with pytest.raises(OutputError, match="the output exists"):
            pack(both, destination, output)
        pack(both, destination, output, overwrite=True)
        (output / "mine.txt").write_text("mine")
        with pytest.raises(OutputError, match=r"not the pack's: mine\.txt"):
            pack(both, destination, output, overwrite=True)
        (output / PACK_FILE).unlink()
        with pytest.raises(OutputError, match="no pack of this tool"):
            pack(both, destination, output, overwrite=True)

    def test_it_is_not_written_into_the_bundle(self, both, destination):
        with pytest.raises(OutputError, match="holds an input or lies inside one"):
            pack(both, destination, both / "out")


class TestZipFile:
    def test_only_a_bundles_zip_is_replaced(self, fp32_bundle, tmp_path):
        output = tmp_path / "new" / "bundle.zip"
        pack(fp32_bundle, "zip", output)
        content = output.read_bytes()
        with pytest.raises(OutputError, match="the output exists"):
            pack(fp32_bundle, "zip", output)
        pack(fp32_bundle, "zip", output, overwrite=True)
        assert output.read_bytes() == content
        output.write_text("a letter")
        with pytest.raises(OutputError, match="no zip file of a bundle"):
            pack(fp32_bundle, "zip", output, overwrite=True)
        assert output.read_text() == "a letter"
        assert [p.name for p in output.parent.iterdir()] == ["bundle.zip"]

    def test_a_folder_or_a_link_is_none(self, fp32_bundle, tmp_path):
        (tmp_path / "link").symlink_to(tmp_path / "bundle.zip")
        for name, what in ((".", "a folder"), ("link", "a link")):
            with pytest.raises(OutputError, match=f"the output is {what}"):
                pack(fp32_bundle, "zip", tmp_path / name, overwrite=True)

    def test_it_is_not_written_into_the_bundle(self, fp32_bundle, tmp_path):
        bundle = copy_bundle(fp32_bundle, tmp_path)
        with pytest.raises(OutputError, match="holds an input or lies inside one"):
            pack(bundle, "zip", bundle / "bundle.zip")
