"""The Swift package's core, compiled and tested here: it needs a Swift compiler, but no Mac."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from fastvlm_convert.cli.main import main
from fastvlm_convert.pipeline import export
from tests.bundles import FP16, recipe
from tests.checkpoints import GOLDEN, LLAVA
from tests.commands import ROOT

PACKAGE = ROOT / "examples" / "ios"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("swift") is None, reason="swift, the compiler, is not installed"),
]


@pytest.mark.parametrize("mode", ["pad", "crop"])
def test_the_core_gives_what_the_bundle_gives(mode: str, tmp_path: Path) -> None:
    """Pixels, token ids, prompts and texts of the golden vectors, to the bit."""
    package, bundle = tmp_path / "package", tmp_path / "bundle"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns(".build"))
    settings = recipe(FP16, common={"image_mode": mode})
    export(GOLDEN / LLAVA / "checkpoint", bundle, recipe=settings, targets=["coreml"])
    constants = package / "Sources/FastVLMCore/BundleConstants.swift"
    constants.unlink(missing_ok=True)
    for command, file, more in (
        ("constants", constants, ["--language", "swift"]),
        ("vectors", tmp_path / "vectors.json", []),
    ):
        assert main(["bundle", command, str(bundle), "-o", str(file), *more]) == 0
    found = subprocess.run(
        ["swift", "test", "--package-path", package, "--filter", "FastVLMCoreTests"],
        env={
            **os.environ,
            "FASTVLM_BUNDLE": str(bundle),
            "FASTVLM_VECTORS": str(tmp_path / "vectors.json"),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "skipped" not in found.stdout + found.stderr
