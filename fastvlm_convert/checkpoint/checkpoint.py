"""Open a checkpoint: find its files, read what it is, offer its weights under canonical names."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fastvlm_convert.checkpoint.adapter_folder import open_adapter
from fastvlm_convert.checkpoint.content import Parts, read_float, read_quantized
from fastvlm_convert.checkpoint.dimensions import Disagreement, find_disagreements
from fastvlm_convert.checkpoint.files import optional_json, read_json
from fastvlm_convert.checkpoint.foreign import refuse_other_folders, refuse_quantized_config
from fastvlm_convert.checkpoint.hub import fetch_model, is_model_id
from fastvlm_convert.checkpoint.layouts import Layout
from fastvlm_convert.checkpoint.picture_settings import PictureSettings, with_pixel_scaling
from fastvlm_convert.checkpoint.prompt_settings import PromptSettings, prompt_settings
from fastvlm_convert.checkpoint.quantized_checkpoint import FILE_NAME as QUANTIZED_FILE
from fastvlm_convert.checkpoint.quantized_checkpoint import QuantizedContent
from fastvlm_convert.checkpoint.tokenizer import TextTokenizer, read_tokenizer
from fastvlm_convert.errors import CheckpointError, shown
from fastvlm_convert.preprocess import ImageMode
from fastvlm_convert.quantized.weight import MixedSource
from fastvlm_convert.regular_file import MAX_TEXT_BYTES, is_there, open_file
from fastvlm_convert.weights.file_tensors import AGAIN
from fastvlm_convert.weights.fold import fold
from fastvlm_convert.weights.model_config import ModelConfig
from fastvlm_convert.weights.source import Weight

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


def open_checkpoint(
    path: str | Path,
    adapter: str | Path | None = None,
    *,
    projector: str | Path | None = None,
    vision_tower: str | Path | None = None,
) -> Checkpoint:
    """Open a FastVLM checkpoint in Apple's or transformers' layout, or a quantized one; headers only.

    Args:
        path: Folder with config.json, weights and tokenizer; or a model's id on Hugging Face, with or without
            a revision: `apple/FastVLM-0.5B@main`.
        adapter: Folder of an adapter that is merged into the weights, or None.
        projector: File with a projector that takes the place of the checkpoint's, or None.
        vision_tower: File with an encoder that takes the place of the checkpoint's, or None.

    Raises:
        CheckpointError: It is missing, damaged, hostile, incomplete or no FastVLM.
        TokenizerError: Its tokenizer is missing or damaged.
    """
    path, origin = _found(path)
    raw = read_json(path / "config.json")
    if is_there(path / QUANTIZED_FILE):
        content = read_quantized(path, raw, any(p is not None for p in (adapter, projector, vision_tower)))
    else:
        refuse_quantized_config(raw, path)
        parts = Parts(
            adapter=None if adapter is None else open_adapter(Path(adapter)),
            projector=None if projector is None else Path(projector),
            vision_tower=None if vision_tower is None else Path(vision_tower),
        )
        content = read_float(path, raw, parts)
    layout, pictures = content.layout, content.pictures
    config = with_pixel_scaling(content.config, pictures.image)
    tokenizer = read_tokenizer(content.tokenizer)
    _check_embeds(tokenizer, config, path)
    generation = optional_json(path / "generation_config.json")
    license = next((path / n for n in _LICENSE_NAMES if is_there(path / n)), None)
    settings = _settings_files(path, tokenizer, license)
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
        oddities=(*origin, *content.notes),
        license=license,
        settings=settings,
        files=tuple(dict.fromkeys((*settings, *content.files))),
    )


def _settings_files(path: Path, tokenizer: TextTokenizer, license: Path | None) -> tuple[Path, ...]:
    """Files of a checkpoint that are no weights, each of them readable."""
    files = [path / "config.json", *tokenizer.files]
    files += [path / n for n in _SETTINGS if is_there(path / n)]
    files += [] if license is None else [license]
    for file in files:
        _check_readable(file)
    return tuple(files)


def _check_readable(path: Path) -> None:
    """Some settings are only hashed and copied; a pipe or a file without end must be told from a text."""
    try:
        open_file(path, MAX_TEXT_BYTES).close()
    except OSError as error:
        raise CheckpointError(f"cannot read: {error.strerror}", where=path, hint=AGAIN) from error


def opened(checkpoint: str | Path | Checkpoint) -> Checkpoint:
    """A checkpoint, opened unless it is open already."""
    return checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)


def _found(path: str | Path) -> tuple[Path, tuple[str, ...]]:
    """The folder of a checkpoint, downloaded where it is a model's id; and where it comes from.

    Raises:
        ConversionError: There is no such folder or model, or it holds something else.
    """
    if str(path) in ("", ".") and not Path("config.json").exists():
        raise CheckpointError(
            "the checkpoint's path is empty or '.', and the current folder holds no config.json",
            hint="give the folder that holds config.json",
        )
    if is_model_id(str(path)):
        model = fetch_model(str(path))
        return model.folder, (model.note,)
    path = Path(path)
    if not path.is_dir():
        what = "a checkpoint is a folder, this is a file" if path.exists() else "there is no such checkpoint"
        raise CheckpointError(what, where=path, hint="give the folder that holds config.json")
    if not is_there(path / "config.json"):
        refuse_other_folders(path)
    return path, ()


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
