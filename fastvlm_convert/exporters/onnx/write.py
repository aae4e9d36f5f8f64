"""Write the graphs of a bundle."""

from pathlib import Path

from fastvlm_convert.exporters.job import ByteCounter, ExportJob
from fastvlm_convert.exporters.onnx.data import ExternalData
from fastvlm_convert.exporters.onnx.graph import Graph
from fastvlm_convert.exporters.onnx.lower import FOLDER, ModelInputs, lower
from fastvlm_convert.exporters.onnx.proto import write_graph
from fastvlm_convert.manifest import Artifact


def export_onnx(job: ExportJob) -> list[Artifact]:
    """Write vision encoder, both embeddings and decoder under `onnx/`.

    Returns:
        One artifact a graph.

    Raises:
        RecipeError: A weight does not fit its storage dtype.
        CheckpointError: A weight cannot be read, or is not finite.
    """
    files = _WrittenFiles(job.folder / FOLDER)
    on_bytes = ByteCounter(job).add
    return lower(job.config, job.weights, job.recipe, files, on_bytes, ModelInputs.of(job.contract))


class _WrittenFiles:
    """Files in a new folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder

    def data(self, name: str) -> ExternalData:
        return ExternalData(self._folder / name)

    def save(self, graph: Graph, name: str) -> None:
        write_graph(graph, self._folder / name)
