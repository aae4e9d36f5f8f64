"""`fastvlm-convert bundle ...`: exit codes, documents, and what people see."""

import json

import pytest

from tests.bundles import copy_bundle
from tests.cli.conftest import CHECKPOINT


@pytest.fixture
def bundle(fp32_bundle, tmp_path):
    return copy_bundle(fp32_bundle, tmp_path)


class TestGroup:
    def test_alone_it_shows_its_commands(self, cli):
        result = cli("bundle")
        assert (result.code, result.out) == (2, "")
        assert all(f"\n  {name} " in result.err for name in ("check", "diff", "pack", "unpack", "sign"))

    def test_a_misspelt_command_is_guessed(self, cli):
        result = cli("bundle", "chekc", "x", "--json")
        assert result.code == 2
        error = result.document["error"]
        assert error["message"] == "No such command 'chekc'"
        assert error["hint"].startswith("did you mean 'check'? commands: check, diff, ")

    def test_flags_go_after_the_command(self, cli, fp32_bundle):
        result = cli("bundle", "--quiet", "check", fp32_bundle)
        assert (result.code, result.err.splitlines()[-1]) == (2, "hint: --quiet goes after the command")


class TestCheck:
    def test_passed(self, cli, fp32_bundle):
        result = cli("bundle", "check", fp32_bundle)
        assert result.code == 0
        assert "sha256" in result.out
        assert result.out.splitlines()[-1].startswith("passed: ")
        assert "the bundle brings no license" in result.err

    def test_document(self, cli, fp32_bundle):
        document = cli("bundle", "check", fp32_bundle, "--json").document
        assert (document["command"], document["status"], document["problems"]) == (
            "bundle check",
            "passed",
            [],
        )
        assert [check["stage"] for check in document["checks"]] == ["manifest", "files", "contents"]
        assert document["bundle"] == str(fp32_bundle)

    def test_failed_is_exit_code_1(self, cli, bundle):
        (bundle / "config.json").write_text("{}")
        (bundle / "stray\x1b[31m").write_text("")
        result = cli("bundle", "check", bundle)
        assert result.code == 1
        assert "'config.json' has 2 bytes, the manifest says" in result.err
        assert "\x1b" not in result.err + result.out
        assert cli("bundle", "check", bundle, "-q").out.startswith("failed: ")
        document = cli("bundle", "check", bundle, "--json").document
        assert (document["status"], len(document["problems"])) == ("failed", 2)

    def test_what_cannot_be_checked_is_exit_code_2(self, cli, tmp_path):
        assert cli("bundle", "check", tmp_path / "nowhere").code == 2
        assert cli("bundle", "check", CHECKPOINT, "--json").document["error"]["code"] == "bundle"

    def test_a_signature_needs_a_key(self, cli, fp32_bundle, tmp_path):
        result = cli("bundle", "check", fp32_bundle, "--signature", "--json")
        assert (result.code, result.document["error"]["code"]) == (2, "usage")
        assert cli("bundle", "check", fp32_bundle, "--public-key", tmp_path / "key.pub").code == 2


class TestDiff:
    def test_for_people_and_programs(self, cli, fp32_bundle, fp16_bundle):
        result = cli("bundle", "diff", fp32_bundle, fp16_bundle)
        assert result.code == 0
        assert "only in A" in result.out
        assert "decoder: float32" in result.out
        assert "layers differ" in result.out
        assert result.err.count("not_run") == 2
        document = cli("bundle", "diff", fp32_bundle, fp16_bundle, "--json").document
        assert document["quality"]["a"]["status"] == "not_run"
        assert document["settings"]["recipe.name"] == {"a": "fp32", "b": "fp16"}
        assert document["layers"][0]["b"]["scheme"] == "float16"

    def test_no_bundle_is_exit_code_2(self, cli, fp32_bundle, tmp_path):
        assert cli("bundle", "diff", fp32_bundle, tmp_path).code == 2


