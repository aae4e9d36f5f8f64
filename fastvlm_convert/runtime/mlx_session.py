"""A bundle's `mlx/` folder as a session, executed by MLX."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
import numpy as np

from fastvlm_convert.dataclass_io import from_plain
from fastvlm_convert.errors import BundleError, RecipeError, shown
from fastvlm_convert.io_names import Precision
from fastvlm_convert.json_file import read_json_file
from fastvlm_convert.manifest import Manifest
from fastvlm_convert.runtime.contract import AGAIN
from fastvlm_convert.runtime.mlx_network import Cache, Decoder, Groups, Weights, decode, embed, encode
from fastvlm_convert.runtime.threads import Threads, refuse_threads

_TARGET: Final = "mlx"
_ERRORS: Final = (RuntimeError, ValueError, IndexError)  # what MLX raises for files and shapes
_GROUP_SIZES, _BITS = (32, 64, 128), (4, 8)


class MlxSession:
    """Runs the weights that mlx-vlm loads, with the same operations; implements `session.Session`.

    Args:
        manifest: The bundle's.
        weights: What the folder holds.
        decoder: What it says of the language model.
        executed_by: What executes it.
    """

    trouble: str | None = None  # MLX does not say where a value came from

    def __init__(self, manifest: Manifest, weights: Weights, decoder: Decoder, executed_by: str) -> None:
        self.executed_by = executed_by
        self.context_length = manifest.contract.context_length
        self.num_image_tokens = manifest.contract.num_image_tokens
        self._weights = weights
        self._decoder = decoder
        self._cache = Cache()
        with _refusals():
            # mlx-vlm joins image tokens and embeddings, and computes a prompt in the wider of their dtypes.
            self._token = embed(weights, mx.array([0])).dtype
            features = weights["mm_projector.2.bias"].dtype
            self._prompt = mx.float32 if mx.float32 in (self._token, features) else self._token

    def encode_image(self, pixel_values: np.ndarray) -> np.ndarray:
        """float32 [1, 3, S, S] -> float32 [num_image_tokens, hidden]."""
        with _refusals():
            return _numpy(encode(self._weights, mx.array(pixel_values.transpose(0, 2, 3, 1))))

    def prepare(self, pictures: np.ndarray) -> np.ndarray:
        """The same: pictures come prepared."""
        return pictures

    def embed(self, token_ids: np.ndarray) -> np.ndarray:
        """int64 [n] -> float32 [n, hidden]."""
        with _refusals():
            return _numpy(embed(self._weights, mx.array(token_ids)))

    def prefill(self, inputs_embeds: np.ndarray) -> np.ndarray:
        """Start a new sequence; logits of the last position, float32 [vocab]."""
        self._cache = Cache()
        return self._append(inputs_embeds, self._prompt)

    def extend(self, inputs_embeds: np.ndarray, position: int) -> np.ndarray:
        """Append tokens from a position on; keys and values that are skipped are zero."""
        with _refusals():
            self._cache.skip_to(position)
        return self._append(inputs_embeds, self._prompt)

    def decode(self, inputs_embeds: np.ndarray) -> np.ndarray:
        """Append one token; its logits, float32 [vocab]."""
        return self._append(inputs_embeds, self._token)

    def _append(self, inputs_embeds: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
        with _refusals():
            x = mx.array(inputs_embeds).astype(dtype)
            return _numpy(decode(self._weights, self._decoder, x, self._cache))


def open_session(
    bundle: Path, manifest: Manifest, precision: Precision | None, threads: Threads, in_turn: bool
) -> MlxSession:
    """Run the `mlx/` folder of a bundle.

    Args:
        bundle: Its folder.
        manifest: Its manifest.
        precision: `exact` computes in float32 on the stored weights; None as MLX does for users.
        threads: Must be left to the runtime.
        in_turn: Changes nothing: the runtime reads the files as it needs them.

    Raises:
        BundleError: The folder is not one that this tool writes, or MLX refuses it.
    """
    del in_turn
    refuse_threads(_TARGET, threads)
    path = bundle / manifest.artifact(_TARGET, "decoder").files[0]
    decoder, default, others = _config(path.parent / "config.json")
    with _refusals():
        arrays = mx.load(str(path))
    if precision == "exact":
        arrays = {
            name: a if a.dtype == mx.uint32 else a.astype(mx.float32) for name, a in dict(arrays).items()
        }
    weights = Weights(dict(arrays), lambda module: others.get(module, default))
    version = f"mlx {mx.__version__}"
    executed_by = f"{version} (float32)" if precision == "exact" else version
    return MlxSession(manifest, weights, decoder, executed_by)


def _config(path: Path) -> tuple[Decoder, Groups, dict[str, Groups]]:
    """The decoder's dimensions, the groups of most modules, and those of the others."""
    try:
        said = read_json_file(path)
    except OSError as error:
        raise BundleError(f"cannot read: {error.strerror}", where=path, hint=AGAIN) from error
    except ValueError as error:
        raise BundleError(f"not valid JSON: {error}", where=path, hint=AGAIN) from error
    if not isinstance(said, dict):
        raise BundleError("not a config.json", where=path, hint=AGAIN)
    fields = {key: said[key] for key in Decoder.__dataclass_fields__ if key in said}
    try:
        decoder = from_plain(Decoder, fields)
    except (RecipeError, ValueError) as error:
        raise BundleError(str(error), where=path, hint=AGAIN) from error
    quantization = said.get("quantization", {"group_size": _GROUP_SIZES[0], "bits": _BITS[0]})
    if not isinstance(quantization, dict):
        raise BundleError(f"quantization is {shown(quantization)}", where=path, hint=AGAIN)
    others = {
        name: _groups(v, path) for name, v in quantization.items() if name not in ("group_size", "bits")
    }
    return decoder, _groups(quantization, path), others


def _groups(words: Any, path: Path) -> Groups:  # noqa: ANN401  what a file says
    match words:
        case {"group_size": int(size), "bits": int(bits)} if size in _GROUP_SIZES and bits in _BITS:
            return size, bits
    raise BundleError(
        f"quantization is {shown(words)}, expected a group_size of 32, 64 or 128 and 4 or 8 bits",
        where=path,
        hint=AGAIN,
    )


def _numpy(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32))


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except _ERRORS as error:
        raise BundleError(
            f"MLX refuses the weights: {' '.join(str(error).split())}",
            hint="`fastvlm-convert verify` tells whether files were changed; or export the bundle again",
        ) from error
