import numpy as np
import pytest

from fastvlm_convert.exporters.onnx.data import ALIGNMENT, CountedData, ExternalData, Region


def test_tensors_start_on_pages_in_the_order_they_come(tmp_path):
    path = tmp_path / "g.onnx_data"
    first, second = np.arange(5, dtype=np.float32), np.arange(6, dtype=np.float16).reshape(2, 3)
    with ExternalData(path) as data:
        regions = [data.append([first], 20), data.append([second[:1], second[1:]], 12)]
    assert regions == [Region("g.onnx_data", 0, 20), Region("g.onnx_data", ALIGNMENT, 12)]
    content = path.read_bytes()
    assert len(content) == ALIGNMENT + 12
    assert content[:20] == first.tobytes()
    assert not any(content[20:ALIGNMENT])
    assert content[ALIGNMENT:] == second.tobytes()


def test_counting_lays_out_alike_and_makes_nothing():
    def never():
        raise AssertionError("a tensor was made")
        yield

    data = CountedData("g.onnx_data")
    regions = [data.append(never(), 20), data.append(never(), 12)]
    assert regions == [Region("g.onnx_data", 0, 20), Region("g.onnx_data", ALIGNMENT, 12)]
    assert data.size == ALIGNMENT + 12


def test_a_tensor_of_another_length_is_noticed(tmp_path):
    with ExternalData(tmp_path / "d") as data, pytest.raises(AssertionError, match="not as long"):
        data.append([np.zeros(5, np.float32)], 24)


def test_a_transposed_chunk_is_written_row_by_row(tmp_path):
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    with ExternalData(tmp_path / "d") as data:
        data.append([values.T], 24)
    assert (tmp_path / "d").read_bytes() == np.ascontiguousarray(values.T).tobytes()


def test_an_existing_file_is_not_overwritten(tmp_path):
    (tmp_path / "d").write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        ExternalData(tmp_path / "d")
    assert (tmp_path / "d").read_bytes() == b"precious"
