"""The machine that figures come from: what makes it fast or slow, and nothing that names its owner."""

import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Final

from fastvlm_convert.amounts import count_text
from fastvlm_convert.processors import usable_cpus

_LIBRARIES: Final = ("numpy", "torch", "onnxruntime", "coremltools", "mlx")
_MEMORY_TOLERANCE: Final = 0.05  # a kernel keeps some for itself, and not always as much

# The names in /proc/cpuinfo of the instructions that decide how fast a network runs. ARM's asimddp is
# "dotprod", fphp and asimdhp are float16 arithmetic.
_INSTRUCTIONS: Final = {
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "avx_vnni", "avx_vnni_int8", "amx_tile", "amx_int8", "amx_bf16", "neon", "asimd", "asimddp", "fphp",
    "asimdhp", "asimdfhm", "i8mm", "bf16", "sve", "sve2", "sme",
}  # fmt: skip
_APPLE_FEATURES: Final = ("FEAT_DotProd", "FEAT_FP16", "FEAT_BF16", "FEAT_I8MM", "FEAT_SME", "FEAT_SME2")


@dataclass(frozen=True)
class Machine:
    """A machine's fingerprint.

    Attributes:
        cpu: Model of the processor, as it calls itself.
        architecture: `x86_64`, `arm64`, `aarch64`.
        instructions: Those of its instruction sets that matter here, as the system calls them.
        cores: Physical cores that this process may use.
        logical_cpus: Logical processors that this process may use.
        memory_bytes: Memory of the machine.
        system: `Linux` or `Darwin`.
        os: Name and version of the operating system, for people.
        kernel: Version of its kernel.
        governor: How the system chooses the processors' frequency; None where it does not say.
        libraries: Version of Python and of the runtimes that are installed.
    """

    cpu: str
    architecture: str
    instructions: tuple[str, ...]
    cores: int
    logical_cpus: int
    memory_bytes: int
    system: str
    os: str
    kernel: str
    governor: str | None
    libraries: dict[str, str]

    @property
    def title(self) -> str:
        """In a few words: `Intel(R) Xeon(R) Processor, 2 cores, Debian GNU/Linux 13`."""
        return f"{self.cpu}, {count_text(self.cores, 'core')}, {self.os}"


def this_machine() -> Machine:
    """The machine that this process runs on."""
    is_mac = sys.platform == "darwin"
    cpu, instructions = _apple_cpu() if is_mac else read_cpuinfo(_text("/proc/cpuinfo"))
    return Machine(
        cpu=cpu or platform.machine(),
        architecture=platform.machine(),
        instructions=instructions,
        cores=len(core_leaders()),
        logical_cpus=len(usable_cpus()),
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        system=platform.system(),
        os=_os_name(),
        kernel=platform.release(),
        governor=_governor(),
        libraries={"python": platform.python_version(), **_versions()},
    )


def core_leaders() -> tuple[int, ...]:
    """The first usable processor of every physical core."""
    leaders: dict[str, int] = {}
    for cpu in usable_cpus():
        siblings = _text(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").strip()
        leaders.setdefault(siblings or str(cpu), cpu)
    if sys.platform == "darwin":
        return tuple(leaders.values())[: int(_sysctl("hw.physicalcpu") or len(leaders))]
    return tuple(leaders.values())


def read_cpuinfo(text: str) -> tuple[str, tuple[str, ...]]:
    """The model of the processors and their instruction sets that matter.

    Args:
        text: /proc/cpuinfo of any Linux. ARM's has no name but numbers of maker and part.
    """
    values: dict[str, list[str]] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            values.setdefault(key.strip(), []).append(value.strip())
    flags = {flag for key in ("flags", "Features") for value in values.get(key, ()) for flag in value.split()}
    names = values.get("model name") or values.get("Hardware")
    if not names:
        makers, parts = values.get("CPU implementer", []), values.get("CPU part", [])
        names = [f"ARM implementer {maker} part {part}" for maker, part in zip(makers, parts, strict=False)]
    return " + ".join(dict.fromkeys(names)), tuple(sorted(flags & _INSTRUCTIONS))


def differences(here: Machine, there: Machine) -> tuple[str, ...]:
    """What makes two machines different ones, in words; empty if figures of both may be compared."""
    found = []
    for name, one, other in (
        ("processor", there.cpu, here.cpu),
        ("architecture", there.architecture, here.architecture),
        ("instructions", " ".join(there.instructions), " ".join(here.instructions)),
        ("cores", there.cores, here.cores),
        ("logical processors", there.logical_cpus, here.logical_cpus),
        ("system", there.system, here.system),
        ("governor", there.governor, here.governor),
    ):
        if one != other:
            found.append(f"{name} {one or 'unknown'}, here {other or 'unknown'}")
    if abs(here.memory_bytes - there.memory_bytes) > _MEMORY_TOLERANCE * here.memory_bytes:
        found.append(f"memory {there.memory_bytes / 1e9:.1f} GB, here {here.memory_bytes / 1e9:.1f} GB")
    return tuple(found)


def changes(here: Machine, there: Machine) -> tuple[str, ...]:
    """What software has changed between two results of one machine, in words."""
    found = [
        f"{name} was {one}, is {other}"
        for name, one, other in (("the system", there.os, here.os), ("the kernel", there.kernel, here.kernel))
        if one != other
    ]
    for name in sorted({*here.libraries, *there.libraries}):
        one, other = there.libraries.get(name, "not installed"), here.libraries.get(name, "not installed")
        if one != other:
            found.append(f"{name} was {one}, is {other}")
    return tuple(found)


def _apple_cpu() -> tuple[str, tuple[str, ...]]:
    features = [name for name in _APPLE_FEATURES if _sysctl(f"hw.optional.arm.{name}") == "1"]
    return _sysctl("machdep.cpu.brand_string"), tuple(features)


def _sysctl(name: str) -> str:
    """A value of macOS's kernel, or an empty text where it has no such value."""
    done = subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _os_name() -> str:
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]}"
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.system()


def _governor() -> str | None:
    cpus = usable_cpus()
    paths = [f"/sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_governor" for cpu in cpus]
    return " + ".join(sorted({_text(path).strip() for path in paths} - {""})) or None


def _text(path: str) -> str:
    """What the kernel says in a file, or an empty text where it does not have it."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
