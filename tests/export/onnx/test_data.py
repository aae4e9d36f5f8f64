import numpy as np
import pytest

from fastvlm_convert.export.onnx.data import ALIGNMENT, ExternalData, Region


def test_tensors_start_on_pages_in_the_order_they_come(tmp_path):
    path = tmp_path / "g.onnx_data"
    first, second = np.arange(5, dtype=np.float32), np.arange(6, dtype=np.float16).reshape(2, 3)
    with ExternalData(path) as data:
        regions = [data.append([first]), data.append([second[:1], second[1:]])]
    assert regions == [Region("g.onnx_data", 0, 20), Region("g.onnx_data", ALIGNMENT, 12)]
    content = path.read_bytes()
    assert len(content) == ALIGNMENT + 12
    assert content[:20] == first.tobytes()
    assert not any(content[20:ALIGNMENT])
    assert content[ALIGNMENT:] == second.tobytes()


def test_a_transposed_chunk_is_written_row_by_row(tmp_path):
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    with ExternalData(tmp_path / "d") as data:
        data.append([values.T])
    assert (tmp_path / "d").read_bytes() == np.ascontiguousarray(values.T).tobytes()


def test_an_existing_file_is_not_overwritten(tmp_path):
    (tmp_path / "d").write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        ExternalData(tmp_path / "d")
    assert (tmp_path / "d").read_bytes() == b"precious"
