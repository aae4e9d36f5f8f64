"""States: tensors that persist between calls. Reading and writing are done by the interpreter itself."""

from fastvlm_convert.mil.ops.table import Tensor, op


@op("read_state", moves=True)
def read_state(input: Tensor) -> Tensor:
    """The value of a state; the interpreter hands over what the state holds."""
    return input
