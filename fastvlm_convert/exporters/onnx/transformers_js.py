"""What transformers.js looks up in config.json before it loads a graph."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastvlm_convert.io_names import MERGE, ONNX_FILE_STEMS
from fastvlm_convert.manifest import Artifact


def transformers_js_config(artifacts: Sequence[Artifact]) -> dict[str, Any]:
    """The section of config.json that says which graphs there are.

    Args:
        artifacts: One a graph.
    """
    onnx = {a.component: a for a in artifacts if a.function != MERGE}
    graphs = {c: Path(a.files[0]).name for c, a in onnx.items()}
    decoder = onnx["decoder"]
    return {
        "transformers.js_config": {
            "dtype": {ONNX_FILE_STEMS[c]: a.precision for c, a in onnx.items()},
            # Exactly the data files that exist under a graph's own name: a missing one is an error there.
            "use_external_data_format": {
                graphs[c]: 1 for c, a in onnx.items() if Path(a.files[1]).name == f"{graphs[c]}_data"
            },
            "kv_cache_dtype": {decoder.precision: decoder.compute},
        }
    }
