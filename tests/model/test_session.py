import numpy as np
import pytest
import torch

from fastvlm_convert.model.fastvlm import Uninitialized
from fastvlm_convert.model.session import TorchSession
from tests.checkpoints import LLAVA, SETS, golden_model


@pytest.fixture
def embeds():
    return np.random.default_rng(0).normal(size=(9, 64)).astype(np.float32)


def whole(model, embeds):
    """Logits of every position, computed in one call."""
    with torch.inference_mode():
        return model.decoder(torch.from_numpy(embeds)[None], model.decoder.new_cache(len(embeds)))[0].numpy()


def test_prefill_and_steps_give_the_logits_of_one_call(embeds):
    model = golden_model(LLAVA)
    session, expected = TorchSession(model, 16), whole(model, embeds)
    np.testing.assert_allclose(session.prefill(embeds[:5]), expected[4], atol=1e-5)
    for i in range(5, 9):
        np.testing.assert_allclose(session.decode(embeds[i : i + 1]), expected[i], atol=1e-5)


def test_a_prefill_forgets_what_was_before(embeds):
    model = golden_model(LLAVA)
    session = TorchSession(model, 16)
    first = session.prefill(embeds)
    session.decode(embeds[:1])
    np.testing.assert_array_equal(session.prefill(embeds), first)


def test_logits_depend_on_the_past_and_not_on_the_future(embeds):
    model = golden_model(LLAVA)
    expected = whole(model, embeds)
    changed = embeds.copy()
    changed[4] += 1
    found = whole(model, changed)
    np.testing.assert_array_equal(found[:4], expected[:4])
    assert (np.abs(found[4:] - expected[4:]).max(-1) > 1e-3).all()


@pytest.mark.parametrize("name", SETS)
def test_shapes_and_types(name):
    model = golden_model(name)
    session, config = TorchSession(model, 32), model.config
    size, hidden = config.vision.image_size, config.decoder.hidden_size
    assert session.executed_by == f"torch {torch.__version__.partition('+')[0]}"
    assert (session.context_length, session.num_image_tokens) == (32, (size // 64) ** 2)
    features = session.encode_image(np.zeros((1, 3, size, size), np.float32))
    assert features.shape == (session.num_image_tokens, hidden)
    embedded = session.embed(np.array([3, 1, 3], np.int64))
    assert embedded.shape == (3, hidden)
    np.testing.assert_array_equal(embedded[0], embedded[2])
    np.testing.assert_array_equal(embedded[1], model.decoder.embed_tokens.weight[1].numpy())
    logits = session.prefill(embedded)
    assert logits.shape == (config.decoder.vocab_size,)
    assert {features.dtype, embedded.dtype, logits.dtype} == {np.dtype(np.float32)}


def test_what_weights_are_read_into_draws_none():
    before = torch.get_rng_state()
    with Uninitialized():
        layers = [torch.nn.Linear(3, 4), torch.nn.Conv2d(3, 4, 3), torch.nn.Embedding(3, 4)]
    assert [layer.weight.shape for layer in layers] == [(4, 3), (4, 3, 3, 3), (3, 4)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.nn.Linear(3, 4)
    assert not torch.equal(torch.get_rng_state(), before)
