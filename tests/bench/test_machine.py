import os
import sys
from dataclasses import replace

import pytest

from fastvlm_convert.bench.machine import changes, differences, read_cpuinfo, this_machine
from fastvlm_convert.bench.threads import pinning
from fastvlm_convert.processors import usable_cpus

XEON = """
processor\t: 0
model name\t: Intel(R) Xeon(R) Processor
flags\t\t: fpu vme avx avx2 avx512f avx512_vnni ht

processor\t: 1
model name\t: Intel(R) Xeon(R) Processor
flags\t\t: fpu vme avx avx2 avx512f avx512_vnni ht
"""
ARM = """
processor\t: 0
Features\t: fp asimd evtstrm aes asimddp i8mm
CPU implementer\t: 0x41
CPU part\t: 0xd05

processor\t: 1
Features\t: fp asimd evtstrm aes asimddp i8mm
CPU implementer\t: 0x41
CPU part\t: 0xd41
"""


def test_a_processor_of_intel():
    assert read_cpuinfo(XEON) == ("Intel(R) Xeon(R) Processor", ("avx2", "avx512_vnni", "avx512f"))


def test_a_phone_s_processor_has_numbers_for_a_name():
    cpu, instructions = read_cpuinfo(ARM)
    assert cpu == "ARM implementer 0x41 part 0xd05 + ARM implementer 0x41 part 0xd41"
    assert instructions == ("asimd", "asimddp", "i8mm")


def test_nothing_is_known_of_a_system_without_cpuinfo():
    assert read_cpuinfo("") == ("", ())


def test_this_machine():
    found = this_machine()
    assert found == this_machine()
    assert 1 <= found.cores <= found.logical_cpus == len(usable_cpus())
    assert found.memory_bytes > 1 << 28
    assert found.libraries["python"] == ".".join(map(str, sys.version_info[:3]))
    assert "onnxruntime" in found.libraries
    assert found.cpu in found.title
    assert os.uname().nodename not in found.title  # what names its owner is left out


def test_the_same_machine_with_other_software():
    here = this_machine()
    there = replace(here, memory_bytes=int(1.01 * here.memory_bytes), kernel="9", os="Other")
    assert differences(here, there) == ()
    assert [change.split(" was")[0] for change in changes(here, there)] == ["the system", "the kernel"]
    assert changes(here, here) == ()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process")
def test_threads_are_as_many_as_processors_that_may_be_used():
    """Of a process that may use one, as in a container."""
    before = os.sched_getaffinity(0)
    last = max(before)
    os.sched_setaffinity(0, {last})
    try:
        chosen = pinning(None)
        assert (chosen.threads, chosen.cpus) == (1, (last,))
        assert (this_machine().cores, this_machine().logical_cpus) == (1, 1)
    finally:
        os.sched_setaffinity(0, before)
