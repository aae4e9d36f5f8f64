import numpy as np
import pytest

from fastvlm_convert.weights.source import CHUNK_BYTES, Weight, computed, reshaped, same_content


def in_memory(values, reads=None):
    """A weight over an array that notes which rows are read."""

    def read(start, stop):
        if reads is not None:
            reads.append((start, stop))
        return np.ascontiguousarray(values[start:stop], np.float32)

    return Weight(values.shape, "float32", read)


def test_chunks_are_all_rows_in_order_and_small():
    rows, width = 1000, 50_000  # 200 MB, never held at once
    reads = []

    def read(start, stop):
        reads.append((start, stop))
        return np.broadcast_to(np.arange(start, stop, dtype=np.float32)[:, None], (stop - start, width))

    seen = np.concatenate([chunk[:, 0] for chunk in Weight((rows, width), "float16", read).chunks()])
    np.testing.assert_array_equal(seen, np.arange(rows))
    assert len(reads) > 20
    assert all((stop - start) * width * 4 <= CHUNK_BYTES for start, stop in reads)


def test_a_row_larger_than_a_chunk_is_read_alone():
    row = CHUNK_BYTES // 4 + 1
    weight = Weight((2, row), "float32", lambda start, stop: np.zeros((stop - start, row), np.float32))
    assert [len(chunk) for chunk in weight.chunks()] == [1, 1]


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0), (1,), (5, 2, 1)])
def test_arrays_and_chunks_of_every_shape(shape):
    values = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
    weight = in_memory(values.reshape(shape or (1,)))
    weight = Weight(shape, "float32", weight.read)
    assert weight.size == values.size
    np.testing.assert_array_equal(weight.array(), values)
    chunks = list(weight.chunks())
    assert sum(chunk.size for chunk in chunks) == values.size


def test_computed_weights_are_computed_when_read():
    calls = []

    def compute():
        calls.append(1)
        return np.arange(6, dtype=np.float64).reshape(3, 2)

    weight = computed((3, 2), "bfloat16", compute)
    assert (weight.shape, weight.dtype, calls) == ((3, 2), "bfloat16", [])
    rows = weight.read(1, 3)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, [[2, 3], [4, 5]])


def test_reshaping_keeps_rows():
    values = np.arange(24, dtype=np.float32).reshape(4, 6, 1, 1)
    weight = reshaped(in_memory(values), (4, 2, 3))
    np.testing.assert_array_equal(weight.array(), values.reshape(4, 2, 3))
    np.testing.assert_array_equal(weight.read(2, 3), values.reshape(4, 2, 3)[2:3])


def test_same_content_reads_up_to_the_first_difference():
    a = np.zeros((4000, 2000), np.float32)  # four chunks
    b = a.copy()
    assert same_content(in_memory(a), in_memory(b))
    assert not same_content(in_memory(a), in_memory(a[:-1]))
    b[10, 3] = 1
    reads = []
    assert not same_content(in_memory(a, reads), in_memory(b))
    assert len(reads) == 1
    b[10, 3], b[-1, -1] = 0, 1
    assert not same_content(in_memory(a, reads), in_memory(b))
