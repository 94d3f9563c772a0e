"""The layout encoder and the grammar abstractor: sizes, shapes and gradients."""

from __future__ import annotations

import pytest
import torch

from pipelines.models.grammar_abstractor import GrammarAbstractorModel
from pipelines.models.layout_encoder import LayoutEncoderModel


def tiny(**more) -> LayoutEncoderModel:
    torch.manual_seed(0)
    return LayoutEncoderModel(block_out_channels=(8, 16, 16), sample_size=64, **more)


def test_the_default_has_31_million_parameters():
    with torch.device("meta"):
        model = LayoutEncoderModel()
    assert 30.5e6 < sum(p.numel() for p in model.parameters()) < 31.5e6


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("size", [(64, 64), (128, 128), (37, 90), (16, 17)])
def test_the_output_has_the_size_of_the_input(patch_size, size):
    with torch.no_grad():
        output = tiny(patch_size=patch_size)(torch.rand(2, 3, *size) * 2 - 1)
    assert output.color_role.shape == (2, 6, *size)
    probabilities, features = output.probabilities(), output.f_tensor()
    assert probabilities.shape == (2, 9, *size)
    assert features.shape == (2, 4, *size)
    assert probabilities.min() >= 0
    assert probabilities.max() <= 1
    assert torch.allclose(probabilities[:, 2:8].sum(1), torch.ones(2, *size), atol=1e-5)
    assert set(features[:, :2].unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(features[:, 2], probabilities[:, 2:8].argmax(1).float())


def test_padding_has_no_effect_far_from_the_border():
    """Cropping an image to a side that needs padding hardly changes the prediction for the rest of it."""
    model = tiny().eval()
    image = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        whole, cut = model(image).hierarchy, model(image[..., :121]).hierarchy
    # Group normalization averages over the whole image, so nothing is exactly equal.
    assert (whole[..., :80] - cut[..., :80]).abs().mean() < 0.01


def test_every_parameter_gets_a_gradient_which_checkpointing_does_not_change():
    gradients = []
    for checkpointing in (False, True):
        model = tiny()
        if checkpointing:
            model.enable_gradient_checkpointing()
        image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
        model(image).probabilities().square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b) for a, b in zip(*gradients, strict=True))


def test_the_abstractor_distinguishes_places():
    """It predicts eight numbers in [0, 1] and two counts from features of any size, which depend on positions."""
    torch.manual_seed(0)
    model = GrammarAbstractorModel(block_out_channels=(8, 16, 16), hidden_size=32, sample_size=32).eval()
    features = torch.zeros(2, 9, 100, 60)
    features[0, 0, 10:20, 5:30] = 1
    features[1, 0, 70:80, 5:30] = 1
    with torch.no_grad():
        output = model(features)
    assert output.grammar.shape == (2, 8)
    assert output.grammar.min() >= 0
    assert output.grammar.max() <= 1
    assert [c.shape for c in output.counts] == [(2, 4), (2, 4)]
    assert output.counted().shape == (2, 2)
    assert not torch.allclose(output.grammar[0], output.grammar[1])
