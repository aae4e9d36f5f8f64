"""What fits a store, and how a bundle is divided: from sizes and artifacts alone."""

from typing import ClassVar

import pytest

from fastvlm_convert.delivery.stores import STORES, files_for, store_fit
from fastvlm_convert.errors import BundleError
from fastvlm_convert.manifest import Artifact

PLAY, APPLE = STORES["play"], STORES["background-assets"]
GB = 1_000_000_000


def artifact(component: str, *files: str, target: str = "onnx") -> Artifact:
    return Artifact(target, component, "float16", "float16", "fp16", files, (), ())


def onnx(component: str) -> Artifact:
    return artifact(component, f"onnx/{component}.onnx", f"onnx/{component}.onnx_data")


SEPARATE = [onnx("vision"), onnx("embed"), onnx("decoder")]


def sizes(vision: int, embed: int, decoder: int) -> dict[str, int]:
    data = {"vision": vision, "embed": embed, "decoder": decoder}
    graphs = {f"onnx/{name}.onnx": 1000 for name in data}
    return {"config.json": 500, **graphs, **{f"onnx/{name}.onnx_data": size for name, size in data.items()}}


def test_a_small_bundle_is_one_pack():
    files = sizes(GB // 4, GB // 4, GB // 4)
    fit = store_fit(PLAY, files, SEPARATE)
    assert (fit.fits, fit.reason, len(fit.packs)) == (True, None, 1)
    assert fit.packs[0].files == tuple(sorted(files))
    assert fit.download_bytes == fit.packs[0].num_bytes == sum(files.values())


def test_a_larger_one_is_divided_without_parting_a_graph_from_its_data():
    files = sizes(GB // 4, GB, GB)
    fit = store_fit(PLAY, files, SEPARATE)
    assert (fit.fits, len(fit.packs)) == (True, 2)
    assert sorted(name for pack in fit.packs for name in pack.files) == sorted(files)
    for pack in fit.packs:
        assert pack.num_bytes <= 1.5 * GB
        for name in pack.files:
            assert f"{name}_data" not in files or f"{name}_data" in pack.files
    assert "config.json" in fit.packs[0].files


def test_graphs_that_share_data_stay_together():
    shared = [onnx("vision"), artifact("embed", "onnx/embed.onnx", "onnx/decoder.onnx_data"), onnx("decoder")]
    fit = store_fit(PLAY, sizes(GB, 1, GB), shared)
    pack = next(p for p in fit.packs if "onnx/embed.onnx" in p.files)
    assert {"onnx/decoder.onnx", "onnx/decoder.onnx_data"} <= set(pack.files)
    assert "onnx/vision.onnx" not in pack.files


@pytest.mark.parametrize("limit", [0, 1])
def test_the_limit_itself_fits(limit):
    files = sizes(0, 0, 0)
    files["onnx/decoder.onnx_data"] = 1_500_000_000 - sum(files[n] for n in ("onnx/decoder.onnx",)) + limit
    assert store_fit(PLAY, files, SEPARATE).fits == (None if limit else True)


class TestTooLarge:
    FILES: ClassVar = sizes(GB // 4, GB // 4, 2 * GB)

    def test_a_plan_says_what_it_cannot_know(self):
        fit = store_fit(PLAY, self.FILES, SEPARATE)
        assert fit.fits is None
        assert fit.reason == (
            "the pack with onnx/decoder.onnx_data has 2,000,001,000 bytes, 1,500,000,000 are allowed before "
            "compression, which `bundle pack` measures"
        )

    def test_where_it_can_be_compressed_it_is_measured(self):
        fit = store_fit(PLAY, self.FILES, SEPARATE, lambda names: GB)
        assert (fit.fits, [pack.download_bytes for pack in fit.packs]) == (True, [500_002_500, GB])

    def test_what_stays_too_large_does_not_fit(self):
        fit = store_fit(PLAY, self.FILES, SEPARATE, lambda names: sum(self.FILES[n] for n in names))
        assert fit.fits is False
        assert "onnx/decoder.onnx_data has 2,000,001,000 bytes" in fit.reason

    def test_so_does_what_an_app_may_not_have_in_total(self):
        parts = [onnx(f"decoder{n}") for n in range(3)]  # each fits, all together do not
        files = {file: 1_400_000_000 if "data" in file else 1 for a in parts for file in a.files}
        fit = store_fit(PLAY, files, parts, lambda names: sum(files[n] for n in names))
        assert (fit.fits, len(fit.packs)) == (False, 3)
        assert fit.reason == "the packs have 4,200,000,003 bytes together, 4,000,000,000 are allowed"
        assert store_fit(PLAY, files, parts, lambda names: GB).fits is True


class TestFiles:
    FILES: ClassVar = {
        "README.md": 1, "onnx/vision.onnx": 2, "onnx/vision.onnx_data": 3, "coreml/v.mlpackage/m": 4,
        "apple-app/fastvithd.mlpackage/m": 5, "apple-app/config.json": 6,
    }  # fmt: skip
    BOTH: ClassVar = [
        onnx("vision"),
        artifact("vision", "coreml/v.mlpackage/m", target="coreml"),
        artifact("vision", "apple-app/fastvithd.mlpackage/m", target="coreml"),
    ]

    def test_those_of_other_formats_stay_behind(self):
        assert set(files_for(PLAY, self.FILES, self.BOTH)) == {
            "README.md", "onnx/vision.onnx", "onnx/vision.onnx_data",
        }  # fmt: skip
        assert set(files_for(APPLE, self.FILES, self.BOTH)) == {
            "README.md", "coreml/v.mlpackage/m", "apple-app/fastvithd.mlpackage/m", "apple-app/config.json",
        }  # fmt: skip

    def test_a_bundle_that_its_devices_cannot_run_is_refused(self):
        with pytest.raises(
            BundleError, match="no artifact that Play for On-device AI could deliver"
        ) as caught:
            files_for(PLAY, self.FILES, self.BOTH[1:])
        assert caught.value.hint == "export one with --target onnx"


def test_apple_publishes_no_limit_of_one_pack():
    files = {"coreml/d/w": 50 * GB}
    fit = store_fit(APPLE, files, [artifact("decoder", "coreml/d/w", target="coreml")])
    assert (fit.fits, len(fit.packs)) == (True, 1)
    assert store_fit(APPLE, {"coreml/d/w": 201 * GB}, []).fits is None
