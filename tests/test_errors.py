import inspect
import re
from pathlib import Path

import pytest

from fastvlm_convert import errors
from fastvlm_convert.errors import ConversionError, did_you_mean, error_class

CLASSES = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, ConversionError) and kind is not ConversionError
]


def test_codes_are_frozen():
    """Programs branch on them: a new one is a decision, and none may change."""
    assert {kind.__name__: kind.code for kind in CLASSES} == {
        "BundleError": "bundle",
        "CheckpointError": "checkpoint",
        "ImageError": "image",
        "MissingDependencyError": "missing_dependency",
        "OutputError": "output",
        "PromptError": "prompt",
        "RecipeError": "recipe",
        "TargetError": "target",
        "TokenizerError": "tokenizer",
        "UsageError": "usage",
        "WorkerError": "worker",
    }


def test_the_documentation_lists_them_all():
    text = (Path(__file__).parents[1] / "docs" / "command_line.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    codes = {kind.code for kind in CLASSES} | {ConversionError.code, "interrupted", "internal"}
    assert len(listed) == len(set(listed))
    assert set(listed) == codes


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.code)
def test_another_process_reports_a_class_by_its_code(kind):
    assert error_class(kind.code) is kind


def test_a_code_of_no_class_is_still_an_error_for_the_user():
    assert error_class("of another version") is ConversionError


@pytest.mark.parametrize(
    ("word", "question"),
    [
        ("exprot", "did you mean 'export'? "),
        ("verity", "did you mean 'verify'? "),
        ("EXPORT", ""),
        ("tflite", ""),
        ("", ""),
    ],
)
def test_did_you_mean(word, question):
    assert did_you_mean(word, ["inspect", "export", "verify"]) == question
