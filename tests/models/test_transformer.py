"""Transformers that denoise: what is decided from the settings of the training."""

from __future__ import annotations

import pytest

from training.models.transformer import TransformerConfig, build_transformer, restart_levels


@pytest.mark.parametrize(
    ("least", "levels"), [(0.0, ()), (0.0998, (0.2994, 0.1996, 0.0998)), (0.2, (0.4, 0.2)), (0.6, ())]
)
def test_finished_samples_are_denoised_again_from_low_noise_levels(least: float, levels: tuple[float, ...]):
    assert restart_levels(least) == pytest.approx(levels)


def test_only_networks_that_predict_the_sample_have_restarts():
    small = {"patch_size": 2, "hidden_size": 16, "num_layers": 1, "num_attention_heads": 1}
    for predicts_sample in (True, False):
        network = build_transformer(
            TransformerConfig(predicts_sample=predicts_sample, **small),
            channels=3,
            size=8,
            text_width=None,
            num_classes=0,
            condition_channels=0,
            num_train_timesteps=1000,
            least_noise_level=0.1,
        )
        assert bool(network.config.restart_levels) == predicts_sample
