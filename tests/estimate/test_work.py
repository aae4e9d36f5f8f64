"""What is counted in the files, against what torch counts in the reference and what arithmetic says."""

import json
from dataclasses import replace
from functools import cache

import onnx
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.estimate_accuracy import model_work
from fastvlm_convert.errors import BundleError
from fastvlm_convert.estimate.mil_work import mil_work
from fastvlm_convert.estimate.onnx_work import onnx_work
from fastvlm_convert.estimate.work import most_alive
from fastvlm_convert.estimate.workload import target_work
from fastvlm_convert.manifest import load_manifest
from fastvlm_convert.pipeline import export
from fastvlm_convert.weights.shapes import weight_shapes
from tests.bundles import copy_bundle, graph_path, mixed_recipe, recipe
from tests.checkpoints import GOLDEN, HF, LLAVA, SHARDED, golden_checkpoint, golden_model

TARGETS = ("onnx", "coreml", "mlx")


@pytest.fixture(scope="module", params=[LLAVA, HF, SHARDED])
def works(request, tmp_path_factory):
    """A golden checkpoint's name and, by target, the work of its float16 bundle."""
    bundle = tmp_path_factory.mktemp("works") / "bundle"
    targets = TARGETS[1:] if request.param == SHARDED else TARGETS  # whose heads ONNX Runtime does not take
    export(GOLDEN / request.param / "checkpoint", bundle, recipe=recipe("fp16"), targets=list(targets))
    manifest = load_manifest(bundle)
    return request.param, {target: target_work(bundle, manifest, target) for target in targets}


@cache
def counted_by_torch(name: str) -> tuple[int, int]:
    """MACs of the reference's encoder, and of its decoder over a picture's tokens without a cache."""
    model = golden_model(name)
    config = model.config
    # As separate products: torch counts nothing for the fused attention of processors.
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as vision:
            model.encode_image(torch.zeros(1, 3, config.vision.image_size, config.vision.image_size))
        with FlopCounterMode(display=False) as decoder:
            tokens = config.vision.num_image_tokens
            model.decoder(torch.zeros(1, tokens, config.decoder.hidden_size), model.decoder.new_cache(tokens))
    return vision.get_total_flops() // 2, decoder.get_total_flops() // 2


def test_the_encoder_multiplies_as_often_as_torch_counts(works):
    name, by_target = works
    macs, _ = counted_by_torch(name)
    # mlx-vlm also computes a classifier of one column, and throws it away.
    extra = {"mlx": golden_model(name).config.vision.output_width}
    found = {target: work.vision.macs - extra.get(target, 0) for target, work in by_target.items()}
    assert found == dict.fromkeys(by_target, macs)


