"""Open a checkpoint: find its files, read what it is, offer its weights under canonical names."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from fastvlm_convert.checkpoint.adapter import EMBED, HEAD, Adapter, merge_adapter
from fastvlm_convert.checkpoint.adapter_folder import open_adapter
from fastvlm_convert.checkpoint.dimensions import (
    Disagreement,
    check_shapes,
    check_supported,
    find_disagreements,
    infer_config,
    text_config,
)
from fastvlm_convert.checkpoint.files import optional_json, read_json
from fastvlm_convert.checkpoint.layouts import LAYOUTS, Layout, canonical_names
from fastvlm_convert.checkpoint.picture_settings import (
    PictureSettings,
    picture_settings,
    with_pixel_scaling,
)
from fastvlm_convert.checkpoint.prompt_settings import PromptSettings, prompt_settings
from fastvlm_convert.checkpoint.quantized_checkpoint import FILE_NAME as QUANTIZED_FILE
from fastvlm_convert.checkpoint.quantized_checkpoint import QuantizedContent, quantized_content, read_record
from fastvlm_convert.checkpoint.tokenizer import TextTokenizer, read_tokenizer
from fastvlm_convert.checkpoint.torch_zip import read_torch_zip
from fastvlm_convert.errors import CheckpointError, shown
from fastvlm_convert.preprocess import ImageMode
from fastvlm_convert.quantized.weight import MixedSource
from fastvlm_convert.regular_file import MAX_TEXT_BYTES, is_there, open_file
from fastvlm_convert.weights.file_tensors import AGAIN
from fastvlm_convert.weights.fold import fold
from fastvlm_convert.weights.model_config import ModelConfig
from fastvlm_convert.weights.reparameterize import reparameterize
from fastvlm_convert.weights.safetensors_file import read_header, read_safetensors
from fastvlm_convert.weights.shapes import convolutions, weight_shapes
from fastvlm_convert.weights.source import Weight, reshaped, same_content
from fastvlm_convert.weights.storage import checked

_T = TypeVar("_T")
_READERS: dict[str, Callable[[Path], dict[str, Weight]]] = {
    "model.safetensors": read_safetensors,
    "pytorch_model.bin": read_torch_zip,
}
_SETTINGS = (
    "preprocessor_config.json", "processor_config.json", "generation_config.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_LICENSE_NAMES = ("LICENSE", "LICENSE_MODEL", "LICENSE.txt", "LICENSE.md", "LICENCE")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found whole.

    Attributes:
        path: Its folder.
        layout: Whose names and config it uses.
        config: The model's dimensions.
        weights: Canonical name -> weight; branches merged, an adapter merged, nothing folded. Empty where
            quantized: those are folded, and some are no floats.
        quantized: What a quantized checkpoint holds instead, else None.
        stored: Stored name -> tensor, as in the files.
        tokenizer: Its tokenizer.
        eos_token_ids: Ids at which an answer ends.
        pictures: How the original code prepares pictures, and where that was found.
        prompt: The format of conversations, and where it was found.
        unused: Stored names that no part of the model reads.
        disagreements: Where config.json contradicts the tensors.
        oddities: What was odd about the files and how they were read nevertheless.
        license: The model's license file, if it brings one.
        settings: Every file but weights: config, tokenizer, preprocessing, generation, license.
        files: Every file that was read, for the checkpoint's hash.
    """

    path: Path
    layout: Layout
    config: ModelConfig
    weights: Mapping[str, Weight]
    quantized: QuantizedContent | None
    stored: Mapping[str, Weight]
    tokenizer: TextTokenizer
    eos_token_ids: tuple[int, ...]
    pictures: PictureSettings
    prompt: PromptSettings
    unused: tuple[str, ...]
    disagreements: tuple[Disagreement, ...]
    oddities: tuple[str, ...]
    license: Path | None
    settings: tuple[Path, ...]
    files: tuple[Path, ...]

    @cached_property
    def sha256(self) -> str:
        """Hash of its files; they are read whole, once."""
        return content_hash(self.files)

    @property
    def folders(self) -> tuple[Path, ...]:
        """Every folder that files were read from: its own, and an adapter's."""
        return tuple(dict.fromkeys(path.parent for path in self.files))

    @property
    def image_mode(self) -> ImageMode:
        """How the original code makes an image square."""
        return self.pictures.image.mode

    @property
    def notes(self) -> tuple[str, ...]:
        """What its files say and this tool does otherwise, or how it read what was odd."""
        return (*self.oddities, *self.pictures.notes, *self.prompt.notes)

    @property
    def folded(self) -> MixedSource:
        """Canonical names, BatchNorm and LayerScale folded; integers where quantized."""
        return fold(self.weights) if self.quantized is None else self.quantized.weights


