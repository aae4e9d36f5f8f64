"""The wheel works outside the checkout: recipes inside, console script there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastvlm_convert.recipe import shipped_recipes

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_wheel_runs_outside_the_checkout(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", tmp_path / "dist", ROOT], check=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "-q", "--no-deps", "--target", site, wheel], check=True)
    code = (
        "import fastvlm_convert, sys; from fastvlm_convert.recipe import load_recipe, shipped_recipes;"
        "print(fastvlm_convert.__file__);"
        "print(len([load_recipe(name) for name in shipped_recipes()]));"
        "print(fastvlm_convert.load_recipe('fp16').name);"
        "from fastvlm_convert.estimate.phones import shipped_phones; shipped_phones();"
        "from fastvlm_convert.mix import mixed_samples; mixed_samples(3)"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    location, count, name = done.stdout.split()
    assert name == "fp16"
    assert (Path(location).parent / "py.typed").is_file()
    page = Path("serve", "page")
    shipped = {file.name for file in (Path(location).parent / page).iterdir()}
    assert shipped >= {file.name for file in (ROOT / "fastvlm_convert" / page).glob("*.*")}
    photos = Path("mix", "photos")
    packed = list((Path(location).parent / photos).iterdir())
    assert {file.name for file in packed} == {f.name for f in (ROOT / "fastvlm_convert" / photos).iterdir()}
    assert "PROVENANCE.md" in {file.name for file in packed}
    assert sum(file.stat().st_size for file in packed) <= 3_000_000
    assert Path(location).is_relative_to(site)
    assert int(count) == len(shipped_recipes())
    packed = sorted(path.name for path in (Path(location).parent / "configs").iterdir())
    assert packed == sorted(path.name for path in (ROOT / "configs").iterdir())
    help_text = subprocess.run(
        [sys.executable, "-m", "fastvlm_convert", "--help"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "export" in help_text
