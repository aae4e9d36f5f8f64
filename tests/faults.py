"""Faults planted in copies of bundles, hashes adapted so that only `verify`'s own judgment finds them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from fastvlm_convert.manifest import FILE_NAME, file_entries
from fastvlm_convert.mil.package import open_package
from tests.bundles import edit_manifest, external_regions, graph_path, load_graph


def adapt_hashes(bundle: Path) -> None:
    """Make the manifest say what is in the files."""
    entries = {name: vars(entry) for name, entry in file_entries(bundle).items() if name != FILE_NAME}
    edit_manifest(bundle, lambda manifest: manifest.update(files=entries))


def edit_file(bundle: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Let `change` alter the parsed content of a JSON file."""
    path = bundle / name
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value, ensure_ascii=False))
    adapt_hashes(bundle)


def edit_onnx_table(bundle: Path, name: str, change: Callable[[np.ndarray], object]) -> None:
    """Let `change` alter a decoder's constant [rows, width] in its data file, in place."""
    model = load_graph(bundle, "decoder")
    (tensor,) = (t for t in model.graph.initializer if t.name == name)
    location, offset, _ = external_regions(model)[name]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    path = graph_path(bundle, "decoder").parent / location
    change(np.memmap(path, dtype, "r+", offset, tuple(tensor.dims)))
    adapt_hashes(bundle)


def edit_coreml_constant(package: Path, name: str, change: Callable[[np.ndarray], object]) -> None:
    """Let `change` alter a constant in the weight file of a package, in place."""
    opened = open_package(package)
    functions = opened.spec.mlProgram.functions.values()
    operations = (o for f in functions for b in f.block_specializations.values() for o in b.operations)
    value = next(o for o in operations if o.type == "const" and o.outputs[0].name == name).attributes["val"]
    sizes = [d.constant.size for d in value.type.tensorType.dimensions]
    path = opened.folder / "weights" / "weight.bin"
    # A record of 64 bytes, of which the third number of 8 bytes is where the values begin.
    start = int(np.memmap(path, np.uint64, "r", value.blobFileValue.offset, 3)[2])
    dtype = {10: np.float16, 11: np.float32}[value.type.tensorType.dataType]
    change(np.memmap(path, dtype, "r+", start, tuple(sizes)))


def edit_description(package: Path, change: Callable[[Any], object]) -> None:
    """Let `change` alter the description in a package's program."""
    (path,) = package.glob("Data/*/model.mlmodel")
    spec = open_package(package).spec
    change(spec.description)
    path.write_bytes(spec.SerializeToString())
