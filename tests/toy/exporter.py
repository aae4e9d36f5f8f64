"""A backend for tests: one file of float32 numbers, and the dimensions beside it."""

import json
from dataclasses import asdict

from fastvlm_convert.errors import TargetError
from fastvlm_convert.exporters.backends import Backend, Prediction
from fastvlm_convert.exporters.job import ByteCounter, ExportJob
from fastvlm_convert.io_names import COMPONENTS
from fastvlm_convert.manifest import Artifact
from fastvlm_convert.quantized.weight import dense_view

CONFIG, WEIGHTS = "toy/config.json", "toy/weights.bin"


def export(job: ExportJob) -> list[Artifact]:
    (job.folder / "toy").mkdir()
    (job.folder / CONFIG).write_text(_dimensions(job.config))
    counter = ByteCounter(job)
    with (job.folder / WEIGHTS).open("wb") as file:
        for _, weight in sorted(dense_view(job.weights).items()):
            counter.add(file.write(weight.array().tobytes()))
    return _artifacts()


def check(config, recipe, layers) -> None:
    if recipe.decoder.compute == "float16":
        raise TargetError("toys compute in float32", hint="take the fp32 recipe")


def predict(config, weights, recipe, image_token_id) -> Prediction:
    size = sum(4 * weight.size for weight in dense_view(weights).values())
    return Prediction({CONFIG: len(_dimensions(config)), WEIGHTS: size}, _artifacts())


def _artifacts() -> list[Artifact]:
    files = (CONFIG, WEIGHTS)
    return [Artifact("toy", part, "float32", "float32", "fp32", files, (), ()) for part in COMPONENTS]


def _dimensions(config) -> str:
    return json.dumps(asdict(config))


BACKEND = Backend(
    title="Toy",
    libraries=(),
    writer=__name__,
    export="export",
    check=check,
    predict=predict,
    base_bytes=50_000_000,
    working_bytes=lambda config, recipe, layers: 4 * max(plan.size for plan in layers),
    auto_compute="float32",
    has_float16_cache=lambda recipe: False,
    client_config=lambda artifacts: {"toy": True},
)
