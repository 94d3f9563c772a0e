"""LatentDiffusionPipeline against closed forms, and its seeds, batches, guidance and invalid input.

Shapes: B images, C latent channels, h w latent cells.
"""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import is_scipy_available
from transformers import T5Config, T5EncoderModel

from pipelines.common.schedulers import (
    FLOW,
    PREDICTION_TYPES,
    check_scheduler,
    make_scheduler,
    noise_schedule_of,
    suitable_samplers,
    training_scheduler,
)
from pipelines.latent_diffusion import (
    LatentDiffusionPipeline,
    concat_condition,
    encode_captions,
    max_caption_length,
    null_class,
    tokenize_captions,
)
from tests.support.tiny_models import (
    TEXT_WIDTH,
    TOKENS,
    tiny_caption_prior,
    tiny_pipeline,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_unet,
    tiny_vae,
)


class PointModel(ModelMixin, ConfigMixin):
    """The ideal model of a dataset with one image per class, in closed form for each prediction type.

    x_t = alpha x_0 + sigma noise, so from x_t and the timestep alone the noise is (x_t - alpha x_0) / sigma.
    """

    @register_to_config
    def __init__(self, sample_size: int = 4, classes: int = 2, prediction_type: str = "epsilon"):
        super().__init__()
        self.config_classes = classes
        points = torch.randn(classes + 1, 4, sample_size, sample_size, generator=torch.Generator().manual_seed(7))
        self.points = torch.nn.Parameter(points)
        self.register_to_config(num_class_embeds=classes + 1)
        self.alphas_cumprod: torch.Tensor | None = None
        self.batch_sizes: list[int] = []

    def forward(self, x_t, timestep, encoder_hidden_states=None, class_labels=None, return_dict=True):
        self.batch_sizes.append(len(x_t))
        x_0 = self.points[class_labels]
        alpha, sigma = self._alpha_sigma(float(timestep))
        noise = (x_t - alpha * x_0) / sigma
        return (
            {"epsilon": noise, "sample": x_0, "v_prediction": alpha * noise - sigma * x_0, FLOW: noise - x_0}[
                self.config.prediction_type
            ],
        )

    def _alpha_sigma(self, timestep: float) -> tuple[float, float]:
        if self.config.prediction_type == FLOW:
            return 1 - timestep / 1000, timestep / 1000
        alphas_cumprod = self.alphas_cumprod.double()
        # Some samplers visit timesteps between the trained ones: interpolate log sigma, as they do.
        log_ratio = ((1 - alphas_cumprod) / alphas_cumprod).log()
        low, high = int(timestep), min(int(timestep) + 1, 999)
        between = log_ratio[low] if timestep == low else torch.lerp(log_ratio[low], log_ratio[high], timestep - low)
        alpha_squared = torch.sigmoid(-between)
        return float(alpha_squared.sqrt()), float((1 - alpha_squared).sqrt())


def point_pipeline(prediction_type: str, **schedule) -> LatentDiffusionPipeline:
    scheduler = training_scheduler(prediction_type, **schedule)
    unet = PointModel(prediction_type=prediction_type)
    unet.alphas_cumprod = noise_schedule_of(scheduler)
    pipeline = LatentDiffusionPipeline(tiny_vae(), unet, scheduler, id2label={0: "square", 1: "circle"})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


SCHEDULES = [
    *((p, {"beta_schedule": b}) for p in ("epsilon", "v_prediction", "sample") for b in ("linear", "scaled_linear")),
    *((p, {"beta_schedule": "squaredcos_cap_v2"}) for p in ("epsilon", "v_prediction", "sample")),
    *((p, {"rescale_betas_zero_snr": True}) for p in ("v_prediction", "sample")),
    (FLOW, {}),
    (FLOW, {"shift": 3.0}),
]


