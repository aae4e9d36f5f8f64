"""Code that opens an MLX bundle: what its README.md shows."""

from typing import Final

from fastvlm_convert.exporters.mlx.lower import FOLDER
from fastvlm_convert.manifest import Manifest


def card_section(manifest: Manifest, target: str) -> str:
    """For mlx-vlm."""
    del manifest, target
    return _MLX_VLM


_MLX_VLM: Final = f"""### Apple silicon, with mlx-vlm

```sh
pip install mlx-vlm
python -m mlx_vlm.generate --model BUNDLE/{FOLDER} --image photo.jpg --prompt "What is in this picture?"
```
"""