def open_checkpoint(path: str | Path, adapter: str | Path | None = None) -> Checkpoint:
    """Open a FastVLM checkpoint in Apple's or transformers' layout, or a quantized one; headers only.

    Args:
        path: Folder with config.json, weights and tokenizer.
        adapter: Folder of an adapter that is merged into the weights, or None.

    Raises:
        CheckpointError: It is missing, damaged, hostile, incomplete or no FastVLM.
        TokenizerError: Its tokenizer is missing or damaged.
    """
    path, adapter = Path(path), None if adapter is None else Path(adapter)
    if not path.is_dir():
        what = "a checkpoint is a folder, this is a file" if path.exists() else "there is no such checkpoint"
        raise CheckpointError(what, where=path, hint="give the folder that holds config.json")
    raw = read_json(path / "config.json")
    layout = _layout(raw, path)
    check_supported(raw, layout, path)
    pictures = picture_settings(raw, layout, path)
    image_size = pictures.image.size
    if is_there(path / QUANTIZED_FILE):
        content = _read_quantized(path, raw, layout, image_size, adapter is not None)
        opened = None
    else:
        opened = None if adapter is None else open_adapter(adapter)
        content = _read_float(path, raw, layout, image_size, opened)
    config = with_pixel_scaling(content.config, pictures.image)
    tokenizer = read_tokenizer((opened and opened.tokenizer) or path)
    _check_embeds(tokenizer, config, path)
    generation = optional_json(path / "generation_config.json")
    license = next((path / n for n in _LICENSE_NAMES if is_there(path / n)), None)
    settings = [path / "config.json", *tokenizer.files]
    settings += [path / n for n in _SETTINGS if is_there(path / n)]
    settings += [] if license is None else [license]
    for setting in settings:
        _check_readable(setting)
    return Checkpoint(
        path=path,
        layout=layout,
        config=config,
        weights=content.weights,
        quantized=content.quantized,
        stored=content.stored,
        tokenizer=tokenizer,
        eos_token_ids=_eos_token_ids(generation, raw, tokenizer, config, path),
        pictures=pictures,
        prompt=prompt_settings(layout, path),
        unused=content.unused,
        disagreements=find_disagreements(config, raw, layout),
        oddities=() if opened is None else opened.notes,
        license=license,
        settings=tuple(settings),
        files=tuple(dict.fromkeys((*settings, *content.files))),
    )


def _check_readable(path: Path) -> None:
    """Some settings are only hashed and copied; a pipe or a file without end must be told from a text."""
    try:
        open_file(path, MAX_TEXT_BYTES).close()
    except OSError as error:
        raise CheckpointError(f"cannot read: {error.strerror}", where=path, hint=AGAIN) from error


def opened(checkpoint: str | Path | Checkpoint) -> Checkpoint:
    """A checkpoint, opened unless it is open already."""
    return checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)


@dataclass(frozen=True)
class _Content:
    """What the files that hold weights give; attributes as in `Checkpoint`."""

    config: ModelConfig
    weights: Mapping[str, Weight]
    quantized: QuantizedContent | None
    stored: Mapping[str, Weight]
    unused: tuple[str, ...]
    files: list[Path]


def _read_float(
    path: Path, raw: Mapping[str, Any], layout: Layout, image_size: int, adapter: Adapter | None
) -> _Content:
    stored, files = _read_tensors(path, _READERS)
    names = canonical_names(stored, layout)
    weights = {ours: stored[name] for name, ours in names.items()}
    if adapter is not None:
        # Apple's names tell the stage only beside each other, so the checkpoint's stand with the adapter's.
        targets = canonical_names([*stored, *adapter.names], adapter.layout or layout)
        tied = EMBED in weights and _is_tied(text_config(raw, layout), raw, weights)
        weights = merge_adapter(weights, adapter, targets, stored, tied)
        files += adapter.files
    config = infer_config(weights, raw, layout, image_size, path)
    merged = reparameterize(weights, list(convolutions(config.vision)))
    weights = checked(merged, weights, "merging train-time branches")
    expected = weight_shapes(config)
    check_shapes(weights, expected, path)
    weights = {name: reshaped(weights[name], shape) for name, shape in expected.items()}
    unused = tuple(_unused(stored, names, weights, config))
    return _Content(config, weights, None, stored, unused, files)


def _read_quantized(
    path: Path, raw: Mapping[str, Any], layout: Layout, image_size: int, has_adapter: bool
) -> _Content:
    if has_adapter:
        raise CheckpointError(
            "an adapter cannot be merged into quantized weights",
            where=path,
            hint="merge it before: fastvlm-convert quantize CHECKPOINT --adapter FOLDER",
        )
    record = read_record(path)
    tensors, files = _read_tensors(path, {"model.safetensors": read_header})
    config, content, unused = quantized_content(record, tensors, raw, layout, image_size, path)
    stored = {name: tensor.weight() for name, tensor in tensors.items()}
    return _Content(config, {}, content, stored, unused, [path / QUANTIZED_FILE, *files])


