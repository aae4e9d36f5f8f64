"""docs/estimate.md is true where it can be checked."""

import re

import pytest

from benchmarks.estimate_accuracy import tables
from fastvlm_convert.estimate.phones import load_phones, shipped_phones
from tests.commands import ROOT

PAGE = (ROOT / "docs" / "estimate.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_it_shows_what_the_script_prints():
    assert tables() in PAGE


def test_it_lists_our_phones():
    def cell(fact):
        return "unknown" if fact == "unknown" else f"{fact.value:g} {fact.basis}"

    for phone in shipped_phones():
        peaks = [f"{peak.unit} {peak.tera_operations_per_s:g} {peak.basis}" for peak in phone.peaks]
        cells = (phone.name, phone.chip, cell(phone.ram_gb), cell(phone.bandwidth_gb_per_s))
        assert f"| {' | '.join(cells)} | {', '.join(peaks) or 'unknown'} |" in PAGE


def test_its_example_of_a_table_is_one(tmp_path):
    (example,) = blocks("yaml")
    path = tmp_path / "mine.yaml"
    path.write_text(example)
    (phone,) = load_phones(path)
    assert phone.peaks[0].arithmetic == "float16"


def test_its_python_runs(tmp_path, monkeypatch, capsys):
    (code,) = blocks("python")
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/estimate.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("an estimate, not a measurement")
    assert re.fullmatch(r"\d+ iPhone .+", lines[1])


@pytest.mark.parametrize("word", ["heat", "kernels", "scheduling"])
def test_it_says_what_is_left_out(word):
    assert f"- **{word}**" in PAGE
