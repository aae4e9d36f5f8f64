import io
import json
import os
import subprocess
import sys

import pytest

from fastvlm_convert import __version__
from fastvlm_convert.amounts import size_text
from fastvlm_convert.cli import inspect
from fastvlm_convert.errors import CheckpointError
from tests.cli.conftest import CHECKPOINT, IMAGE
from tests.cli.test_flags import FLAGS, TOP

HEAVY = ("torch", "onnx", "onnxruntime", "coremltools", "transformers", "safetensors")


def test_help_lists_every_command(cli):
    result = cli("--help")
    assert result.code == 0
    assert all(f"\n  {name} " in result.out for name in TOP)
    assert result.err == ""


@pytest.mark.parametrize("name", FLAGS)
def test_help_of_a_command_lists_its_flags(cli, name):
    result = cli(*name.split(), "-h")
    assert (result.code, result.err) == (0, "")
    assert all(flag in result.out for flag in FLAGS[name])


def test_no_arguments_show_the_help(cli):
    result = cli()
    assert result.code == 2
    assert "Commands:" in result.out + result.err


def test_version(cli):
    assert cli("--version").out == f"fastvlm-convert {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("convert",), "No such command 'convert'"),
        (("inspect",), "Missing argument 'CHECKPOINT'"),
        (("inspect", CHECKPOINT, "--fast"), "No such option: --fast"),
        (("run", CHECKPOINT), "missing argument 'QUESTION'"),
        (("run", CHECKPOINT, "Hi", "--max-new-tokens", "0"), "Invalid value for '--max-new-tokens'"),
        (("run", CHECKPOINT, "Hi", "--max-new-tokens", "many"), "Invalid value for '--max-new-tokens'"),
        (("run", CHECKPOINT, "Hi", "--temperature", "-1"), "Invalid value for '--temperature'"),
        (("run", CHECKPOINT, "Hi", "--top-p", "1.5"), "Invalid value for '--top-p'"),
        (("export", CHECKPOINT, "--recipe", "fp32", "-o", "x"), "Missing option '--target'"),
        (("export", CHECKPOINT, "--target", "onnx", "-o", "x"), "a float checkpoint needs a recipe"),
        (("quantize", CHECKPOINT, "-o", "x"), "Missing option '--recipe'"),
        (("quantize", CHECKPOINT, "--recipe", "int4"), "Missing option '--output'"),
        (("export", CHECKPOINT, "--target", "onnx", "--recipe", "fp32"), "Missing option '--output'"),
        (("verify", "bundle"), "Missing option '--reference'"),
        (("bench",), "Missing argument 'BUNDLE...'"),
        (("bench", "bundle", "--new-tokens", "1"), "Invalid value for '--new-tokens'"),
        (("bench", "bundle", "--trials", "0"), "Invalid value for '--trials'"),
    ],
)
def test_usage_errors(cli, argv, message):
    result = cli(*argv)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert "Traceback" not in result.err


