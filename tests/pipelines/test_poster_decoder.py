"""PosterDecoderPipeline: briefs, seeds, guidance, samplers, invalid input, and loading without Halftone.

Shapes: B images, H W pixels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch

from pipelines.common.design_brief import DesignBrief
from pipelines.common.sampling import guided
from pipelines.common.schedulers import (
    EPSILON,
    FLOW,
    PREDICTION_TYPES,
    sampling_scheduler,
    suitable_samplers,
    training_scheduler,
)
from pipelines.models.design_brief_encoder import DesignBriefEncoder
from pipelines.models.patch_transformer import PatchTransformer2DModel
from pipelines.poster_decoder import PosterDecoderPipeline, as_briefs
from pipelines.tools.loading import load_pipeline
from tests.support.environments import environment_without_halftone
from training.models.unet import PixelUNetConfig, build_pixel_unet

SIDE = 16
BRIEF = {"style": "swiss", "palette": ["cream", "#d33"], "pictures": 2, "energy": 0.8}


def tiny_decoder(prediction_type: str = "v_prediction", **options) -> PosterDecoderPipeline:
    torch.manual_seed(0)
    config = PixelUNetConfig(
        **{"block_out_channels": [8, 16], "norm_num_groups": 4, "attention_head_dim": 8, "layers_per_block": 1}
        | {"attention_resolutions": [8]} | options
    )  # fmt: skip
    pipeline = PosterDecoderPipeline(
        unet=build_pixel_unet(config, SIDE, 8, 6).eval(),
        scheduler=sampling_scheduler(training_scheduler(prediction_type)),
        brief_encoder=DesignBriefEncoder(token_width=8, global_width=6).eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_transformer_decoder() -> PosterDecoderPipeline:
    torch.manual_seed(0)
    shape = {"patch_size": 4, "hidden_size": 16, "num_layers": 1, "num_attention_heads": 2, "bottleneck_size": 4}
    network = PatchTransformer2DModel(
        SIDE, **shape, cross_attention_dim=8, class_embed_type="projection", projection_class_embeddings_input_dim=6
    )
    for layer in (network.patch_out, network.modulation_out, network.blocks[0].modulation):
        torch.nn.init.normal_(layer.weight, std=0.1)  # they begin at zero, and the brief would change nothing
    pipeline = PosterDecoderPipeline(
        unet=None,
        scheduler=sampling_scheduler(training_scheduler("flow_prediction")),
        brief_encoder=DesignBriefEncoder(token_width=8, global_width=6).eval(),
        transformer=network.eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(pipeline, briefs=BRIEF, **options) -> np.ndarray:
    defaults = {"num_inference_steps": 3, "generator": seeded(), "output_type": "np"}
    return pipeline(briefs, **defaults | options).images


# --- generated images


def test_briefs_may_be_mappings_briefs_or_lists():
    pipeline = tiny_decoder()
    image = draw(pipeline)
    assert image.shape == (1, SIDE, SIDE, 3)
    assert 0 <= image.min() <= image.max() <= 1
    assert np.array_equal(image, draw(pipeline, DesignBrief.from_mapping(BRIEF)))
    assert np.array_equal(image, draw(pipeline, [BRIEF]))
    assert not np.array_equal(image, draw(pipeline, BRIEF | {"style": "pop"}))
    assert not np.array_equal(image, draw(pipeline, None))
    assert np.array_equal(draw(pipeline, None), draw(pipeline, {}))


def test_images_depend_neither_on_the_batch_nor_on_their_number():
    pipeline = tiny_decoder()
    both = draw(pipeline, [BRIEF, {"pictures": 0}], generator=[seeded(1), seeded(2)])
    alone = draw(pipeline, {"pictures": 0}, generator=[seeded(2)])
    assert np.allclose(both[1:], alone, atol=1e-5)
    three, two = (draw(pipeline, num_images_per_prompt=n, generator=seeded(4)) for n in (3, 2))
    assert np.allclose(three[:2], two, atol=1e-5)
    assert not np.allclose(three[0], three[1], atol=1e-3)


def test_images_of_one_brief_are_consecutive():
    pipeline = tiny_decoder()
    generators = [seeded(i) for i in range(4)]
    images = draw(pipeline, [BRIEF, {"style": "pop"}], num_images_per_prompt=2, generator=generators)
    assert np.allclose(images[1:2], draw(pipeline, BRIEF, generator=[seeded(1)]), atol=1e-5)
    assert np.allclose(images[2:3], draw(pipeline, {"style": "pop"}, generator=[seeded(2)]), atol=1e-5)


def test_guidance_by_hand():
    uncond, cond = torch.full((1, 3, 2, 2), 1.0), torch.full((1, 3, 2, 2), 3.0)
    assert torch.equal(guided(torch.cat([uncond, cond]), 2.5), torch.full((1, 3, 2, 2), 6.0))
    assert guided(cond, None) is cond


def test_guidance_predicts_for_the_empty_brief_and_the_brief_in_one_batch(monkeypatch):
    pipeline = tiny_decoder()
    calls = []
    forward = pipeline.unet.forward
    monkeypatch.setattr(pipeline.unet, "forward", lambda x, t, **k: calls.append((x, t, k)) or forward(x, t, **k))
    guided_images = []
    for scale in (1.0, 4.0):
        guided_images.append(draw(pipeline, guidance_scale=scale, num_inference_steps=1))
    plain, double = calls
    assert (len(plain[0]), len(double[0])) == (1, 2)
    assert torch.equal(double[0][0], double[0][1])
    tokens, global_vectors = pipeline.encode_briefs(as_briefs([{}, BRIEF]))
    assert torch.allclose(double[2]["encoder_hidden_states"], tokens, atol=1e-6)
    assert torch.allclose(double[2]["class_labels"], global_vectors, atol=1e-6)
    assert not np.allclose(*guided_images, atol=1e-4)
    calls.clear()
    draw(pipeline, {}, guidance_scale=4.0)
    assert {len(x) for x, _, _ in calls} == {1}, "guidance must be disabled without a brief"


def test_other_sizes_and_output_types():
    pipeline = tiny_decoder()
    assert draw(pipeline, height=8, width=24).shape == (1, 8, 24, 3)
    assert draw(pipeline, output_type="pt").shape == (1, 3, SIDE, SIDE)
    (images,) = pipeline(BRIEF, num_inference_steps=2, generator=seeded(), return_dict=False)
    assert images[0].size == (SIDE, SIDE)


def test_the_callback_sees_replaces_and_stops():
    pipeline, seen = tiny_decoder(), []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, tensors["images"].shape))
        pipe._interrupt = step == 1
        return {"images": torch.zeros_like(tensors["images"])}

    images = draw(pipeline, num_inference_steps=5, callback_on_step_end=callback)
    assert seen == [(0, (1, 3, SIDE, SIDE)), (1, (1, 3, SIDE, SIDE))]
    assert np.allclose(images, 0.5)
    assert not np.allclose(draw(pipeline), 0.5), "an interruption must not affect the next call"


def test_half_precision():
    reference = draw(tiny_decoder(FLOW))
    assert np.abs(draw(tiny_decoder(FLOW).to(torch.bfloat16)) - reference).mean() < 0.02


# --- samplers


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_every_suitable_sampler_generates_images(prediction_type):
    pipeline = tiny_decoder(prediction_type)
    for name in suitable_samplers(prediction_type):
        if name == "lms" and not diffusers.utils.is_scipy_available():
            continue
        pipeline.set_scheduler(name)
        images = draw(pipeline, num_inference_steps=4)
        assert np.isfinite(images).all(), name


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpm", "unipc"])
def test_the_ideal_model_of_one_image_generates_it(name, monkeypatch):
    """x_0 is 0.5 everywhere, in [-1, 1]; x_t = alpha x_0 + sigma noise, so the noise is (x_t - alpha x_0) / sigma."""
    pipeline = tiny_decoder(EPSILON)
    alphas_cumprod = training_scheduler(EPSILON).alphas_cumprod

    def noise_in(x, timestep, **_):
        signal = alphas_cumprod[int(timestep)]
        return ((x - signal.sqrt() * 0.5) / (1 - signal).sqrt(),)

    monkeypatch.setattr(pipeline.unet, "forward", noise_in)
    pipeline.set_scheduler(name)
    assert np.allclose(draw(pipeline, num_inference_steps=50, guidance_scale=1.0), 0.75, atol=0.03)


def test_an_unsuitable_sampler_is_rejected():
    pipeline = tiny_decoder(FLOW)
    with pytest.raises(ValueError, match="'ddim' does not suit .* which predicts flow_prediction; use one of dpm"):
        pipeline.set_scheduler("ddim")
    pipeline.scheduler = diffusers.DDIMScheduler()
    with pytest.raises(ValueError, match="the model predicts flow_prediction, but DDIMScheduler expects epsilon"):
        draw(pipeline)


# --- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"briefs": {"style": "swis"}}, "style must be one of .*, but is 'swis'; did you mean 'swiss'"),
        ({"briefs": [BRIEF, {"palette": "blurple"}]}, "palette: 'blurple' is not a colour"),
        ({"briefs": [BRIEF, {"energy": 2}]}, r"energy must be a number in \[0, 1\], but is 2"),
        ({"briefs": "swiss"}, "`briefs` must be briefs or mappings of their fields, but has 'swiss'"),
        ({"briefs": []}, r"`briefs` must be one brief or more, but is \[\]"),
        ({"height": 9}, "`height` must be a multiple of 2 .* but is 9"),
        ({"width": 0}, "`width` must be a positive integer, but is 0"),
        ({"num_inference_steps": 0}, "`num_inference_steps` must be a positive integer, but is 0"),
        ({"num_images_per_prompt": 1.5}, "`num_images_per_prompt` must be a positive integer, but is 1.5"),
        ({"output_type": "latent"}, "`output_type` must be one of pil, np, pt, but is 'latent'"),
        ({"generator": [seeded()] * 2}, "`generator` has 2 entries, but the number of images is 1"),
        ({"callback_on_step_end_tensor_inputs": ["latents"]}, r"but has \['latents'\]"),
    ],
)
def test_bad_input_is_quoted(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_decoder()(**{"briefs": BRIEF} | arguments)


# --- saving


@pytest.mark.parametrize("attention", [[8], []])
def test_saved_and_loaded_with_our_own_classes(tmp_path, attention):
    pipeline = tiny_decoder(FLOW, attention_resolutions=attention)
    pipeline.save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is PosterDecoderPipeline
    assert type(loaded.brief_encoder) is DesignBriefEncoder
    assert loaded.config.prediction_type == FLOW
    assert np.allclose(draw(loaded), draw(pipeline), atol=1e-5)
    names = sorted(path.name.rsplit("_", 1)[0] for path in tmp_path.rglob("*.py"))
    of_decoder = ["design_brief", "design_brief_encoder", "poster_decoder", "poster_domain"]
    shared = [
        "checks",
        "compatibility",
        "conditions",
        "generation",
        "guidance",
        "latents",
        "lora",
        "pixels",
        "sampling",
        "schedulers",
        "standalone",
        "starting_image",
        "starting_point",
    ]
    assert names == sorted([*of_decoder, *shared])
    assert not list((tmp_path / "unet").glob("*.py")), "the U-Net is a class of Diffusers"


OUTSIDE = """
import importlib.util, json, sys
from pathlib import Path

