"""docs/interpreter.md: its code runs, and its list of operations is the table's."""

import re
import runpy
from pathlib import Path

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb  # noqa: N813
from coremltools.converters.mil.mil import get_new_symbol, types

from tests.mil.programs import write_package
from tests.mil.seeds import write_seeds
from tests.mil.test_predict import Halve, convert

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "interpreter.md"
BLOCKS = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)


def _decode(k_cache, x, position):
    begin = mb.concat(values=[[0], position, [0]], axis=0)
    end = mb.concat(values=[[1], mb.add(x=position, y=1), [8]], axis=0)
    cache = mb.slice_update(x=mb.read_state(input=k_cache), update=x, begin=begin, end=end)
    return mb.reduce_sum(x=mb.coreml_update_state(state=k_cache, value=cache))


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """The packages that the document talks about, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "seeds").mkdir()
    write_seeds(tmp_path / "seeds")[-1].rename(tmp_path / "pipeline.mlpackage")
    half = np.float16
    write_package(
        {"main": (lambda x: mb.mul(x=x, y=half(2), name="doubled"), (np.zeros((1, 4), half),))},
        tmp_path / "model.mlpackage",
    )
    cache = mb.StateTensorSpec((1, 4, 8), types.fp16)
    specs = (cache, np.zeros((1, 1, 8), half), np.zeros(1, np.int32))
    write_package({"decode": (_decode, specs), "prefill": (_decode, specs)}, tmp_path / "decoder.mlpackage")
    picture = torch.zeros(1, 3, 24, 32)
    convert(
        Halve(),
        picture,
        tmp_path / "stylize.mlpackage",
        [ct.ImageType("image", tuple(picture.shape))],
        outputs=[ct.ImageType("stylized", color_layout=ct.colorlayout.RGB)],
    )
    symbolic = mb.TensorSpec((1, get_new_symbol()), types.int32)
    table = np.ones((3, 8), np.float32)
    write_package(
        {"main": (lambda ids: mb.gather(x=table, indices=ids, axis=0), (symbolic,))},
        tmp_path / "embed.mlpackage",
        input_types=(ct.TensorType("ids", (1, ct.RangeDim(1, 16, default=4)), dtype=np.int32),),
    )
    return tmp_path


def test_the_code_runs(packages, capsys):
    names: dict = {}
    for block in BLOCKS:
        exec(compile(block, str(DOCUMENT), "exec"), names)
    said = capsys.readouterr().out
    for line in ("[1, 1..16] (1, 4) True", "4 x inf first made by 'doubled' (mul) in 'main'"):
        assert line in said
        assert line in DOCUMENT.read_text(encoding="utf-8")
    assert "['decode', 'prefill'] decode" in said
    assert names["largest"] == {"doubled": 2.0}
    np.testing.assert_array_equal(names["cache"][0, :, 0], [0, 1, 2, 0])
    assert names["picture"].getpixel((0, 0)) == (3, 67, 67, 255)  # half of teal, and 3
    assert (packages / "stylized.png").exists()
    assert len(BLOCKS) == 7


def test_the_list_of_operations_is_the_tables():
    text = DOCUMENT.read_text(encoding="utf-8")
    made = runpy.run_path(str(ROOT / "scripts" / "interpreter_operations.py"))["with_section"](text)
    assert made == text, "run: python scripts/interpreter_operations.py"
    assert "`conv_transpose`" in text
