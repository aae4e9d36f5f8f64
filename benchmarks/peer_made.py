"""What is really in a file that a converter made: schemes by kind, read from the file itself.

Converters ignore options without a word: onnxruntime-genai 0.18 takes `int4_block_size=128` and makes blocks
of 32 (its option is called `block_size` now), and llama.cpp's Q4_K_M falls back to other types where a width
is no multiple of 256.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import onnx

MATRIX = "MatMulNBits"


@dataclass(frozen=True)
class Made:
    """What a file holds.

    Attributes:
        schemes: Scheme of the matrices -> how many of them, the most frequent first.
        table: How the embedding table is stored, where the file tells.
        num_bytes: Bytes of the file, and of what it refers to.
    """

    schemes: dict[str, int]
    table: str
    num_bytes: int

    @property
    def text(self) -> str:
        """In one line."""
        parts = [f"{count} x {scheme}" for scheme, count in self.schemes.items()]
        return "; ".join([*parts, *([f"table {self.table}"] if self.table else [])])


def _by_count(schemes: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(schemes).items(), key=lambda item: (-item[1], item[0])))


def nbits_scheme(node: onnx.NodeProto) -> str:
    """The scheme of a MatMulNBits: `int4 block 32 symmetric`.

    Its fourth input is the zero points; without them every integer is around the middle.
    """
    attributes = {a.name: a.i for a in node.attribute}
    asymmetric = len(node.input) > 3 and node.input[3] != ""
    kind = "asymmetric" if asymmetric else "symmetric"
    level = attributes.get("accuracy_level", 0)
    activations = "int8" if level == 4 else f"level {level}"
    return f"int{attributes['bits']} block {attributes['block_size']} {kind}, {activations} activations"


def made_onnx(paths: Iterable[Path]) -> Made:
    """What graphs of one model hold, external data included."""
    schemes: list[str] = []
    table, files = "", set()
    for path in paths:
        graph = onnx.load(path, load_external_data=False).graph
        files.add(path)
        schemes += [nbits_scheme(node) for node in graph.node if node.op_type == MATRIX]
        for tensor in graph.initializer:
            files |= {path.parent / e.value for e in tensor.external_data if e.key == "location"}
        table = table or _table(graph)
    return Made(_by_count(schemes), table, sum(file.stat().st_size for file in files))


def _table(graph: onnx.GraphProto) -> str:
    """How the operator that looks token ids up stores what it looks into."""
    types = {t.name: onnx.TensorProto.DataType.Name(t.data_type).lower() for t in graph.initializer}
    for node in graph.node:
        if len(node.input) < 2 or "input_ids" not in node.input[1]:
            continue
        if node.op_type == "GatherBlockQuantized":
            sizes = {a.name: a.i for a in node.attribute}
            return f"int{sizes.get('bits', 4)} block {sizes['block_size']}"
        if node.op_type == "Gather" and node.input[0] in types:
            return types[node.input[0]]
    return ""


def made_gguf(path: Path) -> Made:
    """What a GGUF file holds; vectors, which stay float32, do not count."""
    import gguf

    tensors = gguf.GGUFReader(path).tensors
    schemes = [t.tensor_type.name for t in tensors if len(t.shape) > 1 and t.name != "token_embd.weight"]
    table = next(t.tensor_type.name for t in tensors if t.name == "token_embd.weight")
    return Made(_by_count(schemes), table, path.stat().st_size)
