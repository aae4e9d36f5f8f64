"""API keys: known ones pass, on every path but those that are named."""

import os

import pytest

from fastvlm_convert.errors import ConversionError
from fastvlm_convert.serve.errors import UnauthorizedError
from fastvlm_convert.serve.keys import ApiKeys, check_exposure, is_loopback

KEY, OTHER = "sk-0123456789abcdef", "sk-fedcba9876543210"


def key_file(folder, text, mode=0o600):
    path = folder / "keys"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_keys_of_a_file_are_known(tmp_path):
    keys = ApiKeys.read(key_file(tmp_path, f"# clients\n\n qa:{KEY} \r\n{OTHER}\n"))
    assert keys.check(f"Bearer {KEY}") == "key:qa"
    assert keys.check(f"bearer  {KEY} ") == "key:qa"
    unnamed = keys.check(f"Bearer {OTHER}")
    assert unnamed.startswith("key:")
    assert OTHER not in unnamed
    assert unnamed == keys.check(f"Bearer {OTHER}")


@pytest.mark.parametrize(
    "header",
    [
        None, "", KEY, "Bearer", "Bearer ", f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}",
        f"Bearer {KEY} {OTHER}", f"Bearer {KEY.upper()}", "Bearer qa", f"Bearer qa:{KEY}", "Bearer \ud800",
        "Bearer \xe9", f"Bearer\t{KEY}",
    ],
)  # fmt: skip
def test_other_keys_are_refused(header, tmp_path):
    keys = ApiKeys.read(key_file(tmp_path, f"qa:{KEY}\n{OTHER}\n"))
    with pytest.raises(UnauthorizedError) as caught:
        keys.check(header)
    assert caught.value.status == 401
    assert KEY not in str(caught.value)


def test_every_key_is_compared(monkeypatch):
    """So that the time of an answer does not tell which key is close."""
    import hmac

    compared = []
    original = hmac.compare_digest

    def counting(a, b):
        compared.append(len(a))
        return original(a, b)

    monkeypatch.setattr(hmac, "compare_digest", counting)
    keys = ApiKeys({f"c{n}": f"key-number-{n:08d}" for n in range(20)})
    assert keys.check("Bearer key-number-00000003") == "key:c3"
    assert compared == [32] * 20


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no API key"),
        ("# only a comment\n", "no API key"),
        ("short\n", "line 1 .* fewer than 16"),
        (f"{KEY}\n{KEY}\n", "line 2 stands twice"),
        (f"a:{KEY}\na:{OTHER}\n", "line 2 stands twice"),
        (f"a:{KEY}\nb:{KEY}\n", "line 2 stands twice"),
        (f"a b:{KEY}\n", "line 1 is no key"),
        (f":{KEY}\n", "line 1 is no key"),
        (f"a:b:{KEY}\n", "line 1 is no key"),
        (f"{KEY} x\n", "line 1 is no key"),
        (f"{KEY}\u00e9\n", "line 1 is no key"),
        ("name:\n", "line 1 is no key"),
    ],
)
def test_files_that_are_refused(text, message, tmp_path):
    with pytest.raises(ConversionError, match=message) as caught:
        ApiKeys.read(key_file(tmp_path, text))
    assert "openssl rand" in caught.value.hint
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("mode", [0o602, 0o666])
def test_a_file_that_others_write_is_refused(mode, tmp_path):
    path = key_file(tmp_path, KEY, mode)
    with pytest.raises(ConversionError, match=f"can write the API keys .mode {mode:o}") as caught:
        ApiKeys.read(path)
    assert "chmod 600" in caught.value.hint


def test_a_file_that_others_read_is_warned_of(tmp_path, caplog):
    ApiKeys.read(key_file(tmp_path, KEY, 0o440))
    assert caplog.text == ""
    assert ApiKeys.read(key_file(tmp_path, f"a:{KEY}", 0o444)).check(f"Bearer {KEY}") == "key:a"
    assert "can read the API keys (mode 444)" in caplog.text
    assert KEY not in caplog.text


def test_a_file_that_is_not_there(tmp_path):
    for path in (tmp_path / "gone", tmp_path):
        with pytest.raises(ConversionError, match="the API keys cannot be read"):
            ApiKeys.read(path)
    if os.path.exists("/dev/zero"):  # noqa: PTH110
        with pytest.raises(ConversionError, match="a device"):
            ApiKeys.read(tmp_path.__class__("/dev/zero"))


# Where the server listens


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_loopback_needs_no_key(host):
    assert is_loopback(host)
    check_exposure(host, "development", has_keys=False)
    with pytest.raises(ConversionError, match="env production"):
        check_exposure(host, "production", has_keys=False)
    check_exposure(host, "production", has_keys=True)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "192.168.1.2", "example.com", "", "localhost.example.com", "2130706433"]
)
def test_other_addresses_need_a_key(host):
    with pytest.raises(ConversionError, match="needs API keys") as caught:
        check_exposure(host, "development", has_keys=False)
    assert "FAST_VLM_API_KEY_FILE" in caught.value.hint
    check_exposure(host, "development", has_keys=True)