for name in ("pipelines", "training", "data_scripts", "accelerate", "datasets"):
    assert importlib.util.find_spec(name) is None, name

import numpy as np
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

here = Path(sys.argv[1])
brief = json.loads(sys.argv[2])


def load(name):
    pipeline = DiffusionPipeline.from_pretrained(here / name, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline):
    generator = torch.Generator().manual_seed(0)
    return pipeline(brief, num_inference_steps=3, generator=generator, output_type="np").images


ours = load("model")
assert type(ours).__module__.startswith("diffusers_modules.")
assert type(ours.unet) is UNet2DConditionModel
images = {"ours": draw(ours)}
ours.save_pretrained(here / "again")
images["again"] = draw(load("again"))
try:
    ours({"style": "swis"})
except ValueError as error:
    images["refused"] = str(error)
ours.set_scheduler("ddim")
images["ddim"] = draw(ours)
np.savez(here / "images.npz", **images)
"""


@pytest.mark.slow
def test_it_loads_without_halftone_and_gives_the_same_images(tmp_path):
    tiny_decoder().save_pretrained(tmp_path / "model")
    python = environment_without_halftone(tmp_path / "venv")
    (tmp_path / "outside.py").write_text(OUTSIDE)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    result = subprocess.run(
        [python, tmp_path / "outside.py", tmp_path, json.dumps(BRIEF)],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert sys.executable != python
    images = np.load(tmp_path / "images.npz")
    ours = load_pipeline(tmp_path / "model")
    ours.set_progress_bar_config(disable=True)
    assert np.array_equal(images["ours"], draw(ours))
    assert np.array_equal(images["again"], images["ours"])
    assert not np.array_equal(images["ddim"], images["ours"])
    assert "did you mean 'swiss'" in str(images["refused"])
    assert type(load_pipeline(tmp_path / "again")) is PosterDecoderPipeline