def test_the_prefill_multiplies_as_often_as_torch_counts(works):
    """But for what torch does in vain: attention to later tokens, and the head at all but the last."""
    name, by_target = works
    config = golden_model(name).config.decoder
    tokens = golden_model(name).config.vision.num_image_tokens
    _, macs = counted_by_torch(name)
    width = config.num_heads * config.head_dim
    later = 2 * config.num_layers * width * (tokens**2 - tokens * (tokens + 1) // 2)
    heads = (tokens - 1) * config.hidden_size * config.vocab_size
    for target in by_target.keys() & {"onnx", "mlx"}:
        assert by_target[target].prefill.macs == macs - later - heads


def by_hand(name: str, position: int) -> int:
    """MACs of one token: every matrix once, and attention to all tokens before and the token itself."""
    config = golden_model(name).config.decoder
    hidden, mlp = config.hidden_size, config.intermediate_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer = hidden * query + 2 * hidden * key + query * hidden + 3 * hidden * mlp
    attention = 2 * query * (position + 1)
    return config.num_layers * (layer + attention) + hidden * config.vocab_size


def test_a_token_multiplies_as_arithmetic_says(works):
    name, by_target = works
    tokens = golden_model(name).config.vision.num_image_tokens
    for target in by_target.keys() & {"onnx", "mlx"}:
        assert by_target[target].decode_after_picture.macs == by_hand(name, tokens)
        assert by_target[target].decode_at_context.macs == by_hand(name, 2047)
    # The Core ML program attends to its whole cache, and masks what is not there yet.
    assert by_target["coreml"].decode_after_picture.macs == by_hand(name, 2047)


def test_a_token_reads_every_weight_of_the_decoder_once(works):
    """Of the files' bytes: a table that is not the head counts as one row, and the encoder not at all."""
    name, by_target = works
    config = golden_checkpoint(name).config
    shapes = weight_shapes(config)
    skipped = () if config.decoder.tied else ("decoder.embed_tokens.weight",)
    read = {n: s for n, s in shapes.items() if n.startswith("decoder.") and n not in skipped}
    # A tied head of fewer rows than the table reads those.
    size = sum(torch.Size(s).numel() for s in read.values())
    if config.decoder.tied:
        size -= (config.decoder.embed_rows - config.decoder.vocab_size) * config.decoder.hidden_size
    for target, work in by_target.items():
        # And constants of a few bytes; column numbers of the mask in Core ML.
        constants = 4 * 2048 if target == "coreml" else 0
        found = work.decode_after_picture.weight_bytes - constants
        assert found == pytest.approx(2 * size, rel=0.02)
        row, rotary = 2 * config.decoder.hidden_size, 2 * 2 * config.decoder.head_dim
        assert work.decode_after_picture.row_bytes - row in (0, rotary // 2, rotary)


def test_the_cache_grows_with_the_position(works):
    name, by_target = works
    config, tokens = golden_model(name).config.decoder, golden_model(name).config.vision.num_image_tokens
    token = 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim  # key and value, float16
    for target in by_target.keys() & {"onnx", "mlx"}:
        work = by_target[target]
        assert work.decode_after_picture.cache_bytes == (tokens + 2) * token  # all read, the new one written
        assert work.decode_at_context.cache_bytes == (2048 + 1) * token
        assert work.cache_bytes == 2048 * token
    assert by_target["coreml"].decode_after_picture.cache_bytes == (2048 + 1) * token


@pytest.mark.parametrize(("lengths", "attention"), [("range", "decomposed"), ("enumerated", "fused")])
def test_programs_of_open_length_count_as_those_of_a_fixed_one(tmp_path, lengths, attention):
    checkpoint = GOLDEN / LLAVA / "checkpoint"
    fixed, flexible = tmp_path / "fixed", tmp_path / "flexible"
    coreml = {"attention": attention}
    export(checkpoint, fixed, recipe=recipe("fp16", coreml=coreml), targets=["coreml"])
    coreml["sequence_lengths"] = lengths
    export(checkpoint, flexible, recipe=recipe("fp16", coreml=coreml), targets=["coreml"])
    package = "coreml/decoder.mlpackage"
    for tokens, function in ((64, "prefill"), (1, "decode")):
        work, other = (
            mil_work(fixed / package, function, tokens),
            mil_work(flexible / package, "decode", tokens),
        )
        assert (other.macs, other.cache_bytes) == (work.macs, work.cache_bytes)
        assert other.weight_bytes == pytest.approx(work.weight_bytes, rel=0.01)
    # 16 tokens of a picture are a call of 64 in the fixed program, and one of 16 in the other.
    works = [target_work(b, load_manifest(b), "coreml").prefill.macs for b in (fixed, flexible)]
    assert works[1] < works[0] < 5 * works[1]


def test_a_cache_of_tensors_is_written_whole(tmp_path):
    bundle = tmp_path / "bundle"
    settings = recipe("fp16", coreml={"kv_cache": "tensors"})
    export(GOLDEN / LLAVA / "checkpoint", bundle, recipe=settings, targets=["coreml"])
    work = target_work(bundle, load_manifest(bundle), "coreml")
    token = work.cache_bytes // 2048
    assert work.decode_after_picture.cache_bytes == 2 * work.cache_bytes + token


def test_integers_count_with_the_bits_they_have(tmp_path):
    """Mixed widths: every byte of the decoder's data file is read but the embedding's rows and alignment."""
    bundle = tmp_path / "bundle"
    export(GOLDEN / LLAVA / "checkpoint", bundle, recipe=mixed_recipe(), targets=["onnx"])
    work = target_work(bundle, load_manifest(bundle), "onnx")
    layers = json.loads((bundle / "layers.json").read_text())
    stored = sum(layer["stored_bits"] for layer in _decoder_layers(layers)) / 8
    assert work.decode_after_picture.weight_bytes == pytest.approx(stored, rel=0.02)
    floats = target_work_of_floats(tmp_path)
    assert work.decode_after_picture.weight_bytes < 0.6 * floats.decode_after_picture.weight_bytes
    assert work.decode_after_picture.macs == floats.decode_after_picture.macs


def target_work_of_floats(folder):
    bundle = folder / "floats"
    export(GOLDEN / LLAVA / "checkpoint", bundle, recipe=recipe("fp32"), targets=["onnx"])
    return target_work(bundle, load_manifest(bundle), "onnx")


def _decoder_layers(document):
    return [entry for entry in document["layers"] if entry["layer"].startswith("decoder.")]


def test_what_is_alive_at_a_time():
    writes = [("a", 10, ("x",)), ("b", 20, ("a",)), ("c", 5, ("a", "b")), ("d", 1, ("c",))]
    assert most_alive(writes, {"x": 4}) == 35  # a, b and c; x is gone after a
    assert most_alive([], {"x": 4}) == 4


def test_an_operation_nobody_knows_is_refused(fp32_bundle, tmp_path):
    bundle = copy_bundle(fp32_bundle, tmp_path)
    path = graph_path(bundle, "vision")
    model = onnx.load(path, load_external_data=False)
    node = next(n for n in model.graph.node if n.op_type == "Gelu")
    node.op_type = "Einsum"
    onnx.save(model, path)
    with pytest.raises(BundleError, match=f"operation '{node.name}' is a Einsum"):
        onnx_work(path, {"batch_size": 1}, {})


def test_a_graph_that_contradicts_itself_is_refused(fp32_bundle, tmp_path):
    bundle = copy_bundle(fp32_bundle, tmp_path)
    path = graph_path(bundle, "decoder")
    model = onnx.load(path, load_external_data=False)
    given = next(i for i in model.graph.input if i.name == "inputs_embeds")
    given.type.tensor_type.shape.dim[2].dim_value = 65
    onnx.save(model, path)
    sizes = {"batch_size": 1, "sequence_length": 1, "past_sequence_length": 1, "total_sequence_length": 2}
    for dimensions in (sizes, {"batch_size": 1}):
        with pytest.raises(BundleError, match=r"does not fit its inputs|unknown dimension"):
            onnx_work(path, dimensions, {})


@pytest.mark.parametrize("content", [b"", b"no graph", b"\xff" * 100])
def test_a_file_that_is_no_graph_is_refused(tmp_path, content):
    path = tmp_path / "graph.onnx"
    path.write_bytes(content)
    if content:
        with pytest.raises(BundleError, match="no valid protobuf"):
            onnx_work(path, {}, {})
    with pytest.raises(BundleError, match="cannot read the graph"):
        onnx_work(tmp_path / "none.onnx", {}, {})


def test_a_graph_that_prepares_pictures_counts_from_there(tmp_path):
    checkpoint = GOLDEN / LLAVA / "checkpoint"
    works = []
    for preprocessing in ("client", "in_graph"):
        bundle = tmp_path / preprocessing
        settings = recipe("fp16", onnx={"preprocessing": preprocessing})
        export(checkpoint, bundle, recipe=settings, targets=["onnx"])
        works.append(target_work(bundle, load_manifest(bundle), "onnx").vision)
    assert works[0] == works[1]


def test_a_value_can_be_given_so_that_what_makes_it_does_not_count(fp32_bundle):
    path = graph_path(fp32_bundle, "vision")
    whole = onnx_work(path, {"batch_size": 1}, {})
    first = onnx.load(path, load_external_data=False).graph.node[0]
    assert first.op_type == "Conv"
    part = onnx_work(path, {"batch_size": 1}, {first.output[0]: (1, 8, 128, 128)})
    assert whole.macs - part.macs == 8 * 128 * 128 * 27
    assert replace(part, macs=0) != replace(whole, macs=0)


def test_the_shape_of_the_published_model(tmp_path):
    """FastVLM-0.5B at 1024 pixels: the paper's encoder, and a decoder by arithmetic; no weight is made."""
    work = model_work("int8", tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 4e6
    hidden, layers, mlp, vocab, query, key = 896, 24, 4864, 151_936, 896, 128
    matrices = layers * (2 * hidden * query + 2 * hidden * key + 3 * hidden * mlp)
    assert work.decode.macs == matrices + hidden * vocab + layers * 2 * query * 257
    met = 256 * 257 // 2
    assert work.prefill.macs == 256 * matrices + hidden * vocab + layers * 2 * query * met
    assert 2 * work.vision.macs == pytest.approx(487e9, rel=0.01)
    assert work.decode.cache_bytes == (256 + 2) * 2 * 4 * layers * key  # keys and values in float32
