"""`bundle vectors` and `bundle constants`."""

import json

import pytest

from fastvlm_convert.bundle.constants.languages import LANGUAGES


def test_vectors_are_written_and_the_same_every_time(cli, fp16_bundle, tmp_path):
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    for file in files:
        result = cli("bundle", "vectors", fp16_bundle, "-o", file, "--json")
        assert result.code == 0, result.err
        assert result.document["command"] == "bundle vectors"
        assert result.document["output"] == str(file)
    assert files[0].read_bytes() == files[1].read_bytes()
    value = json.loads(files[0].read_text())
    assert {c["name"]: c["text"] for c in value["cases"]} == result.document["answers"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_constants_are_written(cli, fp16_bundle, tmp_path, language):
    file = tmp_path / "constants"
    result = cli("bundle", "constants", fp16_bundle, "--language", language, "-o", file, "--quiet")
    assert (result.code, result.out) == (0, f"{file}\n")
    assert "past_key_values.0.key" in file.read_text()


def test_a_file_is_replaced_only_when_asked_to(cli, fp16_bundle, tmp_path):
    file = tmp_path / "BundleConstants.kt"
    file.write_text("mine")
    arguments = ("bundle", "constants", fp16_bundle, "--language", "kotlin", "-o", file)
    result = cli(*arguments)
    assert result.code == 2
    assert "--overwrite" in result.err
    assert file.read_text() == "mine"
    assert cli(*arguments, "--overwrite").code == 0
    assert "object BundleConstants" in file.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--language", "kotlyn", "-o", "{tmp}/x"), "did you mean 'kotlin'?"),
        (("--language", "kotlin", "-o", "{bundle}/x.kt"), "holds the files that its manifest lists"),
        (("--language", "kotlin", "-o", "{tmp}/none/x.kt"), "there is no such folder"),
        (("--language", "kotlin", "-o", "{tmp}"), "the output is a folder"),
        (
            ("--language", "kotlin", "-o", "{tmp}/x", "--target", "coreml"),
            "the bundle has no target 'coreml'",
        ),
        (("-o", "{tmp}/x"), "Missing option '--language'"),
    ],
)
def test_what_cannot_be_written_is_an_error(cli, fp16_bundle, tmp_path, arguments, message):
    words = [a.format(tmp=tmp_path, bundle=fp16_bundle) for a in arguments]
    result = cli("bundle", "constants", fp16_bundle, *words)
    assert result.code == 2
    assert message in result.err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_bundle_is_an_error(cli, tmp_path):
    result = cli("bundle", "vectors", tmp_path, "-o", tmp_path / "x")
    assert result.code == 2
    assert "not a bundle" in result.err


def test_the_group_alone_shows_its_help(cli):
    result = cli("bundle")
    assert result.code == 2
    assert "vectors" in result.err


def test_a_misspelt_command_of_the_group(cli):
    result = cli("bundle", "vektors")
    assert result.code == 2
    assert "did you mean 'vectors'?" in result.err
