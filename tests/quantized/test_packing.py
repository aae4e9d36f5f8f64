import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fastvlm_convert.quantized.packing import pack, packed_columns, unpack


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("columns", [1, 2, 3, 4, 5, 6, 7, 8, 9, 64, 897])
def test_it_is_a_little_endian_stream_of_bits(bits, columns):
    values = np.random.default_rng(columns).integers(0, 1 << bits, (3, columns), np.uint8)
    content = pack(values, bits)
    assert content.dtype == np.uint8
    assert content.shape == (3, packed_columns(columns, bits)) == (3, -(-columns * bits // 8))
    for row, packed in zip(values.tolist(), content, strict=True):
        number = sum(value << (bits * i) for i, value in enumerate(row))
        assert packed.tobytes() == number.to_bytes(content.shape[1], "little")
    np.testing.assert_array_equal(unpack(content, bits, columns), values)


def test_the_lower_nibble_comes_first():
    assert pack(np.array([[1, 2, 3]], np.uint8), 4).tolist() == [[0x21, 0x03]]


@given(st.data(), st.sampled_from([4, 6, 8]), arrays.array_shapes(min_dims=2, max_dims=2, max_side=40))
def test_whatever_is_packed_is_unpacked(data, bits, shape):
    values = data.draw(arrays.arrays(np.uint8, shape, elements=st.integers(0, (1 << bits) - 1)))
    content = pack(values, bits)
    assert content.shape == (shape[0], packed_columns(shape[1], bits))
    np.testing.assert_array_equal(unpack(content, bits, shape[1]), values)
    for row, alone in zip(values, content, strict=True):  # rows do not depend on each other
        np.testing.assert_array_equal(pack(row[None], bits)[0], alone)
