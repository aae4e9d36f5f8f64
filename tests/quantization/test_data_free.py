"""Weights that are quantized when they are read."""

from dataclasses import replace

import numpy as np
import pytest

from fastvlm_convert.quantization.data_free import quantize_weights
from fastvlm_convert.quantization.palettes import palettize
from fastvlm_convert.quantized.layer_plan import plan_layers
from fastvlm_convert.quantized.weight import PaletteWeight
from fastvlm_convert.recipe_settings import QuantizeRule
from fastvlm_convert.weights.source import Weight
from tests.bundles import recipe
from tests.quantization.layers import weights

VALUES = weights(3, 96, 4 * 9).reshape(96, 4, 3, 3)


class Rows:
    """A weight that counts the rows read of it."""

    def __init__(self) -> None:
        self.read = 0
        self.weight = Weight(VALUES.shape, "float32", self._rows)

    def _rows(self, start: int, stop: int) -> np.ndarray:
        self.read += stop - start
        return VALUES[start:stop]


@pytest.fixture
def made() -> tuple[Rows, PaletteWeight]:
    rows = Rows()
    rule = QuantizeRule(("vision.conv",), "palette4", group_size=8, channel_scale=True)
    source = {"vision.conv.weight": rows.weight}
    plans = plan_layers({"vision.conv.weight": VALUES.shape}, replace(recipe(), quantize=(rule,)))
    palettes = quantize_weights(source, plans)["vision.conv.weight"]
    assert isinstance(palettes, PaletteWeight)
    return rows, palettes


def test_nothing_is_read_before_it_is_asked_for(made):
    rows, palettes = made
    assert (palettes.shape, palettes.rows, palettes.columns) == (VALUES.shape, 96, 36)
    assert rows.read == 0


def test_any_rows_are_those_of_the_whole(made):
    rows, palettes = made
    whole = palettize(VALUES.reshape(96, -1), palettes.scheme).dequantized().reshape(VALUES.shape)
    dense = palettes.dense()
    np.testing.assert_array_equal(dense.array(), whole)
    assert rows.read == 96
    for start, stop in ((0, 5), (7, 9), (16, 24), (90, 96)):
        rows.read = 0
        np.testing.assert_array_equal(dense.read(start, stop), whole[start:stop])
        assert rows.read <= 8 * (-(-stop // 8) - start // 8)  # the groups touched, no others
