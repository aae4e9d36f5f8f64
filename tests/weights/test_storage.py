import numpy as np
import pytest

from fastvlm_convert.errors import CheckpointError, RecipeError
from fastvlm_convert.weights.source import Weight, computed
from fastvlm_convert.weights.storage import FLOAT16_MAX, checked, to_storage


def memory(values: np.ndarray) -> Weight:
    return Weight(values.shape, "float32", lambda start, stop: values[start:stop])


def test_the_limit_is_numpys():
    assert np.finfo(np.float16).max == FLOAT16_MAX


def test_float16_rounds_as_ieee_says_and_keeps_its_largest_number():
    values = np.array([FLOAT16_MAX, -FLOAT16_MAX, 0.1, 1 + 2**-11, 65519], np.float32)
    stored = to_storage(values, "float16", "w")
    assert stored.dtype == np.float16
    # A tie goes to even; all below 65520 round down to the largest.
    assert stored.tolist() == [65504, -65504, 0.0999755859375, 1, 65504]


def test_float32_is_not_copied():
    values = np.array([1e38, -1e-45], np.float32)
    assert to_storage(values, "float32", "w") is values


def test_a_value_beyond_float16_names_the_weight_the_value_and_what_to_do():
    with pytest.raises(
        RecipeError, match=r"weight 'l0_gate' reaches 6.552e\+04, beyond float16's 65504"
    ) as error:
        to_storage(np.array([1, -65520], np.float32), "float16", "l0_gate")
    assert "store that component as float32" in error.value.hint


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_infinity_and_nan_are_stored_in_no_precision(bad, dtype):
    with pytest.raises(CheckpointError, match=f"'w' holds 1 values .* after conversion to {dtype}"):
        to_storage(np.array([1, bad], np.float32), dtype, "w")


def test_a_float64_beyond_float32_is_refused():
    with pytest.raises(CheckpointError, match="'w' holds 2 values"):
        to_storage(np.array([1e39, 0, -1e300]), "float32", "w")


def test_the_step_that_made_an_infinity_is_named():
    before = {"kept": memory(np.ones((4, 2), np.float32)), "changed": memory(np.ones((4, 2), np.float32))}
    large = computed((4, 2), "float32", lambda: np.full((4, 2), 1e38) * [[1], [1], [1], [1e3]])
    view = checked({**before, "changed": large}, before, "merging the adapter")
    assert view["kept"] is before["kept"]
    assert view["changed"].read(0, 3).tolist() == np.full((3, 2), 1e38, np.float32).tolist()
    with pytest.raises(
        CheckpointError, match=r"'changed' holds 2 values .* infinite after merging the adapter"
    ):
        view["changed"].array()


def test_a_product_of_finite_halves_may_overflow_without_a_warning():
    before = {"w": memory(np.full((1, 1), 3e38, np.float32))}
    doubled = Weight((1, 1), "float32", lambda start, stop: before["w"].read(start, stop) * np.float32(2))
    with pytest.raises(CheckpointError, match="after applying the repairs"):
        checked({"w": doubled}, before, "applying the repairs")["w"].array()