@pytest.mark.parametrize(("prediction_type", "schedule"), SCHEDULES)
def test_the_ideal_model_of_one_image_generates_it_with_every_suitable_sampler(prediction_type, schedule):
    pipeline = point_pipeline(prediction_type, **schedule)
    names = suitable_samplers(prediction_type, bool(schedule.get("rescale_betas_zero_snr")))
    assert len(names) >= 5
    for name in names:
        if name == "lms" and not is_scipy_available():
            continue
        pipeline.set_scheduler(name)
        # Without guidance only the conditional prediction is computed.
        result = pipeline(class_labels=[0, "circle"], guidance_scale=1, output_type="latent", num_inference_steps=10)
        # DPM-Solver and UniPC round flow timesteps down to integers, so the model's timestep is off by up to 1/1000.
        tolerance = 2e-2 if prediction_type == FLOW and name in ("dpm", "dpm_sde", "unipc") else 2e-5
        assert (result.images - pipeline.unet.points[:2]).abs().max() < tolerance, name


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_guidance_extrapolates_from_the_null_class(prediction_type):
    """Every prediction type is linear in x_0, so guided sampling ends at x_null + scale (x_class - x_null)."""
    pipeline = point_pipeline(prediction_type)
    unconditional, conditional = pipeline.unet.points[2], pipeline.unet.points[1]
    latents = pipeline(class_labels=1, guidance_scale=3.0, output_type="latent", num_inference_steps=5).images
    assert torch.allclose(latents[0], unconditional + 3.0 * (conditional - unconditional), atol=1e-4)
    assert set(pipeline.unet.batch_sizes) == {2}, "both halves must be in one batch"


def test_guidance_is_skipped_at_one_and_without_a_condition():
    pipeline = point_pipeline("epsilon")
    latents = pipeline(output_type="latent", num_inference_steps=5).images
    assert torch.allclose(latents[0], pipeline.unet.points[2], atol=1e-4)
    pipeline(class_labels=0, guidance_scale=1.0, output_type="latent", num_inference_steps=5)
    assert set(pipeline.unet.batch_sizes) == {1}


# --- unsuitable samplers


def test_samplers_without_flow_matching_are_rejected_with_a_list_of_suitable_ones():
    pipeline = point_pipeline(FLOW)
    with pytest.raises(
        ValueError, match="'ddim' does not suit .* flow_prediction; use one of dpm, .*euler, unipc, heun"
    ):
        pipeline.set_scheduler("ddim")
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    with pytest.raises(ValueError, match="predicts flow_prediction, but DDIMScheduler expects epsilon"):
        pipeline()
    pipeline.set_scheduler("euler")
    pipeline(num_inference_steps=2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda config: diffusers.DDIMScheduler.from_config(config, prediction_type="v_prediction"), "expects v_pred"),
        (lambda config: diffusers.DDIMScheduler.from_config(config, clip_sample=True), "clips predictions"),
        (lambda config: diffusers.DDIMScheduler(clip_sample=False), "another noise schedule"),
        (lambda config: diffusers.FlowMatchEulerDiscreteScheduler(), "expects flow_prediction"),
    ],
)
def test_a_scheduler_that_was_set_by_hand_is_checked(make, message):
    pipeline = point_pipeline("epsilon")
    pipeline.scheduler = make(pipeline.scheduler.config)
    with pytest.raises(ValueError, match=message):
        pipeline()


def test_zero_terminal_snr_rejects_samplers_that_ignore_it():
    scheduler = training_scheduler("v_prediction", rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="v_prediction with zero terminal SNR; use one of ddim"):
        make_scheduler("heun", scheduler)
    heun = diffusers.HeunDiscreteScheduler.from_config(scheduler.config)
    with pytest.raises(ValueError, match="does not suit"):
        check_scheduler(heun, "v_prediction", noise_schedule_of(scheduler))


def test_the_noise_schedule_is_kept_although_from_config_would_change_it():
    """`from_config` turns a DDPM scheduler with default values into a Heun scheduler with the defaults of Heun."""
    trained = diffusers.DDPMScheduler(clip_sample=False)
    by_hand = diffusers.HeunDiscreteScheduler.from_config(trained.config)
    assert not torch.allclose(by_hand.alphas_cumprod, trained.alphas_cumprod)
    assert torch.allclose(make_scheduler("heun", trained).alphas_cumprod, trained.alphas_cumprod)
    assert make_scheduler("ddim", diffusers.EulerDiscreteScheduler()).config.clip_sample is False


@pytest.mark.parametrize("prediction_type", ["epsilon", FLOW])
def test_zero_terminal_snr_is_rejected_for_epsilon_and_flow_prediction(prediction_type):
    with pytest.raises(ValueError, match="`rescale_betas_zero_snr` cannot be used with"):
        training_scheduler(prediction_type, rescale_betas_zero_snr=True)


def test_unknown_names_are_rejected():
    with pytest.raises(ValueError, match="`prediction_type` must be one of epsilon"):
        training_scheduler("noise")
    with pytest.raises(ValueError, match="unknown scheduler 'eule'"):
        make_scheduler("eule", training_scheduler("epsilon"))
    assert type(make_scheduler("flow_euler", training_scheduler(FLOW))).__name__ == "FlowMatchEulerDiscreteScheduler"


