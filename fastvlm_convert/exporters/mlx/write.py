"""Write the files of MLX weights."""

from collections.abc import Sequence
from pathlib import Path

from fastvlm_convert.exporters.job import ByteCounter, ExportJob
from fastvlm_convert.exporters.mlx.lower import lower
from fastvlm_convert.exporters.mlx.sizes import METADATA, entries_of
from fastvlm_convert.exporters.mlx.weights import Tensors
from fastvlm_convert.manifest import Artifact
from fastvlm_convert.weights.safetensors_file import lay_out


def export_mlx(job: ExportJob) -> list[Artifact]:
    """Write the weights under `mlx/`, and those for Apple's app if the recipe asks for it.

    Returns:
        One artifact a component and folder.

    Raises:
        RecipeError: A weight does not fit its storage dtype.
        CheckpointError: A weight cannot be read, or is not finite.
    """
    files = _WrittenFiles(job.folder)
    return lower(job.config, job.weights, job.recipe, files, ByteCounter(job).add)


class _WrittenFiles:
    """Files in a bundle under construction."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, content: Sequence[Tensors], name: str) -> None:
        path = self._folder / name
        path.parent.mkdir(exist_ok=True)  # Apple's app has its vision package there
        layout = lay_out(path, entries_of(content), METADATA)
        layout.create()
        for weight in content:
            for first_row, rows in weight.rows():
                for tensor, values in rows.items():
                    layout.write(tensor, [values], first_row)
