"""Write the three graphs of a bundle."""

from collections.abc import Sequence

from fastvlm_convert.contract import Component, PrecisionName, onnx_data_name, onnx_file_name
from fastvlm_convert.errors import TargetError
from fastvlm_convert.export.job import ByteCounter, ExportJob
from fastvlm_convert.export.onnx.data import ExternalData
from fastvlm_convert.export.onnx.decoder import build_decoder
from fastvlm_convert.export.onnx.embed import Table, build_embed, store_table
from fastvlm_convert.export.onnx.graph import Graph
from fastvlm_convert.export.onnx.vision import build_vision
from fastvlm_convert.manifest import Artifact
from fastvlm_convert.recipe import FloatSettings, OnnxSettings, Recipe
from fastvlm_convert.weights.config import ModelConfig
from fastvlm_convert.weights.plan import LayerPlan
from fastvlm_convert.weights.quantized import without_palettes
from fastvlm_convert.weights.schemes import PaletteScheme

FOLDER = "onnx"
_HEAD_DIM_STEP = 16  # GroupQueryAttention with rotary positions inside
_SLOW_BITS = 8  # MatMulNBits has a kernel for them at accuracy level 4 alone


def check_target(config: ModelConfig, recipe: Recipe, plans: Sequence[LayerPlan]) -> None:
    """Refuse dimensions and schemes that ONNX Runtime cannot execute; reads no weight.

    Raises:
        TargetError: Names the dimension or setting and what is allowed.
    """
    if config.decoder.head_dim % _HEAD_DIM_STEP:
        raise TargetError(
            f"the decoder's head size is {config.decoder.head_dim}; ONNX Runtime's GroupQueryAttention "
            f"with rotary positions needs a multiple of {_HEAD_DIM_STEP}",
            hint="this model cannot be run by ONNX Runtime; `run` answers from the checkpoint itself",
        )
    for plan in plans:
        _check_scheme(plan, config, recipe.onnx)
    for component in ("vision", "decoder"):
        if getattr(recipe, component).float32_ops:
            raise TargetError(
                f"{component}.float32_ops is set, which only Core ML packages can follow",
                hint=f"set {component}.compute to float32 for ONNX",
            )
    for name in ("float32_scores", "separate_key_bias"):
        if getattr(recipe.repairs, name):
            raise TargetError(
                f"repairs.{name} is set, which only Core ML packages can follow; in ONNX attention is one "
                "operator",
                hint=f"leave repairs.{name} empty and set decoder.compute to float32 for ONNX",
            )


def _check_scheme(plan: LayerPlan, config: ModelConfig, settings: OnnxSettings) -> None:
    """Refuse a scheme that ONNX cannot express, or that ONNX Runtime executes far slower than floats."""
    scheme, layer = plan.scheme, plan.layer
    if isinstance(scheme, PaletteScheme):
        raise TargetError(
            f"layer '{layer}' has scheme palette{scheme.bits}, but ONNX has no look-up of weights",
            hint="ONNX has int8 and int4 with a block_size of 16, 32, 64 or 128; palettes are for coreml",
        )
    if scheme is None or not layer.startswith("decoder."):
        return
    if scheme.block_size is None:
        raise TargetError(
            f"layer '{layer}' is quantized per channel, but ONNX Runtime's MatMulNBits needs blocks",
            hint="give its rule a block_size of 16, 32, 64 or 128",
        )
    is_looked_up = layer == "decoder.embed_tokens" and not config.decoder.tied
    if scheme.bits == _SLOW_BITS and settings.accuracy_level == 0 and not is_looked_up:
        raise TargetError(
            f"layer '{layer}' has {scheme.bits} bits, and onnx.accuracy_level is 0: ONNX Runtime then "
            "dequantizes the whole weight for every token, some 250 times slower than at level 4",
            hint="set onnx.accuracy_level to 4, or give the layer 4 bits",
        )


