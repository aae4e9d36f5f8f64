"""`serve --show-settings`: values and where they are from; what is wrong ends the command."""

import pytest

from fastvlm_convert.serve.settings import Settings
from tests.cli.conftest import Cli


def test_every_setting_has_its_value_and_origin(cli: Cli, tmp_path, monkeypatch):
    file = tmp_path / "mine.yaml"
    file.write_text("slots: 3\nmax_queue: 1\n")
    monkeypatch.setenv("FAST_VLM_MAX_QUEUE", "2")
    monkeypatch.setenv("COLUMNS", "200")
    result = cli("serve", "--show-settings", "--settings", file, "--port", 9)
    assert result.code == 0
    head, *lines = [line.rstrip().split(maxsplit=2) for line in result.out.splitlines()]
    rows = {name: (value, origin) for name, value, origin in lines}
    assert head == ["setting", "value", "from"]
    assert list(rows) == list(Settings.model_fields)
    assert rows["port"] == ("9", "command line, --port")
    assert rows["max_queue"] == ("2", "environment FAST_VLM_MAX_QUEUE")
    assert rows["slots"] == ("3", f"{file}:1")
    assert rows["threads"] == ("null", "default")
    assert rows["cache_enabled"] == ("true", "default")


def test_as_json(cli: Cli, tmp_path, monkeypatch):
    keys = tmp_path / "keys"
    keys.write_text("sk-secret\n")
    monkeypatch.setenv("FAST_VLM_API_KEY_FILE", str(keys))
    result = cli("serve", "--show-settings", "--json")
    settings = {setting["name"]: setting for setting in result.document["settings"]}
    assert settings["api_key_file"]["value"] == str(keys)
    assert settings["api_key_file"]["origin"] == "environment FAST_VLM_API_KEY_FILE"
    assert settings["port"]["allowed"] == "an integer from 0 to 65535"
    assert "sk-secret" not in result.out


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("FAST_VLM_MAX_QEUE", "1", "there is no setting 'max_qeue' (environment FAST_VLM_MAX_QEUE)"),
        ("FAST_VLM_BITS", "4", "the bundle decides it (environment FAST_VLM_BITS)"),
        (
            "FAST_VLM_PORT",
            "x",
            "port is 'x', expected an integer from 0 to 65535 (environment FAST_VLM_PORT)",
        ),
    ],
)
def test_what_is_wrong_is_an_error(cli: Cli, monkeypatch, name, value, expected):
    monkeypatch.setenv(name, value)
    for arguments in (["--show-settings"], []):
        result = cli("serve", *arguments)
        assert (result.code, result.out) == (2, "")
        assert expected in result.err
    document = cli("serve", "--show-settings", "--json").document
    assert (document["status"], document["error"]["code"]) == ("error", "settings")
