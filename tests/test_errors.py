import ast
import inspect
import math
import re
from pathlib import Path

import pytest

from fastvlm_convert import errors
from fastvlm_convert.errors import (
    MAX_MESSAGE,
    BundleError,
    ConversionError,
    OutputError,
    did_you_mean,
    error_class,
    shortened,
    shown,
)
from fastvlm_convert.mil.inputs import InputError

CLASSES = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, ConversionError) and kind is not ConversionError
]


def test_codes_are_frozen():
    """Programs branch on them: a new one is a decision, and none may change."""
    assert {kind.__name__: kind.code for kind in CLASSES} == {
        "BenchmarkError": "benchmark",
        "BundleError": "bundle",
        "MalformedManifestError": "bundle",
        "MemoryLimitError": "memory",
        "CheckpointError": "checkpoint",
        "ImageError": "image",
        "DatasetError": "dataset",
        "MissingDependencyError": "missing_dependency",
        "OutputError": "output",
        "PhonesError": "phones",
        "PromptError": "prompt",
        "RecipeError": "recipe",
        "SettingsError": "settings",
        "SignatureError": "signature",
        "TargetError": "target",
        "TokenizerError": "tokenizer",
        "UsageError": "usage",
        "WorkerError": "worker",
    }


def test_the_documentation_lists_them_all():
    text = (Path(__file__).parents[1] / "docs" / "command_line.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \|", text.partition("| code | what is wrong |")[2], re.MULTILINE)
    codes = {kind.code for kind in CLASSES} | {ConversionError.code, "interrupted", "internal"}
    assert len(listed) == len(set(listed))
    assert set(listed) == codes


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.code)
def test_another_process_reports_a_class_by_its_code(kind):
    assert issubclass(kind, error_class(kind.code))
    assert error_class(kind.code).code == kind.code


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


KINDS = {kind.__name__: kind for kind in [*CLASSES, ConversionError, InputError]}
RAISED = [
    (path, node)
    for path in sorted(Path(errors.__file__).parent.rglob("*.py"))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in KINDS
]


def test_every_refusal_has_a_next_step():
    """Its own, or that of its kind."""
    assert len(RAISED) > 300
    without = [
        f"{path.name}:{node.lineno}"
        for path, node in RAISED
        if KINDS[node.func.id].next_step is None and "hint" not in [k.arg for k in node.keywords]
    ]
    assert without == []


def test_a_hint_of_its_own_goes_before_that_of_its_kind():
    assert BundleError("odd").hint == "copy it again, or export it again"
    assert BundleError("odd", hint="do this").hint == "do this"
    assert BundleError("odd").given_hint is None
    assert OutputError("odd").hint is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        ([1, None, "a"], "[1, null, 'a']"),
        ({"a": False}, "{'a': false}"),
        (math.nan, "nan"),
        (10**40, "an integer of some 39 digits"),
        (-3, "-3"),
        ("\ud800", "'\\ud800'"),
    ],
)
def test_values_are_shown_in_the_words_of_json(value, text):
    assert shown(value) == text


LONG = ["x" * 10**6, ["y"] * 10**5, [[[["z" * 99] * 9] * 9] * 9], {"k" * 9999: 1}, 10**9999]


@pytest.mark.parametrize("number", range(len(LONG)))
def test_a_value_is_shown_in_few_characters(number):
    assert len(shown(LONG[number])) <= 100


def test_a_message_stays_short_whatever_a_file_holds():
    error = ConversionError(f"before {'x' * 10**6} after", where="p" * 10**6, hint="h" * 10**6)
    assert len(error.args[0]) == MAX_MESSAGE
    assert error.args[0].startswith("before x")
    assert error.args[0].endswith("x after")
    assert len(str(error)) < 1000
    assert len(error.hint) < 1000
    assert shortened("short") == "short"
