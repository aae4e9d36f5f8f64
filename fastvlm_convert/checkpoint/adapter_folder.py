"""Tell what kind of adapter a folder holds, and open it."""

from pathlib import Path

from fastvlm_convert.checkpoint import mlx_adapter, peft_adapter
from fastvlm_convert.checkpoint.adapter import Adapter
from fastvlm_convert.checkpoint.files import optional_json
from fastvlm_convert.errors import CheckpointError
from fastvlm_convert.regular_file import is_there


def open_adapter(path: Path) -> Adapter:
    """Open the folder of an adapter of PEFT, LLaVA, mlx-lm or mlx-vlm; headers only.

    Raises:
        CheckpointError: It is none, is damaged, or cannot be merged.
    """
    if not path.is_dir():
        what = "an adapter is a folder, this is a file" if path.exists() else "there is no such adapter"
        raise CheckpointError(what, where=path, hint=f"give the folder that holds {peft_adapter.CONFIG}")
    if is_there(path / peft_adapter.CONFIG):
        has_mlx = is_there(path / mlx_adapter.WEIGHTS)
        return mlx_adapter.read_mlx(path) if has_mlx else peft_adapter.read_peft(path)
    if "model_type" in optional_json(path / "config.json"):
        raise CheckpointError(
            "this is a whole checkpoint, not an adapter",
            where=path,
            hint=f"give it as CHECKPOINT, without --adapter: {path}",
        )
    raise CheckpointError(
        f"'{peft_adapter.CONFIG}' is missing",
        where=path,
        hint="give the folder that PEFT's save_pretrained() made",
    )
