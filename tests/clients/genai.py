"""A bundle in onnxruntime-genai's published wheel, beside the same bundle as `run` runs it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvlm_convert.generate import answer_tokens
from fastvlm_convert.manifest import Contract, load_manifest
from fastvlm_convert.prompt import Prompt
from fastvlm_convert.runtime.loaded import LoadedModel, load_bundle

og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")


@dataclass(frozen=True)
class Genai:
    """One bundle, opened twice.

    Attributes:
        folder: The bundle.
        model: onnxruntime-genai's.
        tokenizer: onnxruntime-genai's.
        ours: The bundle as `run` runs it.
        contract: What its manifest promises.
    """

    folder: Path
    model: Any
    tokenizer: Any
    ours: LoadedModel
    contract: Contract

    def ids(self, prompt: Prompt) -> np.ndarray:
        """A prompt as onnxruntime-genai takes it: int32 [n], an id of `<image>` for each of its features."""
        image = np.full(self.contract.num_image_tokens, self.contract.image_token_id)
        parts = [part for segment in prompt.segments for part in (image, segment)][1:]
        return np.concatenate(parts).astype(np.int32)

    def generator(self, batch_size: int = 1, **options: Any) -> Any:
        """A generator with search options; those of the bundle where none are given."""
        params = og.GeneratorParams(self.model)
        params.set_search_options(batch_size=batch_size, **options)
        return og.Generator(self.model, params)

    def answer(self, prompt: Prompt, max_new_tokens: int) -> list[int]:
        """Its tokens, up to and without the one that ends it."""
        ids = self.ids(prompt)
        generator = self.generator(max_length=len(ids) + max_new_tokens)
        if prompt.images:
            generator.set_inputs(self.inputs(ids[None], prompt.images))
        else:
            generator.append_tokens(ids[None])
        return self.rest(generator)

    def inputs(self, ids: np.ndarray, images: tuple[np.ndarray, ...]) -> Any:
        """Token ids and pictures by the names that onnxruntime-genai knows.

        Pictures of one call have one size, so those of several sizes are made square first.
        """
        if len({image.shape for image in images}) > 1:
            images = tuple(self.ours.unprepared(self.ours.session.prepare(image)) for image in images)
        tensors = og.NamedTensors()
        tensors["input_ids"] = ids
        tensors["pixel_values"] = np.concatenate(images)
        tensors["num_image_tokens"] = np.full(len(images), self.contract.num_image_tokens)
        return tensors

    def rest(self, generator: Any) -> list[int]:
        """What a generator still gives, without the token that ends it."""
        tokens = []
        while not generator.is_done():
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
        return tokens[:-1] if tokens[-1] in self.contract.eos_token_ids else tokens

    def our_answer(self, prompt: Prompt, max_new_tokens: int) -> list[int]:
        """The tokens of `run`."""
        tokens = list(answer_tokens(self.ours.session, prompt, self.contract.eos_token_ids, max_new_tokens))
        return [token for token in tokens if token not in self.contract.eos_token_ids]


def open_genai(bundle: Path) -> Genai:
    """Open a bundle as it is; nothing is written beside it."""
    model = og.Model(str(bundle))
    contract = load_manifest(bundle).contract
    return Genai(bundle, model, og.Tokenizer(model), load_bundle(bundle, "onnx"), contract)
