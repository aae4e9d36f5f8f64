"""What makes decoding fast in ONNX Runtime, each lever alone and together, with its KL divergence beside it.

    python -m benchmarks.decode_levers
    python -m benchmarks.decode_levers checkpoints/fastvlm-demo

Speed is that of the decoder's graph at the checkpoint's shape (FastVLM-0.5B's without one), with made-up
integers, which take as long as any others. Every contender runs in a process of its own; all take turns, a
step at a time behind a prompt of 288 tokens, with everything that a greedy client does in a step but the
embedding. Of wall and CPU time the ratios to the first contender's in the same round are printed: their
median, and its bootstrap interval. On a busy machine look at one thread's CPU time.

KL divergence is that of the integers, calibrated as `int4` is, from the checkpoint's own floats over its
answers about degraded pictures, and, of a real language model, also about texts. Without a checkpoint there
is none: random weights have no answers. What is computed in the graph, and how, does not change the integers.

Two levers are no settings, because they do not pay: `gate+up` stacks two products of a layer into one, and
`argmax` picks the token in the graph. They are applied to the finished graph here.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from benchmarks.decode_divergence import Divergence, Exam
from benchmarks.decode_step import NEXT_TOKEN, POSITION
from fastvlm_convert.bench.machine import this_machine
from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.exporters.onnx.data import CountedData, DataFile, ExternalData
from fastvlm_convert.exporters.onnx.graph import Graph
from fastvlm_convert.exporters.onnx.lower import ModelInputs, lower
from fastvlm_convert.exporters.onnx.proto import write_graph
from fastvlm_convert.intervals import bootstrap
from fastvlm_convert.io_names import LOGITS
from fastvlm_convert.preprocess import ImageSettings
from fastvlm_convert.quantized.layer_plan import plan_layers
from fastvlm_convert.quantized.schemes import AffineMatrix, AffineScheme
from fastvlm_convert.quantized.weight import AnyWeight, QuantizedWeight
from fastvlm_convert.recipe import Recipe, load_recipe
from fastvlm_convert.recipe_settings import FloatName, QuantizeRule
from fastvlm_convert.weights.fold import fold
from fastvlm_convert.weights.model_config import ModelConfig
from fastvlm_convert.weights.published import published_config
from fastvlm_convert.weights.shapes import weight_shapes
from fastvlm_convert.weights.source import Weight

IMAGE_SIZE = 1024
HEAD = ("decoder.embed_tokens", "decoder.lm_head")


@dataclass(frozen=True)
class Rule:
    """How matrices are quantized: bits, weights a scale, zero points or none."""

    bits: int
    block: int
    symmetric: bool

    def __str__(self) -> str:
        return f"int{self.bits}/{self.block}{'' if self.symmetric else ' zero points'}"

    def rule(self, layers: tuple[str, ...], solver: str) -> QuantizeRule:
        return QuantizeRule(layers, f"int{self.bits}", self.block, self.symmetric, solver=solver)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Contender:
    """A decoder; the levers that are on."""

    name: str
    layers: Rule
    head: Rule
    compute: FloatName = "float32"
    stacked: bool = False
    argmax: bool = False

    def recipe(self) -> Recipe:
        base = load_recipe("int4")
        rules = (
            self.head.rule(HEAD, "search"),
            self.layers.rule(("decoder.*",), "gptq"),
            QuantizeRule(("*",), "float"),
        )
        return replace(base, decoder=replace(base.decoder, compute=self.compute), quantize=rules)


A64, S64, A128, S128, S32 = (
    Rule(4, 64, False),
    Rule(4, 64, True),
    Rule(4, 128, False),
    Rule(4, 128, True),
    Rule(4, 32, True),
)
TABLE8, TABLE4 = Rule(8, 128, True), Rule(4, 32, True)
CONTENDERS = (
    Contender("zero points, blocks of 64", A64, TABLE8),
    Contender("computes in float16", A64, TABLE8, "float16"),
    Contender("symmetric", S64, TABLE8),
    Contender("blocks of 32, symmetric", S32, TABLE8),
    Contender("blocks of 128", A128, TABLE8),
    Contender("blocks of 128, symmetric", S128, TABLE8),
    Contender("head int4", A64, TABLE4),
    Contender("gate+up", A64, TABLE8, stacked=True),
    Contender("argmax", A64, TABLE8, argmax=True),
    Contender("128, symmetric, head int4", S128, TABLE4),
    Contender("the same, head in blocks of 128", S128, Rule(4, 128, True)),
    Contender("128, 32, gate+up, argmax", S128, TABLE4, stacked=True, argmax=True),
)


class _DecoderAlone:
    """Files of an export of which only the decoder is written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.path = folder

    def data(self, name: str) -> DataFile:
        return ExternalData(self._folder / name) if name.startswith("decoder") else _Counted(name)

    def save(self, graph: Graph, name: str) -> None:
        if name.startswith("decoder"):
            self.path = self._folder / name
            write_graph(graph, self.path)


