"""What `pack --for zip` wrote comes back to the byte; a zip that somebody prepared does no harm."""

import json
import os
import stat
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fastvlm_convert.delivery.check import check_bundle
from fastvlm_convert.delivery.pack import pack
from fastvlm_convert.delivery.unpack import MAX_RATIO, unpack
from fastvlm_convert.delivery.zip_file import write_zip
from fastvlm_convert.errors import BundleError, OutputError
from fastvlm_convert.manifest import FILE_NAME
from tests.bundles import copy_bundle, edit_manifest
from tests.checkpoints import tree_state

CONFIG = "config.json"


@pytest.fixture(scope="module")
def packed(fp32_bundle, tmp_path_factory):
    output = tmp_path_factory.mktemp("packed") / "bundle.zip"
    pack(fp32_bundle, "zip", output)
    return output


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class TestRoundTrip:
    def test_it_comes_back_to_the_byte(self, packed, fp32_bundle, tmp_path):
        manifest = unpack(packed, tmp_path / "back")
        assert contents(tmp_path / "back") == contents(fp32_bundle)
        assert set(manifest.files) | {FILE_NAME} == set(contents(fp32_bundle))
        assert check_bundle(tmp_path / "back").status == "passed"

    def test_the_zip_depends_on_the_bundle_alone(self, packed, fp32_bundle, tmp_path):
        copy = copy_bundle(fp32_bundle, tmp_path)
        for path in copy.rglob("*"):
            os.utime(path, (1e9, 1e9))
            path.chmod(0o700)
        pack(copy, "zip", tmp_path / "another.zip")
        assert (tmp_path / "another.zip").read_bytes() == packed.read_bytes()

    def test_other_tools_read_it(self, packed, fp32_bundle, tmp_path):
        done = subprocess.run(
            [sys.executable, "-m", "zipfile", "-t", packed], capture_output=True, text=True, check=True
        )
        assert "Done testing" in done.stdout
        with zipfile.ZipFile(packed) as archive:
            names = archive.namelist()
            assert names == sorted(contents(fp32_bundle))
            for info in archive.infolist():
                assert (info.date_time, info.compress_type) == ((1980, 1, 1, 0, 0, 0), zipfile.ZIP_STORED)
                assert stat.S_IMODE(info.external_attr >> 16) == 0o644

    def test_what_is_said_about_the_bundle_goes_along(self, fp32_bundle, tmp_path):
        bundle = copy_bundle(fp32_bundle, tmp_path)
        (bundle / "model.sig").write_text("{}")
        pack(bundle, "zip", tmp_path / "signed.zip")
        unpack(tmp_path / "signed.zip", tmp_path / "back")
        assert (tmp_path / "back" / "model.sig").read_text() == "{}"

    def test_deflated_by_another_tool_it_is_the_same(self, fp32_bundle, tmp_path):
        with zipfile.ZipFile(tmp_path / "other.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.mkdir("onnx")
            for name, content in contents(fp32_bundle).items():
                archive.writestr(name, content)
        unpack(tmp_path / "other.zip", tmp_path / "back")
        assert contents(tmp_path / "back") == contents(fp32_bundle)

    @pytest.mark.slow
    def test_files_beyond_four_gigabytes(self, tmp_path):
        large = tmp_path / "large"
        with large.open("wb") as file:
            file.truncate((1 << 32) + 5)
        write_zip({"large": large, "small": Path(__file__)}, tmp_path / "large.zip", lambda share: None)
        with zipfile.ZipFile(tmp_path / "large.zip") as archive:
            assert archive.getinfo("large").file_size == (1 << 32) + 5
            assert archive.read("small") == Path(__file__).read_bytes()


class TestPlace:
    def test_an_existing_bundle_is_replaced_when_asked(self, packed, fp32_bundle, tmp_path):
        bundle = copy_bundle(fp32_bundle, tmp_path)
        with pytest.raises(OutputError, match="the output exists"):
            unpack(packed, bundle)
        (bundle / CONFIG).write_text("changed")
        unpack(packed, bundle, overwrite=True)
        assert contents(bundle) == contents(fp32_bundle)

    def test_what_is_said_about_a_bundle_does_not_keep_it_from_being_replaced(
        self, packed, fp32_bundle, tmp_path
    ):
        bundle = copy_bundle(fp32_bundle, tmp_path)
        for name in ("verification.json", "model.sig"):
            (bundle / name).write_text("{}")
        unpack(packed, bundle, overwrite=True)
        assert contents(bundle) == contents(fp32_bundle)
        (bundle / "mine.txt").write_text("mine")
        with pytest.raises(OutputError, match=r"mine\.txt"):
            unpack(packed, bundle, overwrite=True)

    def test_a_disk_without_room_is_said_before_a_byte_is_written(self, packed, tmp_path, monkeypatch):
        usage = type("Usage", (), {"free": 1000})
        monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
        with pytest.raises(OutputError, match="bytes, 1000 are free"):
            unpack(packed, tmp_path / "back")
        assert list(tmp_path.iterdir()) == []


Entries = dict[str, bytes]


def rewritten(packed: Path, folder: Path, change: Callable[[zipfile.ZipFile, Entries], None]) -> Path:
    """The bundle's zip as `change` writes it."""
    with zipfile.ZipFile(packed) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    output = folder / "changed.zip"
    with zipfile.ZipFile(output, "w") as archive:
        change(archive, entries)
    return output


def plus(name: str, content: bytes = b"x", mode: int = stat.S_IFREG | 0o644):
    """All entries, and one more."""

    def change(archive: zipfile.ZipFile, entries: Entries) -> None:
        for old, value in entries.items():
            archive.writestr(old, value)
        info = zipfile.ZipInfo("x")
        info.filename = info.orig_filename = name
        info.external_attr = mode << 16
        archive.writestr(info, content)

    return change


def without(name: str):
    def change(archive: zipfile.ZipFile, entries: Entries) -> None:
        for old, value in entries.items():
            if old != name:
                archive.writestr(old, value)

    return change


def with_content(name: str, make: Callable[[bytes], bytes], compression: int = zipfile.ZIP_STORED):
    def change(archive: zipfile.ZipFile, entries: Entries) -> None:
        for old, value in entries.items():
            new = make(value) if old == name else value
            archive.writestr(old, new, compression if old == name else zipfile.ZIP_STORED)

    return change


def with_manifest(edit: Callable[[dict], object], more: Entries | None = None):
    def change(archive: zipfile.ZipFile, entries: Entries) -> None:
        value = json.loads(entries[FILE_NAME])
        edit(value)
        new = {**entries, FILE_NAME: json.dumps(value).encode(), **(more or {})}
        for name, content in new.items():
            archive.writestr(name, content, zipfile.ZIP_DEFLATED)

    return change


HOSTILE = {
    "traversal": (plus("../evil"), "does not lie inside a bundle"),
    "hidden traversal": (plus("onnx/../../evil"), "does not lie inside a bundle"),
    "absolute": (plus("/tmp/evil"), "does not lie inside a bundle"),
    "drive": (plus("C:/evil"), "does not lie inside a bundle"),
    "backslashes": (plus("..\\evil"), "does not lie inside a bundle"),
    "zero byte": (plus("config.json\0.png"), "cannot be printed"),
    "escape sequence": (plus("\x1b[2Jevil"), "cannot be printed"),
    "dot": (plus("./config.json"), "is no plain path"),
    "link": (plus("up", b"/etc", stat.S_IFLNK | 0o777), "'up' is a link"),
    "link for a file": (plus("config.json2", b"/etc/passwd", stat.S_IFLNK | 0o777), "is a link"),
    "device": (plus("dev", b"", stat.S_IFCHR | 0o666), "is no plain file"),
    "pipe": (plus("fifo", b"", stat.S_IFIFO | 0o666), "is no plain file"),
    "twice": (plus(CONFIG), "'config.json' stands there twice"),
    "case": (plus("CONFIG.json"), "are one file on some systems"),
    "file and folder": (plus("config.json/x"), "is a file, and a folder for"),
    "extra": (plus("extra.txt"), "'extra.txt' is not the bundle's"),
    "too long": (plus("a" * 300), "is too long"),
    "missing": (without(CONFIG), "'config.json' is missing"),
    "no manifest": (without(FILE_NAME), f"no bundle: it has no {FILE_NAME} at its top"),
    "another size": (with_content(CONFIG, lambda c: c + b" "), "bytes, the manifest says"),
    "another content": (with_content(CONFIG, lambda c: c.replace(b"qwen2", b"QWEN2")), "has other content"),
    "manifest no JSON": (with_content(FILE_NAME, lambda c: c[:100]), "is not valid JSON"),
    "manifest of a bomb": (
        with_content(FILE_NAME, lambda c: c + b" " * (5 << 20), zipfile.ZIP_DEFLATED),
        f"would grow more than {MAX_RATIO}-fold",
    ),
    "large manifest": (with_content(FILE_NAME, lambda c: c + b" " * (5 << 20)), "at most"),
    "large record": (plus("verification.json", b"{}" + b" " * (5 << 20)), "at most"),
    "bomb": (
        with_manifest(
            lambda m: m["files"].update(bomb={"size": 50 << 20, "sha256": "0" * 64}),
            {"bomb": bytes(50 << 20)},
        ),
        f"'bomb' would grow more than {MAX_RATIO}-fold",
    ),
    "no artifacts": (with_manifest(lambda m: m.update(artifacts=[])), "lists no artifact"),
    "lists what is outside": (
        with_manifest(lambda m: m["files"].update({"../x": {"size": 1, "sha256": "0" * 64}})),
        "lies outside the bundle",
    ),
    "of another version": (with_manifest(lambda m: m.update(schema_version=1)), "manifest version 1"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_zip_is_refused_and_leaves_nothing(packed, tmp_path, name):
    change, message = HOSTILE[name]
    file = rewritten(packed, tmp_path, change)
    before = tree_state(tmp_path)
    with pytest.raises(BundleError) as caught:
        unpack(file, tmp_path / "sub" / "back")
    assert message in str(caught.value)
    assert tree_state(tmp_path) == before
    assert not (tmp_path / "sub").exists()


def patched(packed: Path, folder: Path, name: str, change: Callable[[bytearray, int], None]) -> Path:
    """The zip with an entry of its central directory changed in place."""
    content = bytearray(packed.read_bytes())
    at = content.rindex(b"PK\x01\x02", 0, content.rindex(name.encode()))
    change(content, at)
    (folder / "patched.zip").write_bytes(content)
    return folder / "patched.zip"


def encrypt(content: bytearray, at: int) -> None:
    content[at + 8] |= 1


def shrink(content: bytearray, at: int) -> None:
    struct.pack_into("<I", content, at + 20, 5)  # the compressed size


def point_elsewhere(content: bytearray, at: int) -> None:
    struct.pack_into("<I", content, at + 42, 0)  # where the entry begins


def compress_oddly(content: bytearray, at: int) -> None:
    struct.pack_into("<H", content, at + 10, 14)  # LZMA


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (encrypt, "is encrypted"),
        (shrink, "in another size than its own"),
        (point_elsewhere, "no zip file that can be read"),
        (compress_oddly, "compressed in a way that bundles are not"),
    ],
)
def test_a_patched_zip_is_refused(packed, tmp_path, change, message):
    with pytest.raises(BundleError, match=message):
        unpack(patched(packed, tmp_path, CONFIG, change), tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_entries_that_share_their_bytes_are_refused(packed, tmp_path):
    """The bombs of David Fifield: many entries, one kernel."""
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("kernel", os.urandom(1 << 16))
        kernel = archive.infolist()[0]
        for n in range(50):
            copy = zipfile.ZipInfo(f"copy{n}")
            for field in ("compress_size", "file_size", "CRC", "header_offset", "compress_type"):
                setattr(copy, field, getattr(kernel, field))
            archive.filelist.append(copy)
    with pytest.raises(BundleError, match="its entries overlap"):
        unpack(tmp_path / "bomb.zip", tmp_path / "back")


@pytest.mark.parametrize("content", [b"", b"PK", b"no zip at all", bytes(1000)])
def test_what_is_no_zip_is_said(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(BundleError, match="no zip file that can be read"):
        unpack(tmp_path / "file", tmp_path / "back")


def test_a_cut_zip_is_refused(packed, tmp_path):
    content = packed.read_bytes()
    for share in (0.1, 0.5, 0.999):
        (tmp_path / "cut.zip").write_bytes(content[: int(share * len(content))])
        with pytest.raises(BundleError, match="no zip file that can be read"):
            unpack(tmp_path / "cut.zip", tmp_path / "back")


def test_what_cannot_be_opened_is_said(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, message in (
        ("nowhere", "there is no such file"),
        ("pipe", "it is a pipe"),
        (".", "it is a folder"),
    ):
        with pytest.raises(BundleError, match=message):
            unpack(tmp_path / name, tmp_path / "back")


def test_a_zip_never_holds_a_damaged_bundle(fp32_bundle, tmp_path):
    bundle = copy_bundle(fp32_bundle, tmp_path)
    edit_manifest(bundle, lambda m: m["files"][CONFIG].update(sha256="0" * 64))
    with pytest.raises(BundleError, match="not sound"):
        pack(bundle, "zip", tmp_path / "bundle.zip")
    assert not (tmp_path / "bundle.zip").exists()
