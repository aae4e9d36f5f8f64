import json
import time

import pytest

from fastvlm_convert.json_file import parse_json, read_json_file

BAD = {
    "a key twice": ('{"a": {"b": 1, "b": 2}}', "the key 'b' stands twice in one object"),
    "a long key twice": (f'{{"{"k" * 9999}": 1, "{"k" * 9999}": 1}}', "k.*stands twice"),
    "many digits": ("9" * 5000, "it holds a number of 5000 digits"),
    "deep": ("[" * 100_000, "it is nested too deeply"),
    "cut off": ('{"a": [1', "delimiter"),
    "empty": ("", "Expecting value"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(case):
    text, message = BAD[case]
    with pytest.raises(ValueError, match=message) as caught:
        parse_json(text)
    assert len(str(caught.value)) < 200


def test_what_the_standard_library_reads():
    text = json.dumps({"a": [1, -2.5, None, True, "\ud800", {"a": 1}], "b": {"a": 10**300}})
    assert parse_json(text) == json.loads(text)


def test_a_byte_order_mark_is_no_fault(tmp_path):
    (tmp_path / "x.json").write_bytes('\ufeff{"a": "ü"}'.encode())
    assert read_json_file(tmp_path / "x.json") == {"a": "ü"}


def test_a_vocabulary_is_read_in_no_time():
    text = json.dumps({f"token{i}": i for i in range(150_000)})
    start = time.perf_counter()
    parse_json(text)
    assert time.perf_counter() - start < 5