def content_hash(files: Iterable[Path]) -> str:
    """SHA-256 over the names and contents of files, independent of where they lie.

    Raises:
        CheckpointError: One cannot be read.
    """
    total = hashlib.sha256()
    for path in sorted(files, key=lambda p: p.name):
        try:
            with open_file(path) as file:
                digest = hashlib.file_digest(file, "sha256")
        except OSError as error:
            hint = "see that you may read it"
            raise CheckpointError(f"cannot read: {error.strerror}", where=path, hint=hint) from error
        total.update(f"{path.name}\0{digest.hexdigest()}\n".encode())
    return total.hexdigest()


def source_hash(checkpoint: Checkpoint) -> str:
    """Hash of the float checkpoint: of this one's files, or of what a quantized one was made from."""
    if checkpoint.quantized is not None:
        return checkpoint.quantized.record.source.sha256
    return checkpoint.sha256


def _is_tied(text: Mapping[str, Any], raw: Mapping[str, Any], weights: Mapping[str, Weight]) -> bool:
    """Whether embedding and head are one table, which then may be stored once or twice."""
    if HEAD not in weights:
        return True
    said = raw.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    return said is True and same_content(weights[HEAD], weights[EMBED])


def _layout(raw: Mapping[str, Any], path: Path) -> Layout:
    model_type = raw.get("model_type")
    for layout in LAYOUTS:
        if model_type == layout:
            return layout
    raise CheckpointError(
        f"model_type is {shown(model_type)}; supported: {', '.join(repr(name) for name in LAYOUTS)}",
        where=path / "config.json",
        hint="give a FastVLM checkpoint in Apple's or transformers' layout",
    )


def _read_tensors(
    path: Path, readers: Mapping[str, Callable[[Path], dict[str, _T]]]
) -> tuple[dict[str, _T], list[Path]]:
    for name, reader in readers.items():
        if is_there(path / name):
            return reader(path / name), [path / name]
        index = path / f"{name}.index.json"
        if is_there(index):
            return _read_shards(path, index, reader)
    raise CheckpointError(
        "no weights: neither " + ", ".join(readers) + " nor an index of shards is here", where=path
    )


def _read_shards(
    path: Path, index: Path, reader: Callable[[Path], dict[str, _T]]
) -> tuple[dict[str, _T], list[Path]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError("it has no weight_map of tensor names to file names", where=index)
    shards: dict[str, dict[str, _T]] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(f"shard '{file}' lies outside the checkpoint's folder", where=index)
        shards[file] = reader(path / file)
    for name, file in weight_map.items():
        if name not in shards[file]:
            raise CheckpointError(f"tensor '{name}' is not in '{file}', where the index has it", where=index)
    tensors = {name: weight for shard in shards.values() for name, weight in shard.items()}
    tensors |= {name: shards[file][name] for name, file in weight_map.items()}  # it decides between two
    return tensors, [index, *(path / file for file in shards)]


def _check_embeds(tokenizer: TextTokenizer, config: ModelConfig, path: Path) -> None:
    """Every id that the tokenizer or the model itself can produce needs a row to be embedded with."""
    rows, largest = config.decoder.embed_rows, tokenizer.largest_text_id
    if largest >= rows or config.decoder.vocab_size > rows:
        raise CheckpointError(
            f"the embedding table has {rows} rows, but token ids go up to {largest} and the head has "
            f"{config.decoder.vocab_size} rows",
            where=path,
            hint="do tokenizer and weights belong to the same model?",
        )


def _eos_token_ids(
    generation: Mapping[str, Any],
    raw: Mapping[str, Any],
    tokenizer: TextTokenizer,
    config: ModelConfig,
    path: Path,
) -> tuple[int, ...]:
    stated = generation.get("eos_token_id", raw.get("eos_token_id"))
    if stated is None:
        stated = [tokenizer.end_of_turn_id, tokenizer.end_of_text_id]
    ids = stated if isinstance(stated, list) else [stated]
    if not ids or not all(type(i) is int and 0 <= i < config.decoder.vocab_size for i in ids):
        raise CheckpointError(
            f"eos_token_id is {shown(stated)}, expected ids below {config.decoder.vocab_size}", where=path
        )
    return tuple(ids)


def _unused(
    stored: Mapping[str, Weight],
    names: Mapping[str, str],
    weights: Mapping[str, Weight],
    config: ModelConfig,
) -> list[str]:
    """Stored tensors that neither are a weight nor went into one as a train-time branch."""
    blocks = tuple(f"{block}." for block in convolutions(config.vision))
    return sorted(
        name
        for name in stored
        if names.get(name) not in weights and not names.get(name, "").startswith(blocks)
    )
