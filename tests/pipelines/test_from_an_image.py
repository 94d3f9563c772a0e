"""Image to image and inpainting: with every kind of pipeline, every sampler and every image mode."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from pipelines.common.latents import decode_latents, encode_latents
from pipelines.common.pixels import MODES, blended
from pipelines.common.schedulers import (
    FLOW,
    PREDICTION_TYPES,
    sampling_scheduler,
    suitable_samplers,
    training_scheduler,
)
from pipelines.latent_diffusion import LatentDiffusionPipeline
from pipelines.models.patch_transformer import PatchTransformer2DModel
from pipelines.models.pixel_autoencoder import PixelAutoencoder
from tests.pipelines.test_latent_diffusion_pipeline import PointModel, point_pipeline
from tests.support.color_profiles import p3_profile
from tests.support.drawing import GENERATING, draw, every, made, seeded
from tests.support.tiny_models import tiny_pipeline

SAMPLERS = [(kind, name) for kind in PREDICTION_TYPES for name in suitable_samplers(kind)]
each_sampler = pytest.mark.parametrize(("prediction_type", "sampler"), SAMPLERS)
each_mode = pytest.mark.parametrize("channels", MODES)
LEVELS = (0.3, 0.2)
INTEGER_TIMESTEPS = ("dpm", "dpm_sde", "unipc")  # of flow matching: rounded down, so that x_t is off by up to 1/1000


class GaussianModel(PointModel):
    """The ideal model of standard normal latents: E[x_0 | x_t] = alpha x_t / (alpha² + sigma²)."""

    def forward(self, x_t, timestep, encoder_hidden_states=None, class_labels=None, return_dict=True):
        alpha, sigma = self._alpha_sigma(float(timestep))
        x_0, noise = (number * x_t / (alpha**2 + sigma**2) for number in (alpha, sigma))
        known = {"epsilon": noise, "sample": x_0, "v_prediction": alpha * noise - sigma * x_0, FLOW: noise - x_0}
        return (known[self.config.prediction_type],)


def gaussian_pipeline(prediction_type: str) -> LatentDiffusionPipeline:
    pipeline = point_pipeline(prediction_type)
    network = GaussianModel(prediction_type=prediction_type)
    network.alphas_cumprod = pipeline.unet.alphas_cumprod
    pipeline.register_modules(unet=network)
    return pipeline


def pixel_pipeline(channels: int = 3, **options: Any) -> LatentDiffusionPipeline:
    """A transformer on pixels, which ends at its least noise level and restarts."""
    torch.manual_seed(2)
    network = PatchTransformer2DModel(
        sample_size=8, in_channels=channels, out_channels=channels, patch_size=2, hidden_size=16, num_layers=1,
        num_attention_heads=2, bottleneck_size=4, **{"least_noise_level": 0.15, "restart_levels": LEVELS} | options,
    ).eval()  # fmt: skip
    torch.nn.init.normal_(network.patch_out.weight, std=0.1)
    scheduler = sampling_scheduler(training_scheduler(FLOW))
    pipeline = LatentDiffusionPipeline(PixelAutoencoder(channels), None, scheduler, transformer=network)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise_image(size: int = 8, mode: str = "RGB", seed: int = 5) -> Image.Image:
    shape = {"RGB": (size, size, 3), "RGBA": (size, size, 4), "L": (size, size)}[mode]
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def upper_half(size: int = 8) -> Image.Image:
    mask = np.zeros((size, size), dtype=np.uint8)
    mask[: size // 2] = 255
    return Image.fromarray(mask)


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


def side_of(pipeline: Any) -> int:
    return pipeline._size(None, None)[0]


def tensor_of(image: Image.Image) -> torch.Tensor:
    """An image as tensors of users have it: 1 C H W in [0, 1]."""
    return torch.from_numpy(np.atleast_3d(array(image)).copy()).movedim(2, 0)[None].float() / 255


def round_trip(pipeline: Any, image: Image.Image) -> np.ndarray:
    """What the VAE makes of an image: B H W C in [0, 1]."""
    pixels = tensor_of(image) * 2 - 1
    if hasattr(pipeline, "vae"):
        pixels = decode_latents(pipeline.vae, encode_latents(pipeline.vae, blended(pixels)))
    return (pixels / 2 + 0.5).movedim(1, -1).detach().numpy()


# --- strength


@every
def test_strength_0_takes_no_step_and_gives_the_round_trip_of_the_vae(kind):
    pipeline, steps = made(kind), []
    image = noise_image(side_of(pipeline))
    images = draw(
        pipeline, **GENERATING[kind], image=image, strength=0, callback_on_step_end=lambda *_: steps.append(1) or {}
    )
    assert steps == []
    assert np.allclose(images, round_trip(pipeline, image), atol=1e-6)


@every
def test_strength_1_gives_the_image_of_pure_noise_bit_for_bit(kind):
    pipeline = made(kind)
    plain = draw(pipeline, **GENERATING[kind])
    assert np.array_equal(draw(pipeline, **GENERATING[kind], image=noise_image(), strength=1.0), plain)
    assert not np.array_equal(draw(pipeline, **GENERATING[kind], image=noise_image(), strength=0.5), plain)


@each_sampler
def test_the_ideal_model_generates_its_image_from_any_strength_and_that_of_pure_noise_from_1(prediction_type, sampler):
    """A wrong noise level or a wrong first step would show in the ideal model of one image per class."""
    pipeline = point_pipeline(prediction_type)
    pipeline.set_scheduler(sampler)
    call = {"class_labels": [0, 1], "guidance_scale": 1, "output_type": "latent", "num_inference_steps": 10}
    tolerance = 3e-2 if prediction_type == FLOW and sampler in INTEGER_TIMESTEPS else 2e-5
    for strength in (0.1, 0.3, 0.7, 0.9):
        images = pipeline(**call, image=noise_image(), strength=strength, generator=seeded()).images
        assert (images - pipeline.unet.points[:2]).abs().max() < tolerance, strength
    whole = pipeline(**call, image=noise_image(), strength=1, generator=seeded()).images
    assert torch.equal(whole, pipeline(**call, generator=seeded()).images)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_similarity_to_the_image_falls_with_strength_as_the_closed_form_says(prediction_type):
    """With the ideal model of standard normal latents, (alpha x_0 + sigma noise) / norm is where every path ends."""
    pipeline = gaussian_pipeline(prediction_type)
    pipeline.set_scheduler("euler" if prediction_type == FLOW else "ddim")
    noise = torch.randn(1, 4, 4, 4, generator=seeded(1))
    call = {"latents": noise, "output_type": "latent", "num_inference_steps": 100, "image": noise_image()}
    x_0 = pipeline(**call, strength=0).images
    distances = []
    for strength in (0.0, 0.25, 0.5, 0.75, 1.0):
        found = pipeline(**call, strength=strength).images
        if 0 < strength < 1:
            timestep = float(pipeline.scheduler.timesteps[100 - round(strength * 100)])
            alpha, sigma = pipeline.unet._alpha_sigma(timestep)
            expected = (alpha * x_0 + sigma * noise) / (alpha**2 + sigma**2) ** 0.5
            assert torch.allclose(found, expected, rtol=0.03, atol=0.01), strength
        distances.append(float((found - x_0).square().mean()))
    assert distances == sorted(distances)
    assert distances[0] == 0 < distances[1]


def test_a_callback_counts_the_steps_that_are_taken():
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, pipe.num_timesteps, float(timestep)))
        return {}

    pipeline = tiny_pipeline(FLOW)
    draw(pipeline, num_inference_steps=10, image=noise_image(), strength=0.3, callback_on_step_end=callback)
    assert seen == [(number, 3, float(pipeline.scheduler.timesteps[7 + number])) for number in range(3)]


def test_steps_below_the_least_noise_level_become_one_step_above_it():
    pipeline, calls = pixel_pipeline(), []
    pipeline.transformer.register_forward_pre_hook(lambda module, args: calls.append(round(float(args[1]))))
    call = {"sigmas": [1.0, 0.6, 0.4, 0.2, 0.1, 0.05], "image": noise_image()}
    draw(pipeline, **call, strength=0.34)
    assert calls == [200] + [200, 200], "one step from 0.2, then the restart from 0.2, but none from 0.3"
    calls.clear()
    draw(pipeline, **call, strength=0.67)
    assert calls == [400, 200] + [300, 300, 200, 200]


def test_only_the_mode_of_the_posterior_and_the_noise_of_the_generator_count():
    """The stream of a generator is then the same as without an image: the initial noise is all that is drawn."""
    pipeline, one, other = tiny_pipeline(), seeded(4), seeded(4)
    draw(pipeline, generator=one, image=noise_image(), strength=0.5)
    draw(pipeline, generator=other)
    assert torch.equal(one.get_state(), other.get_state())


# --- inpainting


@each_sampler
@pytest.mark.parametrize("again", [1, 3])
def test_outside_of_the_mask_latents_are_those_of_the_image_and_inside_they_are_the_models(
    prediction_type, sampler, again
):
    pipeline = point_pipeline(prediction_type)
    pipeline.set_scheduler(sampler)
    call = {"class_labels": 1, "guidance_scale": 1, "output_type": "latent", "num_inference_steps": 5}
    masked = {"image": noise_image(), "mask_image": upper_half(), "jump_n_sample": again}
    kept = pipeline(**call, image=noise_image(), strength=0).images
    filled = pipeline(**call, **masked, generator=seeded()).images
    assert torch.equal(filled[:, :, 2:], kept[:, :, 2:])
    tolerance = 3e-2 if prediction_type == FLOW and sampler in INTEGER_TIMESTEPS else 2e-5
    assert (filled - pipeline.unet.points[1])[:, :, :2].abs().max() < tolerance


@pytest.mark.parametrize("again", [1, 3])
def test_every_step_is_taken_as_often_as_asked_except_from_pure_noise(again):
    pipeline, calls = tiny_pipeline(FLOW, text=False), []
    pipeline.unet.register_forward_pre_hook(lambda module, args: calls.append(float(args[1])))
    draw(pipeline, image=noise_image(), mask_image=upper_half(), jump_n_sample=again)
    first, *others = pipeline.scheduler.timesteps.tolist()
    assert calls == [first, *(timestep for timestep in others for _ in range(again))]


def test_resampling_keeps_the_distribution_of_the_ideal_model():
    """x_t of standard normal samples has variance alpha² + sigma² at every level, so the end has variance 1.

    With too little or too much noise after a step back, the variance would be another one.
    """
    for prediction_type in (FLOW, "epsilon"):
        pipeline = gaussian_pipeline(prediction_type)
        pipeline.set_scheduler("euler" if prediction_type == FLOW else "ddim")
        call = {"output_type": "latent", "num_inference_steps": 250, "height": 64, "width": 64}
        mask = np.full((64, 64), 255, dtype=np.uint8)
        mask[0, 0] = 0
        images = pipeline(
            **call, image=noise_image(64), mask_image=Image.fromarray(mask), jump_n_sample=4, generator=seeded()
        ).images  # fmt: skip
        assert float(images.std()) == pytest.approx(1, abs=0.03), prediction_type


def test_resampling_adapts_what_is_filled_to_what_is_kept():
    """An ideal model of images of one grey level each: what is filled has to be the level of what is kept."""
    torch.manual_seed(0)
    levels = torch.linspace(-1, 1, 21)

    class OneLevel(torch.nn.Module):
        config = pixel_pipeline().transformer.config
        dtype = torch.float32

        def forward(self, x, timestep, return_dict=True, **conditions):
            sigma = max(float(timestep) / 1000, 1e-3)
            distances = (x[:, None] - (1 - sigma) * levels[None, :, None, None, None]).square().flatten(2).sum(2)
            weights = torch.softmax(-distances / (2 * sigma**2), dim=1)
            clean = (weights * levels).sum(1)[:, None, None, None].expand_as(x)
            return ((x - clean) / sigma,)

    errors = {}
    for again in (1, 4):
        pipeline = pixel_pipeline(restart_levels=(), least_noise_level=0.0)
        pipeline.transformer.forward = OneLevel().forward
        kept = torch.full((1, 3, 8, 8), 0.8)
        mask = torch.zeros(1, 1, 8, 8)
        mask[..., :6] = 1
        images = [
            draw(pipeline, image=kept, mask_image=mask, jump_n_sample=again, num_inference_steps=20, generator=number)
            for number in range(24)
        ]
        errors[again] = float(np.mean([np.abs(image[..., :6, :] - 0.8).mean() for image in images]))
    assert errors[4] < 0.8 * errors[1]


def test_a_latent_cell_is_filled_if_any_of_its_pixels_is():
    pipeline = tiny_pipeline()
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[7, 0] = 255
    call = {"output_type": "latent", "image": noise_image(), "num_inference_steps": 2, "generator": seeded()}
    kept = pipeline(**call, strength=0).images
    changed = (pipeline(**call, mask_image=Image.fromarray(mask)).images != kept).any(dim=1)[0]
    assert changed.nonzero().tolist() == [[3, 0]]


@every
def test_with_paste_back_pixels_outside_of_the_mask_are_those_of_the_image(kind):
    pipeline = made(kind)
    side = side_of(pipeline)
    half, image = side // 2, noise_image(side)
    call = {**GENERATING[kind], "output_type": "pil", "image": image, "mask_image": upper_half(side)}
    pasted, plain = draw(pipeline, **call, paste_back=True)[0], draw(pipeline, **call)[0]
    assert np.array_equal(array(pasted)[half:], array(image)[half:])
    assert np.array_equal(array(pasted)[:half], array(plain)[:half])
    if hasattr(pipeline, "vae"):
        assert not np.array_equal(array(plain)[half:], array(image)[half:])
    else:
        assert np.array_equal(array(plain), array(pasted)), "a model of pixels keeps them by itself"


@each_mode
def test_a_transformer_on_pixels_in_every_image_mode(channels):
    pipeline, image = pixel_pipeline(channels), noise_image(mode=MODES[channels])
    call = {"output_type": "pil", "image": image}
    same = draw(pipeline, **call, strength=0)[0]
    assert same.mode == image.mode
    filled = draw(pipeline, **call, mask_image=upper_half())[0]
    assert np.array_equal(array(filled)[4:], array(same)[4:]), "also after restarts"
    assert not np.array_equal(array(filled)[:4], array(same)[:4])
    pasted = draw(pipeline, **call, mask_image=upper_half(), paste_back=True)[0]
    assert np.array_equal(array(pasted)[4:], array(image)[4:])
    if image.mode != "RGBA":  # colours of nearly transparent pixels are rounded in the channels of the network
        assert np.array_equal(array(same), array(image))


# --- how images are read


def test_orientation_and_colour_profile_are_applied():
    image = noise_image()
    turned, profiled = image.transpose(Image.Transpose.ROTATE_90), image.copy()
    turned.getexif()[0x0112] = 6  # turned by 90 degrees when it is shown
    pipeline = pixel_pipeline()
    call = {"output_type": "pil", "strength": 0}
    assert np.array_equal(array(draw(pipeline, **call, image=turned)[0]), array(image))
    profiled.info["icc_profile"] = p3_profile()
    assert not np.array_equal(array(draw(pipeline, **call, image=profiled)[0]), array(image))
    mask = upper_half().transpose(Image.Transpose.ROTATE_90)
    mask.getexif()[0x0112] = 6
    filled = draw(pipeline, output_type="pil", image=image, mask_image=mask)[0]
    assert np.array_equal(array(filled)[4:], array(image)[4:])


def test_an_image_of_another_size_is_resized_to_the_size_that_is_generated():
    pipeline, wide = pixel_pipeline(), noise_image(32).resize((32, 16))
    small = wide.resize((8, 8), Image.Resampling.LANCZOS)
    assert np.array_equal(array(draw(pipeline, output_type="pil", image=wide, strength=0)[0]), array(small))
    own = draw(pipeline, output_type="pil", image=wide, strength=0, height=16, width=32)[0]
    assert np.array_equal(array(own), array(wide))


def test_images_masks_tensors_and_arrays_are_the_same():
    pipeline, image, mask = pixel_pipeline(), noise_image(), upper_half()
    expected = draw(pipeline, image=image, mask_image=mask)
    tensors = {"image": tensor_of(image), "mask_image": tensor_of(mask)}
    assert np.array_equal(draw(pipeline, **tensors), expected)
    assert np.array_equal(draw(pipeline, **{name: one[0] for name, one in tensors.items()}), expected)
    arrays = {"image": array(image) / 255.0, "mask_image": array(mask) / 255.0}
    assert np.array_equal(draw(pipeline, **arrays), expected)
    assert np.array_equal(draw(pipeline, image=[image], mask_image=[mask]), expected)


def test_one_image_for_all_prompts_or_one_for_each():
    pipeline, images = tiny_pipeline(), [noise_image(seed=seed) for seed in (1, 2)]
    prompts = {"prompt": ["a red poster", "blue"], "strength": 0.5}
    alone = [
        draw(pipeline, prompt=prompt, strength=0.5, image=image, generator=[seeded()])
        for prompt, image in zip(prompts["prompt"], images)
    ]
    both = draw(pipeline, **prompts, image=images, generator=[seeded(), seeded()])
    assert np.allclose(both, np.concatenate(alone), atol=2e-5)
    generators = [seeded(), seeded(9), seeded(), seeded(9)]
    four = draw(pipeline, **prompts, image=images, num_images_per_prompt=2, generator=generators)
    assert np.allclose(four[[0, 2]], both, atol=2e-5)
    one = draw(pipeline, **prompts, image=images[0], generator=[seeded(), seeded()])
    assert np.allclose(one[0], both[0], atol=2e-5)
    assert not np.allclose(one[1], both[1], atol=2e-3)
    with pytest.raises(ValueError, match="`image` .* has 3 entries, but there are 2 prompts or labels; pass one image"):
        draw(pipeline, **prompts, image=[*images, images[0]])


@pytest.mark.parametrize("kind", ["controlnet", "poster_controlnet"])
def test_a_control_steers_from_an_image_as_well(kind):
    pipeline = made(kind)
    side = side_of(pipeline)
    call = {**GENERATING[kind], "image": noise_image(side), "mask_image": upper_half(side)}
    assert not np.allclose(draw(pipeline, **call), draw(pipeline, **call, controlnet_conditioning_scale=0.0), atol=1e-4)


def test_a_published_folder_starts_from_an_image_without_halftone(tmp_path):
    pipeline = tiny_pipeline(FLOW, text=False)
    pipeline.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded) is not LatentDiffusionPipeline
    loaded.set_progress_bar_config(disable=True)
    call = {"image": noise_image(), "mask_image": upper_half(), "strength": 0.8}
    assert np.allclose(draw(loaded, **call), draw(pipeline, **call), atol=1e-5)


IMAGE, MASK = noise_image(), upper_half()
BAD = [
    ({"image": IMAGE}, "`image` needs a `strength`, from 0 .* such as 0.6; pass both"),
    ({"strength": 0.5}, "`strength` has no effect without `image`; pass the image"),
    ({"mask_image": MASK}, "`mask_image` has no effect without `image`; pass the image"),
    ({"image": IMAGE, "strength": 1.5}, "`strength` must be from 0 .* to 1 .*, but is 1.5"),
    ({"image": IMAGE, "strength": -0.1}, "`strength` must be from 0 .* to 1 .*, but is -0.1"),
    ({"image": IMAGE, "strength": float("nan")}, "`strength` must be .*, but is nan"),
    ({"image": IMAGE, "mask_image": upper_half(16)}, "the size of `image`, 8×8 pixels .*, but has 16×16; resize the m"),
    ({"image": IMAGE, "mask_image": Image.new("L", (8, 8))}, "`mask_image` is empty: no pixel of it is white at 8×8 "),
    ({"image": IMAGE, "mask_image": [MASK] * 2}, "`image` .* has 2 entries, but there are 1 prompts"),
    ({"image": [IMAGE] * 2, "mask_image": [MASK] * 3}, "`mask_image` has 3 entries and `image` 2; pass one mask"),
    ({"image": IMAGE, "strength": 0.5, "paste_back": True}, "`paste_back` has no effect without `mask_image`"),
    ({"image": IMAGE, "strength": 0.5, "jump_n_sample": 2}, "`jump_n_sample` has no effect without `mask_image`"),
    ({"image": IMAGE, "mask_image": MASK, "jump_n_sample": 0}, "`jump_n_sample` must be a positive integer, but is 0"),
    (
        {"image": IMAGE, "mask_image": MASK, "paste_back": True, "output_type": "latent"},
        "`paste_back` pastes pixels, but `output_type` is 'latent'",
    ),
    ({"image": "photo.png", "strength": 0.5}, "`image` must be a PIL image, .* but is 'photo.png'"),
    ({"image": torch.zeros(4, 8, 8), "strength": 0.5}, r"`image` must have 3 channels, but has shape \(4, 8, 8\)"),
    ({"image": torch.full((3, 8, 8), 2.0), "strength": 0.5}, r"`image` must lie in \[0, 1\], but lies in \[2, 2\]"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(pixel_pipeline(), **arguments)
