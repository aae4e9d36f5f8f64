"""The reference against arrays that Apple's and transformers' own code computed."""

import numpy as np
import pytest
import torch

from fastvlm_convert.generate import generate, teacher_forced
from fastvlm_convert.model.session import TorchSession
from fastvlm_convert.pictures import load_image
from fastvlm_convert.prompt import Prompt, build_prompt, user_message
from fastvlm_convert.prompt_reading import embed_prompt
from tests.checkpoints import GoldenCase, golden_cases, golden_checkpoint, golden_model

CASES = golden_cases()
CONTEXT = 128
TOLERANCE = 1e-4

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_form = pytest.mark.parametrize("folded", [False, True], ids=["unfolded", "folded"])


def prompt_of(case: GoldenCase) -> Prompt:
    checkpoint = golden_checkpoint(case.name)
    message = user_message(case.question, [load_image(case.image)])
    return build_prompt([message], checkpoint.prompt.format, checkpoint.tokenizer, checkpoint.pictures.image)


def assert_close(golden: np.ndarray, ours: np.ndarray) -> None:
    assert golden.shape == ours.shape
    assert np.abs(golden - ours).max() <= TOLERANCE * max(1.0, np.abs(golden).max())


def test_the_three_sets_are_here():
    assert len(CASES) == 8
    assert all(len(case.greedy_token_ids) == 24 for case in CASES)


@every_case
def test_preprocessing_is_exact(case):
    prompt = prompt_of(case)
    np.testing.assert_array_equal(case.array("pixel_values"), prompt.images[0])
    assert [s.tolist() for s in prompt.segments] == [case.ids_before_image, case.ids_after_image]


@every_form
@every_case
def test_outputs_match(case, folded):
    model, prompt = golden_model(case.name, folded), prompt_of(case)
    session = TorchSession(model, CONTEXT)
    features = case.array("vision_features")
    if features is not None:
        with torch.inference_mode():
            assert_close(features, model.vision(torch.from_numpy(prompt.images[0])).numpy())
    image_tokens = session.encode_image(prompt.images[0])
    assert_close(case.array("image_tokens")[0], image_tokens)

    embeds = embed_prompt(session, prompt, [image_tokens])
    with torch.inference_mode():
        logits = model.decoder(torch.from_numpy(embeds)[None], model.decoder.new_cache(CONTEXT))
    assert_close(case.array("prefill_logits"), logits.numpy())
    np.testing.assert_allclose(session.prefill(embeds), logits[0, -1].numpy(), atol=1e-6)

    steps = case.array("decode_logits")  # row i follows answer token i
    if steps is not None:
        assert_close(steps, teacher_forced(session, embeds, [*case.greedy_token_ids, 0])[1:])


@every_form
@every_case
def test_greedy_tokens_are_the_same(case, folded):
    session = TorchSession(golden_model(case.name, folded), CONTEXT)
    answer = generate(session, prompt_of(case), (), len(case.greedy_token_ids))
    assert list(answer.token_ids) == case.greedy_token_ids
    assert golden_checkpoint(case.name).tokenizer.decode(list(answer.token_ids)) == case.greedy_text


@pytest.mark.parametrize("name", sorted({case.name for case in CASES}))
def test_folding_changes_no_feature(name):
    plain, folded = golden_model(name), golden_model(name, folded=True)
    pixels = torch.rand(
        1, 3, *[plain.config.vision.image_size] * 2, generator=torch.Generator().manual_seed(0)
    )
    with torch.inference_mode():
        expected, found = plain.vision(pixels), folded.vision(pixels)
    assert (expected - found).abs().max() <= 1e-5 * max(1.0, expected.abs().max())
    assert not any("ffn.bn" in key or "_scale" in key for key in folded.state_dict())
