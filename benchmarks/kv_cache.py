"""An int8 KV cache in ONNX Runtime: what it does to answers where keys have a large bias, and what it costs.

    python -m benchmarks.kv_cache [CHECKPOINT] [--positions 4096] [--planted 100]

Takes a checkpoint's decoder in float32 and plants a bias in its keys: in the two channels of every head that
turn slowest with the position, as Qwen2's are, so many times the keys' deviation. The softmax hardly sees it;
integers that must span it do. Each variant reads the same text and then goes on for some known tokens, whose
logits are compared with those of the float32 cache (mean KL divergence, nats). Scales are the largest that
the float32 cache holds. "Apart" keeps keys without their bias: its share of the scores, which is known for
every position, is added as attention bias. Variants take turns while they are timed.
"""

import argparse
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Final

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.io_names import (
    ATTENTION_MASK,
    INPUTS_EMBEDS,
    LOGITS,
    past_key,
    past_value,
    present_key,
    present_value,
)
from fastvlm_convert.metrics import kl_divergence
from fastvlm_convert.pipeline import export
from fastvlm_convert.questions import hard_questions
from fastvlm_convert.recipe import load_recipe
from fastvlm_convert.runtime.loaded import load_bundle
from fastvlm_convert.weights.model_config import DecoderConfig

DEMO: Final = Path("checkpoints/fastvlm-demo")
CHUNK: Final = 512  # tokens a call: the bias of scores has heads x tokens x positions numbers
KNOWN: Final = 32


@dataclass(frozen=True)
class Variant:
    """How keys and values are kept.

    Attributes:
        name: For the table.
        dtype: Of the cache.
        per: `PER_TENSOR` or `PER_CHANNEL`, for int8.
        apart: Whether keys are kept without their bias.
    """

    name: str
    dtype: str = "float32"
    per: str = "NONE"
    apart: bool = False


VARIANTS: Final = (
    Variant("float32"),
    Variant("float32, key bias apart", apart=True),
    Variant("int8 a tensor", "int8", "PER_TENSOR"),
    Variant("int8 a channel", "int8", "PER_CHANNEL"),
    Variant("int8 a tensor, key bias apart", "int8", "PER_TENSOR", apart=True),
    Variant("int8 a channel, key bias apart", "int8", "PER_CHANNEL", apart=True),
)


class Decoder:
    """A decoder's graph whose caches are of one variant.

    Args:
        graph: As exported, with its weights; the planted bias is in it.
        config: Its dimensions.
        positions: That the cache holds.
        variant: Which.
        floats: What a float32 cache of the same keys holds, for the scales.
    """

    def __init__(
        self,
        graph: onnx.ModelProto,
        config: DecoderConfig,
        positions: int,
        variant: Variant,
        floats: list[np.ndarray],
    ) -> None:
        model = onnx.ModelProto()
        model.CopyFrom(graph)
        for layer in range(config.num_layers):
            if variant.apart:
                _keep_bias_apart(model.graph, config, layer, positions)
            if variant.dtype == "int8":
                _quantize(model.graph, layer, variant.per, floats[2 * layer : 2 * layer + 2])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        shape = (1, config.num_kv_heads, positions, config.head_dim)
        self.cache = [np.zeros(shape, variant.dtype) for _ in range(2 * config.num_layers)]
        self._logits = np.zeros((1, 1, self._session.get_outputs()[0].shape[-1]), np.float32)
        self._binding = self._session.io_binding()
        layers = range(config.num_layers)
        names = [
            pair
            for i in layers
            for pair in ((past_key(i), present_key(i)), (past_value(i), present_value(i)))
        ]
        for (past, present), array in zip(names, self.cache, strict=True):
            value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
            self._binding.bind_ortvalue_input(past, value)
            self._binding.bind_ortvalue_output(present, value)
        self._binding.bind_ortvalue_output(LOGITS, onnxruntime.OrtValue.ortvalue_from_numpy(self._logits))

    def step(self, embeds: np.ndarray, length: int) -> np.ndarray:
        """Append float32 [n, hidden] to so many positions; logits of the last, float32 [vocab]."""
        given = np.ascontiguousarray(embeds[None])
        mask = np.ones((1, length + len(embeds)), np.int64)
        for name, array in ((INPUTS_EMBEDS, given), (ATTENTION_MASK, mask)):
            self._binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        self._session.run_with_iobinding(self._binding)
        return self._logits[0, 0].copy()

    def read(self, embeds: np.ndarray) -> np.ndarray:
        """Read text, then known tokens one by one; their logits, float32 [KNOWN, vocab]."""
        text = len(embeds) - KNOWN
        for start in range(0, text, CHUNK):
            self.step(embeds[start : min(start + CHUNK, text)], start)
        return np.stack([self.step(embeds[i : i + 1], i) for i in range(text, len(embeds))])


