"""How quantized matrices lie in safetensors files: a few plain tensors each, integers packed.

An affine matrix is `q`, uint8 [rows, bytes]; `scale`, float16 [rows, blocks]; and where asymmetric
`zero_point`, uint8 [rows, blocks]. A palette matrix is `indices`, uint8 [rows, bytes]; `palette`, float16
[groups, levels]; and with a scale per channel `scale`, float16 [rows]. `q` and `indices` are packed as
`quantized/packing.py` says. The scheme of a tensor is stored elsewhere: in a plan or in quantized.json.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fastvlm_convert.arithmetic import ceil_div, num_elements
from fastvlm_convert.atomic_file import whole_file
from fastvlm_convert.errors import CheckpointError
from fastvlm_convert.quantized.packing import pack, packed_columns, unpack
from fastvlm_convert.quantized.schemes import (
    AffineMatrix,
    AffineScheme,
    PaletteMatrix,
    PaletteScheme,
    QuantizedMatrix,
    Scheme,
)
from fastvlm_convert.quantized.weight import PaletteWeight, QuantizedWeight, StoredWeight
from fastvlm_convert.weights.file_tensors import FileTensor
from fastvlm_convert.weights.safetensors_file import Entries, lay_out, read_header
from fastvlm_convert.weights.source import Weight

_LAYER = "weight"  # what a file of one layer calls its matrix; no canonical name is that short


def matrix_entries(scheme: Scheme, rows: int, columns: int) -> Entries:
    """Part name -> dtype and shape of the tensors that hold a matrix.

    Args:
        scheme: How it is quantized; its blocks divide `columns`.
        rows: Output channels.
        columns: Weights of one output channel.
    """
    stream = ("uint8", (rows, packed_columns(columns, scheme.bits)))
    if isinstance(scheme, AffineScheme):
        blocks = (rows, scheme.num_blocks(columns))
        affine: dict[str, tuple[str, tuple[int, ...]]] = {"q": stream, "scale": ("float16", blocks)}
        return affine if scheme.symmetric else {**affine, "zero_point": ("uint8", blocks)}
    tables = ("float16", (scheme.num_groups(rows), scheme.levels))
    palette: dict[str, tuple[str, tuple[int, ...]]] = {"indices": stream, "palette": tables}
    return {**palette, "scale": ("float16", (rows,))} if scheme.per_channel_scale else palette


def matrix_tensors(matrix: QuantizedMatrix) -> dict[str, np.ndarray]:
    """The tensors that hold a matrix, or consecutive rows of one, as `matrix_entries` names them."""
    if isinstance(matrix, AffineMatrix):
        affine = {"q": pack(matrix.q, matrix.scheme.bits), "scale": matrix.scale}
        return affine if matrix.scheme.symmetric else {**affine, "zero_point": matrix.zero_point}
    palette = {"indices": pack(matrix.indices, matrix.scheme.bits), "palette": matrix.palette}
    return palette if matrix.scale is None else {**palette, "scale": matrix.scale}


def affine_matrix(tensors: Mapping[str, np.ndarray], scheme: AffineScheme, columns: int) -> AffineMatrix:
    """The rows that `matrix_tensors` was given."""
    scale = tensors["scale"]
    middle = np.full(scale.shape, scheme.middle, np.uint8)
    return AffineMatrix(
        scheme, unpack(tensors["q"], scheme.bits, columns), scale, tensors.get("zero_point", middle)
    )


def palette_matrix(tensors: Mapping[str, np.ndarray], scheme: PaletteScheme, columns: int) -> PaletteMatrix:
    """The matrix that `matrix_tensors` was given."""
    indices = unpack(tensors["indices"], scheme.bits, columns)
    return PaletteMatrix(scheme, indices, tensors["palette"], tensors.get("scale"))


def stored_weight(
    tensors: Mapping[str, FileTensor], name: str, shape: tuple[int, ...], scheme: Scheme, path: Path
) -> StoredWeight:
    """A quantized weight in a file, read when it is asked for.

    Args:
        tensors: The file's tensors.
        name: The weight's name; its parts are called `NAME.q` and so on.
        shape: Dimensions of the weight.
        scheme: How it is quantized.
        path: The file or folder, for messages.

    Returns:
        A weight that raises `CheckpointError` when it is read and holds scales that are NaN or infinite, or
        a zero point beyond the scheme's bits.

    Raises:
        CheckpointError: A part is missing, or has another dtype or shape than the scheme asks for.
    """
    columns = num_elements(shape[1:])
    parts: dict[str, FileTensor] = {}
    for part, (dtype, expected) in matrix_entries(scheme, shape[0], columns).items():
        found = tensors.get(f"{name}.{part}")
        if found is None:
            raise CheckpointError(f"tensor '{name}.{part}' is missing", where=path)
        if (found.dtype, found.shape) != (dtype, expected):
            raise CheckpointError(
                f"tensor '{name}.{part}' is {found.dtype} {list(found.shape)}, its scheme needs {dtype} "
                f"{list(expected)}",
                where=path,
            )
        parts[part] = found
    if isinstance(scheme, PaletteScheme):

        def groups(start: int, stop: int) -> PaletteMatrix:
            size = scheme.group_size
            spans = dict.fromkeys(parts, (start, stop))
            spans["palette"] = (start // size, ceil_div(stop, size))
            arrays = {part: _checked(tensor, *spans[part]) for part, tensor in parts.items()}
            return palette_matrix(arrays, scheme, columns)

        return PaletteWeight(shape, scheme, groups)

    def read(start: int, stop: int) -> AffineMatrix:
        rows = {part: _checked(tensor, start, stop) for part, tensor in parts.items()}
        if not scheme.symmetric and rows["zero_point"].max(initial=0) >= scheme.levels:
            raise CheckpointError(
                f"tensor '{name}.zero_point' holds {rows['zero_point'].max()}, more than {scheme.bits} bits",
                where=path,
            )
        return affine_matrix(rows, scheme, columns)

    return QuantizedWeight(shape, scheme, read)


def _checked(tensor: FileTensor, start: int, stop: int) -> np.ndarray:
    rows = tensor.rows(start, stop)
    if rows.dtype == np.float16 and not np.isfinite(rows).all():
        raise CheckpointError(
            f"tensor '{tensor.name}' holds values that are NaN or infinite",
            where=tensor.path,
            hint="it is damaged; quantize again",
        )
    return rows


def save_layer(path: Path, matrix: QuantizedMatrix, floats: Mapping[str, np.ndarray]) -> None:
    """Save one solved layer in a file of its own, which appears whole or not at all.

    Args:
        path: The file; its folder exists.
        matrix: The layer's weight.
        floats: Float32 tensors that solving it changed (norms, biases), by canonical name.

    Raises:
        OSError: The file cannot be written.
    """
    tensors = {f"{_LAYER}.{part}": array for part, array in matrix_tensors(matrix).items()}
    tensors |= {name: np.asarray(array, np.float32) for name, array in sorted(floats.items())}
    with whole_file(path) as partial:
        layout = lay_out(partial, {name: (array.dtype.name, array.shape) for name, array in tensors.items()})
        layout.create()
        for name, array in tensors.items():
            layout.write(name, [array])


def load_layer(path: Path, shape: tuple[int, ...], scheme: Scheme) -> tuple[StoredWeight, dict[str, Weight]]:
    """A layer that `save_layer` wrote; only the header is read.

    Args:
        path: The file.
        shape: Dimensions of the layer's weight.
        scheme: How it is quantized.

    Returns:
        The weight, and by canonical name the float tensors that solving it changed.

    Raises:
        CheckpointError: The file is missing or damaged, or holds another shape or scheme.
    """
    tensors = read_header(path)
    weight = stored_weight(tensors, _LAYER, shape, scheme, path)
    floats = {n: tensor.weight() for n, tensor in tensors.items() if not n.startswith(f"{_LAYER}.")}
    return weight, floats
