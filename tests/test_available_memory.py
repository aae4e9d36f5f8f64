"""What a process may have; limits of containers are tested with serve's workers."""

from fastvlm_convert.available_memory import available_memory_bytes, group_limits, memory_limit_bytes
from fastvlm_convert.peak_memory import peak_memory_bytes


def test_there_is_a_machine():
    assert peak_memory_bytes() < memory_limit_bytes() < 1 << 50
    available = available_memory_bytes()
    assert available is None or 0 < available < memory_limit_bytes()


def test_a_group_and_those_around_it(tmp_path):
    membership = tmp_path / "cgroup"
    membership.write_text("0::/pod/app\n")
    for folder, limit, used in (("pod/app", 900, 100), ("pod", 5000, 4000), ("pod/other", 1, 1)):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "memory.max").write_text(f"{limit}\n")
        (tmp_path / folder / "memory.current").write_text(f"{used}\n")
    assert list(group_limits(tmp_path, membership)) == [(900, 800), (5000, 1000)]
    assert list(group_limits(tmp_path, tmp_path / "missing")) == []
