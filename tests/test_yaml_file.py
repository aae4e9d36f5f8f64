import time

import pytest
import yaml

from fastvlm_convert.recipe import shipped_recipes
from fastvlm_convert.yaml_file import parse_yaml

BAD = {
    "a key twice": ("a: 1\nb: 2\na: 3\n", "the key 'a' stands twice, line 3, column 1"),
    "a key twice inside": ("a: {b: 1, b: 2}", "the key 'b' stands twice"),
    "no integer": ("a: 0x_", "'0x_' is no integer, line 1, column 4"),
    "said to be an integer": ("a: !!int x", "'x' is no integer"),
    "said to be a number": ("a: !!float x", "'x' is no number"),
    "said to be true": ("a: !!bool perhaps", "'perhaps' is no truth value"),
    "said to be a mapping": ("a: !!map x", "'x' is no mapping"),
    "many digits": (f"a: {'1' * 5000}", "a number of 5000 digits"),
    "code": ("a: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
    "itself": ("a: &x [*x]", "recursive"),
    "merged with itself": ("a: &x {<<: *x}", "recursive"),
    "merged with a number": ("<<: 3", "<< merges mappings alone"),
    "a list as a key": ("? [1]\n: 2", "a key must be a single value"),
    "deep": ("[" * 5000, "it is nested too deeply"),
    "a zero": ("a: \0", "unacceptable character"),
    "a long one": (f"a: !!float {'x' * 9000}", "is no number"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(case):
    text, message = BAD[case]
    with pytest.raises(ValueError, match=message) as caught:
        parse_yaml(text)
    assert len(str(caught.value)) <= 300
    assert not isinstance(caught.value, UnicodeError)


def test_what_looks_like_a_date_is_text():
    assert parse_yaml("a: 2001-99-99\nb: 2001-01-01 10:00:00\n") == {
        "a": "2001-99-99",
        "b": "2001-01-01 10:00:00",
    }


def test_merge_keys_add_what_is_missing():
    assert parse_yaml("a: &a {x: 1, y: 1}\nb: {<<: *a, y: 2}\n")["b"] == {"x": 1, "y": 2}
    assert parse_yaml("- &a {x: 1}\n- &b {x: 2, y: 2}\n- {<<: [*a, *b]}\n")[2] == {"x": 1, "y": 2}


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_what_pyyaml_reads(name):
    text = shipped_recipes()[name].read_text()
    assert parse_yaml(text) == yaml.safe_load(text)


def test_merge_keys_do_not_multiply():
    """PyYAML would make 9 to the power of 12 pairs of this."""
    lines = ["a0: &a0 {" + ", ".join(f"k{i}: 1" for i in range(9)) + "}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 13)]
    start = time.perf_counter()
    assert len(parse_yaml("\n".join(lines))["a12"]) == 9
    assert time.perf_counter() - start < 5