class TestPack:
    def test_there_and_back(self, cli, fp32_bundle, tmp_path):
        result = cli("bundle", "pack", fp32_bundle, "--for", "zip", "-o", tmp_path / "b.zip", "-q")
        assert (result.code, result.out, result.err) == (0, f"{tmp_path / 'b.zip'}\n", "")
        result = cli("bundle", "unpack", tmp_path / "b.zip", "-o", tmp_path / "back", "--json")
        assert result.code == 0
        assert (result.document["command"], result.document["bundle"]) == (
            "bundle unpack",
            str(tmp_path / "back"),
        )
        assert cli("bundle", "check", tmp_path / "back").code == 0
        assert cli("bundle", "unpack", tmp_path / "b.zip", "-o", tmp_path / "back").code == 2
        assert cli("bundle", "unpack", tmp_path / "b.zip", "-o", tmp_path / "back", "--overwrite").code == 0

    def test_for_a_store(self, cli, fp32_bundle, tmp_path):
        result = cli("bundle", "pack", fp32_bundle, "--for", "play", "-o", tmp_path / "out", "--json")
        store = result.document["store"]
        assert (result.code, store["fits"], store["max_pack_bytes"]) == (0, True, 1_500_000_000)
        assert store["download_bytes"] == sum(pack["bytes"] for pack in store["packs"])
        result = cli("bundle", "pack", fp32_bundle, "--for", "play", "-o", tmp_path / "out", "--overwrite")
        assert "Play for On-device AI: fits" in result.out
        assert "build.gradle.kts says how it is included" in result.err

    def test_what_is_not_known_is_guessed(self, cli, fp32_bundle, tmp_path):
        result = cli("bundle", "pack", fp32_bundle, "--for", "plya", "-o", tmp_path / "out", "--json")
        assert result.code == 2
        assert result.document["error"]["hint"].startswith("did you mean 'play'?")

    def test_a_damaged_bundle_is_exit_code_2(self, cli, bundle, tmp_path):
        (bundle / "config.json").unlink()
        for destination in ("zip", "play"):
            result = cli("bundle", "pack", bundle, "--for", destination, "-o", tmp_path / "out")
            assert (result.code, (tmp_path / "out").exists()) == (2, False)
            assert "'config.json' is missing" in result.err


class TestSign:
    @pytest.fixture(autouse=True)
    def _library(self):
        pytest.importorskip("model_signing", reason="needs the extra sign")

    @pytest.fixture
    def keys(self, tmp_path):
        from cryptography.hazmat.primitives.asymmetric import ec

        from tests.delivery.test_signature import write_keys

        return write_keys(tmp_path, "key", ec.generate_private_key(ec.SECP256R1()))

    def test_signed_and_checked(self, cli, bundle, keys):
        result = cli("bundle", "sign", bundle, "--key", keys[0], "--json")
        assert (result.code, result.document["signature"]) == (0, str(bundle / "model.sig"))
        result = cli("bundle", "check", bundle, "--signature", "--public-key", keys[1], "--json")
        assert (result.code, result.document["checks"][-1]["stage"]) == (0, "signature")
        assert "it is signed" not in result.err

    def test_a_damaged_bundle_is_not_signed(self, cli, bundle, keys):
        (bundle / "config.json").write_text("{}")
        assert cli("bundle", "sign", bundle, "--key", keys[0]).code == 2
        assert not (bundle / "model.sig").exists()

    def test_an_unsigned_one_cannot_be_checked(self, cli, bundle, keys):
        result = cli("bundle", "check", bundle, "--signature", "--public-key", keys[1], "--json")
        assert (result.code, result.document["error"]["code"]) == (2, "signature")


def test_verify_records(cli, bundle, pictures):
    result = cli("verify", bundle, "--reference", CHECKPOINT, "--images", pictures, "--record", "--json")
    assert (result.code, result.document["recorded"]) == (0, str(bundle / "verification.json"))
    record = json.loads((bundle / "verification.json").read_text())
    assert record["checks"] == result.document["checks"]
    assert record["measurements"] == result.document["measurements"]
    assert (record["num_questions"], record["status"]) == (2, "passed")
    assert cli("bundle", "check", bundle, "--json").document["checks"][-1]["stage"] == "verification"
    found = cli("bundle", "diff", bundle, bundle, "--json").document["quality"]["a"]
    assert found["figures"]["onnx, onnxruntime: top1_agreement"] in (1.0, "equal")
    (bundle / "verification.json").unlink()
    cli("verify", bundle, "--reference", CHECKPOINT, "--images", pictures)
    assert not (bundle / "verification.json").exists()


def test_an_export_replaces_a_bundle_about_which_something_was_said(cli, bundle):
    for name in ("verification.json", "model.sig"):
        (bundle / name).write_text("{}")
    export = ("export", CHECKPOINT, "--target", "onnx", "--recipe", "fp32", "-o", bundle, "--overwrite")
    assert cli(*export, "-q").code == 0
    assert not {"verification.json", "model.sig"} & {path.name for path in bundle.iterdir()}
    (bundle / "mine.json").write_text("{}")
    assert cli(*export, "-q").code == 2


def test_plan_says_what_fits(cli):
    plan = ("plan", CHECKPOINT, "--recipe", "fp16", "--target", "onnx", "--target", "coreml")
    result = cli(*plan)
    assert "Play for On-device AI: fits (" in result.out
    assert "Apple-hosted Background Assets: fits (" in result.out
    document = cli(*plan, "--json").document
    assert [store["name"] for store in document["stores"]] == ["play", "background-assets"]
    onnx = sum(size for name, size in document["files"].items() if not name.startswith("coreml/"))
    assert document["stores"][0]["download_bytes"] == onnx
    assert [s["name"] for s in cli(*plan[:6], "--json").document["stores"]] == ["play"]
