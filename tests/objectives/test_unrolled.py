"""The differentiable sampler: exact for a known distribution, and a gradient through its last steps only.

B samples.
"""

from __future__ import annotations

import pytest
import torch

from training.objectives.diffusion import Diffusion, DiffusionConfig
from training.objectives.functional import PREDICTION_TYPES, prediction_target
from training.objectives.unrolled import clean_and_noise, noise_levels, unrolled

GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_clean_sample_and_noise_invert_the_target(prediction_type):
    x_0, noise = normal(4, 3, 2, 2), normal(4, 3, 2, 2)
    alpha = 0.6
    sigma = 0.4 if prediction_type == "flow_prediction" else 0.8
    a, s = torch.full((4,), alpha, dtype=torch.float64), torch.full((4,), sigma, dtype=torch.float64)
    target = prediction_target(prediction_type, x_0, noise, a, s)
    clean, implied = clean_and_noise(prediction_type, alpha * x_0 + sigma * noise, target, alpha, sigma)
    assert torch.allclose(clean, x_0)
    assert torch.allclose(implied, noise)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_perfect_model_of_one_image_gives_this_image(prediction_type):
    """If there is a single image, its prediction at every noise level is known, and every sampler ends there."""
    diffusion = Diffusion(DiffusionConfig(prediction_type=prediction_type))
    image, levels = normal(1, 3, 2, 2).float(), noise_levels(diffusion, 5)
    known = {level.timestep: level for level in levels}

    def predict(x_t, timestep):
        level = known[timestep]
        noise = (x_t - level.alpha * image) / level.sigma
        a, s = (torch.full((1,), value) for value in (level.alpha, level.sigma))
        return prediction_target(prediction_type, image, noise, a, s)

    noise = normal(1, 3, 2, 2).float()
    assert torch.allclose(unrolled(predict, noise, levels, prediction_type, 1), image, atol=1e-3)


def test_levels_are_evenly_spaced_from_pure_noise_to_one_step_before_the_end():
    flow = noise_levels(Diffusion(DiffusionConfig()), 4)
    assert [level.sigma for level in flow] == pytest.approx([1, 0.75, 0.5, 0.25])
    assert [level.timestep for level in flow] == pytest.approx([1000, 750, 500, 250])
    assert all(level.alpha == pytest.approx(1 - level.sigma) for level in flow)
    shifted = noise_levels(Diffusion(DiffusionConfig(flow_shift=3.0)), 2)
    assert [level.sigma for level in shifted] == pytest.approx([1, 3 * 0.5 / (1 + 2 * 0.5)])
    steps = noise_levels(Diffusion(DiffusionConfig(prediction_type="epsilon")), 4)
    assert [level.timestep for level in steps] == [999, 750, 500, 250]
    assert all(level.alpha**2 + level.sigma**2 == pytest.approx(1) for level in steps)


@pytest.mark.parametrize("gradient_steps", [1, 2, 4])
def test_the_gradient_is_that_of_the_last_steps(gradient_steps):
    """A model that predicts the flow w x_t multiplies x_t by 1 - w/4 in each of four steps.

    With K steps of it in the gradient, the derivative is that of (1 - w/4)^K, times the constant result of the others.
    """
    levels = noise_levels(Diffusion(DiffusionConfig()), 4)
    w, noise = torch.tensor(0.8, requires_grad=True), torch.ones(1, 1, 1, 1)
    result = unrolled(lambda x_t, timestep: w * x_t, noise, levels, "flow_prediction", gradient_steps)
    assert float(result) == pytest.approx(0.8**4)
    result.backward()
    expected = 0.8 ** (4 - gradient_steps) * gradient_steps * 0.8 ** (gradient_steps - 1) * -0.25
    assert float(w.grad) == pytest.approx(expected, rel=1e-5)
