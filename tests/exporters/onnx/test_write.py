import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.errors import RecipeError, TargetError
from fastvlm_convert.manifest import load_manifest
from fastvlm_convert.pipeline import export
from fastvlm_convert.weights import file_tensors
from fastvlm_convert.weights.fold import fold
from tests.bundles import FP16, external_regions, graph_path, load_graph, recipe
from tests.checkpoints import GOLDEN, SHARDED, edit_json, edit_tensors, read_tensors
from tests.exporters.onnx.conftest import Variant

COMPONENTS = ("vision", "embed", "decoder")
GRAPHS = (*((component, "main") for component in COMPONENTS), ("embed", "merge"))
PAGE = 4096

# What transformers.js and onnxruntime-genai read, by the names that they use.
SIZES = {  # hidden, KV heads, head size, vocabulary, image edge
    "fp32": (64, 2, 16, 512, 256),
    "fp16": (64, 2, 16, 512, 256),
    "hf": (64, 2, 16, 512, 256),
    "own_table": (64, 2, 16, 512, 256),
    "untied": (112, 1, 16, 453, 192),
    "cut": (64, 2, 16, 432, 256),
    "mixed": (64, 2, 16, 512, 320),
}
FILES = {
    "fp16": {"vision_encoder_fp16", "embed_tokens_fp16", "decoder_model_merged_fp16"},
    "mixed": {"vision_encoder_fp16", "embed_tokens_fp16", "decoder_model_merged"},
}


def described(values) -> dict[str, tuple[str, list]]:
    return {
        v.name: (
            TensorProto.DataType.Name(v.type.tensor_type.elem_type),
            [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim],
        )
        for v in values
    }


@pytest.mark.parametrize("graph", GRAPHS, ids="-".join)
def test_the_checker_accepts_it(variant: Variant, graph):
    onnx.checker.check_model(str(graph_path(variant.bundle, *graph)), full_check=True)


def test_inputs_and_outputs_are_what_clients_read(variant: Variant):
    hidden, kv_heads, head_dim, vocab, size = SIZES[variant.name]
    cache = "FLOAT16" if variant.name == "fp16" else "FLOAT"
    graphs = {c: load_graph(variant.bundle, c).graph for c in COMPONENTS}
    assert described(graphs["vision"].input) == {"pixel_values": ("FLOAT", ["batch_size", 3, size, size])}
    assert described(graphs["vision"].output) == {"image_features": ("FLOAT", ["num_image_tokens", hidden])}
    tokens = ["batch_size", "sequence_length"]
    assert described(graphs["embed"].input) == {"input_ids": ("INT64", tokens)}
    assert described(graphs["embed"].output) == {"inputs_embeds": ("FLOAT", [*tokens, hidden])}
    merge = load_graph(variant.bundle, "embed", "merge").graph
    features = {"image_features": ("FLOAT", ["num_image_tokens", hidden])}
    assert described(merge.input) == {"input_ids": ("INT64", tokens), **features}
    assert described(merge.output) == {"inputs_embeds": ("FLOAT", [*tokens, hidden])}
    past = (cache, ["batch_size", kv_heads, "past_sequence_length", head_dim])
    present = (cache, ["batch_size", kv_heads, "total_sequence_length", head_dim])
    assert described(graphs["decoder"].input) == {
        "inputs_embeds": ("FLOAT", [*tokens, hidden]),
        "attention_mask": ("INT64", ["batch_size", "total_sequence_length"]),
        **{f"past_key_values.{i}.{kind}": past for i in range(2) for kind in ("key", "value")},
    }
    assert described(graphs["decoder"].output) == {
        "logits": ("FLOAT", ["batch_size", 1, vocab]),
        **{f"present.{i}.{kind}": present for i in range(2) for kind in ("key", "value")},
    }