# --- seeds and batches


@pytest.mark.parametrize("sampler", ["dpm", "ddpm", "euler_ancestral"])
def test_the_same_seed_gives_the_same_image_in_any_batch(sampler):
    """Includes samplers that add noise at every step."""
    pipeline = tiny_pipeline("epsilon")
    pipeline.set_scheduler(sampler)

    def generate(prompts, generator, count=1):
        return pipeline(
            prompts, num_images_per_prompt=count, generator=generator, num_inference_steps=4, output_type="np"
        ).images

    four = generate("a red poster", seeded(), 4)
    assert np.array_equal(four, generate("a red poster", seeded(), 4))
    assert np.abs(four[0] - four[1]).max() > 0.01
    assert np.allclose(generate("a red poster", seeded())[0], four[0], atol=1e-4)
    alone = generate("a blue poster", seeded(5))
    assert not np.allclose(alone[0], four[0], atol=1e-2)
    listed = generate(["a red poster", "a blue poster", "of circles"], [seeded(i) for i in (4, 6, 5)])
    last = generate("of circles", [seeded(5)])
    assert np.allclose(listed[2], last[0], atol=1e-4)


def test_images_are_in_the_order_of_prompts():
    pipeline = point_pipeline("epsilon")
    result = pipeline(class_labels=[1, 0], num_images_per_prompt=2, guidance_scale=1, output_type="latent").images
    assert torch.allclose(result, pipeline.unet.points[[1, 1, 0, 0]], atol=1e-4)


def test_given_latents_replace_random_ones():
    pipeline = tiny_pipeline()
    latents = torch.randn(1, 4, 4, 4)
    first = pipeline("a", latents=latents, num_inference_steps=2, output_type="np").images
    assert np.array_equal(first, pipeline("a", latents=latents, num_inference_steps=2, output_type="np").images)


# --- conditions


def test_no_prompt_means_the_empty_prompt_which_the_negative_prompt_replaces():
    pipeline = tiny_pipeline()

    def latents(**arguments):
        return pipeline(**arguments, generator=seeded(), num_inference_steps=2, output_type="latent").images

    assert torch.equal(latents(prompt=None), latents(prompt="", guidance_scale=1))
    unguided = latents(prompt="a red poster", guidance_scale=1)
    assert not torch.allclose(latents(prompt=""), unguided, atol=1e-4)
    # uncond + scale (cond - uncond) with equal halves is cond, at any scale
    same = latents(prompt="a red poster", negative_prompt="a red poster", guidance_scale=7.0)
    assert torch.allclose(same, unguided, atol=1e-4)
    assert not torch.allclose(latents(prompt="a red poster", negative_prompt="blue"), latents(prompt="a red poster"))


def test_prompts_and_labels_together():
    pipeline = tiny_pipeline(classes=3)
    assert null_class(pipeline.unet) == 3

    def latents(**arguments):
        return pipeline(
            **arguments, generator=[seeded(1), seeded(2)], num_inference_steps=2, output_type="latent"
        ).images

    named = latents(prompt=["a red poster", "blue"], class_labels=["kind 2", "kind 0"])
    assert torch.equal(named, latents(prompt=["a red poster", "blue"], class_labels=torch.tensor([2, 0])))
    assert not torch.allclose(named, latents(prompt=["a red poster", "blue"], class_labels=[1, 1]), atol=1e-4)
    assert torch.equal(latents(prompt=["a", "a"], class_labels=1), latents(prompt="a", class_labels=[1, 1]))


def test_an_unconditional_model():
    pipeline = tiny_pipeline(FLOW, text=False)
    images = pipeline(num_images_per_prompt=2, num_inference_steps=2, generator=seeded()).images
    assert [image.size for image in images] == [(8, 8), (8, 8)]


def test_predictions_of_the_caption_prior_are_concatenated_to_the_noisy_latents():
    pipeline = tiny_pipeline(FLOW, prior=True)
    seen = []
    forward = pipeline.unet.forward
    pipeline.unet.forward = lambda x, *args, **kwargs: seen.append(x) or forward(x, *args, **kwargs)
    pipeline("a red poster", num_inference_steps=2, generator=seeded(), height=12, width=8)
    prompt_embeds = pipeline.encode_prompt(["", "a red poster"])
    with torch.no_grad():
        expected = pipeline.caption_prior(prompt_embeds, seen[0].shape[-2:])
    assert expected.shape == (2, 4, *seen[0].shape[-2:])
    for model_input in seen:  # unconditional half first, at every step
        torch.testing.assert_close(model_input[:, 4:], expected)
    assert not torch.allclose(expected[0], expected[1])