class _Counted(CountedData):
    def __enter__(self) -> "_Counted":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def made_up_weights(config: ModelConfig, recipe: Recipe) -> Mapping[str, AnyWeight]:
    """Weights of a decoder that computes finite numbers; those of the encoder are not read."""
    shapes = {name: _constant(name, shape) for name, shape in weight_shapes(config).items()}
    weights: dict[str, AnyWeight] = dict(fold(shapes))
    for plan in plan_layers({name: weight.shape for name, weight in weights.items()}, recipe):
        if isinstance(plan.scheme, AffineScheme):
            weights[f"{plan.layer}.weight"] = _made_up(plan.shape, plan.scheme)
    return weights


def _constant(name: str, shape: tuple[int, ...]) -> Weight:
    value = 0 if name.endswith(".bias") else 1
    return Weight(
        shape, "float32", lambda start, stop: np.full((stop - start, *shape[1:]), value, np.float32)
    )


def _made_up(shape: tuple[int, ...], scheme: AffineScheme) -> QuantizedWeight:
    columns = shape[1]
    blocks = scheme.num_blocks(columns)

    def read(start: int, stop: int) -> AffineMatrix:
        rows = stop - start
        q = np.full((rows, columns), scheme.middle, np.uint8)
        q[:, ::2] += 1
        q[:, 1::2] -= 1
        scale = np.full((rows, blocks), columns**-0.5, np.float16)
        return AffineMatrix(scheme, q, scale, np.full((rows, blocks), scheme.middle, np.uint8))

    return QuantizedWeight(shape, scheme, read)


def build(config: ModelConfig, contender: Contender, folder: Path) -> Path:
    """Write a contender's decoder; the path of its graph."""
    folder.mkdir()
    files, recipe = _DecoderAlone(folder), contender.recipe()
    inputs = ModelInputs(config.decoder.vocab_size - 1, ImageSettings(IMAGE_SIZE, "pad"))
    lower(config, made_up_weights(config, recipe), recipe, files, lambda _: None, inputs)  # type: ignore[arg-type]
    if contender.stacked or contender.argmax:
        changed(files.path, contender, config.decoder.num_layers)
    return files.path


def changed(path: Path, contender: Contender, num_layers: int) -> None:
    """Write a graph again with the levers that no recipe has."""
    model = onnx.load(path)
    for data in path.parent.glob("*_data"):
        data.unlink()
    if contender.stacked:
        for layer in range(num_layers):
            stack(model.graph, f"l{layer}_gate", f"l{layer}_up")
    if contender.argmax:
        node = helper.make_node("ArgMax", [LOGITS], [NEXT_TOKEN], axis=-1, keepdims=0)
        model.graph.node.append(node)
        value = helper.make_tensor_value_info(NEXT_TOKEN, onnx.TensorProto.INT64, ["batch_size", 1])
        model.graph.output.append(value)
    onnx.save_model(model, path, save_as_external_data=True, location=f"{path.name}_data")


def stack(graph: onnx.GraphProto, first: str, second: str) -> None:
    """Make two products with quantized matrices one, and share its columns out."""
    nodes = {node.output[0]: node for node in graph.node}
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    pair, both = (nodes[first], nodes[second]), f"{first}_and_up"
    inputs = [pair[0].input[0]]
    for one, other in zip(*(node.input[1:] for node in pair), strict=True):
        casts = nodes.get(one), nodes.get(other)
        names = [one, other] if casts[0] is None else [cast.input[0] for cast in casts if cast is not None]
        joined = np.concatenate([numpy_helper.to_array(tensors[name]) for name in names])
        for name in names:
            graph.initializer.remove(tensors[name])
        graph.initializer.append(numpy_helper.from_array(joined, names[0]))
        if casts[1] is not None:
            graph.node.remove(casts[1])
        inputs.append(one)
    rows = [helper.get_node_attr_value(node, "N") for node in pair]
    attributes = {a.name: helper.get_attribute_value(a) for a in pair[0].attribute}
    attributes["N"] = sum(rows)
    place = list(graph.node).index(pair[0])
    for node in pair:
        graph.node.remove(node)
    product = helper.make_node("MatMulNBits", inputs, [both], domain="com.microsoft", **attributes)
    parts = helper.make_node("Split", [both], [first, second], axis=-1, num_outputs=2)
    for offset, node in enumerate((product, parts)):
        graph.node.insert(place + offset, node)