def export_onnx(job: ExportJob) -> list[Artifact]:
    """Write vision encoder, embedding and decoder under `onnx/`.

    Returns:
        One artifact a graph.

    Raises:
        TargetError: ONNX Runtime cannot execute the model, or a weight does not fit its storage dtype.
        CheckpointError: A weight cannot be read.
    """
    (job.folder / FOLDER).mkdir()
    writer = _Writer(job)
    return [writer.vision(), *writer.decoder_and_embed()]


class _Writer:
    """Writes the graphs of one job."""

    def __init__(self, job: ExportJob) -> None:
        self.job = job
        self.config = job.config
        self.weights = without_palettes(job.weights)
        self.recipe = job.recipe
        # Clients look every id up, `<image>` too, which may lie beyond the checkpoint's table.
        self.embed_rows = max(job.contract.image_token_id + 1, job.config.decoder.embed_rows)
        self.folder = job.folder / FOLDER
        self._on_bytes = ByteCounter(job).add

    def vision(self) -> Artifact:
        settings = self.recipe.vision
        precision = self.job.precision("vision")
        file = onnx_file_name("vision", precision)
        with self._data(file) as data:
            graph = Graph("fastvlm_vision", data, settings.storage, settings.compute, self._on_bytes)
            build_vision(graph, self.config, self.weights)
            graph.save(self.folder / file)
        return _artifact("vision", settings, precision, graph, file, onnx_data_name(file))

    def decoder_and_embed(self) -> list[Artifact]:
        settings, decoder = self.recipe.decoder, self.config.decoder
        precision = self.job.precision("decoder")
        file = onnx_file_name("decoder", precision)
        shared = decoder.tied and self.recipe.onnx.shared_table
        head = self.weights["decoder.embed_tokens.weight" if decoder.tied else "decoder.lm_head.weight"]
        with self._data(file) as data:
            graph = Graph(
                "fastvlm_decoder",
                data,
                settings.storage,
                settings.compute,
                self._on_bytes,
                self.recipe.onnx.accuracy_level,
            )
            table = store_table(graph, head, self.embed_rows if shared else decoder.vocab_size)
            build_decoder(graph, decoder, self.weights, self.recipe.common.max_context_length, table)
            graph.save(self.folder / file)
            decoder_artifact = _artifact("decoder", settings, precision, graph, file, onnx_data_name(file))
            return [self._embed(data, table) if shared else self._embed_apart(), decoder_artifact]

    def _embed_apart(self) -> Artifact:
        file = onnx_file_name("embed", self.job.precision("embed"))
        with self._data(file) as data:
            return self._embed(data, None)

    def _embed(self, data: ExternalData, table: Table | None) -> Artifact:
        """The embedding over a table that is there already, or over its own, written to `data`."""
        storage, precision = self.recipe.embed.storage, self.job.precision("embed")
        file = onnx_file_name("embed", precision)
        graph = Graph("fastvlm_embed", data, storage, "float32", self._on_bytes)
        if table is None:
            table = store_table(graph, self.weights["decoder.embed_tokens.weight"], self.embed_rows)
        build_embed(graph, table, self.embed_rows, self.config.decoder.hidden_size)
        graph.save(self.folder / file)
        settings = FloatSettings(storage, "float32")
        return _artifact("embed", settings, precision, graph, file, table.location)

    def _data(self, file: str) -> ExternalData:
        return ExternalData(self.folder / onnx_data_name(file))


def _artifact(
    component: Component, settings: FloatSettings, precision: PrecisionName, graph: Graph, *files: str
) -> Artifact:
    return Artifact(
        target="onnx",
        component=component,
        storage=settings.storage,
        compute=settings.compute,
        precision=precision,
        files=tuple(f"{FOLDER}/{file}" for file in files),
        inputs=tuple(graph.inputs),
        outputs=tuple(graph.outputs),
    )
