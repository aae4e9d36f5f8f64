"""Write the packages of a bundle."""

from collections.abc import Mapping

import coremltools
from coremltools.converters.mil.mil import Function
from coremltools.proto import FeatureTypes_pb2, Model_pb2

from fastvlm_convert import io_names as names
from fastvlm_convert.exporters.coreml.decoder import TARGET as DECODER_TARGET
from fastvlm_convert.exporters.coreml.decoder import DecoderBuilder
from fastvlm_convert.exporters.coreml.package import Metadata, write_package
from fastvlm_convert.exporters.coreml.paths import APPLE_PACKAGE, DECODER_PACKAGE, FILES, VISION_PACKAGE
from fastvlm_convert.exporters.coreml.vision import APPLE_INPUT, VisionBuilder
from fastvlm_convert.exporters.coreml.weights import Weights
from fastvlm_convert.exporters.job import ByteCounter, ExportJob
from fastvlm_convert.io_names import Component, PrecisionName, TensorSpec
from fastvlm_convert.manifest import Artifact
from fastvlm_convert.quantized.weight import dense_view
from fastvlm_convert.recipe import FloatSettings

_APPLE_TARGET = coremltools.target.iOS16

_MAIN = "main"

_FEATURES = {
    names.IMAGE: "RGB picture, made square as image_mode says; scaled to 0..1 inside",
    names.PIXEL_VALUES: "RGB in 0..1, channels first",
    names.IMAGE_FEATURES: "projected image tokens; they take the place of <image> in the prompt's embeddings",
    names.INPUT_IDS: "token ids",
    names.INPUTS_EMBEDS: "embeddings of the tokens, image features spliced in; pad a chunk at its end",
    names.POSITION: "tokens already in the cache; a multiple of the chunk for prefill",
    names.LAST_INDEX: "row of the chunk whose logits are wanted: its last real token",
    names.KEY_CACHE: "keys of all layers; zeros for a new conversation",
    names.VALUE_CACHE: "values of all layers; zeros for a new conversation",
    names.KEY_CACHE_OUT: "k_cache for the next call",
    names.VALUE_CACHE_OUT: "v_cache for the next call",
    names.LOGITS: "logits of the next token",
    APPLE_INPUT: "RGB in 0..1, channels first",
}


def export_coreml(job: ExportJob) -> list[Artifact]:
    """Write vision and decoder packages under `coreml/`, and one for Apple's app if the recipe asks for it.

    Returns:
        One artifact a function.

    Raises:
        TargetError: A weight does not fit its storage dtype, or the model does not fit Apple's app.
        CheckpointError: A weight cannot be read.
        RecipeError: A pattern of float32_ops matches no operation.
    """
    writer = _Writer(job)
    artifacts = [*writer.vision(), *writer.decoder()]
    return [*artifacts, *writer.apple_vision()] if job.recipe.coreml.drop_in else artifacts


