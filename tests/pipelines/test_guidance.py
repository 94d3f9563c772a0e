"""Guidance at a part of the noise levels, and guidance by an earlier version of the model."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.callbacks import SDCFGCutoffCallback

from pipelines.common.guidance import noise_level
from pipelines.common.schedulers import FLOW, PREDICTION_TYPES, sampling_scheduler, training_scheduler
from pipelines.latent_diffusion import LatentDiffusionPipeline
from pipelines.models.patch_transformer import PatchTransformer2DModel
from tests.pipelines.test_latent_diffusion_pipeline import point_pipeline
from tests.support.drawing import GENERATING, OTHER, PROMPT, draw, made, same, seeded
from tests.support.tiny_models import (
    TEXT_WIDTH,
    tiny_caption_prior,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_vae,
)

TRANSFORMERS = {
    "transformer_captioned": {"prompt": PROMPT},
    "transformer_labelled": {"class_labels": 1},
    "transformer_unconditional": {},
}
CALLS: dict[str, dict[str, Any]] = {**GENERATING, **TRANSFORMERS}
CONDITIONED = [kind for kind in CALLS if "unconditional" not in kind]
LATENT = [kind for kind in CALLS if not kind.startswith("poster")]
each_conditioned = pytest.mark.parametrize("kind", CONDITIONED)
each_latent = pytest.mark.parametrize("kind", LATENT)
SOME = (0.3, 0.8)


def pipeline_of(kind: str) -> Any:
    if kind not in TRANSFORMERS:
        return made(kind)
    text, classes = "captioned" in kind, 4 if "labelled" in kind else None
    torch.manual_seed(2)
    network = PatchTransformer2DModel(
        sample_size=4, in_channels=8 if text else 4, out_channels=4, patch_size=2, hidden_size=16, num_layers=1,
        num_attention_heads=2, bottleneck_size=4, cross_attention_dim=TEXT_WIDTH if text else None,
        num_class_embeds=classes,
    ).eval()  # fmt: skip
    pipeline = LatentDiffusionPipeline(
        tiny_vae(), None, sampling_scheduler(training_scheduler(FLOW)), tiny_text_encoder() if text else None,
        tiny_tokenizer() if text else None, transformer=changed(network, seed=3, by=0.1),
        caption_prior=tiny_caption_prior() if text else None,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def changed(module: Any, seed: int = 9, by: float = 0.05) -> Any:
    """Return a copy with other weights, as those of an earlier checkpoint."""
    module = copy.deepcopy(module)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += by * torch.randn(parameter.shape, generator=random)
    return module


def earlier(pipeline: Any) -> Any:
    """Return a pipeline with the same autoencoder, and other weights of all that is trained."""
    name = "unet" if pipeline.transformer is None else "transformer"
    trained = {name: changed(pipeline.denoiser)}
    for one in ("text_encoder", "caption_prior"):
        if getattr(pipeline, one) is not None:
            trained[one] = changed(getattr(pipeline, one))
    return type(pipeline).from_pipe(pipeline, **trained)


def rows_of(network: Any) -> tuple[list[tuple[float, int]], Any]:
    """Return a list that gets the timestep and the number of rows of each call of `network`, and the hook."""
    calls: list[tuple[float, int]] = []
    hook = network.register_forward_pre_hook(lambda module, args: calls.append((float(args[1]), len(args[0]))))
    return calls, hook


def level_of(pipeline: Any, timestep: float) -> float:
    """Return the noise level in float64, from the definition."""
    if pipeline.config.prediction_type == FLOW:
        return timestep / 1000
    alpha_squared = float(pipeline._own_scheduler.alphas_cumprod.double()[int(timestep)])
    alpha, sigma = math.sqrt(alpha_squared), math.sqrt(1 - alpha_squared)
    return sigma / (alpha + sigma)


# --- noise levels


def test_the_noise_level_is_sigma_of_flow_matching_or_that_of_the_same_ratio_of_noise():
    assert [noise_level(t, None, 1000) for t in (0.0, 250.0, 1000.0)] == [0, 0.25, 1]
    alphas = training_scheduler("epsilon").alphas_cumprod
    levels = [noise_level(float(t), alphas, 1000) for t in range(1000)]
    assert levels == sorted(levels)
    assert 0 < levels[0] < 0.05 < 0.9 < levels[-1] < 1
    for timestep in (0, 400, 999):
        ratio = math.sqrt((1 - alphas[timestep]) / alphas[timestep])  # sigma / alpha
        assert levels[timestep] == pytest.approx(ratio / (1 + ratio), abs=1e-6)
    assert noise_level(400.5, alphas, 1000) == pytest.approx((levels[400] + levels[401]) / 2, abs=2e-6)
    zero_snr = training_scheduler("v_prediction", rescale_betas_zero_snr=True).alphas_cumprod
    assert noise_level(999, zero_snr, 1000) == 1


def test_bounds_are_exact_although_timesteps_are_float32():
    """(0.2, 0.6] of ten equal steps contains the levels 0.6, 0.5, 0.4 and 0.3."""
    pipeline = point_pipeline(FLOW)
    pipeline(class_labels=1, guidance_interval=(0.2, 0.6), sigmas=[1 - i / 10 for i in range(10)], output_type="latent")
    assert pipeline.unet.batch_sizes == [1] * 4 + [2] * 4 + [1] * 2


# --- the interval


@each_conditioned
def test_an_interval_with_all_noise_levels_changes_nothing_and_an_empty_one_is_scale_1(kind: str):
    pipeline, options = pipeline_of(kind), {**CALLS[kind], "guidance_scale": 3.0, "num_images_per_prompt": 2}
    plain = draw(pipeline, **options)
    for everything in ((0, 1), [0.0, 1.0], (1e-4, 1)):
        assert np.array_equal(draw(pipeline, **options, guidance_interval=everything), plain), everything
    unguided = draw(pipeline, **options | {"guidance_scale": 1.0})
    for empty in ((0.5, 0.5), (0, 0), (1, 1), (0.0, 1e-4)):
        assert same(draw(pipeline, **options, guidance_interval=empty), unguided), empty
    some = draw(pipeline, **options, guidance_interval=SOME, num_inference_steps=6)
    for other in (1.0, 3.0):
        assert not same(some, draw(pipeline, **options | {"guidance_scale": other}, num_inference_steps=6))


@each_conditioned
def test_only_the_conditional_prediction_is_computed_outside_of_the_interval(kind: str):
    pipeline = pipeline_of(kind)
    calls, _ = rows_of(pipeline.denoiser)
    draw(pipeline, **CALLS[kind], guidance_interval=SOME, num_inference_steps=8, num_images_per_prompt=2)
    inside = [SOME[0] < level_of(pipeline, timestep) <= SOME[1] for timestep, _ in calls]
    assert [rows for _, rows in calls] == [4 if guides else 2 for guides in inside]
    assert len(calls) == 8
    assert 0 < sum(inside) < 8


@pytest.mark.parametrize("sampler", ["ddim", "euler", "heun", "unipc", "euler_ancestral"])
def test_every_sampler_has_the_same_noise_levels(sampler: str):
    pipeline = made("captioned")
    pipeline.set_scheduler(sampler)
    calls, _ = rows_of(pipeline.unet)
    draw(pipeline, prompt=PROMPT, guidance_interval=SOME, num_inference_steps=10)
    inside = [SOME[0] < level_of(pipeline, timestep) <= SOME[1] for timestep, _ in calls]
    assert [rows for _, rows in calls] == [2 if guides else 1 for guides in inside]
    assert 0 < sum(inside) < len(calls)


@pytest.mark.parametrize("automatic", [False, True])
def test_the_interval_in_closed_form(automatic: bool):
    """Euler steps of rectified flow with the ideal model of one image, in float64: x' = x + (s' - s) v."""
    pipeline, weak = point_pipeline(FLOW), point_pipeline(FLOW)
    with torch.no_grad():
        weak.unet.points += 1
    pipeline.set_scheduler("euler")
    sigmas, noise = [1.0, 0.85, 0.6, 0.4, 0.2], torch.randn(1, 4, 4, 4, generator=seeded(3))
    guide = {"guidance_model": weak, "autoguidance_scale": 3.0} if automatic else {"guidance_scale": 3.0}
    options = {"sigmas": sigmas, "latents": noise, "output_type": "latent", "guidance_interval": SOME}
    result = pipeline(class_labels=1, **guide, **options).images
    point = pipeline.unet.points[1].double()
    other = weak.unet.points[1].double() if automatic else pipeline.unet.points[2].double()
    x = noise.double()
    for sigma, following in zip(sigmas, [*sigmas[1:], 0.0]):
        target = other + 3.0 * (point - other) if SOME[0] < sigma <= SOME[1] else point
        x = x + (following - sigma) * (x - target) / sigma
    assert torch.allclose(result.double(), x, atol=1e-4)


# --- autoguidance


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_autoguidance_extrapolates_from_the_weaker_model(prediction_type: str):
    """Every prediction type is linear in x_0, so it ends at x_weak + scale (x_strong - x_weak), for the same class."""
    strong, weak = point_pipeline(prediction_type), point_pipeline(prediction_type)
    with torch.no_grad():
        weak.unet.points += torch.randn(weak.unet.points.shape, generator=seeded(1))
    options = {"num_inference_steps": 5, "output_type": "latent", "autoguidance_scale": 2.5}
    for guide in (weak, weak.unet):
        for label, index in ((1, 1), (None, 2)):  # without a condition, both models are asked for the null class
            latents = strong(class_labels=label, guidance_model=guide, **options).images[0]
            expected = weak.unet.points[index] + 2.5 * (strong.unet.points[index] - weak.unet.points[index])
            assert torch.allclose(latents, expected, atol=2e-4)
    assert set(strong.unet.batch_sizes) == set(weak.unet.batch_sizes) == {1}


@each_latent
@pytest.mark.parametrize("images", [1, 2])
def test_guidance_of_a_model_by_itself_changes_nothing(kind: str, images: int):
    pipeline, options = pipeline_of(kind), {**CALLS[kind], "num_images_per_prompt": images}
    plain = draw(pipeline, **options, guidance_scale=1)
    for guide in (pipeline, pipeline.denoiser, copy.deepcopy(pipeline)):
        assert np.array_equal(draw(pipeline, **options, guidance_model=guide, autoguidance_scale=3.0), plain)


@each_latent
def test_a_weaker_model_guides_and_scale_1_switches_it_off(kind: str):
    pipeline = pipeline_of(kind)
    weak, options = earlier(pipeline), {**CALLS[kind], "num_images_per_prompt": 2, "num_inference_steps": 6}
    calls, hook = rows_of(weak.denoiser)
    own = draw(pipeline, **options, guidance_scale=1)
    assert np.array_equal(draw(pipeline, **options, guidance_model=weak, autoguidance_scale=1), own)
    assert not calls
    guided = draw(pipeline, **options, guidance_model=weak)
    assert not same(guided, own)
    assert [rows for _, rows in calls] == [2] * 6
    assert np.array_equal(draw(pipeline, **options, guidance_model=weak, guidance_scale=7), guided)
    assert np.array_equal(draw(pipeline, **options, guidance_model=weak, autoguidance_scale=2.0), guided)
    calls.clear()
    some = draw(pipeline, **options, guidance_model=weak, guidance_interval=SOME)
    assert 0 < len(calls) < 6
    assert not same(some, guided)
    hook.remove()
    assert np.array_equal(draw(pipeline, **options, guidance_scale=1), own), "a call must leave nothing behind"


@pytest.mark.parametrize("kind", ["captioned", "captioned_and_labelled", "transformer_captioned"])
def test_the_weaker_model_has_its_own_text_condition(kind: str):
    pipeline = pipeline_of(kind)
    weak, seen = earlier(pipeline), []
    weak.denoiser.register_forward_pre_hook(lambda m, args, given: seen.append((args[0], given)), with_kwargs=True)
    prompts = {"prompt": [PROMPT, OTHER], "generator": [seeded(i) for i in range(4)], "num_images_per_prompt": 2}
    own = draw(pipeline, **prompts, guidance_model=weak, num_inference_steps=2)
    expected = weak.encode_prompt([PROMPT, PROMPT, OTHER, OTHER])
    for inputs, given in seen:
        torch.testing.assert_close(given["encoder_hidden_states"], expected)
        if weak.caption_prior is not None:
            torch.testing.assert_close(inputs[:, 4:], weak.caption_prior(expected, (4, 4)))
    seen.clear()
    network_alone = draw(pipeline, **prompts, guidance_model=weak.denoiser, num_inference_steps=2)
    torch.testing.assert_close(seen[0][1]["encoder_hidden_states"], pipeline.encode_prompt([PROMPT] * 2 + [OTHER] * 2))
    assert not same(own, network_alone)


@each_latent
def test_the_same_seed_gives_the_same_image_in_any_batch(kind: str):
    pipeline = pipeline_of(kind)
    options = {**CALLS[kind], "guidance_model": earlier(pipeline), "guidance_interval": (0.1, 0.9)}
    three = draw(pipeline, **options, num_images_per_prompt=3, generator=5)
    for number in range(3):
        assert same(draw(pipeline, **options, generator=5 + number), three[number : number + 1])


def test_a_callback_may_end_autoguidance():
    pipeline = made("captioned")
    weak = earlier(pipeline)
    calls, _ = rows_of(weak.unet)
    options = {"prompt": PROMPT, "guidance_model": weak, "num_images_per_prompt": 2}
    draw(pipeline, **options, callback_on_step_end=SDCFGCutoffCallback(None, 1))
    assert len(calls) == 2
    assert pipeline.guidance_scale == 0


def test_an_earlier_controlnet_guides_a_later_one():
    """A run of a ControlNet trains only this: the U-Net of its earlier checkpoint has the same weights."""
    pipeline = made("controlnet")
    weak = type(pipeline).from_pipe(
        pipeline, unet=copy.deepcopy(pipeline.unet), controlnet=changed(pipeline.controlnet)
    )
    own = draw(pipeline, **GENERATING["controlnet"], guidance_scale=1)
    guided = draw(pipeline, **GENERATING["controlnet"], guidance_model=weak)
    assert not same(guided, own)
    weak.set_controlnet(copy.deepcopy(pipeline.controlnet))
    assert np.array_equal(draw(pipeline, **GENERATING["controlnet"], guidance_model=weak), own)
    weak = type(pipeline).from_pipe(pipeline, controlnet=changed(pipeline.controlnet))
    with pytest.raises(ValueError, match="has another ControlNet, but the same U-Net object"):
        draw(pipeline, **GENERATING["controlnet"], guidance_model=weak)


# --- what cannot be used


@pytest.mark.parametrize("interval", [(0.8, 0.3), (-0.1, 0.5), (0, 1.1), (0.5,), 0.5, (0, float("nan"))])
def test_intervals_that_cannot_be_used_are_quoted(interval: Any):
    with pytest.raises(ValueError, match=r"`guidance_interval` must be two noise levels \(low, high\) with 0 <= low"):
        draw(made("captioned"), prompt=PROMPT, guidance_interval=interval)


def test_a_guide_of_another_kind_is_refused():
    pipeline = made("captioned")

    def refused(guide: Any, message: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            draw(pipeline, **{"prompt": PROMPT, "guidance_model": guide} | options)

    refused("runs/x", "`guidance_model` must be the pipeline of an earlier checkpoint, or its network, but is 'runs/x'")
    refused(made("labelled").unet, "has `down_block_types` .*; pass an earlier checkpoint of the same run")
    refused(pipeline_of("transformer_captioned"), "has `class` PatchTransformer2DModel, and this model UNet2DCond")
    refused(made("controlnet"), "has a ControlNet, and this model has none")
    other = earlier(pipeline)
    other.register_modules(vae=changed(pipeline.vae))
    refused(other, "an autoencoder with other weights, and so another latent space")
    other.register_modules(vae=tiny_vae(patch_size=4))
    refused(other, "has `vae.class` MultiHeadAutoencoderKL, and this model AutoencoderKL")
    flow = earlier(pipeline)
    flow.register_to_config(prediction_type=FLOW)
    refused(flow, "has `prediction_type` flow_prediction, and this model epsilon")
    refused(earlier(pipeline), "`negative_prompt` has no effect with `guidance_model`", negative_prompt="blue")