def _attention(graph: onnx.GraphProto, layer: int) -> onnx.NodeProto:
    nodes = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    return nodes[layer]


def _initializer(graph: onnx.GraphProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in graph.initializer if tensor.name == name)


def _key_bias(graph: onnx.GraphProto, config: DecoderConfig, layer: int) -> tuple[onnx.TensorProto, slice]:
    """The bias of queries, keys and values of a layer, and where that of the keys is."""
    add = next(node for node in graph.node if node.output[0] == _attention(graph, layer).input[0])
    first = config.num_heads * config.head_dim
    return _initializer(graph, add.input[1]), slice(first, first + config.num_kv_heads * config.head_dim)


def plant(graph: onnx.GraphProto, config: DecoderConfig, times: float) -> None:
    """Add a bias to the slowest channels of all keys, so many times one deviation of the keys."""
    half = config.head_dim // 2
    for layer in range(config.num_layers):
        tensor, keys = _key_bias(graph, config, layer)
        values = numpy_helper.to_array(tensor).copy()
        bias = values[keys].reshape(config.num_kv_heads, config.head_dim)
        bias[:, [half - 1, 2 * half - 1]] += times
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def _keep_bias_apart(graph: onnx.GraphProto, config: DecoderConfig, layer: int, positions: int) -> None:
    """Give attention keys without bias, and add what the bias would have given to the scores."""
    node, (tensor, keys) = _attention(graph, layer), _key_bias(graph, config, layer)
    values = numpy_helper.to_array(tensor).copy()
    heads, kv, dim = config.num_heads, config.num_kv_heads, config.head_dim
    bias = values[keys].reshape(kv, dim).copy()
    values[keys] = 0
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    cos, sin = (numpy_helper.to_array(_initializer(graph, node.input[i])) for i in (7, 8))
    first, second = bias[:, : dim // 2, None], bias[:, dim // 2 :, None]
    turned = np.concatenate([first * cos.T - second * sin.T, second * cos.T + first * sin.T], 1)[
        ..., :positions
    ]

    def name(part: str) -> str:
        return f"l{layer}_bias_{part}"

    def constant(part: str, array: np.ndarray) -> str:
        graph.initializer.append(numpy_helper.from_array(array, name(part)))
        return name(part)

    def op(kind: str, part: str, inputs: list[str], **settings: object) -> str:
        domain = "com.microsoft" if kind == "RotaryEmbedding" else ""
        added.append(helper.make_node(kind, inputs, [name(part)], name(part), domain=domain, **settings))
        return name(part)

    added: list[onnx.NodeProto] = []
    integers = {k: constant(f"c{k}", np.array([n], np.int64)) for k, n in enumerate((0, heads * dim, 2))}
    query = op("Slice", "query", [node.input[0], integers[0], integers[1], integers[2]])
    one = constant("one", np.array([1], np.int64))
    total = op("Reshape", "total", [op("Cast", "total64", [node.input[6]], to=onnx.TensorProto.INT64), one])
    tokens = op("Gather", "tokens", [op("Shape", "shape", [node.input[0]]), one])
    past = op("Sub", "past", [total, tokens])
    query = op(
        "RotaryEmbedding", "turned_query", [query, past, node.input[7], node.input[8]], num_heads=heads
    )
    split = constant("split", np.array([0, -1, kv, heads // kv * dim], np.int64))
    grouped = op("Transpose", "by_kv", [op("Reshape", "split_query", [query, split])], perm=[0, 2, 1, 3])
    rows = op("Reshape", "rows", [grouped, constant("rows_shape", np.array([kv, -1, dim], np.int64))])
    scaled = (turned * np.float32(dim**-0.5)).astype(np.float32)
    table = op("Slice", "table_now", [constant("table", scaled), integers[0], total, integers[2]])
    scores = op("MatMul", "scores", [rows, table])  # [kv, n * heads / kv, total]
    shape = op(
        "Concat", "score_shape", [constant("head", np.array([kv, -1, heads // kv], np.int64)), total], axis=0
    )
    scores = op("Reshape", "per_token", [scores, shape])
    scores = op("Transpose", "per_head", [scores], perm=[0, 2, 1, 3])
    last = op("Concat", "bias_shape", [constant("all", np.array([1, heads, -1], np.int64)), total], axis=0)
    scores = op("Reshape", "scores_of_heads", [scores, last])
    node.input.extend([""] * (11 - len(node.input)))
    node.input[10] = scores
    at = list(graph.node).index(node)
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*rest[:at], *added, *rest[at:]])


def _quantize(graph: onnx.GraphProto, layer: int, per: str, floats: list[np.ndarray]) -> None:
    """Make a layer's caches int8."""
    node = _attention(graph, layer)
    node.input.extend([""] * (14 - len(node.input)))
    for k, (values, part) in enumerate(zip(floats, "kv", strict=True)):
        axes = (0, 1, 2, 3) if per == "PER_TENSOR" else (0, 2)
        scale = np.maximum(np.abs(values).max(axes), 1e-12) / 127
        name = f"l{layer}_{part}_scale"
        graph.initializer.append(numpy_helper.from_array(scale.astype(np.float32).reshape(-1), name))
        node.input[12 + k] = name
        node.attribute.append(helper.make_attribute(f"{part}_quant_type", per))
    node.attribute.append(helper.make_attribute("kv_cache_bit_width", 8))
    names = {*node.input[3:5], *node.output[1:3]}
    for value in (*graph.input, *graph.output):
        if value.name in names:
            value.type.tensor_type.elem_type = onnx.TensorProto.INT8


def text_embeds(checkpoint: Path, bundle: Path, count: int) -> np.ndarray:
    """So many tokens of questions, again and again in another order; float32 [count, hidden]."""
    tokenizer = open_checkpoint(checkpoint).tokenizer
    texts = sorted({question.text for question in hard_questions()})
    rng = np.random.default_rng(0)
    ids: list[int] = []
    while len(ids) < count:
        ids += tokenizer.encode(texts[rng.integers(len(texts))])
    return load_bundle(bundle, in_turn=True).session.embed(np.array(ids[:count], np.int64))


def main() -> None:
    """Print one row per variant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", nargs="?", type=Path, default=DEMO)
    parser.add_argument("--positions", type=int, default=4096)
    parser.add_argument(
        "--planted", type=float, default=100.0, help="bias in deviations of the keys; 0 plants none"
    )
    parser.add_argument("--rounds", type=int, default=64, help="tokens that each variant is timed for")
    arguments = parser.parse_args()
    recipe, positions = load_recipe("fp32"), arguments.positions
    recipe = replace(recipe, common=replace(recipe.common, max_context_length=positions))
    config = open_checkpoint(arguments.checkpoint).config.decoder
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        export(arguments.checkpoint, bundle, recipe=recipe, targets="onnx")
        graph = onnx.load(next((bundle / "onnx").glob("decoder*.onnx")))
        embeds = text_embeds(arguments.checkpoint, bundle, positions)
    floats = Decoder(graph, config, positions, VARIANTS[0], [])
    floats.read(embeds)
    keys = np.stack(floats.cache[::2])
    plant(graph.graph, config, arguments.planted * float(keys.std()))
    held: dict[bool, list[np.ndarray]] = {}
    decoders, logits = {}, {}
    for variant in sorted(VARIANTS, key=lambda v: v.dtype != "float32"):
        decoder = Decoder(graph, config, positions, variant, held.get(variant.apart, []))
        logits[variant] = decoder.read(embeds)
        if variant.dtype == "float32":
            held[variant.apart] = decoder.cache
        decoders[variant] = decoder
    spent: dict[Variant, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in range(arguments.rounds):
        for variant, decoder in decoders.items():
            start = time.process_time()
            decoder.step(embeds[-1:], positions - 1)
            spent[variant].append(time.process_time() - start)
    print("| cache | KL, nats | bytes a token | CPU ms a token | ratio |\n|---|---|---|---|---|")
    first = VARIANTS[0]
    for variant in VARIANTS:
        divergence = float(kl_divergence(logits[first], logits[variant]).mean())
        size = sum(array[:, :, :1].nbytes for array in decoders[variant].cache)
        ratio = median(b / a for a, b in zip(spent[first], spent[variant], strict=True))
        cost = 1000 * median(spent[variant])
        print(f"| {variant.name} | {divergence:.2g} | {size} | {cost:.2f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