class _Writer:
    """Writes the packages of one job."""

    def __init__(self, job: ExportJob) -> None:
        self.job = job
        self.config = job.config
        self.weights = job.weights
        self.recipe = job.recipe
        self.contract = job.contract
        self.license = job.license
        self.folder = job.folder
        self._on_bytes = ByteCounter(job).add

    def vision(self) -> list[Artifact]:
        settings, recipe = self.recipe.vision, self.recipe
        weights = Weights(self._on_bytes)
        builder = VisionBuilder(self.config, self.weights, settings, weights, DECODER_TARGET)
        function = builder.function(recipe.coreml.image_input, recipe.decoder.compute)
        builder.ops.check_patterns("vision")
        text = "FastVLM image encoder and projector: a picture to image tokens."
        return self._write(VISION_PACKAGE, {_MAIN: function}, {_MAIN: "vision"}, settings, weights, text)

    def decoder(self) -> list[Artifact]:
        settings, recipe = self.recipe.decoder, self.recipe
        weights = Weights(self._on_bytes)
        builder = DecoderBuilder(
            self.config.decoder,
            self.weights,
            settings,
            recipe.coreml,
            recipe.repairs,
            recipe.common.max_context_length,
            weights,
        )
        functions = builder.functions()
        builder.ops.check_patterns("decoder")
        components: dict[str, Component] = {f: "embed" if f == names.EMBED else "decoder" for f in functions}
        text = "FastVLM language model: embeddings to the next token's logits, with a KV cache."
        return self._write(DECODER_PACKAGE, functions, components, settings, weights, text)

    def apple_vision(self) -> list[Artifact]:
        """The encoder alone, in the form that Apple's app loads."""
        settings = FloatSettings("float32", "float32")
        weights = Weights(lambda count: None)
        floats = dense_view(self.weights)  # integers in blocks need iOS 18
        function = VisionBuilder(self.config, floats, settings, weights, _APPLE_TARGET).apple_function()
        text = "FastVLM image encoder without projector, for Apple's FastVLM app."
        return self._write(
            APPLE_PACKAGE, {_MAIN: function}, {_MAIN: "vision"}, settings, weights, text, _APPLE_TARGET
        )

    def _write(
        self,
        package: str,
        functions: Mapping[str, Function],
        components: Mapping[str, Component],
        settings: FloatSettings,
        weights: Weights,
        description: str,
        target: coremltools.target = DECODER_TARGET,
    ) -> list[Artifact]:
        default = next(iter(functions))
        metadata = self._metadata(description)
        model = write_package(self.folder / package, functions, default, target, weights, metadata)
        described = {f.name: f for f in model.description.functions} or {default: model.description}
        return [
            Artifact(
                target="coreml",
                component=components[name],
                storage=settings.storage,
                compute=settings.compute,
                precision=self._precision(components[name], package),
                files=tuple(f"{package}/{file}" for file in FILES),
                inputs=_specs(described[name].input) + _specs(described[name].state),
                outputs=_specs(described[name].output),
                function=name,
            )
            for name in functions
        ]

    def _precision(self, component: Component, package: str) -> PrecisionName:
        return "fp32" if package == APPLE_PACKAGE else self.job.precision(component)

    def _metadata(self, description: str) -> Metadata:
        contract = self.contract
        return Metadata(
            description=description,
            author="FastVLM by Apple, converted by fastvlm-convert",
            license=self.license,
            details={
                "prompt": contract.prompt,
                "image_mode": contract.image_mode,
                "image_size": str(contract.image_size),
                "num_image_tokens": str(contract.num_image_tokens),
                "context_length": str(contract.context_length),
                "prefill_chunk": str(self.recipe.coreml.prefill_chunk),
                "eos_token_ids": ", ".join(str(i) for i in contract.eos_token_ids),
                "recipe": self.recipe.name,
            },
            features=_FEATURES,
        )


_ARRAY_TYPES = FeatureTypes_pb2.ArrayFeatureType
_DTYPES = {
    _ARRAY_TYPES.FLOAT16: "float16",
    _ARRAY_TYPES.FLOAT32: "float32",
    _ARRAY_TYPES.INT32: "int32",
}


def _specs(features: list[Model_pb2.FeatureDescription]) -> tuple[TensorSpec, ...]:
    return tuple(_spec(feature) for feature in features)


def _spec(feature: Model_pb2.FeatureDescription) -> TensorSpec:
    kind = feature.type.WhichOneof("Type")
    if kind == "imageType":
        image = feature.type.imageType
        return TensorSpec(feature.name, "rgb_image", (int(image.height), int(image.width)))
    array = feature.type.stateType.arrayType if kind == "stateType" else feature.type.multiArrayType
    dtype = f"{_DTYPES[array.dataType]}_state" if kind == "stateType" else _DTYPES[array.dataType]
    flexible = array.shapeRange.sizeRanges or [None] * len(array.shape)
    options = [s.shape for s in array.enumeratedShapes.shapes]
    shape: list[int | str] = []
    for axis, (size, allowed) in enumerate(zip(array.shape, flexible, strict=True)):
        if options:
            sizes = sorted({int(o[axis]) for o in options})
            shape.append(sizes[0] if len(sizes) == 1 else "|".join(str(s) for s in sizes))
        elif allowed is not None and allowed.lowerBound != allowed.upperBound:
            shape.append(f"{allowed.lowerBound}..{allowed.upperBound}")
        else:
            shape.append(int(size))
    return TensorSpec(feature.name, dtype, tuple(shape))
