"""The exporters are twins: what is found under a name in one folder is found under it in the other.

MLX has no graph to build, so its folder has some of their files, with the same names in them.
"""

import ast
from functools import cache
from pathlib import Path

import pytest

import fastvlm_convert.exporters

FOLDER = Path(fastvlm_convert.exporters.__file__).parent
TARGETS = ("onnx", "coreml")

# Files that one format alone needs, and why.
OWN_FILES = {
    "onnx": {
        "genai": "onnxruntime-genai reads a config of its own",
        "merge": "onnxruntime-genai embeds and merges image features in one graph",
        "transformers_js": "transformers.js reads a config of its own",
        "pictures": "clients that resize in their own way send pictures of any size",
        "fused": "operators of ONNX Runtime that read integers; Core ML decompresses weights first",
    },
    "coreml": {
        "metadata": "a package holds texts for people",
        "paths": "a package is a folder of files",
        "split": "Apple's devices are reported to compute wide matrices wrongly",
        "stretches": "a decoder may be too large for one program",
        "values": "a program writes down the dtype and shape of every value, an ONNX graph does not",
    },
}
# Public names that one format alone needs, by file, and why.
OWN_NAMES = {
    "onnx": {
        "cache": ({"close_cache"}, "every graph gives the whole cache back"),
        "data": (
            {"Region", "DataFile", "ExternalData"},
            "we write the file; coremltools writes Core ML's",
        ),
        "embed": ({"look_up"}, "the graph that merges image features looks up the same way"),
        "graph": ({"tensor_type"}, "a graph names dtypes by number"),
        "lower": ({"ModelInputs"}, "graphs hold how pictures are prepared, and the id that features replace"),
        "ops": ({"rms_norm_of_sum"}, "ONNX Runtime has one operator for a sum and its norm"),
        "proto": ({"write_graph"}, "a file is one graph, a package several"),
        "proto_size": ({"graph_bytes"}, "a file is one graph, a package several"),
        "static": (
            {"input_scale", "rounded", "static_linear"},
            "16 bits have a form of their own; linear layers have another operator for integers",
        ),
        "support": ({"check_pictures"}, "some ways to prepare pictures cannot be written as a graph"),
    },
    "coreml": {
        "cache": ({"Cache", "TensorCache", "StateCache"}, "state that stays inside, or tensors for tests"),
        "data": ({"is_inline", "LazyArray"}, "coremltools writes the file and asks for arrays one by one"),
        "decoder": ({"Stretch"}, "a decoder may be too large for one program"),
        "graph": (
            {"Input", "Lengths", "check_patterns", "scalar"},
            "inputs are pictures, states or of flexible length; operations may differ in precision",
        ),
        "ops": (
            {"attention", "rms_norm", "zeros"},
            "attention has two forms; ONNX's norms begin with a sum; a linear layer always has a bias",
        ),
        "proto": ({"write_package"}, "a file is one graph, a package several"),
        "proto_size": ({"package_bytes"}, "a file is one graph, a package several"),
        "static": ({"rounded_input"}, "a linear layer is any other behind what rounds its input"),
        "vision": ({"build_apple_vision"}, "Apple's app loads a vision package"),
        "weights": (
            {"looked_up", "dense_rows", "AffineParts"},
            "palettes; long tables in parts; the writer asks for integers and scales one by one",
        ),
    },
}

# Files and public names of MLX's folder that the twins have not, and why.
MLX_FILES = {
    "groups": "integers lie in groups with a bias, whose sizes are few",
    "folders": "each folder has a config.json of its own",
}
MLX_NAMES = {
    "decoder": ({"language_name"}, "config.json names layers, too"),
    "sizes": ({"entries_of"}, "files are tensors by name"),
    "support": ({"notes"}, "it stores as floats what it cannot hold"),
    "vision": ({"build_projector"}, "Apple's app has the projector without the encoder"),
    "weights": (
        {"NamedWeight", "Tensors", "tensors", "channels_last", "constant"},
        "tensors of a file, in the layout of another network",
    ),
}