def test_predicted_latents_of_another_size_are_interpolated():
    prior, states = tiny_caption_prior(), torch.randn(2, TOKENS, TEXT_WIDTH)
    trained = prior(states)
    assert trained.shape == (2, 4, 4, 4)
    torch.testing.assert_close(prior(states, (4, 4)), trained)
    torch.testing.assert_close(prior(states, (8, 2)).mean((2, 3)), trained.mean((2, 3)))


def test_no_gradient_flows_into_the_prior():
    expected = torch.ones(1, 4, 4, 4, requires_grad=True)
    noisy = torch.zeros(1, 4, 4, 4, requires_grad=True)
    concat_condition(noisy, expected).sum().backward()
    assert noisy.grad is not None
    assert expected.grad is None
    assert concat_condition(noisy, None) is noisy


def test_a_t5_text_encoder():
    torch.manual_seed(0)
    config = T5Config(vocab_size=10, d_model=TEXT_WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    encoder, tokenizer = T5EncoderModel(config).eval(), tiny_tokenizer()
    tokenizer.model_max_length = int(1e30)
    with pytest.raises(ValueError, match="pass `max_text_length`"):
        max_caption_length(tokenizer, encoder)
    pipeline = LatentDiffusionPipeline(
        tiny_vae(), tiny_unet(), training_scheduler("epsilon"), encoder, tokenizer, max_text_length=6
    )
    assert pipeline.encode_prompt(["a red poster"]).shape == (1, 6, TEXT_WIDTH)


def test_captions_are_padded_truncated_and_encoded_as_in_training():
    tokenizer, encoder = tiny_tokenizer(), tiny_text_encoder()
    ids = tokenize_captions(tokenizer, ["a red", "", "a " * 50], max_caption_length(tokenizer, encoder))
    assert ids.tolist() == [[1, 4, 5, 2, 0, 0, 0, 0], [1, 2, 0, 0, 0, 0, 0, 0], [1, 4, 4, 4, 4, 4, 4, 2]]
    pipeline = tiny_pipeline()
    with torch.no_grad():
        assert torch.equal(pipeline.encode_prompt(["a red", "", "a " * 50]), encode_captions(encoder, ids))
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="has no pad token"):
        tokenize_captions(tokenizer, ["a"], 8)


# --- outputs, callback, precision


def test_output_types():
    pipeline = tiny_pipeline()
    kinds = {kind: pipeline("a", num_inference_steps=2, generator=seeded(), output_type=kind) for kind in ("np", "pt")}
    assert kinds["np"].images.shape == (1, 8, 8, 3)
    assert kinds["pt"].images.shape == (1, 3, 8, 8)
    assert np.array_equal(kinds["np"].images[0], kinds["pt"].images[0].permute(1, 2, 0).numpy())
    assert 0 <= kinds["np"].images.min() <= kinds["np"].images.max() <= 1
    (images,) = pipeline("a", num_inference_steps=2, generator=seeded(), return_dict=False)
    assert np.array_equal(np.asarray(images[0]), (kinds["np"].images[0] * 255).round().astype(np.uint8))
    assert pipeline("a", num_inference_steps=2, height=16, width=24).images[0].size == (24, 16)


def test_the_callback_sees_each_step_may_replace_latents_and_may_stop():
    pipeline = tiny_pipeline()
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, float(timestep), tensors["latents"].shape))
        pipe._interrupt = step == 1
        return {"latents": torch.zeros_like(tensors["latents"])}

    result = pipeline("a", num_inference_steps=5, callback_on_step_end=callback, output_type="latent")
    assert [step for step, _, _ in seen] == [0, 1]
    assert result.images.abs().sum() == 0
    again = pipeline("a", num_inference_steps=5, output_type="latent")
    assert again.images.abs().sum() > 0, "an interruption must not affect the next call"


def test_the_progress_bar_counts_the_steps(capsys):
    pipeline = tiny_pipeline()
    pipeline.set_progress_bar_config(disable=False)
    pipeline("a", num_inference_steps=3)
    assert "3/3" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    pipeline = tiny_pipeline(FLOW)
    reference = pipeline("a red poster", num_inference_steps=3, generator=seeded(), output_type="np").images
    images = pipeline.to(dtype)("a red poster", num_inference_steps=3, generator=seeded(), output_type="np").images
    assert np.abs(images - reference).mean() < 0.02


