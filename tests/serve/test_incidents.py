"""The incident log: private, rotated, free of what clients sent, and never in the way."""

import json
import logging
import os
import stat
import sys

import pytest

from fastvlm_convert.errors import ConversionError
from fastvlm_convert.serve.errors import RequestError
from fastvlm_convert.serve.incidents import IncidentLog
from fastvlm_convert.serve.threats import finding_of
from fastvlm_convert.serve.validate import check_text, open_picture, sha256_of
from tests.serve.pictures import SETTINGS, TYPES, data_url, png


def hashed(client):
    return sha256_of("salt" + client)[:16]


def opened(path, **options):
    return IncidentLog(path, hashed, lambda: 1_700_000_000.25, **options)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_incident_is_a_line(tmp_path):
    log = opened(tmp_path / "incidents.jsonl")
    log.record("sql_injection", "record", client="192.0.2.1", request_id="r1", evidence=[sha256_of("text")])
    log.record("picture_size", "reject", client="192.0.2.1", request_id="r2")
    log.close()
    first, second = lines(tmp_path / "incidents.jsonl")
    assert first == {
        "time": "2023-11-14T22:13:20.250+00:00",
        "rule": "sql_injection",
        "action": "record",
        "request_id": "r1",
        "client": hashed("192.0.2.1"),
        "sha256": [sha256_of("text")],
    }
    assert second["client"] == first["client"]
    assert (log.total, log.lost) == (2, 0)


def test_without_a_file_incidents_are_counted():
    log = opened(None)
    log.record("sql_injection", "record", client="c", request_id="r")
    log.close()
    assert (log.total, log.lost) == (1, 0)


@pytest.mark.skipif(os.name != "posix", reason="permissions of files")
def test_only_its_owner_reads_it(tmp_path):
    path = tmp_path / "incidents.jsonl"
    path.write_text("")
    path.chmod(0o644)
    old = os.umask(0)
    try:
        log = opened(path, max_bytes=400)
        for number in range(20):
            log.record("sql_injection", "record", client="c", request_id=str(number))
        log.close()
    finally:
        os.umask(old)
    files = list(tmp_path.iterdir())
    assert len(files) > 1
    for file in files:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_it_is_rotated(tmp_path):
    path = tmp_path / "incidents.jsonl"
    log = opened(path, max_bytes=1000, backups=2)
    for number in range(100):
        log.record("sql_injection", "record", client="c", request_id=str(number))
    log.close()
    assert sorted(file.name for file in tmp_path.iterdir()) == [path.name, f"{path.name}.1", f"{path.name}.2"]
    assert all(file.stat().st_size <= 1000 for file in tmp_path.iterdir())
    assert lines(path)[-1]["request_id"] == "99"


def test_a_log_goes_on_where_it_ended(tmp_path):
    path = tmp_path / "incidents.jsonl"
    for number in range(2):
        log = opened(path)
        log.record("sql_injection", "record", client="c", request_id=str(number))
        log.close()
    assert [line["request_id"] for line in lines(path)] == ["0", "1"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a disk that is full")  # noqa: PTH110
def test_a_full_disk_fails_nothing_and_is_said_once(tmp_path, caplog):
    path = tmp_path / "incidents.jsonl"
    path.symlink_to("/dev/full")
    with caplog.at_level(logging.WARNING):
        log = opened(path)
        for number in range(10):
            log.record("sql_injection", "record", client="c", request_id=str(number))
        log.close()
    assert (log.total, log.lost) == (10, 10)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "No space left on device" in caplog.text


def test_a_line_cannot_be_forged(tmp_path):
    log = opened(tmp_path / "i")
    log.record("sql_injection", "record", client="c", request_id='r"}\n{"rule": "forged"}\u2028\x1b[0m')
    log.close()
    assert len(lines(tmp_path / "i")) == 1
    assert "\x1b" not in (tmp_path / "i").read_text()


@pytest.mark.parametrize("name", ["none/incidents", "."])
def test_a_file_that_cannot_be_written_is_refused_at_the_start(name, tmp_path):
    with pytest.raises(ConversionError, match="incidents cannot be written") as caught:
        opened(tmp_path / name)
    assert caught.value.hint


def test_planted_secrets_are_in_no_line(tmp_path):
    """Of keys, texts and pictures, whatever rule they break."""
    secret = "hunter2-secret"
    log = opened(tmp_path / "incidents")
    attempts = [
        lambda: check_text(f"\x00 {secret}", "p", 4096),
        lambda: check_text(f"\ud800 {secret}", "p", 4096),
        lambda: open_picture(f"http://{secret}/", secret, SETTINGS),
        lambda: open_picture(f"data:image/{secret};base64,AAAA", "p", SETTINGS),
        lambda: open_picture(f"data:image/png;base64,{secret}", "p", SETTINGS),
        lambda: open_picture(data_url(png(8, 8, pixels=secret.encode()), TYPES["PNG"]), "p", SETTINGS),
    ]
    for number, attempt in enumerate(attempts):
        with pytest.raises(RequestError) as caught:
            attempt()
        error = caught.value
        assert error.evidence
        log.record(
            finding_of(error).rule, "reject", client=secret, request_id=str(number), evidence=error.evidence
        )
    log.close()
    written = (tmp_path / "incidents").read_text()
    assert len(written.splitlines()) == len(attempts)
    assert "hunter2" not in written
    assert "aHVudGVyM" not in written
    assert sys.getsizeof(written) < 4000
