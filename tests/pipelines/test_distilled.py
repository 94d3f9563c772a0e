"""A pipeline that was distilled has its steps in its config, and refuses guidance; others keep the usual defaults."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pipelines.common.distilled import GUIDANCE_SCALE, NUM_INFERENCE_STEPS, given_or_default, sampling_defaults
from pipelines.latent_diffusion import LatentDiffusionPipeline
from tests.support.tiny_models import tiny_pipeline
from tests.support.tiny_published import PUBLISHED

DISTILLED = {"num_inference_steps": 2, "guidance_scale": 1.5}


def distilled(entry=DISTILLED) -> LatentDiffusionPipeline:
    parts = tiny_pipeline("flow_prediction")
    return LatentDiffusionPipeline(**parts.components, distilled=entry)


def draw(pipeline, **options) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline("a red poster", generator=0, output_type="np", **options).images


def test_the_defaults_are_in_the_config_and_survive_saving(tmp_path):
    distilled().save_pretrained(tmp_path)
    loaded = LatentDiffusionPipeline.from_pretrained(tmp_path)
    assert sampling_defaults(loaded) == (2, 1.0)
    assert np.array_equal(draw(loaded), draw(loaded, num_inference_steps=2, guidance_scale=1.0))
    assert given_or_default(loaded, 7, None) == (7, 1.0)


def test_other_pipelines_have_the_usual_defaults_and_no_entry(tmp_path):
    pipeline = tiny_pipeline("flow_prediction")
    pipeline.save_pretrained(tmp_path)
    assert "distilled" not in json.loads((tmp_path / "model_index.json").read_text())
    assert sampling_defaults(pipeline) == (NUM_INFERENCE_STEPS, GUIDANCE_SCALE) == (25, 2.5)
    assert np.array_equal(draw(pipeline), draw(pipeline, num_inference_steps=25, guidance_scale=2.5))


def test_its_sampler_by_name_takes_its_steps_and_has_two_or_more():
    """The levels of the last step follow from the scheduler of the model, however it is chosen."""
    own, named = (PUBLISHED["distilled"]() for _ in range(2))
    named.set_scheduler("euler")
    assert named.scheduler.config.shift_terminal == own.scheduler.config.shift_terminal == pytest.approx(1 / 3)
    assert np.array_equal(draw(named), draw(own))
    with pytest.raises(ValueError, match="`num_inference_steps` must be at least 2 for this model, but is 1"):
        draw(own, num_inference_steps=1)


def test_guidance_is_refused():
    assert np.array_equal(draw(distilled(), guidance_scale=0.5), draw(distilled()))
    with pytest.raises(ValueError, match=r"`guidance_scale` is 1\.1, .* with a scale of 1\.5"):
        draw(distilled(), guidance_scale=1.1)


@pytest.mark.parametrize("entry", [{}, {"num_inference_steps": 2}, {**DISTILLED, "num_inference_steps": 0}, 4])
def test_an_incomplete_entry_is_refused(entry):
    with pytest.raises(ValueError, match="`distilled` must be a dictionary"):
        distilled(entry)