def measured(paths: Sequence[Path], rounds: int, threads: int) -> np.ndarray:
    """Milliseconds of a step, [rounds, contenders, wall and CPU]; the first rounds warm up, unreported."""
    children = []
    for path in paths:
        command = [sys.executable, "-m", "benchmarks.decode_step", str(path), str(threads)]
        children.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    order, times = np.random.default_rng(0), np.zeros((rounds + 3, len(paths), 2))
    for figures in times:
        for n in order.permutation(len(paths)):
            children[n].stdin.write("\n")
            children[n].stdin.flush()
            figures[n] = json.loads(children[n].stdout.readline())
    for child in children:
        child.stdin.close()
        child.wait()
    return times[3:]


def crossings(vocabulary: int) -> str:
    """What a step does beside the decoder, and what would pick the token instead; microseconds, medians."""
    logits = np.random.default_rng(0).standard_normal((1, 1, vocabulary)).astype(np.float32)
    given = helper.make_tensor_value_info(LOGITS, onnx.TensorProto.FLOAT, logits.shape)
    token = helper.make_tensor_value_info(NEXT_TOKEN, onnx.TensorProto.INT64, [1, 1])
    node = helper.make_node("ArgMax", [LOGITS], [NEXT_TOKEN], axis=-1, keepdims=0)
    opsets = [helper.make_opsetid("", 20)]
    model = helper.make_model(helper.make_graph([node], "pick", [given], [token]), opset_imports=opsets)
    model.ir_version = 10
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    binding, picked = (
        session.io_binding(),
        onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((1, 1), np.int64)),
    )
    binding.bind_ortvalue_output(NEXT_TOKEN, picked)

    def bind() -> None:
        binding.bind_input(LOGITS, "cpu", 0, np.float32, logits.shape, logits.ctypes.data)

    bind()
    works = {
        "copy the logits": lambda: logits[0, 0].copy(),
        "NumPy's argmax": lambda: np.argmax(logits[0, 0]),
        "bind an input": bind,
        "ArgMax in ONNX Runtime": lambda: session.run_with_iobinding(binding),
    }
    return "us: " + ", ".join(f"{median_time(work):.0f} {name}" for name, work in works.items())


def median_time(work: Callable[[], object]) -> float:
    """Microseconds that something takes, the median of 200."""
    times = []
    for _ in range(200):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1e6 * float(np.median(times))


def ratio(times: np.ndarray, n: int, kind: int) -> str:
    """How many times as fast as the first contender, the median of the rounds and its interval."""
    ratios = times[:, 0, kind] / times[:, n, kind]
    found = bootstrap(ratios, statistic=lambda values: float(np.median(values)))
    return f"{np.median(ratios):.2f} [{found.low:.2f}, {found.high:.2f}]"


def row(contender: Contender, path: Path, cells: Sequence[str], divergence: Sequence[Divergence]) -> str:
    """A line of the table."""
    size = sum(file.stat().st_size for file in path.parent.iterdir()) / 1e6
    kl = [f"{d.mean:.2g} [{d.low:.2g}, {d.high:.2g}]" for d in divergence]
    cells = [contender.name, str(contender.layers), str(contender.head), f"{size:.0f}", *cells, *kl]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--questions", type=int, default=150, help="pictures to ask about, and texts")
    asked = parser.parse_args()
    checkpoint = open_checkpoint(asked.checkpoint) if asked.checkpoint else None
    config = checkpoint.config if checkpoint else published_config("0.5b")
    exam = Exam.of(checkpoint, asked.questions) if checkpoint else None
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("FASTVLM_CONVERT_CACHE", f"{folder}/cache")
        paths = [build(config, c, Path(folder) / str(n)) for n, c in enumerate(CONTENDERS)]
        times = measured(paths, asked.rounds, asked.threads)
        machine = this_machine()
        print(f"{machine.cpu} ({', '.join(machine.instructions)}); onnxruntime {onnxruntime.__version__}")
        print(f"{asked.threads} threads, {asked.rounds} rounds, behind {POSITION} tokens")
        print(crossings(config.decoder.vocab_size))
        kinds = exam.kinds if exam else ()
        titles = [
            "",
            "layers",
            "head",
            "MB",
            "ms, least",
            "speed",
            "by CPU time",
            *(f"KL, {k}" for k in kinds),
        ]
        print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
        for n, (contender, path) in enumerate(zip(CONTENDERS, paths, strict=True)):
            cells = [f"{times[:, n, 0].min():.1f}", ratio(times, n, 0), ratio(times, n, 1)]
            found = exam.divergence(contender.recipe()) if exam else ()
            print(row(contender, path, cells, found), flush=True)


if __name__ == "__main__":
    main()
