from fastvlm_convert.peak_memory import peak_memory_bytes


def test_peak_memory_only_grows():
    before = peak_memory_bytes()
    block = bytearray(64 << 20)
    assert peak_memory_bytes() >= max(before, len(block))