def test_the_manifest_says_what_the_graphs_say(variant: Variant):
    for artifact in load_manifest(variant.bundle).artifacts:
        graph = load_graph(variant.bundle, artifact.component, artifact.function).graph
        for specs, values in ((artifact.inputs, graph.input), (artifact.outputs, graph.output)):
            types = {"FLOAT": "float32", "FLOAT16": "float16", "INT64": "int64"}
            found = {name: (types[dtype], tuple(shape)) for name, (dtype, shape) in described(values).items()}
            assert {s.name: (s.dtype, s.shape) for s in specs} == found


def test_files_are_named_as_clients_look_them_up(variant: Variant):
    stems = FILES.get(variant.name, {"vision_encoder", "embed_tokens", "decoder_model_merged"})
    expected = {f"{stem}.onnx" for stem in stems} | {f"{stem}.onnx_data" for stem in stems}
    expected |= {f"{stem}.onnx".replace("embed_tokens", "embedding") for stem in stems}
    if variant.name not in ("own_table", "untied", "mixed"):  # there the table lies in the decoder's file
        expected = {name for name in expected if not (name.startswith("embed") and name.endswith("_data"))}
    assert {path.name for path in (variant.bundle / "onnx").iterdir()} == expected


def regions_by_file(bundle: Path) -> dict[str, dict[int, int]]:
    """File -> offset -> length of the longest tensor there, over all graphs."""
    regions: dict[str, dict[int, int]] = {}
    for graph in GRAPHS:
        for file, offset, length in external_regions(load_graph(bundle, *graph)).values():
            at = regions.setdefault(file, {})
            at[offset] = max(length, at.get(offset, 0))
    return regions


def test_data_files_hold_pages_of_tensors_and_nothing_else(variant: Variant):
    data_files = regions_by_file(variant.bundle)
    assert set(data_files) == {p.name for p in (variant.bundle / "onnx").glob("*.onnx_data")}
    for name, regions in data_files.items():
        end = 0
        for offset, length in sorted(regions.items()):
            assert offset % PAGE == 0
            assert offset == end + -end % PAGE  # right behind the one before: no gap, no overlap
            end = offset + length
        assert (variant.bundle / "onnx" / name).stat().st_size == end


def test_no_weight_is_stored_twice(variant: Variant):
    digests: Counter[str] = Counter()
    for name, regions in regions_by_file(variant.bundle).items():
        content = (variant.bundle / "onnx" / name).read_bytes()
        digests.update(hashlib.sha256(content[o : o + n]).hexdigest() for o, n in regions.items())
    twice = sum(count - 1 for count in digests.values())
    assert twice == (
        1 if variant.name == "own_table" else 0
    )  # its very purpose: browsers need their own table


@pytest.mark.parametrize("name", ["fp32", "fp16", "hf", "cut"])
def test_tied_head_and_embedding_are_one_region(variants, name):
    bundle = variants(name).bundle
    head = external_regions(load_graph(bundle, "decoder"))["lm_head_weight"]
    table = external_regions(load_graph(bundle, "embed"))["embed_tokens_weight"]
    assert head[:2] == table[:2]
    assert head[2] <= table[2]
    decoder_file = graph_path(bundle, "decoder").name
    assert table[0] == f"{decoder_file}_data"


@pytest.mark.parametrize("name", ["own_table", "untied", "mixed"])
def test_otherwise_each_has_its_own_file(variants, name):
    bundle = variants(name).bundle
    table = external_regions(load_graph(bundle, "embed"))["embed_tokens_weight"]
    assert table[:2] == (f"{graph_path(bundle, 'embed').name}_data", 0)
    assert "lm_head_weight" in external_regions(load_graph(bundle, "decoder"))


