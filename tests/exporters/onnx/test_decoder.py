"""The decoder's graph by itself, driven as a client drives it: the cache goes in and comes out."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

from fastvlm_convert import metrics
from fastvlm_convert.generate import generate, teacher_forced
from fastvlm_convert.pictures import load_image
from fastvlm_convert.prompt_reading import embed_prompt
from fastvlm_convert.weights.fold import fold
from tests.bundles import export_bundle, graph_path, load_graph, open_bundle, recipe
from tests.checkpoints import HF, LLAVA, edit_tensors, golden_cases, golden_checkpoint, read_tensors
from tests.exporters.onnx.conftest import Variant

CASES = [case for case in golden_cases() if case.name in (LLAVA, HF)]

Cache = dict[str, np.ndarray]


class Client:
    """A decoder session without any of our runtime around it."""

    def __init__(self, bundle: Path) -> None:
        self.session = onnxruntime.InferenceSession(
            graph_path(bundle, "decoder"), providers=["CPUExecutionProvider"]
        )
        self.past = {i.name: i for i in self.session.get_inputs() if i.name.startswith("past")}
        self.outputs = [o.name for o in self.session.get_outputs()]

    def empty(self, batch: int = 1) -> Cache:
        """Every symbol but the batch is 0, as transformers.js does it."""
        dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        return {
            name: np.zeros((batch, *(n if isinstance(n, int) else 0 for n in i.shape[1:])), dtypes[i.type])
            for name, i in self.past.items()
        }

    def run(self, embeds: np.ndarray, cache: Cache) -> tuple[np.ndarray, Cache]:
        """Logits and the cache that has grown."""
        total = next(iter(cache.values())).shape[2] + embeds.shape[1]
        mask = np.ones((len(embeds), total), np.int64)
        logits, *present = self.session.run(
            self.outputs, {"inputs_embeds": embeds, "attention_mask": mask, **cache}
        )
        names = [name.replace("present", "past_key_values") for name in self.outputs[1:]]
        return logits, dict(zip(names, present, strict=True))


def embeds_of(length: int, hidden: int = 64, batch: int = 1) -> np.ndarray:
    return np.random.default_rng(length).normal(size=(batch, length, hidden)).astype(np.float32)


@pytest.fixture(scope="module")
def client(variants):
    return Client(variants("fp32").bundle)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_and_tokens_are_those_of_the_original_code(variants, case):
    loaded = open_bundle(variants("fp32" if case.name == LLAVA else "hf").bundle)
    session = loaded.session
    prompt = loaded.prompt(case.question, [load_image(case.image)])
    embeds = embed_prompt(session, prompt, [session.encode_image(case.array("pixel_values"))])

    def close(golden, ours):
        np.testing.assert_allclose(ours, golden, rtol=0, atol=1e-4 * max(1.0, np.abs(golden).max()))

    close(case.array("prefill_logits")[0, -1], session.prefill(embeds))
    steps = case.array("decode_logits")
    if steps is not None:
        close(steps, teacher_forced(session, embeds, [*case.greedy_token_ids, 0])[1:])
    answer = generate(session, prompt, (), len(case.greedy_token_ids))
    assert list(answer.token_ids) == case.greedy_token_ids
    assert loaded.tokenizer.decode(list(answer.token_ids)) == case.greedy_text


@pytest.mark.parametrize("name", ["fp32", "hf", "own_table", "untied", "cut"])
def test_float32_equals_the_reference(variants, name):
    variant: Variant = variants(name)
    reference, candidate = variant.reference().session, open_bundle(variant.bundle).session
    ids = np.random.default_rng(0).integers(0, 400, 40)
    embeds = reference.embed(ids)
    forced = ids[:12].tolist()
    expected, found = (teacher_forced(s, embeds, forced) for s in (reference, candidate))
    assert metrics.sqnr_db(expected, found) >= 100


def test_float16_stays_close_to_the_reference(variants):
    variant: Variant = variants("fp16")
    reference, candidate = variant.reference().session, open_bundle(variant.bundle).session
    ids = np.random.default_rng(0).integers(0, 400, 40)
    embeds = reference.embed(ids)
    forced = ids[:12].tolist()
    expected, found = (teacher_forced(s, embeds, forced) for s in (reference, candidate))
    assert 50 <= metrics.sqnr_db(expected, found) < 80
    assert found.dtype == np.float32
    assert {v.dtype for v in Client(variant.bundle).empty().values()} == {np.dtype(np.float16)}


def test_float16_weights_that_lose_nothing_give_the_reference_in_float32_arithmetic(llava, tmp_path):
    """The rotary tables are no weights: rounding them to the storage dtype would cost 40 dB here."""
    tensors = read_tensors(llava)
    decoder = {k: v.half().float() for k, v in tensors.items() if "vision_tower" not in k}
    edit_tensors(llava, decoder)
    settings = recipe("fp16", decoder={"compute": "float32"}, vision={"storage": "float32"})
    loaded = open_bundle(export_bundle(llava, tmp_path / "bundle", settings))
    variant = Variant("", llava, settings, tmp_path / "bundle")
    reference = variant.reference().session
    ids = np.random.default_rng(0).integers(0, 400, 40)
    embeds = reference.embed(ids)
    expected, found = (teacher_forced(s, embeds, ids[:8].tolist()) for s in (reference, loaded.session))
    assert metrics.sqnr_db(expected, found) >= 100


@pytest.mark.parametrize("length", [1, 2, 7, 64, 300])
def test_any_prompt_length_gives_the_last_positions_logits(client, length):
    embeds = embeds_of(length)
    logits, cache = client.run(embeds, client.empty())
    assert logits.shape == (1, 1, 512)
    assert {v.shape for v in cache.values()} == {(1, 2, length, 16)}
    longer, _ = client.run(np.concatenate([embeds, embeds_of(3)], 1), client.empty())
    assert np.abs(longer - logits).max() > 1e-2


@pytest.mark.parametrize("chunks", [(3, 3), (1, 1, 1, 1, 1, 1), (5, 1), (2, 4)], ids=str)
@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_a_prefill_in_chunks_is_one_prefill(variants, name, chunks):
    client = Client(variants(name).bundle)
    embeds = embeds_of(6)
    expected, whole = client.run(embeds, client.empty())
    cache, start = client.empty(), 0
    for count in chunks:
        logits, cache = client.run(embeds[:, start : start + count], cache)
        start += count
    scale = np.abs(expected).max()
    np.testing.assert_allclose(logits, expected, atol=scale * (1e-5 if name == "fp32" else 3e-3))
    for key, value in whole.items():
        np.testing.assert_allclose(cache[key], value, atol=1e-5 if name == "fp32" else 2e-2)


def test_sequences_of_a_batch_do_not_see_each_other(client):
    embeds = embeds_of(9, batch=2)
    together, cache = client.run(embeds, client.empty(2))
    step, _ = client.run(embeds[:, :1], cache)
    for i in range(2):
        alone, alone_cache = client.run(embeds[i : i + 1], client.empty())
        np.testing.assert_allclose(together[i], alone[0], atol=1e-5)
        np.testing.assert_allclose(step[i], client.run(embeds[i : i + 1, :1], alone_cache)[0][0], atol=1e-5)


def test_positions_matter(client):
    """Rotary positions are inside: the same token at another place gives other logits."""
    embeds = embeds_of(4)
    _, cache = client.run(embeds, client.empty())
    first, cache = client.run(embeds[:, :1], cache)
    again, _ = client.run(embeds[:, :1], cache)
    assert np.abs(first - again).max() > 1e-3


def test_the_context_length_is_the_rotary_tables(variants):
    client = Client(variants("mixed").bundle)  # 128 positions
    logits, cache = client.run(embeds_of(128), client.empty())
    assert np.isfinite(logits).all()
    with pytest.raises(InvalidArgument, match="total_sequence_length"):
        client.run(embeds_of(1), cache)


def test_attention_norms_and_positions_are_fused(variants):
    graph = load_graph(variants("fp32").bundle, "decoder").graph
    kinds = Counter(node.op_type for node in graph.node)
    layers = 2
    assert kinds == {
        "GroupQueryAttention": layers,
        "SkipSimplifiedLayerNormalization": 2 * layers + 1,
        "FusedMatMul": 5 * layers + 1,  # qkv, o, gate, up, down; head
        "QuickGelu": layers,
        "Mul": layers,
        "Add": layers,  # bias of qkv
        "Slice": 2,  # the last position, before the head
        "Cast": 2,
        "ReduceSum": 1,
        "Sub": 2,  # the tokens before this call; and zeros, the block before the first
        "Shape": 1,
        "Gather": 1,
    }
    attention = next(node for node in graph.node if node.op_type == "GroupQueryAttention")
    assert {a.name: a.i for a in attention.attribute if a.name == "do_rotary"} == {"do_rotary": 1}
    names = {node.name for node in graph.node}
    assert {"l0_qkv", "l0_attn", "l1_gate", "l1_down", "final_norm"} <= names


def test_weights_are_not_transposed(variants):
    """A weight lies in the file as in the checkpoint, [out, in], so nothing was copied on the way."""
    bundle = variants("fp32").bundle
    weights = fold(golden_checkpoint(LLAVA).weights)
    expected = weights["decoder.layers.1.mlp.up_proj.weight"].array()
    (tensor,) = (t for t in load_graph(bundle, "decoder").graph.initializer if t.name == "l1_up_weight")
    facts = {e.key: e.value for e in tensor.external_data}
    content = (bundle / "onnx" / facts["location"]).read_bytes()
    start = int(facts["offset"])
    found = np.frombuffer(content[start : start + int(facts["length"])], np.float32).reshape(tensor.dims)
    np.testing.assert_array_equal(found, expected)
