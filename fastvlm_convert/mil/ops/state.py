"""States: tensors that persist between calls. Reading and writing are done by the interpreter itself."""

from fastvlm_convert.mil.ops.slices import slices_of
from fastvlm_convert.mil.ops.table import Bools, InPlace, Ints, Tensor, op


@op("read_state", moves=True)
def read_state(input: Tensor) -> Tensor:
    """The value of a state; the interpreter hands over what the state holds."""
    return input


@op("slice_update", moves=True)
def slice_update(
    x: Tensor,
    update: Tensor,
    begin: Ints,
    end: Ints,
    in_place: InPlace,
    stride: Ints | None = None,
    begin_mask: Bools | None = None,
    end_mask: Bools | None = None,
    squeeze_mask: Bools | None = None,
) -> Tensor:
    """X with a slice replaced by `update`, which has the shape of the slice."""
    y = x if in_place is InPlace.YES else x.clone()
    index, flipped = slices_of(x.shape, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    if flipped:
        raise ValueError("slice_update with a negative stride")
    place = y[index]
    if place.numel() != update.numel():
        raise ValueError(f"the slice has shape {list(place.shape)}, the update {list(update.shape)}")
    place.copy_(update.reshape(place.shape))
    return y
