"""The work of a bundle's `mlx/` folder, by the shapes of its weights: it holds no graph to walk.

What mlx-vlm does with them is written down in `runtime/mlx_network.py`; this follows it, product by product.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from fastvlm_convert.arithmetic import num_elements
from fastvlm_convert.errors import BundleError, CheckpointError, shortened
from fastvlm_convert.estimate.work import Work
from fastvlm_convert.weights.file_tensors import FileTensor, item_size
from fastvlm_convert.weights.safetensors_file import read_header

_VISION: Final = "vision_tower.vision_model"
_LANGUAGE: Final = "language_model.model"
_TABLE: Final = f"{_LANGUAGE}.embed_tokens"
_HEAD: Final = "language_model.lm_head"
_PARTS: Final = ("weight", "scales", "biases")
_HINT: Final = "`fastvlm-convert bundle check` tells whether the file was changed; or export the bundle again"


class MlxWeights:
    """The tensors of a folder, by their header.

    Args:
        path: The safetensors file.

    Raises:
        BundleError: It is none.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._tensors: Mapping[str, FileTensor] = read_header(path, packed=True)
        except OSError as error:
            raise BundleError(f"cannot read the weights: {error.strerror or error}", where=path) from error
        except CheckpointError as error:
            raise BundleError(str(error.args[0]), where=path, hint=_HINT) from error

    def vision(self, image_size: int) -> Work:
        """What the encoder and the projector do with a square picture of so many pixels an edge."""
        products = _Products(
            self, item_size(self[f"{_VISION}.patch_embed.blocks.0.reparam_conv.weight"].dtype)
        )
        edge = image_size
        for i, stride in enumerate((2, 2, 1)):
            edge = products.conv(f"{_VISION}.patch_embed.blocks.{i}.reparam_conv", edge, stride)
        place = 0
        while (name := f"{_VISION}.network.{place}") and self._has_prefix(name):
            edge = self._part(products, name, edge)
            place += 1
        edge = products.conv(f"{_VISION}.conv_exp.reparam_conv", edge)
        for part in ("reduce", "expand"):
            products.conv(f"{_VISION}.conv_exp.se.{part}", 1)
        width = self[f"{_VISION}.conv_exp.reparam_conv.weight"].shape[0]
        for layer in ("mm_projector.0", "mm_projector.2"):
            width = products.linear(layer, edge * edge, width)
        head = self[f"{_VISION}.head.proj"].shape if f"{_VISION}.head.proj" in self._tensors else (0,)
        products.macs += num_elements(head)  # a classifier, which mlx-vlm computes and throws away
        read = sum(t.num_bytes for n, t in self._tensors.items() if not n.startswith("language_model."))
        return products.work(read)

    def _has_prefix(self, name: str) -> bool:
        return any(tensor.startswith(f"{name}.") for tensor in self._tensors)

    def _part(self, products: "_Products", name: str, edge: int) -> int:
        """A place of the encoder's list: a downsampling, a position encoding or the blocks of a stage."""
        if f"{name}.proj.0.lkb_reparam.weight" in self._tensors:
            return products.conv(
                f"{name}.proj.1.reparam_conv", products.conv(f"{name}.proj.0.lkb_reparam", edge, 2)
            )
        if f"{name}.reparam_conv.weight" in self._tensors:
            return products.conv(f"{name}.reparam_conv", edge)
        b = 0
        while f"{name}.{b}.convffn.fc1.weight" in self._tensors:
            block = f"{name}.{b}"
            if f"{block}.token_mixer.reparam_conv.weight" in self._tensors:
                products.conv(f"{block}.token_mixer.reparam_conv", edge)
            else:
                self._mixer(products, f"{block}.token_mixer", edge * edge)
            for layer in ("conv.conv", "fc1", "fc2"):
                products.conv(f"{block}.convffn.{layer}", edge)
            b += 1
        return edge

    def _mixer(self, products: "_Products", name: str, tokens: int) -> None:
        packed, width = self[f"{name}.qkv.weight"].shape
        products.linear(f"{name}.qkv", tokens, width)
        products.attention(tokens, tokens * tokens, packed // 3)
        products.linear(f"{name}.proj", tokens, packed // 3)

    def decoder(self, tokens: int, position: int, looked_up: int) -> Work:
        """What a call of the language model does.

        Args:
            tokens: Tokens that it appends.
            position: Tokens that the cache holds before.
            looked_up: How many of the tokens are looked up in the table: those of a picture are not.
        """
        layer = f"{_LANGUAGE}.layers.0"
        hidden = self[f"{layer}.input_layernorm.weight"].shape[0]
        # MLX computes in the widest dtype of its operands, so vectors decide in which a whole part computes.
        products = _Products(self, item_size(self[f"{layer}.self_attn.k_proj.bias"].dtype))
        met = tokens * position + tokens * (tokens + 1) // 2
        cache = 0
        for i in range(self.num_layers):
            layer = f"{_LANGUAGE}.layers.{i}"
            width, keys, _ = (products.linear(f"{layer}.self_attn.{p}_proj", tokens, hidden) for p in "qkv")
            products.attention(tokens, met, width)
            products.linear(f"{layer}.self_attn.o_proj", tokens, width)
            inner = products.linear(f"{layer}.mlp.gate_proj", tokens, hidden)
            products.linear(f"{layer}.mlp.up_proj", tokens, hidden)
            products.linear(f"{layer}.mlp.down_proj", tokens, inner)
            cache += 2 * keys * products.item * (position + 2 * tokens)
        is_tied = f"{_HEAD}.weight" not in self._tensors
        products.linear(_TABLE if is_tied else _HEAD, 1, hidden)
        table = {f"{_TABLE}.{part}" for part in _PARTS}
        read = sum(
            tensor.num_bytes
            for name, tensor in self._tensors.items()
            if name.startswith("language_model.") and (is_tied or name not in table)
        )
        row = sum(self[name].num_bytes // self[name].shape[0] for name in table if name in self._tensors)
        return products.work(read, looked_up * row, cache)

    @property
    def num_layers(self) -> int:
        """Layers of the language model."""
        count = 0
        while f"{_LANGUAGE}.layers.{count}.input_layernorm.weight" in self._tensors:
            count += 1
        return count

    def __getitem__(self, name: str) -> FileTensor:
        """A tensor.

        Raises:
            BundleError: There is none of that name, or it is a number.
        """
        if name not in self._tensors or not self._tensors[name].shape:
            raise BundleError(f"the MLX weights lack '{shortened(name, 100)}'", where=self._path, hint=_HINT)
        return self._tensors[name]


class _Products:
    """Adds up products.

    Args:
        weights: Whose.
        item: Bytes of an element of their results.
    """

    def __init__(self, weights: MlxWeights, item: int) -> None:
        self._weights = weights
        self.item = item
        self.macs = 0
        self._written = 0
        self._peak = 0

    def conv(self, name: str, edge: int, stride: int = 1) -> int:
        """A convolution over a square that only its stride shrinks; returns its result's edge."""
        kernel = self._weights[f"{name}.weight"].shape
        after = (edge - 1) // stride + 1
        self.macs += after * after * num_elements(kernel)
        self._wrote(after * after * kernel[0], edge * edge * kernel[-1])
        return after

    def linear(self, name: str, tokens: int, columns: int) -> int:
        """A product with a matrix, of floats or of integers; returns its rows."""
        rows = self._weights[f"{name}.weight"].shape[0]
        self.macs += tokens * rows * columns
        self._wrote(tokens * rows, tokens * columns)
        return rows

    def attention(self, tokens: int, met: int, width: int) -> None:
        """Attention of queries that meet so many keys together; `width` is that of all heads."""
        self.macs += 2 * met * width
        self._wrote(tokens * width, 3 * tokens * width)

    def _wrote(self, count: int, read: int) -> None:
        self._written += count * self.item
        self._peak = max(self._peak, (count + read) * self.item)

    def work(self, weight_bytes: int, row_bytes: int = 0, cache_bytes: int = 0) -> Work:
        """All products, with bytes of what they read."""
        return Work(self.macs, weight_bytes, row_bytes, cache_bytes, self._written, self._peak)