Arguments = list[str]


@cache
def files(target: str) -> dict[str, ast.Module]:
    paths = sorted((FOLDER / target).glob("*.py"))
    return {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def definitions(module: ast.Module | ast.ClassDef, target: str, prefix: str = "") -> dict[str, Arguments]:
    """Functions, classes and methods with their arguments; a target's own name in a name is no difference."""
    found: dict[str, Arguments] = {}
    for node in module.body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = []
            found |= definitions(node, target, f"{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            found[prefix + node.name.replace(target, "TARGET")] = arguments
    return found


def public_names(module: ast.Module, target: str) -> set[str]:
    return {name for name in definitions(module, target) if "." not in name and not name.startswith("_")}


def shared_files() -> list[str]:
    return sorted(set(files("onnx")) & set(files("coreml")))


def in_one_order(a: Arguments, b: Arguments) -> bool:
    """Whether arguments that both have stand in one order."""
    return [name for name in a if name in b] == [name for name in b if name in a]


def test_both_have_the_same_files():
    onnx, coreml = set(files("onnx")), set(files("coreml"))
    assert onnx - coreml == set(OWN_FILES["onnx"])
    assert coreml - onnx == set(OWN_FILES["coreml"])
    expected = {"vision", "decoder", "attention", "embed", "ops", "weights", "write", "sizes"}
    assert expected <= onnx & coreml


@pytest.mark.parametrize("file", shared_files())
def test_files_have_the_same_public_names(file):
    onnx, coreml = (public_names(files(target)[file], target) for target in TARGETS)
    assert onnx - coreml == OWN_NAMES["onnx"].get(file, (set(), ""))[0]
    assert coreml - onnx == OWN_NAMES["coreml"].get(file, (set(), ""))[0]


@pytest.mark.parametrize("file", shared_files())
def test_functions_of_one_name_take_arguments_in_one_order(file):
    """Methods and private functions too. What is public also begins with the same argument."""
    onnx, coreml = (definitions(files(target)[file], target) for target in TARGETS)
    for name in set(onnx) & set(coreml):
        assert in_one_order(onnx[name], coreml[name]), f"{file}.{name}: {onnx[name]}, {coreml[name]}"
        if not name.startswith("_"):
            assert onnx[name][:1] == coreml[name][:1], f"{file}.{name}"


@pytest.mark.parametrize("target", TARGETS)
def test_layers_take_graph_name_and_input_in_this_order(target):
    layers = definitions(files(target)["ops"], target)
    assert len(layers) >= 4
    for name, arguments in layers.items():
        given = [a for a in arguments if a in ("graph", "name", "x")]
        assert given == [a for a in ("graph", "name", "x") if a in given], name


def test_mlx_has_the_files_and_names_of_the_twins():
    mlx = files("mlx")
    assert set(mlx) - set(files("onnx")) == set(MLX_FILES)
    assert {"backend", "decoder", "lower", "sizes", "support", "vision", "weights", "write"} <= set(mlx)
    for file in set(mlx) & set(files("onnx")):
        twins = public_names(files("onnx")[file], "onnx") | public_names(files("coreml")[file], "coreml")
        assert public_names(mlx[file], "mlx") - twins == MLX_NAMES.get(file, (set(), ""))[0], file


def test_reversed_arguments_are_noticed():
    assert in_one_order(["graph", "name", "x", "weight"], ["graph", "name", "x", "skip", "weight"])
    assert not in_one_order(["x", "weight", "name"], ["name", "x", "weight"])
    assert not in_one_order(["x", "name"], ["name", "x"])


def test_names_are_read_with_their_owner_and_without_the_target():
    module = ast.parse("def export_onnx(job): ...\nclass A:\n    def b(self, c, *, d): ...\nX = 1\n")
    assert definitions(module, "onnx") == {"export_TARGET": ["job"], "A": [], "A.b": ["self", "c", "d"]}
