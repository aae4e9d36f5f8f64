"""With `--json` every failure is one document; without it, one line says what and one says what next."""

import pytest

from fastvlm_convert.cli import inspect
from fastvlm_convert.errors import (
    BundleError,
    CheckpointError,
    ConversionError,
    ImageError,
    MissingDependencyError,
    OutputError,
    PromptError,
    RecipeError,
    SignatureError,
    TargetError,
    TokenizerError,
    UsageError,
)
from tests.bundles import recipe, write_recipe
from tests.cli.conftest import CHECKPOINT

CODES = {
    "bundle", "checkpoint", "image", "missing_dependency", "output", "prompt", "recipe", "signature",
    "target", "tokenizer", "usage", "worker",
}  # fmt: skip

EXPORT = ("export", CHECKPOINT, "--target", "onnx", "--recipe", "fp32")
USAGE = {
    "unknown_option": ("inspect", CHECKPOINT, "--fast"),
    "unknown_option_before_the_flag": ("inspect", "--fast", CHECKPOINT),
    "unknown_short_option": ("inspect", CHECKPOINT, "-x"),
    "missing_argument": ("inspect",),
    "missing_option": ("export", CHECKPOINT, "--recipe", "fp32", "-o", "x"),
    "missing_value": ("inspect", CHECKPOINT, "--adapter"),
    "value_of_a_flag": ("export", CHECKPOINT, "--overwrite=yes"),
    "bad_number": ("run", CHECKPOINT, "Hi", "--max-new-tokens", "many"),
    "number_out_of_range": ("run", CHECKPOINT, "Hi", "--top-p", "1.5"),
    "too_many_arguments": ("inspect", CHECKPOINT, "b"),
    "contradicting_options": ("recipes", "fp16", "--schema"),
    "target_of_a_checkpoint": ("run", CHECKPOINT, "Hi", "--target", "onnx"),
}
UNREADABLE = {"missing_value"}  # a flag behind it is the value


@pytest.mark.parametrize("name", USAGE)
@pytest.mark.parametrize("place", ["last", "behind_the_command"])
def test_every_usage_error_is_one_document(cli, name, place):
    command, *rest = USAGE[name]
    flag_last = place == "last" and name not in UNREADABLE
    result = cli(command, *rest, "--json") if flag_last else cli(command, "--json", *rest)
    document = result.document
    assert result.code == 2
    assert set(document) == {"schema", "schema_version", "command", "status", "error"}
    assert (document["schema_version"], document["command"], document["status"]) == (1, command, "error")
    assert document["error"]["code"] == "usage"
    assert set(document["error"]) == {"code", "message", "where", "hint"}
    assert document["error"]["message"]
    assert document["error"]["hint"]


@pytest.mark.parametrize(
    ("argv", "message", "hint"),
    [
        (("convert", "--json"), "No such command 'convert'", "commands: inspect, "),
        (("exprot", CHECKPOINT, "--json"), "No such command 'exprot'", "did you mean 'export'? "),
        (("--json", "inspect", CHECKPOINT), "No such option: --json", "--json goes after the command"),
        (("--fast", "inspect", "--json"), "No such option: --fast", "usage: fastvlm-convert "),
    ],
)
def test_where_no_command_is_recognized_the_document_names_none(cli, argv, message, hint):
    result = cli(*argv)
    assert result.code == 2
    assert result.document["command"] is None
    assert result.document["error"]["code"] == "usage"
    assert result.document["error"]["message"] == message
    assert result.document["error"]["hint"].startswith(hint)


@pytest.mark.parametrize("argv", [("inspect", "--", "--json"), ("inspect", "no/such", "--", "--json")])
def test_what_is_behind_two_dashes_is_no_flag(cli, argv):
    result = cli(*argv)
    assert (result.code, result.out) == (2, "")


def test_a_value_that_looks_like_a_flag_is_none(cli, tmp_path, monkeypatch):
    """`--json` is the bundle's name here, and nothing asks for JSON."""
    monkeypatch.chdir(tmp_path)
    result = cli(*EXPORT, "-o", "--json")
    assert result.code == 0
    assert result.out.startswith("file ")
    assert (tmp_path / "--json" / "fastvlm_manifest.json").is_file()


