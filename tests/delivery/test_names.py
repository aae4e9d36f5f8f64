import pytest

from fastvlm_convert.delivery.names import clashes, name_problem


@pytest.mark.parametrize(
    "name", ["a", "a.b", "onnx/vision_encoder.onnx", "ä/ö", "a b", "..a", ".hidden", "a/..b"]
)
def test_plain_names_are_fine(name):
    assert name_problem(name) is None


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/a",
        "a/",
        "a//b",
        ".",
        "..",
        "a/..",
        "a/./b",
        "a\\b",
        "c:a",
        "a\0",
        "a\x1b[0m",
        "a\ud800",
        "é" * 200,
    ],
)
def test_others_are_not(name):
    assert name_problem(name)


@pytest.mark.parametrize(
    ("names", "count"),
    [
        (["a", "b/a", "b/c"], 0),
        (["a", "a"], 1),
        (["a", "A"], 1),
        (["stra\u00dfe", "STRASSE"], 1),
        (["\u00e9", "e\u0301"], 1),
        (["a", "a/b"], 1),
        (["A/b", "a"], 1),
        (["a/b", "A/c"], 0),
    ],
)
def test_what_cannot_stand_side_by_side(names, count):
    assert len(list(clashes(names))) == count
    assert len(list(clashes(reversed(names)))) == count