@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloading needs an accelerator")
@pytest.mark.parametrize("patch_size", [None, 2])
def test_model_cpu_offload(patch_size):
    pipeline = tiny_pipeline(patch_size=patch_size)
    reference = pipeline("a", num_inference_steps=3, generator=seeded(), output_type="np").images
    pipeline.enable_model_cpu_offload()
    for _ in range(2):
        images = pipeline("a", num_inference_steps=3, generator=seeded(), output_type="np").images
        assert np.abs(images - reference).max() < 0.02
    assert pipeline.unet.device.type == "cpu", "must be offloaded after the call"


# --- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": 3}, "`prompt` must be a string or a list of strings, but is 3"),
        ({"prompt": "a", "class_labels": 9}, "`class_labels` must be from 0 to 2, but has 9"),
        ({"prompt": "a", "class_labels": 3}, "`class_labels` must be from 0 to 2, but has 3"),
        (
            {"class_labels": "cat"},
            "has 'cat', which is not a class of this model; its classes are kind 0, kind 1",
        ),
        ({"prompt": ["a", "b"], "class_labels": [0, 1, 2]}, "must have one entry each, or equally many, but have"),
        ({"prompt": []}, "must have one entry each, or equally many, but have"),
        ({"prompt": "a", "negative_prompt": "b", "guidance_scale": 1.0}, "`guidance_scale` above 1, but it is 1.0"),
        ({"prompt": "a", "negative_prompt": ["b", "c"]}, "`negative_prompt` has 2 entries"),
        ({"prompt": "a", "height": 9}, "`height` must be a multiple of 2 .* but is 9"),
        ({"prompt": "a", "num_inference_steps": 0}, "`num_inference_steps` must be a positive integer, but is 0"),
        ({"prompt": "a", "num_images_per_prompt": 1.5}, "`num_images_per_prompt` must be a positive .* but is 1.5"),
        ({"prompt": "a", "output_type": "jpeg"}, "`output_type` must be one of pil, np, pt, latent, but is 'jpeg'"),
        ({"prompt": "a", "generator": [seeded()] * 2}, "`generator` has 2 entries, but the number of images is 1"),
        ({"prompt": "a", "latents": torch.zeros(1, 4, 2, 2)}, r"`latents` must have shape \(1, 4, 4, 4\)"),
        ({"prompt": "a", "callback_on_step_end_tensor_inputs": ["noise"]}, r"but has \['noise'\]"),
    ],
)
def test_bad_input_is_quoted(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline(classes=3)(**arguments)


def test_conditions_that_the_model_does_not_have_are_rejected():
    unconditional = tiny_pipeline(text=False)
    with pytest.raises(ValueError, match="no text encoder, so `prompt` must be None, but is 'a'"):
        unconditional("a")
    with pytest.raises(ValueError, match="has no classes, so `class_labels` must be None, but is 1"):
        unconditional(class_labels=1)
    with pytest.raises(ValueError, match="`text_encoder` and `tokenizer` go together"):
        LatentDiffusionPipeline(tiny_vae(), tiny_unet(), training_scheduler("epsilon"), tiny_text_encoder())
    with pytest.raises(ValueError, match="`caption_prior` needs a `text_encoder`"):
        LatentDiffusionPipeline(
            tiny_vae(), tiny_unet(), training_scheduler("epsilon"), caption_prior=tiny_caption_prior()
        )


# --- saving


@pytest.mark.parametrize("options", [{"classes": 2, "patch_size": 4}, {"text": False}, {"prior": True}])
def test_saved_and_loaded_with_our_own_classes(options, tmp_path):
    pipeline = tiny_pipeline(FLOW, **options)
    pipeline.save_pretrained(tmp_path)
    loaded = LatentDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is LatentDiffusionPipeline
    assert type(loaded.vae) is type(pipeline.vae)
    assert loaded.config.prediction_type == FLOW
    assert loaded.config.id2label == pipeline.config.id2label
    prompt = "a red poster" if options.get("text", True) else None
    images = [p(prompt, num_inference_steps=2, generator=seeded(), output_type="np").images for p in (pipeline, loaded)]
    # Not bit for bit: safetensors maps weights at 8-byte alignment, which changes the order of vectorized sums.
    assert np.allclose(*images, atol=1e-5)


def test_components_of_diffusers_load_with_diffusers(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    assert isinstance(diffusers.AutoencoderKL.from_pretrained(tmp_path, subfolder="vae"), diffusers.AutoencoderKL)
    diffusers.UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet")
    diffusers.DPMSolverMultistepScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert not list(tmp_path.glob("*/*.py"))
