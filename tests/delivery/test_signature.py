"""Signatures of the model-signing library, made and checked with keys of one's own."""

import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastvlm_convert.delivery.check import check_bundle
from fastvlm_convert.delivery.signature import sign_bundle
from fastvlm_convert.errors import OutputError, SignatureError
from fastvlm_convert.manifest import SIGNATURE_FILE
from tests.bundles import copy_bundle, edit_manifest

pytest.importorskip("model_signing", reason="needs the extra sign")
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

PEM, PLAIN = serialization.Encoding.PEM, serialization.NoEncryption()
PKCS8 = serialization.PrivateFormat.PKCS8
PUBLIC = serialization.PublicFormat.SubjectPublicKeyInfo


def write_keys(folder: Path, name: str, key, encryption=PLAIN) -> tuple[Path, Path]:
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(PEM, PKCS8, encryption))
    public.write_bytes(key.public_key().public_bytes(PEM, PUBLIC))
    return private, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return write_keys(tmp_path_factory.mktemp("keys"), "key", ec.generate_private_key(ec.SECP256R1()))


@pytest.fixture(scope="module")
def signed_once(fp32_bundle, tmp_path_factory, keys):
    bundle = copy_bundle(fp32_bundle, tmp_path_factory.mktemp("signed"))
    sign_bundle(bundle, keys[0])
    return bundle


@pytest.fixture
def signed(signed_once, tmp_path):
    return copy_bundle(signed_once, tmp_path)


def found(bundle: Path, public: Path) -> tuple[str, str | None]:
    check = next(c for c in check_bundle(bundle, public).checks if c.stage == "signature")
    return check.status, check.reason


def test_a_signature_holds_wherever_the_bundle_lies(signed, keys, tmp_path):
    assert found(signed, keys[1]) == ("passed", None)
    assert found(Path(shutil.move(signed, tmp_path / "renamed")), keys[1]) == ("passed", None)


def test_it_lies_outside_what_is_hashed(signed, keys):
    assert check_bundle(signed).status == "passed"
    (signed / "verification.json").write_text("{}")  # written after it was signed, and checked apart
    assert {c.stage: c.status for c in check_bundle(signed, keys[1]).checks}["verification"] == "failed"
    sign_bundle(signed, keys[0])  # an earlier one is replaced
    (signed / "verification.json").unlink()
    assert found(signed, keys[1]) == ("passed", None)


def test_the_librarys_own_command_checks_it(signed, keys):
    command = [sys.executable, "-m", "model_signing", "verify", "key", signed]
    options = ["--signature", signed / SIGNATURE_FILE, "--public_key", keys[1]]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (signed / "config.json").write_text("{}")
    assert subprocess.run([*command, *options], capture_output=True, check=False).returncode != 0


@pytest.mark.parametrize("curve", [ec.SECP384R1(), ec.SECP521R1()], ids=lambda c: c.name)
def test_other_curves(fp32_bundle, tmp_path, curve):
    bundle = copy_bundle(fp32_bundle, tmp_path)
    private, public = write_keys(tmp_path, "other", ec.generate_private_key(curve))
    sign_bundle(bundle, private)
    assert found(bundle, public) == ("passed", None)


def test_another_key_fails(signed, tmp_path):
    _, public = write_keys(tmp_path, "other", ec.generate_private_key(ec.SECP256R1()))
    status, reason = found(signed, public)
    assert (status, "does not match the provided public key" in reason) == ("failed", True)


def test_a_bundle_that_was_changed_with_its_manifest_fails(signed, keys):
    """Every hash is right, but it is not what was signed."""
    edit_manifest(signed, lambda m: m["contract"].update(eos_token_ids=[1]))
    status, reason = found(signed, keys[1])
    assert status == "failed"
    assert (
        "Hash mismatch for" in reason
    )  # the library's words escape quotes, or do not, as bytes happen to be
    assert "fastvlm_manifest.json" in reason


def test_a_damaged_bundle_is_not_compared(signed, keys):
    (signed / "config.json").write_text("{}")
    assert found(signed, keys[1])[0] == "not_run"


def edited(change):
    def edit(path: Path) -> None:
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))

    return edit


def payload(value: object):
    return edited(
        lambda s: s["dsseEnvelope"].update(payload=base64.b64encode(json.dumps(value).encode()).decode())
    )


DAMAGED = {
    "empty": lambda p: p.write_text(""),
    "cut": lambda p: p.write_text(p.read_text()[:-40]),
    "a list": lambda p: p.write_text("[]"),
    "nothing": lambda p: p.write_text("{}"),
    "no UTF-8": lambda p: p.write_bytes(b"\xff\xfe\xfd"),
    "large": lambda p: p.write_text(" " * (5 << 20)),
    "without a hint": edited(lambda s: s["verificationMaterial"].update(publicKey={"hint": ""})),
    "without signatures": edited(lambda s: s["dsseEnvelope"].update(signatures=[])),
    "another signature": edited(lambda s: s["dsseEnvelope"]["signatures"][0].update(sig="AAAA")),
    "another payload": payload({}),
    "a payload that is no object": payload([]),
    "a folder": lambda p: (p.unlink(), p.mkdir(), (p / "x").write_text("")),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_signature_fails(signed, keys, name, capsys):
    DAMAGED[name](signed / SIGNATURE_FILE)
    if name == "a folder":
        assert check_bundle(signed).status == "failed"
    elif name == "without a hint":  # which is allowed, and said on standard error by the library
        assert found(signed, keys[1])[0] == "passed"
    else:
        assert found(signed, keys[1])[0] == "failed"
    assert capsys.readouterr().out == ""


def test_a_bundle_without_one_is_an_error(fp32_bundle, keys):
    with pytest.raises(SignatureError, match="the bundle is not signed"):
        check_bundle(fp32_bundle, keys[1])


def test_keys_that_cannot_be_used(signed, tmp_path, keys):
    (tmp_path / "no.pem").write_text("no key")
    secret = serialization.BestAvailableEncryption(b"secret")
    locked, _ = write_keys(tmp_path, "locked", ec.generate_private_key(ec.SECP256R1()), secret)
    rsa_keys = write_keys(tmp_path, "rsa", rsa.generate_private_key(65537, 2048))
    odd_keys = write_keys(tmp_path, "odd", ec.generate_private_key(ec.SECP256K1()))
    for private in (tmp_path / "no.pem", locked, rsa_keys[0], odd_keys[0], keys[1]):
        with pytest.raises(SignatureError, match="no key that can be used here"):
            sign_bundle(signed, private)
    for public in (tmp_path / "no.pem", rsa_keys[1], odd_keys[1], keys[0]):
        with pytest.raises(SignatureError, match="no key that can be used here"):
            check_bundle(signed, public)
    with pytest.raises(SignatureError, match="there is no such key"):
        sign_bundle(signed, tmp_path / "nowhere")
    with pytest.raises(SignatureError, match="it is a folder"):
        check_bundle(signed, tmp_path)


def test_where_it_cannot_be_written_is_said(signed, keys):
    (signed / SIGNATURE_FILE).unlink()
    (signed / SIGNATURE_FILE).mkdir()
    with pytest.raises(OutputError, match="cannot sign"):
        sign_bundle(signed, keys[0])
