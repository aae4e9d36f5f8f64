import codecs
import os
import socket
import subprocess
import sys

import pytest

from fastvlm_convert.regular_file import (
    UnreadableFileError,
    decoded,
    is_there,
    open_file,
    read_file,
    read_text,
)


def make(tmp_path, kind):
    path = tmp_path / "x"
    match kind:
        case "a folder":
            path.mkdir()
        case "a pipe":
            os.mkfifo(path)
        case "a socket":
            with socket.socket(socket.AF_UNIX) as listening:
                listening.bind(str(path))
        case "a device":
            path.symlink_to("/dev/zero")
    return path


@pytest.mark.parametrize("kind", ["a folder", "a pipe", "a socket", "a device"])
def test_what_is_no_file_is_named_at_once(tmp_path, kind):
    path = make(tmp_path, kind)
    with pytest.raises(OSError, match=f"it is {kind}, not a file") as caught:
        open_file(path)
    assert caught.value.strerror == f"it is {kind}, not a file"
    assert caught.value.filename == str(path)


def test_links(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "good").symlink_to("file")
    (tmp_path / "bad").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    assert read_file(tmp_path / "good") == b"x"
    with pytest.raises(UnreadableFileError, match="it is a link to nowhere, which is missing"):
        read_file(tmp_path / "bad")
    with pytest.raises(OSError, match="symbolic links"):
        read_file(tmp_path / "loop")
    assert [is_there(tmp_path / name) for name in ("good", "bad", "loop", "none")] == [
        True,
        True,
        True,
        False,
    ]


@pytest.mark.parametrize("name", ["none", "a\0b"])
def test_nothing_of_that_name(tmp_path, name):
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / name)


def test_a_file_beyond_all_reason_is_not_read(tmp_path):
    path = tmp_path / "x"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a terabyte that takes no disk
    with pytest.raises(
        UnreadableFileError, match="it has 1099511627776 bytes, at most 33554432 make sense here"
    ):
        read_file(path)
    path.write_bytes(b"abc")
    assert read_file(path, 3) == b"abc"


TEXTS = {
    "utf-8": "grün".encode(),
    "with a mark": codecs.BOM_UTF8 + "grün".encode(),
    "utf-16 little": "grün".encode("utf-16"),
    "utf-16 big": codecs.BOM_UTF16_BE + "grün".encode("utf-16-be"),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_texts_of_every_editor(tmp_path, kind):
    (tmp_path / "x").write_bytes(TEXTS[kind])
    assert read_text(tmp_path / "x") == "grün"


@pytest.mark.parametrize(
    ("raw", "message"),
    [(b"ab\xff", "byte 2 is no UTF-8 text"), (codecs.BOM_UTF16_LE + b"a", "is no UTF-16 text")],
)
def test_what_is_no_text(raw, message):
    with pytest.raises(ValueError, match=message):
        decoded(raw)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a process as somebody else")
def test_a_folder_that_may_not_be_searched(tmp_path):
    (tmp_path / "x").write_text("{}")
    tmp_path.chmod(0)
    code = (
        "import os, sys; from pathlib import Path; from fastvlm_convert.regular_file import read_file;"
        "os.seteuid(65534); read_file(Path(sys.argv[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "x"], capture_output=True, text=True)
    assert "PermissionError: [Errno 13] Permission denied" in done.stderr
