"""A chain of blocks against the whole model."""

from collections.abc import Iterator, Mapping

import pytest
import torch

from fastvlm_convert.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fastvlm_convert.model.block_streamer import BlockStreamer, intercepted
from fastvlm_convert.model.fastvlm import load_model
from fastvlm_convert.recipe_settings import RepairSettings
from fastvlm_convert.weights.fold import fold
from fastvlm_convert.weights.rescale import fp16_safe, repaired_config
from fastvlm_convert.weights.source import Weight
from tests.checkpoints import LLAVA, SETS, golden_checkpoint
from tests.planted import DEMO

TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


def checkpoint_of(name: str) -> Checkpoint:
    return open_checkpoint(DEMO) if name == "demo" else golden_checkpoint(name)


def through(chain: BlockStreamer, blocks: list[str], x: torch.Tensor) -> torch.Tensor:
    for block in blocks:
        x = chain.run(chain.load(block), x)
    return x


@pytest.mark.parametrize("name", [*SETS, "demo"])
@torch.no_grad()
def test_it_is_the_whole_model(name):
    checkpoint = checkpoint_of(name)
    weights = fold(checkpoint.weights)
    chain = BlockStreamer(checkpoint.config, weights)
    model = load_model(checkpoint.config, weights, folded=True)
    random = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 3, *[checkpoint.config.vision.image_size] * 2, generator=random)
    features = through(chain, chain.vision_blocks(), pixels)
    torch.testing.assert_close(features, model.encode_image(pixels), **TOLERANCE)

    ids = torch.randint(checkpoint.config.decoder.vocab_size, (9,), generator=random)
    rows = [torch.cat([chain.embed(ids), features[0]]), torch.cat([features[1], chain.embed(ids[:4])])]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=3.0)
    hidden = through(chain, chain.decoder_blocks(), padded)
    for row, found in zip(rows, hidden, strict=True):
        expected = model.decoder(row[None], model.decoder.new_cache(len(row)))[0]
        vocab = checkpoint.config.decoder.vocab_size
        torch.testing.assert_close(chain.logits(found[: len(row)]), expected[:, :vocab], **TOLERANCE)


@torch.no_grad()
def test_a_scaled_residual_stream():
    checkpoint = golden_checkpoint(LLAVA)
    repairs = RepairSettings(residual_shift=3)
    config = repaired_config(checkpoint.config, repairs)
    weights = fold(checkpoint.weights)
    plain = BlockStreamer(checkpoint.config, weights)
    shifted = BlockStreamer(config, fp16_safe(weights, checkpoint.config.decoder, repairs))
    x = torch.randn(2, 7, config.decoder.hidden_size, generator=torch.Generator().manual_seed(1))
    expected = through(plain, plain.decoder_blocks(), x)
    found = through(shifted, shifted.decoder_blocks(), x * config.decoder.residual_scale)
    torch.testing.assert_close(found * 8, expected, **TOLERANCE)
    torch.testing.assert_close(shifted.logits(found[0]), plain.logits(expected[0]), **TOLERANCE)


def test_embeddings():
    checkpoint = golden_checkpoint(LLAVA)
    chain = BlockStreamer(checkpoint.config, fold(checkpoint.weights))
    table = chain.tensor("decoder.embed_tokens.weight")
    ids = torch.tensor([5, 3, 5, 0])
    assert torch.equal(chain.embed(ids), table[ids])
    assert chain.embed(ids[:0]).shape == (0, checkpoint.config.decoder.hidden_size)


class Watched(Mapping[str, Weight]):
    """Weights that note which of them were asked for."""

    def __init__(self, weights: Mapping[str, Weight]) -> None:
        self.weights = weights
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> Weight:
        self.asked.add(name)
        return self.weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def test_a_block_reads_its_own_weights_and_all_blocks_read_all():
    checkpoint = golden_checkpoint(LLAVA)
    watched = Watched(fold(checkpoint.weights))
    chain = BlockStreamer(checkpoint.config, watched)
    chain.load("decoder.layers.1")
    own = {name for name in watched if name.startswith("decoder.layers.1.")}
    assert watched.asked == own
    for block in (*chain.vision_blocks(), *chain.decoder_blocks()):
        chain.load(block)
    assert set(watched) - watched.asked == {"decoder.embed_tokens.weight", "decoder.norm.weight"}


def test_inputs_are_intercepted_and_replaced_while_the_block_lasts():
    chain = BlockStreamer(golden_checkpoint(LLAVA).config, fold(golden_checkpoint(LLAVA).weights))
    projector = chain.load("projector")
    x = torch.rand(2, projector.fc1.in_features, 2, 2, generator=torch.Generator().manual_seed(0))
    seen = {}

    def halve(given: torch.Tensor) -> torch.Tensor:
        seen["fc2"] = given
        return given / 2

    with intercepted({projector.fc2: halve}):
        halved = chain.run(projector, x)
    whole = chain.run(projector, x)
    torch.testing.assert_close(projector.fc2(seen["fc2"]), whole, rtol=0, atol=0)
    torch.testing.assert_close(projector.fc2(seen["fc2"] / 2), halved, rtol=0, atol=0)


def test_nothing_is_intercepted_after_an_error():
    chain = BlockStreamer(golden_checkpoint(LLAVA).config, fold(golden_checkpoint(LLAVA).weights))
    projector = chain.load("projector")
    x = torch.ones(1, projector.fc1.in_features, 2, 2)

    def fail(given: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), intercepted({projector.fc1: fail}):
        chain.run(projector, x)
    chain.run(projector, x)