def test_every_element_of_the_model_is_stored_once(variant: Variant):
    """Elements in the files, against those of the folded weights: nothing is left out or added."""
    checkpoint = open_checkpoint(variant.checkpoint)
    weights = fold(checkpoint.weights)
    decoder = checkpoint.config.decoder
    expected = sum(weight.size for weight in weights.values())
    expected += variant.settings.common.max_context_length * decoder.head_dim  # cosines and sines
    if decoder.tied and not variant.settings.onnx.shared_table:
        expected += weights["decoder.embed_tokens.weight"].size
    if variant.name == "cut":
        expected += decoder.hidden_size  # the row of <image>
    found = 0
    seen = set()
    longest = regions_by_file(variant.bundle)
    for component in COMPONENTS:
        model = load_graph(variant.bundle, component)
        regions = external_regions(model)
        for tensor in model.graph.initializer:
            if tensor.data_type not in (TensorProto.FLOAT, TensorProto.FLOAT16):
                continue
            if tensor.name not in regions:
                found += int(np.prod(tensor.dims))
            elif regions[tensor.name][:2] not in seen:
                file, offset, _ = regions[tensor.name]
                seen.add((file, offset))
                found += longest[file][offset] // (4 if tensor.data_type == TensorProto.FLOAT else 2)
    assert found == expected


def test_weights_have_the_dtype_that_the_recipe_says(variant: Variant):
    dtypes = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}
    for component in COMPONENTS:
        stored = {
            tensor.data_type
            for tensor in load_graph(variant.bundle, component).graph.initializer
            if tensor.data_type in dtypes.values()
        }
        assert stored == {dtypes[getattr(variant.settings, component).storage]}


def test_op_names_are_unique_in_a_graph(variant: Variant):
    for graph in GRAPHS:
        names = [node.name for node in load_graph(variant.bundle, *graph).graph.node]
        assert all(names)
        assert len(names) == len(set(names))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every read of a tensor from a file from now on."""
    counted: list[int] = []
    read_exactly = file_tensors._read_exactly

    def read(path, into, offset):
        counted.append(into.nbytes)
        read_exactly(path, into, offset)

    monkeypatch.setattr(file_tensors, "_read_exactly", read)
    return counted


def test_an_impossible_head_size_is_refused_before_any_weight_is_read(llava, reads, tmp_path):
    edit_json(llava / "config.json", {"num_attention_heads": 8})
    with pytest.raises(
        TargetError, match=r"the decoder's head size is 8; .* needs a multiple of 16"
    ) as caught:
        export(llava, tmp_path / "out" / "bundle", recipe=recipe(), targets=["onnx"])
    assert caught.value.hint
    assert reads == []
    assert not (tmp_path / "out").exists()


def test_an_impossible_head_size_of_an_untied_model(reads, tmp_path):
    with pytest.raises(TargetError, match="the decoder's head size is 8"):
        export(GOLDEN / SHARDED / "checkpoint", tmp_path / "bundle", recipe=recipe(), targets=["onnx"])
    assert reads == [453 * 112 * 2] * 2  # head and embedding were compared, to see whether they are one
    assert list(tmp_path.iterdir()) == []


def test_the_same_counter_sees_an_export_read(llava, reads, tmp_path):
    export(llava, tmp_path / "bundle", recipe=recipe(), targets=["onnx"])
    assert len(reads) > 100


@pytest.mark.parametrize(
    ("tensor", "op"),
    [
        ("model.layers.1.mlp.gate_proj.weight", "l1_gate_weight"),
        ("model.embed_tokens.weight", "embed_tokens"),
        ("model.mm_projector.0.weight", "projector_fc1_weight"),
    ],
)
def test_a_weight_beyond_float16_is_an_error_that_names_it(llava, tmp_path, tensor, op):
    values = read_tensors(llava)[tensor]
    values[3, 1] = -1e5
    edit_tensors(llava, {tensor: values})
    with pytest.raises(RecipeError, match=rf"weight '{op}' reaches 1e\+05, beyond float16's 65504") as caught:
        export(llava, tmp_path / "out" / "bundle", recipe=recipe(FP16), targets=["onnx"])
    assert "float32" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()