def raise_instead(monkeypatch, error):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(inspect, "open_checkpoint", fail)


@pytest.mark.parametrize(
    "kind",
    [
        BundleError, CheckpointError, ImageError, MissingDependencyError, OutputError, PromptError,
        RecipeError, SignatureError, TargetError, TokenizerError, UsageError,
    ],
)  # fmt: skip
def test_the_code_is_the_class(cli, monkeypatch, kind: type[ConversionError]):
    raise_instead(monkeypatch, kind("odd"))
    document = cli("inspect", "x", "--json").document
    hint = kind.next_step  # what to do about any error of the kind
    assert document["error"] == {"code": kind.code, "message": "odd", "where": None, "hint": hint}
    assert kind.code in CODES


def test_real_failures_have_their_codes(cli, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no picture")
    palette = write_recipe(recipe(onnx={"shared_table": False}), tmp_path / "odd.yaml")
    palette.write_text(palette.read_text().replace("shared_table", "sharedtable"))
    found = {
        "checkpoint": cli("inspect", tmp_path / "empty", "--json"),
        "bundle": cli("verify", tmp_path / "empty", "--reference", CHECKPOINT, "--json"),
        "recipe": cli("plan", CHECKPOINT, "--target", "onnx", "--recipe", palette, "--json"),
        "target": cli("plan", CHECKPOINT, "--target", "tflite", "--recipe", "fp32", "--json"),
        "image": cli("run", CHECKPOINT, tmp_path / "notes.txt", "Hi", "--json"),
        "output": cli(*EXPORT, "-o", tmp_path / "empty", "--json"),
    }
    assert {name: result.document["error"]["code"] for name, result in found.items()} == {
        name: name for name in found
    }


def test_an_interruption_is_a_document_too(cli, monkeypatch):
    raise_instead(monkeypatch, KeyboardInterrupt())
    result = cli("inspect", "x", "--json")
    assert result.code == 130
    assert result.document["error"]["code"] == "interrupted"


class TestForPeople:
    def test_two_lines(self, cli):
        result = cli("export", CHECKPOINT, "--target", "onnx")
        assert (result.code, result.out) == (2, "")
        assert result.err == (
            "error: Missing option '--output' / '-o'\n"
            "hint: usage: fastvlm-convert export CHECKPOINT --target onnx|coreml|mlx --output BUNDLE "
            "[OPTIONS]; fastvlm-convert export -h explains it\n"
        )

    @pytest.mark.parametrize(
        ("argv", "question"),
        [
            (("exprot",), "did you mean 'export'?"),
            (("inpsect", CHECKPOINT), "did you mean 'inspect'?"),
            (("plan", CHECKPOINT, "--recipie", "int4"), "did you mean '--recipe'?"),
            (("plan", CHECKPOINT, "--recipe=int4", "--tagret=onnx"), "did you mean '--target'?"),
            (("plan", CHECKPOINT, "--target", "onx", "--recipe", "int4"), "did you mean 'onnx'?"),
            (("plan", CHECKPOINT, "--target", "onnx", "--recipe", "ios-int"), "did you mean 'ios-int4'?"),
            (("recipes", "androidint4"), "did you mean 'android-int4'?"),
        ],
    )
    def test_a_misspelt_word_is_guessed(self, cli, argv, question):
        result = cli(*argv)
        assert (result.code, result.out) == (2, "")
        assert f"hint: {question} " in result.err

    @pytest.mark.parametrize("argv", [("tflite",), ("plan", CHECKPOINT, "--zzz")])
    def test_what_resembles_nothing_is_not(self, cli, argv):
        assert "did you mean" not in cli(*argv).err

    @pytest.mark.parametrize("argv", [("inspect", "-v"), ("inspect", "--verbose", "--fast")])
    def test_verbose_shows_the_traceback_of_a_usage_error(self, cli, argv):
        assert cli(*argv).err.startswith("Traceback")
