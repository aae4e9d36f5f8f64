"""Write the packages of a bundle."""

from fastvlm_convert.exporters.coreml.graph import Graph
from fastvlm_convert.exporters.coreml.lower import lower
from fastvlm_convert.exporters.coreml.metadata import metadata_of
from fastvlm_convert.exporters.coreml.proto import write_package
from fastvlm_convert.exporters.job import ByteCounter, ExportJob, Statement
from fastvlm_convert.manifest import Artifact


def export_coreml(job: ExportJob) -> list[Artifact]:
    """Write vision and decoder packages under `coreml/`, and one for Apple's app if the recipe asks for it.

    Returns:
        One artifact a function.

    Raises:
        RecipeError: A weight does not fit its storage dtype, or a pattern of float32_ops matches nothing.
        CheckpointError: A weight cannot be read, or is not finite.
    """
    files = _WrittenFiles(job)
    return lower(job.config, job.weights, job.recipe, files, ByteCounter(job).add)


class _WrittenFiles:
    """Packages in a bundle under construction."""

    def __init__(self, job: ExportJob) -> None:
        self._job = job

    def save(self, graphs: list[Graph], name: str) -> None:
        job = self._job
        metadata = metadata_of(name, Statement(job.contract, job.license), job.recipe)
        write_package(job.folder / name, graphs, metadata)