class TestErrors:
    @pytest.fixture
    def raising(self, monkeypatch):
        def set_up(error: BaseException) -> None:
            def fail(*_: object, **__: object) -> None:
                raise error

            monkeypatch.setattr(inspect, "open_checkpoint", fail)

        return set_up

    def test_an_error_for_the_user_is_two_lines(self, cli, raising):
        raising(CheckpointError("it is [bold]odd[/]", where="a/:x:/b [c]", hint="use [another]"))
        result = cli("inspect", "x")
        assert (result.code, result.out) == (2, "")
        assert result.err == "error: it is [bold]odd[/] (a/:x:/b [c])\nhint: use [another]\n"

    def test_a_long_one_is_not_wrapped(self, cli, raising):
        raising(CheckpointError("word " * 100, where="p" * 300))
        assert cli("inspect", "x").err.count("\n") == 2  # the error and its hint

    def test_verbose_adds_the_traceback(self, cli, raising):
        raising(CheckpointError("odd"))
        result = cli("inspect", "x", "-v")
        assert result.err.startswith("Traceback")
        assert "\nerror: odd\nhint: " in result.err

    def test_json_gets_one_document(self, cli, raising):
        raising(CheckpointError("odd", where="here", hint="do"))
        result = cli("inspect", "x", "--json")
        assert result.code == 2
        assert result.document == {
            "schema": "fastvlm-convert/error",
            "schema_version": 1,
            "command": "inspect",
            "status": "error",
            "error": {"code": "checkpoint", "message": "odd (here)", "where": "here", "hint": "do"},
        }

    def test_a_bug_is_exit_code_2_and_shows_where(self, cli, raising):
        raising(RuntimeError("oops"))
        result = cli("inspect", "x")
        assert (result.code, result.out) == (2, "")
        assert result.err.startswith("Traceback")
        assert "RuntimeError: oops" in result.err
        assert "this is a bug in fastvlm-convert" in result.err

    def test_a_bug_with_json(self, cli, raising):
        raising(RuntimeError("oops"))
        document = cli("inspect", "x", "--json").document
        assert document["status"] == "error"
        assert document["error"]["code"] == "internal"
        assert document["error"]["message"] == "internal error: RuntimeError('oops')"

    def test_an_interruption_is_130(self, cli, raising):
        raising(KeyboardInterrupt())
        result = cli("inspect", "x")
        assert (result.code, result.out) == (130, "")
        assert "Traceback" not in result.err

    @pytest.mark.parametrize("json_flag", [[], ["--json"]])
    def test_a_full_disk_behind_standard_output_is_no_failed_gate(self, cli, json_flag, monkeypatch):
        class Full(io.StringIO):
            def write(self, text: str) -> int:
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(sys, "stdout", Full())
        assert cli("inspect", CHECKPOINT, *json_flag).code == 2

    @pytest.mark.parametrize("json_flag", [[], ["--json"]])
    def test_a_closed_pipe_is_no_failed_gate(self, json_flag):
        command = [sys.executable, "-m", "fastvlm_convert", "inspect", CHECKPOINT, *json_flag]
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
        os.close(writer)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr


def imported(*argv: object) -> list[str]:
    """Heavy packages that a command imports."""
    code = (
        "import json, sys; from fastvlm_convert.cli.main import main; code = main(sys.argv[1:]);"
        f"print('\\n' + json.dumps([m for m in {HEAVY} if m in sys.modules])); raise SystemExit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, argv)], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("argv", [("--help",), *((*name.split(), "--help") for name in FLAGS)], ids=" ".join)
def test_help_loads_nothing_heavy(argv):
    assert imported(*argv) == []


@pytest.mark.parametrize("argv", [(), ("--json",)])
def test_inspect_loads_nothing_heavy(argv):
    assert imported("inspect", CHECKPOINT, *argv) == []


def test_the_same_test_sees_what_run_imports():
    assert "torch" in imported("run", CHECKPOINT, "Hi", "--max-new-tokens", 1)


def test_export_imports_no_torch(tmp_path):
    arguments = ("--target", "onnx", "--recipe", "fp32", "-o", tmp_path / "b")
    assert imported("export", CHECKPOINT, *arguments) == ["onnx"]


def test_running_a_bundle_imports_no_torch(fp32_bundle):
    assert imported("run", fp32_bundle, IMAGE, "Hi", "--max-new-tokens", 1) == ["onnxruntime"]


def test_json_is_valid_where_the_terminal_knows_ascii_only(tmp_path):
    """A path of characters that standard output cannot show."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    folder = tmp_path / "café 图 \U0001f600"
    (folder / "x").mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, "-m", "fastvlm_convert", "inspect", folder / "x", "--json"],
        capture_output=True,
        env=environment,
    )
    assert done.returncode == 2
    assert str(folder) in json.loads(done.stdout.decode("ascii"))["error"]["message"]
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (123_456, "123 kB"), (5_500_000, "5.5 MB"),
        (2_000_000_000, "2.0 GB"),
    ],
)  # fmt: skip
def test_sizes_for_people(count, text):
    assert size_text(count) == text
