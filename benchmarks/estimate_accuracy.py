"""How far published figures of phones are from what `estimate` says at best.

    python -m benchmarks.estimate_accuracy

The graphs are those that `export` writes for FastVLM-0.5B, whose decoder is Qwen2-0.5B; their weights are not
made, because `estimate` reads none. Each figure stands beside the recipe whose weights come nearest to what
was measured. A share of a ceiling is what a runtime reached. It is no factor to multiply other ceilings with:
these few figures, of several runtimes on two chips, lie far apart.
"""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fastvlm_convert.estimate.onnx_work import onnx_work
from fastvlm_convert.estimate.phones import Phone, known, shipped_phones
from fastvlm_convert.estimate.work import Work
from fastvlm_convert.exporters.onnx.data import CountedData
from fastvlm_convert.exporters.onnx.graph import Graph
from fastvlm_convert.exporters.onnx.lower import ModelInputs, lower
from fastvlm_convert.exporters.onnx.proto import write_graph
from fastvlm_convert.manifest import Artifact
from fastvlm_convert.predict.placeholder_weights import placeholder_weights
from fastvlm_convert.preprocess import ImageSettings
from fastvlm_convert.quantized.layer_plan import plan_layers
from fastvlm_convert.recipe import load_recipe
from fastvlm_convert.weights.published import published_config

SIZE = "0.5b"
CARD = "https://huggingface.co/litert-community/FastVLM-0.5B"


@dataclass(frozen=True)
class Published:
    """What somebody measured.

    Attributes:
        what: Model, runtime and part of the chip.
        phone: Row of our table.
        recipe: Ours that is nearest.
        source: Where it is published.
        decode: Tokens a second.
        first_token_s: Seconds to the first token with a picture of 1024 pixels; None where none was measured.
        prefill: Tokens a second, or None.
    """

    what: str
    phone: str
    recipe: str
    source: str
    decode: float
    first_token_s: float | None
    prefill: float | None


PUBLISHED = (
    Published("Qwen2-0.5B, 4 bit, MNN", "iPhone 15 Pro", "int4-small", "MNN", 51.4, None, 234.5),
    Published("FastVLM-0.5B, LiteRT, GPU", "iQOO 15", "int8", CARD, 64, 0.55, 2220),
    Published("FastVLM-0.5B, int8, LiteRT, NPU", "iQOO 15", "int8", CARD, 106, 0.12, 11_272),
)


@dataclass(frozen=True)
class ModelWork:
    """What our graphs of the same model take: a picture, its tokens, and one token after it."""

    vision: Work
    prefill: Work
    decode: Work


class GraphsAlone:
    """Graphs in a folder; their data files are laid out and not written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextmanager
    def data(self, name: str) -> Iterator[CountedData]:
        yield CountedData(name)

    def save(self, graph: Graph, name: str) -> None:
        write_graph(graph, self._folder / name)


def model_work(recipe_name: str, folder: Path) -> ModelWork:
    """Write the graphs of a recipe and count what they do."""
    config, recipe = published_config(SIZE), load_recipe(recipe_name)
    shapes = {name: weight.shape for name, weight in placeholder_weights(config, ()).items()}
    weights = placeholder_weights(config, plan_layers(shapes, recipe))
    inputs = ModelInputs(config.decoder.vocab_size - 1, ImageSettings(config.vision.image_size, "pad"))
    artifacts = lower(config, weights, recipe, GraphsAlone(folder), lambda count: None, inputs)

    def path(component: str) -> Path:
        return folder / Path(first(artifacts, component).files[0]).name

    tokens = config.vision.num_image_tokens

    def decoder(count: int, position: int) -> Work:
        names = ("batch_size", "sequence_length", "past_sequence_length", "total_sequence_length")
        return onnx_work(
            path("decoder"), dict(zip(names, (1, count, position, position + count), strict=True)), {}
        )

    row = onnx_work(path("embed"), {"batch_size": 1, "sequence_length": 1}, {})
    return ModelWork(
        onnx_work(path("vision"), {"batch_size": 1}, {}), decoder(tokens, 0), row + decoder(1, tokens)
    )


def first(artifacts: list[Artifact], component: str) -> Artifact:
    """The first artifact of a component."""
    return next(artifact for artifact in artifacts if artifact.component == component)


def decode_row(found: Published, work: ModelWork, phone: Phone) -> str:
    """A line of the table of tokens."""
    bandwidth = known(phone.bandwidth_gb_per_s)
    assert bandwidth is not None
    ceiling = 1e9 * bandwidth / work.decode.read_bytes
    size = f"{work.decode.read_bytes / 1e6:.0f} MB"
    cells = (found.what, phone.chip, found.recipe, size, f"{bandwidth:g} GB/s", f"{ceiling:.0f}")
    return row_of(*cells, f"{found.decode:g}", f"{found.decode / ceiling:.0%}")


def first_token_row(found: Published, work: ModelWork, phone: Phone) -> str:
    """A line of the table of first tokens."""
    bandwidth = known(phone.bandwidth_gb_per_s)
    assert bandwidth is not None
    assert found.first_token_s is not None
    memory = (work.vision.read_bytes + work.prefill.read_bytes) / (1e9 * bandwidth)
    operations = 2 * (work.vision.macs + work.prefill.macs)
    peaks = {peak.unit: operations / (1e12 * peak.tera_operations_per_s) for peak in phone.peaks}
    computing = [f"{1e3 * seconds:.0f} ms ({unit})" for unit, seconds in peaks.items()]
    measured, rate = found.first_token_s, operations / found.first_token_s
    return row_of(
        found.what,
        f"{operations / 1e9:,.0f} G",
        f"{1e3 * memory:.0f} ms",
        ", ".join(computing) or "unknown",
        f"{1e3 * measured:.0f} ms",
        f"{rate / 1e12:.1f} T",
    )


def row_of(*cells: str) -> str:
    """A line of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


def tables() -> str:
    """Both tables, in Markdown."""
    phones = {phone.name: phone for phone in shipped_phones()}
    works = {}
    for recipe in dict.fromkeys(found.recipe for found in PUBLISHED):
        with tempfile.TemporaryDirectory() as folder:
            works[recipe] = model_work(recipe, Path(folder))
    decode = ("", "chip", "our recipe", "a token reads", "memory", "tok/s at most", "measured", "reached")
    first_token = ("", "operations", "memory takes", "peak takes", "measured", "operations a second")
    lines = [
        row_of(*decode),
        row_of(*("---" for _ in decode)),
        *(decode_row(found, works[found.recipe], phones[found.phone]) for found in PUBLISHED),
        "",
        row_of(*first_token),
        row_of(*("---" for _ in first_token)),
        *(
            first_token_row(found, works[found.recipe], phones[found.phone])
            for found in PUBLISHED
            if found.first_token_s is not None
        ),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(tables())
