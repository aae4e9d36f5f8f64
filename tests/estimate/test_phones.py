"""Tables of phones: ours, those of users, and what is wrong with them."""

from pathlib import Path

import pytest
import yaml

from fastvlm_convert.errors import PhonesError
from fastvlm_convert.estimate.phones import Fact, load_phones, shipped_phones, with_own

FACT = {
    "value": 8,
    "basis": "measured",
    "source": "by me, with os_proc_available_memory",
    "date": "2026-11-28",
}
PEAK = {
    "unit": "gpu", "arithmetic": "float16", "tera_operations_per_s": 2.5, "basis": "published",
    "source": "https://example.com", "date": "2026-11",
}  # fmt: skip
ROW = {
    "name": "Mine",
    "chip": "A chip",
    "os": "android",
    "ram_gb": FACT,
    "app_limit_gb": "unknown",
    "bandwidth_gb_per_s": {**FACT, "value": 77.5},
    "peaks": [PEAK],
}


def written(folder: Path, content: object) -> Path:
    path = folder / "mine.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def changed(**values: object) -> dict[str, object]:
    return {"phones": [{**ROW, **values}]}


class TestOurs:
    def test_every_fact_has_an_address_or_says_what_it_is_derived_from(self):
        facts = [
            fact
            for phone in shipped_phones()
            for fact in (phone.ram_gb, phone.app_limit_gb, phone.bandwidth_gb_per_s, *phone.peaks)
            if fact != "unknown"
        ]
        assert len(facts) > 15
        assert all("https://" in fact.source for fact in facts)

    def test_the_phones_that_figures_are_published_for_are_there(self):
        chips = {phone.chip for phone in shipped_phones()}
        assert {"Apple A17 Pro", "Snapdragon 8 Elite Gen 5"} <= chips

    def test_nothing_is_said_that_nobody_publishes(self):
        assert {phone.app_limit_gb for phone in shipped_phones()} == {"unknown"}


class TestOnesOwn:
    def test_a_row(self, tmp_path):
        (phone,) = load_phones(written(tmp_path, {"phones": [ROW]}))
        assert phone.name == "Mine"
        assert phone.ram_gb == Fact(8.0, "measured", FACT["source"], "2026-11-28")
        assert phone.app_limit_gb == "unknown"
        assert phone.peaks[0].tera_operations_per_s == 2.5

    def test_a_row_of_the_same_name_replaces_ours_in_its_place(self, tmp_path):
        ours = shipped_phones()
        rows = [{**ROW, "name": ours[1].name}, ROW]
        table = with_own(ours, load_phones(written(tmp_path, {"phones": rows})))
        assert [phone.name for phone in table] == [*(phone.name for phone in ours), "Mine"]
        assert table[1].chip == "A chip"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "expected one key, phones"),
        ("phones: []", "0 rows, expected 1 to 1000"),
        ("phones: {}", "expected one key, phones"),
        ("- 1", "expected one key, phones"),
        ("phones: [1]", r"phones\[0\] is 1, expected settings"),
        ("phones: [{]", "not valid YAML: .*line 1"),
        ("\x00", "not valid YAML"),
        ({"phones": [ROW, ROW]}, r"phones\[1\].name: 'Mine' stands twice"),
        (changed(os="windows"), r"phones\[0\].os is 'windows', expected 'ios' or 'android'"),
        (changed(name=" "), r"phones\[0\].name is ' ', expected a text"),
        (changed(speed=3), r"unknown setting phones\[0\].speed"),
        (changed(ram_gb=8), r"phones\[0\].ram_gb is 8, expected 'unknown' or settings"),
        (changed(ram_gb={**FACT, "value": 0}), r"phones\[0\].ram_gb.value is 0.0, expected a number above 0"),
        (changed(ram_gb={**FACT, "value": -4}), "value is -4.0"),
        (changed(ram_gb={**FACT, "value": float("nan")}), "value is nan"),
        (changed(ram_gb={**FACT, "value": float("inf")}), "value is inf"),
        (changed(ram_gb={**FACT, "value": 8e9}), "value is 8000000000.0, expected .* at most 256"),
        (changed(ram_gb={**FACT, "value": 10**350}), "ram_gb.value is an integer of some 348 digits"),
        (changed(ram_gb={**FACT, "value": "8 GB"}), r"ram_gb.value is '8 GB', expected a number"),
        (changed(ram_gb={**FACT, "value": True}), "ram_gb.value is true, expected a number"),
        (changed(ram_gb={**FACT, "source": ""}), "source is '', expected where"),
        (
            changed(ram_gb={**FACT, "date": "yesterday"}),
            "date is 'yesterday', expected one such as 2026-11-28",
        ),
        (changed(ram_gb={**FACT, "date": "2026-13"}), "date is '2026-13'"),
        (changed(ram_gb={"value": 8}), "missing setting .*ram_gb.basis"),
        (
            changed(app_limit_gb={**FACT, "value": 12}),
            "app_limit_gb is 12, more than the phone's ram_gb of 8",
        ),
        (
            changed(peaks=[{**PEAK, "unit": "dsp"}]),
            r"peaks\[0\].unit is 'dsp', expected 'cpu' or 'gpu' or 'npu'",
        ),
        (changed(peaks=[{**PEAK, "tera_operations_per_s": 0}]), "tera_operations_per_s is 0.0"),
        (changed(peaks=[{**PEAK, "tera_operations_per_s": 1e30}]), "at most 100000"),
        (changed(peaks="unknown"), "peaks is 'unknown', expected a list"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, content, expected):
    path = written(tmp_path, content)
    with pytest.raises(PhonesError, match=expected) as caught:
        load_phones(path)
    assert caught.value.where == str(path)
    assert caught.value.hint


def test_files_that_are_none(tmp_path):
    with pytest.raises(PhonesError, match="there is no such file"):
        load_phones(tmp_path / "none.yaml")
    with pytest.raises(PhonesError, match="it is a folder"):
        load_phones(tmp_path)
    big = tmp_path / "big.yaml"
    big.write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(PhonesError, match="at most 1048576 make sense"):
        load_phones(big)
