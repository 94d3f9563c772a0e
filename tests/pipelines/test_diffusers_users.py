"""The pipelines behave as users of Diffusers expect: generators, from_pipe, embeddings, NumPy numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from pipelines.autoencoder import AutoencoderPipeline
from pipelines.fusion_controlnet_pipeline import FusionControlNetPipeline
from pipelines.latent_diffusion import LatentDiffusionPipeline
from pipelines.poster_controlnet_pipeline import PosterControlNetPipeline
from pipelines.poster_decoder import PosterDecoderPipeline
from pipelines.sample import main as sample
from pipelines.tools.loading import load_pipeline
from tests.support.drawing import GENERATING, OTHER, PROMPT, draw, every, made, same, seeded
from tests.support.tiny_controlnets import tiny_controlled, tiny_controlled_decoder
from tests.support.tiny_models import tiny_pipeline
from tests.support.tiny_published import PUBLISHED

# --- generators


@every
@pytest.mark.parametrize("sampler", [None, "ddpm"])
def test_a_generator_and_a_list_with_it_give_the_same_first_image(kind: str, sampler: str | None):
    """Includes a sampler that adds noise at every step."""
    pipeline = made(kind)
    if sampler and pipeline.config.prediction_type != "flow_prediction":
        pipeline.set_scheduler(sampler)
    listed = draw(pipeline, **GENERATING[kind], generator=[seeded(3)])
    assert np.array_equal(draw(pipeline, **GENERATING[kind], generator=seeded(3)), listed)
    three = draw(pipeline, **GENERATING[kind], generator=seeded(3), num_images_per_prompt=3)
    assert same(three[:1], listed)
    assert not np.allclose(three[1], three[2], atol=1e-3)
    two = draw(pipeline, **GENERATING[kind], generator=seeded(3), num_images_per_prompt=2)
    assert same(two, three[:2]), "the first images must not depend on their number"


def test_a_generator_that_is_used_again_gives_new_images():
    pipeline, generator = made("captioned"), seeded()
    images = [draw(pipeline, prompt=PROMPT, generator=generator, num_images_per_prompt=2) for _ in range(2)]
    four = np.concatenate(images)
    assert all(not np.allclose(four[i], four[j], atol=1e-3) for i in range(4) for j in range(i))


@pytest.mark.parametrize("kind", GENERATING)
def test_an_integer_is_the_seed_of_the_first_image_and_the_next_ones_follow(kind: str):
    pipeline = made(kind)
    drawn = draw(pipeline, **GENERATING[kind], generator=np.int64(3), num_images_per_prompt=3)
    expected = draw(pipeline, **GENERATING[kind], generator=[seeded(3), seeded(4), seeded(5)], num_images_per_prompt=3)
    assert np.array_equal(drawn, expected)
    with pytest.raises(ValueError, match="as a seed, `generator` must be from 0 to 9223372036854775807, but is -1"):
        draw(pipeline, **GENERATING[kind], generator=-1)


def test_the_autoencoder_and_the_caption_model_take_seeds():
    pixels = torch.rand(2, 3, 8, 8, generator=seeded())
    autoencoder, captions = made("autoencoder"), made("image_caption")
    assert torch.equal(autoencoder.encode(pixels, 5), autoencoder.encode(pixels, [seeded(5), seeded(6)]))
    drawn = [captions.draw("a red circle", 2, g, "np").images for g in (5, [seeded(5), seeded(6)])]
    assert np.array_equal(*drawn)
    pairs = [captions.sample(2, g, output_type="np").images for g in (5, [seeded(5), seeded(6)])]
    assert np.array_equal(*pairs)
    images = torch.rand(2, 3, 32, 32, generator=seeded())
    assert captions.caption(images, generator=5, num_candidates=2) == captions.caption(
        images, generator=[seeded(5), seeded(6)], num_candidates=2
    )


@pytest.mark.parametrize("kind", ["captioned", "controlnet"])
def test_the_first_image_is_that_of_sample_py_for_the_seed(kind: str, tmp_path: Path):
    made(kind).save_pretrained(tmp_path / "model")
    output = tmp_path / "grid.png"
    words = ("--model", tmp_path / "model", "--prompt", PROMPT, "--seed", 3, "--num_images", 1, "--device", "cpu")
    sample([str(word) for word in (*words, "--num_inference_steps", 4, "--output", output)])
    pipeline = load_pipeline(tmp_path / "model")
    pipeline.set_progress_bar_config(disable=True)
    expected = draw(pipeline, prompt=PROMPT, generator=seeded(3), output_type="pil")[0]
    scaled = np.asarray(expected).repeat(16, axis=0).repeat(16, axis=1)  # grids show small images enlarged
    with Image.open(output) as grid:
        assert any_window(np.asarray(grid.convert("RGB")), scaled), "the grid does not show the image"


def any_window(grid: np.ndarray, image: np.ndarray) -> bool:
    """Whether `image` (H W 3) is a part of `grid`."""
    height, width, _ = image.shape
    corners = np.argwhere((grid == image[0, 0]).all(2))
    return any(np.array_equal(grid[y : y + height, x : x + width], image) for y, x in corners)


def test_the_autoencoder_and_the_caption_model_use_generators_in_the_same_way():
    autoencoder, pixels = made("autoencoder"), torch.rand(3, 3, 8, 8, generator=seeded())
    three = autoencoder.encode(pixels, seeded(5))
    assert torch.allclose(autoencoder.encode(pixels[:1], [seeded(5)]), three[:1], atol=1e-5)
    captions = made("image_caption")
    three = captions.draw("a red circle", 3, generator=seeded(5), output_type="np").images
    assert same(captions.draw("a red circle", generator=[seeded(5)], output_type="np").images, three[:1])
    images = torch.rand(2, 3, 32, 32, generator=seeded())
    options = {"top_p": 1.0, "num_candidates": 4}
    both = captions.caption(images, generator=seeded(5), **options)
    assert captions.caption(images[:1], generator=[seeded(5)], **options) == both[:1]
    pairs = [captions.sample(generator=g, output_type="np", top_p=1.0) for g in (seeded(5), [seeded(5)])]
    assert np.array_equal(pairs[0].images, pairs[1].images)
    assert pairs[0].captions == pairs[1].captions


# --- from_pipe


@every
def test_from_pipe_gives_the_same_pipeline_with_the_same_weights(kind: str):
    pipeline = made(kind)
    again = type(pipeline).from_pipe(pipeline)
    again.set_progress_bar_config(disable=True)
    assert type(again) is type(pipeline)
    assert all(again.components[name] is component for name, component in pipeline.components.items())
    own = {name: value for name, value in pipeline.config.items() if not name.startswith("_")}
    assert {name: again.config[name] for name in own} == own
    assert np.array_equal(draw(again, **GENERATING[kind]), draw(pipeline, **GENERATING[kind]))


def test_from_pipe_adds_and_removes_a_controlnet():
    base = tiny_pipeline(classes=2)
    net = tiny_controlled(classes=2).controlnet
    steered = FusionControlNetPipeline.from_pipe(base, controlnet=net)
    assert steered.config.id2label == base.config.id2label
    assert steered.unet is base.unet
    back = LatentDiffusionPipeline.from_pipe(steered)
    back.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(back, prompt=PROMPT, class_labels="kind 1"), draw(base, prompt=PROMPT, class_labels=1))
    posters = tiny_controlled_decoder()
    assert type(PosterDecoderPipeline.from_pipe(posters)) is PosterDecoderPipeline
    decoder = PosterDecoderPipeline.from_pipe(posters)
    assert PosterControlNetPipeline.from_pipe(decoder, controlnet=posters.controlnet).unet is posters.unet
    assert AutoencoderPipeline.from_pipe(base).vae is base.vae


def test_from_pipe_changes_the_precision_only_if_asked_to():
    pipeline = tiny_pipeline().to(torch.bfloat16)
    assert LatentDiffusionPipeline.from_pipe(pipeline).unet.dtype == torch.bfloat16
    assert LatentDiffusionPipeline.from_pipe(pipeline, torch_dtype=torch.float32).unet.dtype == torch.float32


def test_from_pipe_takes_the_parts_of_stable_diffusion():
    pipeline = tiny_pipeline()
    parts = {name: pipeline.components[name] for name in ("vae", "unet", "scheduler", "text_encoder", "tokenizer")}
    stock = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    ours = LatentDiffusionPipeline.from_pipe(stock)
    ours.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(ours, prompt=PROMPT), draw(pipeline, prompt=PROMPT))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((tiny_pipeline, {}), "LatentDiffusionPipeline has no `controlnet`, which FusionControlNetPipeline needs"),
        ((tiny_controlled, {"colour": 1}), "FusionControlNetPipeline has no `colour`; it has vae, unet"),
        ((lambda: "runs/model", {}), "`pipeline` must be a pipeline, but is 'runs/model'"),
    ],
)
def test_from_pipe_says_what_is_missing_or_unknown(arguments, message):
    make, options = arguments
    with pytest.raises(ValueError, match=message):
        FusionControlNetPipeline.from_pipe(make(), **options)


# --- embeddings and negative prompts


@pytest.mark.parametrize("kind", ["captioned", "captioned_and_labelled", "controlnet"])
def test_prompt_embeds_replace_prompts(kind: str):
    pipeline = made(kind)
    rest = {name: value for name, value in GENERATING[kind].items() if name != "prompt"}
    embeds, negative = (pipeline.encode_prompt([text]) for text in (PROMPT, OTHER))
    for options in ({}, {"guidance_scale": 1.0}, {"num_images_per_prompt": 2}):
        assert same(
            draw(pipeline, **rest, prompt_embeds=embeds, **options), draw(pipeline, **rest, prompt=PROMPT, **options)
        )
    expected = draw(pipeline, **rest, prompt=PROMPT, negative_prompt=OTHER)
    assert same(draw(pipeline, **rest, prompt_embeds=embeds, negative_prompt_embeds=negative), expected)
    assert same(draw(pipeline, **rest, prompt=PROMPT, negative_prompt_embeds=negative), expected)
    two = pipeline.encode_prompt([PROMPT, OTHER])
    generators = [seeded(1), seeded(2)]
    assert len(draw(pipeline, **rest, prompt_embeds=two, generator=generators)) == 2


def test_several_controls_for_one_row_of_prompt_embeds():
    pipeline = made("controlnet")
    controls = torch.rand(2, 2, 8, 8, generator=seeded()).round()
    options = {"control_image": controls, "generator": seeded()}
    embeds = pipeline.encode_prompt([PROMPT])
    assert same(
        draw(pipeline, prompt_embeds=embeds, **options),
        draw(pipeline, prompt=PROMPT, **options | {"generator": seeded()}),
    )


def test_a_pipeline_without_its_text_encoder_takes_prompt_embeds():
    pipeline = made("captioned")
    embeds, negative = (pipeline.encode_prompt([text]) for text in (PROMPT, ""))
    expected = draw(pipeline, prompt=PROMPT)
    without = LatentDiffusionPipeline.from_pipe(pipeline, text_encoder=None, tokenizer=None)
    without.set_progress_bar_config(disable=True)
    assert same(draw(without, prompt_embeds=embeds, negative_prompt_embeds=negative), expected)
    with pytest.raises(ValueError, match="loaded without its text encoder, so it needs `prompt_embeds`"):
        draw(without)
    with pytest.raises(ValueError, match="so guidance needs `negative_prompt_embeds`"):
        draw(without, prompt_embeds=embeds)
    with pytest.raises(ValueError, match="no text encoder, so `prompt` must be None, but is 'a red poster'"):
        draw(without, prompt=PROMPT)


def test_an_empty_negative_prompt_means_none():
    captioned, labelled = made("captioned"), made("labelled")
    for empty in ("", [""]):
        unguided = draw(captioned, prompt=PROMPT, negative_prompt=empty, guidance_scale=1.0)
        assert np.array_equal(unguided, draw(captioned, prompt=PROMPT, guidance_scale=1.0))
        assert np.array_equal(draw(captioned, prompt=PROMPT, negative_prompt=empty), draw(captioned, prompt=PROMPT))
        assert np.array_equal(draw(labelled, class_labels=1, negative_prompt=empty), draw(labelled, class_labels=1))
    assert draw(captioned, negative_prompt="").shape == (1, 8, 8, 3)


# --- numbers, steps, results


@every
def test_numpy_numbers_are_numbers(kind: str):
    pipeline = made(kind)
    plain = dict(GENERATING[kind])
    side = 16 if "poster" in kind else 8
    numpy = {
        "height": np.int64(side), "width": np.int32(side), "num_inference_steps": np.int64(4),
        "num_images_per_prompt": np.int16(2), "guidance_scale": np.float32(2.5),
    }  # fmt: skip
    python = {name: value.item() for name, value in numpy.items()}
    expected = draw(pipeline, **plain, **python)
    if "class_labels" in plain:
        plain["class_labels"] = np.int64(1)
    assert np.array_equal(draw(pipeline, **plain, **numpy), expected)
    if kind == "labelled":
        for labels in (np.array([1]), np.array(1), torch.tensor(1), (1,), "kind 1", np.str_("kind 1")):
            assert np.array_equal(draw(pipeline, class_labels=labels, **numpy), expected)


@pytest.mark.parametrize("kind", ["captioned", "poster_decoder", "captioned_and_labelled"])
def test_timesteps_and_sigmas_are_those_of_the_scheduler(kind: str):
    pipeline = made(kind)
    expected = draw(pipeline, **GENERATING[kind])
    flow = pipeline.config.prediction_type == "flow_prediction"
    if flow:
        given = {"sigmas": pipeline.scheduler.sigmas[:-1].tolist()}
    else:
        given = {"timesteps": pipeline.scheduler.timesteps.tolist()}
    seen = []
    images = draw(
        pipeline, **GENERATING[kind], **given, num_inference_steps=9,
        callback_on_step_end=lambda pipe, step, *_: seen.append(pipe.num_timesteps),
    )  # fmt: skip
    assert seen == [4] * 4
    assert np.allclose(images, expected, atol=1e-4)
    fewer = {name: values[::2] for name, values in given.items()}
    assert not np.allclose(draw(pipeline, **GENERATING[kind], **fewer), expected, atol=1e-4)
    as_array = {name: np.array(values) for name, values in given.items()}
    assert np.array_equal(draw(pipeline, **GENERATING[kind], **as_array), images)


@every
def test_results_in_every_form(kind: str):
    pipeline, options = made(kind), {**GENERATING[kind], "num_inference_steps": 2}
    arrays = draw(pipeline, **options)
    tensors = draw(pipeline, **options, output_type="pt")
    images = draw(pipeline, **options, output_type="pil")
    assert np.allclose(tensors.permute(0, 2, 3, 1).numpy(), arrays, atol=1e-6)
    assert np.allclose(np.asarray(images[0]) / 255, arrays[0], atol=0.5 / 255 + 1e-6)
    (alone,) = pipeline(**options, generator=seeded(), output_type="np", return_dict=False)
    assert np.array_equal(alone, arrays)


@every
def test_the_progress_bar_is_configured_as_in_diffusers(kind: str, capsys: pytest.CaptureFixture):
    pipeline = PUBLISHED[kind]()
    pipeline.set_progress_bar_config(disable=False, desc="denoising")
    draw(pipeline, **GENERATING[kind])
    assert "denoising: 100%" in capsys.readouterr().err
    pipeline.set_progress_bar_config(disable=True)
    draw(pipeline, **GENERATING[kind])
    assert capsys.readouterr().err == ""


@every
def test_another_precision(kind: str):
    pipeline = made(kind)
    expected = draw(pipeline, **GENERATING[kind])
    images = draw(pipeline.to(torch.bfloat16), **GENERATING[kind])
    assert images.dtype == np.float32
    assert np.abs(images - expected).mean() < 0.05


def test_the_positional_arguments_of_stable_diffusion_are_refused():
    """In Stable Diffusion, height and width follow the prompt; here class labels do."""
    with pytest.raises(ValueError, match="this model has no classes, so `class_labels` must be None, but is 8"):
        made("captioned")(PROMPT, 8)
    for kind in ("captioned", "captioned_and_labelled"):
        with pytest.raises(ValueError, match="`negative_prompt` must be a string or a list of strings, but is 8"):
            made(kind)(PROMPT, 1, 8)


# --- devices


@pytest.mark.parametrize("device_map", ["cpu", "balanced"])
@pytest.mark.parametrize("kind", ["captioned", "captioned_and_labelled", "two_controlnets", "poster_decoder"])
def test_device_maps(kind: str, device_map: str, tmp_path: Path):
    pipeline = made(kind)
    pipeline.save_pretrained(tmp_path)
    mapped = type(pipeline).from_pretrained(tmp_path, device_map=device_map, torch_dtype=torch.float32)
    mapped.set_progress_bar_config(disable=True)
    options = GENERATING.get(kind, {"prompt": PROMPT})
    assert np.allclose(draw(mapped, **options), draw(pipeline, **options), atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without an accelerator")
def test_offloading_without_an_accelerator_is_refused_by_diffusers():
    with pytest.raises(RuntimeError, match="accelerator"):
        made("captioned").enable_model_cpu_offload()
