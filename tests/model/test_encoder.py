"""The encoder with its layers by name."""

import torch

from fastvlm_convert.model.encoder import Encoder
from fastvlm_convert.weights.fold import fold
from tests.checkpoints import LLAVA, golden_checkpoint, golden_model


def golden_encoder() -> tuple[Encoder, torch.Tensor]:
    """The encoder of a golden checkpoint, and a picture."""
    checkpoint = golden_checkpoint(LLAVA)
    pixels = torch.rand(1, 3, *[checkpoint.config.vision.image_size] * 2, generator=torch.manual_seed(0))
    return Encoder(checkpoint.config, fold(checkpoint.weights)), pixels


def test_it_is_the_models():
    encoder, pixels = golden_encoder()
    expected = golden_model(LLAVA, folded=True).encode_image(pixels)[0]
    torch.testing.assert_close(encoder.run(pixels), expected, rtol=1e-4, atol=1e-4)


def test_going_on_from_the_block_of_a_layer():
    """Only what is behind counts: a layer that changes is seen from its own block on."""
    encoder, pixels = golden_encoder()
    states, whole = list(encoder.states(pixels)), encoder.run(pixels)
    torch.testing.assert_close(states[-1][0], whole, rtol=0, atol=0)
    names = list(encoder.layers)
    for name in (names[0], names[len(names) // 2], names[-1]):
        torch.testing.assert_close(encoder.run_from(name, states), whole, rtol=0, atol=0)
    changed = encoder.layers[names[len(names) // 2]]
    changed.weight.data *= 2
    torch.testing.assert_close(
        encoder.run_from(names[len(names) // 2], states), encoder.run(pixels), rtol=0, atol=0
    )
    assert not torch.equal(encoder.run(pixels), whole)
    torch.testing.assert_close(encoder.run_from(names[-1], states), whole, rtol=0, atol=0)
