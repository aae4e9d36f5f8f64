"""What the answers feel, against autograd on the whole model."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fastvlm_convert.quantization import token_weights
from fastvlm_convert.quantization.answers import TokenBatch
from fastvlm_convert.quantization.token_weights import measured_weights, spread, squared_gradients
from fastvlm_convert.recipe_settings import CalibrationSettings
from tests.checkpoints import LLAVA, golden_model
from tests.quantization.calibrated import float_chain, golden_batch, golden_hidden, golden_weights


def whole_model(batch: TokenBatch, row: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits that predict a sample's answer, and every layer's outputs, of the model as a whole."""
    model, outputs = golden_model(LLAVA, folded=True), {}

    def watch(name: str, y: torch.Tensor) -> None:
        y.retain_grad()
        outputs[name] = y

    hooks = [
        layer.register_forward_hook(lambda _m, _i, y, name=name: watch(name, y))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and name.startswith("decoder.layers.")
    ]
    embeds = batch.embeds[row][batch.real[row]].clone().requires_grad_()
    logits = model.decoder(embeds[None], model.decoder.new_cache(len(embeds)))[0]
    for hook in hooks:
        hook.remove()
    return logits[batch.answers[1][batch.answers[0] == row]], outputs


def probes(logits: torch.Tensor) -> torch.Tensor:
    """`sqrt(p) n - p (sqrt(p) . n)` for the noise n of the seed, drawn some rows at a time."""
    noise = torch.Generator().manual_seed(token_weights.SEED)
    parts = torch.split(logits.detach(), token_weights.SAMPLES_BACK)
    n = torch.cat([torch.randn(part.shape, generator=noise) for part in parts])
    p = torch.softmax(logits.detach(), -1)
    return p.sqrt() * n - p * (p.sqrt() * n).sum(-1, keepdim=True)


def test_they_are_the_squared_gradients_of_a_whole_backward_pass():
    batch, found = golden_batch(), golden_weights()
    runs = [whole_model(batch, row) for row in range(len(batch.embeds))]
    rows = probes(torch.cat([logits for logits, _ in runs]))
    for row, (logits, outputs) in enumerate(runs):
        (logits * rows[batch.answers[0] == row]).sum().backward()
        assert set(outputs) == set(found)
        for name, y in outputs.items():
            expected = y.grad[0].square().mean(-1)
            assert expected.max() > 0
            ours = found[name][row]
            torch.testing.assert_close(
                ours[batch.real[row]], expected, rtol=1e-3, atol=1e-5 * expected.max().item()
            )
            assert not ours[~batch.real[row]].any()
    assert not batch.real.all()  # or nothing was padded


def test_they_predict_the_divergence(monkeypatch):
    """Noise at a layer's outputs costs what its weights say, on average over many draws."""
    chain, batch = float_chain(), golden_batch()
    layer, block = "self_attn.o_proj", "decoder.layers.1"
    drawn = []
    for seed in range(6):
        monkeypatch.setattr(token_weights, "SEED", seed)
        found = squared_gradients(chain, batch, lambda share: None)
        drawn.append(found[f"{block}.{layer}"].numpy())
    mean = np.mean(drawn, 0)
    before = chain.run(chain.load("decoder.layers.0"), batch.embeds)
    clean = torch.log_softmax(chain.logits(golden_hidden()), -1)
    ratios = []
    for seed in range(12):
        noise = torch.Generator().manual_seed(seed)
        module = chain.load(block)
        module.get_submodule(layer).register_forward_hook(
            lambda _m, _i, y, noise=noise: y + 3e-3 * torch.randn(y.shape, generator=noise)
        )
        noisy = torch.log_softmax(chain.logits(chain.run(module, before)[batch.answers]), -1)
        width = chain.config.decoder.hidden_size
        predicted = 0.5 * 3e-3**2 * width * mean.sum()
        ratios.append(float((clean.exp() * (clean - noisy)).sum()) / predicted)
    assert 0.7 < np.mean(ratios) < 1.4


def test_progress_reaches_the_end():
    shares: list[float] = []
    squared_gradients(float_chain(), golden_batch(), shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_averages_by_modality():
    batch, layer = golden_batch(), "decoder.layers.0.mlp.up_proj"
    weights, found = golden_weights()[layer], measured("modality")[layer]
    text = batch.real & ~batch.image
    for tokens in (batch.image, text):
        torch.testing.assert_close(found[tokens], weights[tokens].mean().expand(int(tokens.sum())))
    assert found[batch.image][0] != found[text][0]
    assert not found[~batch.real].any()


def test_texts_alone_weigh_no_more_than_text_beside_pictures():
    """However many they are: the more there are, the less each of their tokens weighs."""
    batch = golden_batch()
    image = batch.image.clone()
    image[1:] = False  # as if only the first sample had a picture
    batch = replace(batch, image=image)
    found = spread((0.5, 2.0), batch)
    beside, alone = found[0][batch.real[0] & ~image[0]], found[1:][batch.real[1:]]
    assert len(alone) > len(beside) > 0
    assert beside.unique().tolist() == [2.0]
    assert alone.sum().item() == pytest.approx(beside.sum().item())
    assert len(alone.unique()) == 1
    assert found[image].unique().tolist() == [0.5]
    assert not found[~batch.real].any()


def test_few_texts_weigh_as_much_as_text_beside_pictures():
    batch = golden_batch()
    image = batch.image.clone()
    image[-1] = False
    real = batch.real.clone()
    real[-1, 4:] = False
    found = spread((0.5, 2.0), replace(batch, image=image, real=real))
    assert found[-1][:5].tolist() == [2.0] * 4 + [0.0]


def test_few_samples_tell_the_averages_of_all(monkeypatch):
    monkeypatch.setattr(token_weights, "AVERAGED_SAMPLES", 2)
    batch, layer = golden_batch(), "decoder.layers.0.mlp.up_proj"
    two = squared_gradients(float_chain(), batch.first(2), lambda share: None)[layer]
    found = measured("modality")[layer]
    assert found.shape == batch.real.shape
    torch.testing.assert_close(found[2][batch.image[2]][0], two[batch.image[:2]].mean())


def test_what_a_recipe_tells_apart():
    assert measured("uniform") == {}
    by_token = measured("token")
    assert all(torch.equal(by_token[layer], weights) for layer, weights in golden_weights().items())


def measured(kind: str) -> dict[str, torch.Tensor]:
    """Of the golden samples, as a recipe asks."""
    settings = CalibrationSettings(token_weights=kind)
    return measured_weights(float_chain(), golden_batch(), settings, lambda share: None)
