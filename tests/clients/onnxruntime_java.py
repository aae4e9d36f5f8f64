"""ONNX Runtime's Java API on this machine: a desktop jar as it is, or Android's own package made to run.

`ONNXRUNTIME_JAVA` names the file: `onnxruntime-VERSION.jar` from Maven Central, which holds libraries for
Linux, or the `.aar` that apps get (`onnxruntime-android-VERSION.aar` from Maven Central). Without it, it is
the `.aar` of `make clients-android`, out of a package of npm's. An `.aar`'s x86-64 library is made for
Android's C library, for which `bionic.c` stands in.
"""

import os
import shutil
import struct
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

VARIABLE = "ONNXRUNTIME_JAVA"
DOWNLOADED = Path(__file__).with_name("onnxruntime.aar")
_JNI = "jni/x86_64"
_LIBRARIES = ("libonnxruntime.so", "libonnxruntime4j_jni.so")
_SYSTEM = {"libm.so": "libm.so.6", "libdl.so": "libdl.so.2"}

# Symbols whose first letter becomes a b (see bionic.c).
_RENAMED = (
    "sysconf", "realpath", "fflush", "fprintf", "vfprintf", "fputs", "fputc", "fwrite",
    "pthread_cond_broadcast", "pthread_cond_destroy", "pthread_cond_signal", "pthread_cond_wait",
    "pthread_cond_timedwait",
)  # fmt: skip
# Of ELF: program headers and tags of the dynamic section.
_LOAD, _DYNAMIC = 1, 2
_STRTAB, _STRSZ = 5, 10
_VERSIONS = (0x6FFFFFF0, 0x6FFFFFFC, 0x6FFFFFFD, 0x6FFFFFFE, 0x6FFFFFFF)
_IGNORED = 0x60000001


@dataclass(frozen=True)
class OnnxRuntimeJava:
    """What a JVM needs to load ONNX Runtime.

    Attributes:
        jar: The classes.
        options: Of `java`.
        environment: Of the process.
    """

    jar: Path
    options: tuple[str, ...]
    environment: dict[str, str]


def onnxruntime_java(folder: Path) -> OnnxRuntimeJava:
    """ONNX Runtime's Java API from the file that the environment names; the test is skipped without one.

    Args:
        folder: Empty, for what is made of it.
    """
    name = os.environ.get(VARIABLE) or str(DOWNLOADED)
    if not Path(name).is_file():
        pytest.skip(f"ONNX Runtime for Java is not there: make clients-android, or set {VARIABLE}")
    if not name.endswith(".aar"):
        return OnnxRuntimeJava(Path(name), (), dict(os.environ))
    if sys.platform != "linux" or os.uname().machine != "x86_64" or shutil.which("cc") is None:
        pytest.skip("Android's library can only be run on Linux on x86-64, with a C compiler (cc)")
    with zipfile.ZipFile(name) as package:
        package.extract("classes.jar", folder)
        for library in _LIBRARIES:
            (folder / library).write_bytes(for_linux(package.read(f"{_JNI}/{library}")))
    source = Path(__file__).with_name("bionic.c")
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-w", "-o", folder / "libc.so", source, "-Wl,-soname,libc.so"], check=True
    )
    for alias in ("liblog.so", "libandroid.so"):
        (folder / alias).symlink_to("libc.so")
    for alias, library in _SYSTEM.items():
        (folder / alias).symlink_to(f"/lib/x86_64-linux-gnu/{library}")
    return OnnxRuntimeJava(
        jar=folder / "classes.jar",
        options=(f"-Donnxruntime.native.path={folder}",),
        environment={**os.environ, "LD_LIBRARY_PATH": str(folder)},
    )


def for_linux(library: bytes) -> bytes:
    """A library of Android whose symbols have no versions, so that Linux's loader binds them to its own."""
    data = bytearray(library)
    start, size, count = struct.unpack_from("<Q", data, 32)[0], *struct.unpack_from("<HH", data, 54)
    headers = [struct.unpack_from("<IIQQQQ", data, start + i * size) for i in range(count)]
    tags: dict[int, int] = {}
    at = next(offset for kind, _, offset, *_ in headers if kind == _DYNAMIC)
    while (entry := struct.unpack_from("<QQ", data, at))[0]:
        if entry[0] in _VERSIONS:
            struct.pack_into("<Q", data, at, _IGNORED)
        tags[entry[0]] = entry[1]
        at += 16
    names = next(
        tags[_STRTAB] - address + offset
        for kind, _, offset, address, _, length in headers
        if kind == _LOAD and address <= tags[_STRTAB] < address + length
    )
    for name in _RENAMED:
        place = data.find(f"\0{name}\0".encode(), names, names + tags[_STRSZ])
        if place >= 0:
            data[place + 1] = ord("b")
    return bytes(data)
