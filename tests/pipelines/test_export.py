"""pipelines/export.py: every part of every kind of model, images without PyTorch, and bad input.

Shapes: B images, C channels, H W pixels.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from pipelines.common.schedulers import make_scheduler, sampling_scheduler, training_scheduler
from pipelines.export import main
from pipelines.fusion_controlnet_pipeline import FusionControlNetPipeline
from pipelines.latent_diffusion import LatentDiffusionPipeline
from pipelines.models.pixel_autoencoder import PixelAutoencoder
from pipelines.tools.cli import UserError
from pipelines.tools.onnx_latent_diffusion import OnnxLatentDiffusionPipeline, TorchNoise, make_sampler, noise_level
from tests.pipelines.test_patch_transformer import tiny_transformer
from tests.support.environments import environment_of
from tests.support.runs import ROOT, environment
from tests.support.tiny_controlnets import PICTURE, tiny_controlled
from tests.support.tiny_models import TEXT_WIDTH, tiny_pipeline, tiny_text_encoder, tiny_tokenizer
from tests.support.tiny_published import PUBLISHED

LIBRARIES = ("numpy", "tokenizers", "onnxruntime", "pillow")
STEPS = 4


def pixels(channels: int = 3, classes: int | None = 2, **options: Any) -> LatentDiffusionPipeline:
    """Make a pipeline with a transformer on pixels, whose predictions are about as large as those of a trained one."""
    network = tiny_transformer(
        in_channels=channels, out_channels=channels, cross_attention_dim=TEXT_WIDTH, num_layers=1,
        num_class_embeds=None if classes is None else classes + 1, **options,
    )  # fmt: skip
    last = network.patch_out if network.convolutions is None else network.convolutions.last
    with torch.no_grad():
        last.weight *= 0.02
        if network.convolutions is not None:  # with random weights, an image hardly depends on its noise
            for weights in network.patch_in.parameters():
                weights *= 100
            network.convolutions.first.weight *= 10
            last.weight *= 0.3
    pipeline = LatentDiffusionPipeline(
        vae=PixelAutoencoder(latent_channels=channels, scaling_factor=1.5),
        unet=None,
        transformer=network,
        scheduler=sampling_scheduler(training_scheduler("flow_prediction")),
        text_encoder=tiny_text_encoder(),
        tokenizer=tiny_tokenizer(),
        id2label=None if classes is None else {i: f"kind {i}" for i in range(classes)},
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def exported(pipeline: Any, folder: Path, *flags: str) -> Path:
    pipeline.save_pretrained(folder / "pipeline")
    main(["--model", str(folder / "pipeline"), "--format", "onnx", "--output", str(folder / "exported"), *flags])
    return folder / "exported"


def description(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "onnx_model.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> tuple[LatentDiffusionPipeline, Path]:
    """A model that uses everything: captions, classes, a least noise level and restarts."""
    pipeline = pixels(least_noise_level=0.1, restart_levels=[0.3, 0.1], conv_layers=2, conv_width=8)
    return pipeline, exported(pipeline, tmp_path_factory.mktemp("model"))


def assert_same_images(
    pipeline: Any,
    folder: Path,
    torch_only: dict[str, Any] | None = None,
    scheduler: str | None = None,
    **arguments: Any,
) -> None:
    """Both draw the same noise from a seed, so that their images are the same up to rounding."""
    options = {"num_inference_steps": STEPS, "generator": 5, "output_type": "np"} | arguments
    expected = pipeline(**options, **(torch_only or {})).images
    images = OnnxLatentDiffusionPipeline(folder)(**options, scheduler=scheduler)
    assert images.shape == expected.shape
    assert expected.std() > 0.01
    assert np.abs(images - expected).mean() < 0.1 / 255


# --- numbers that have to be those of PyTorch and Diffusers


@pytest.mark.parametrize("shape", [(4, 4, 4), (1, 3, 6), (3, 5, 7), (3, 64, 64)])
@pytest.mark.parametrize("seed", [0, 7, 2**33 + 5])
def test_noise_is_that_of_pytorch(shape, seed):
    ours, generator = TorchNoise(seed), torch.Generator().manual_seed(seed)
    for _ in range(2):
        expected = torch.randn(shape, generator=generator).numpy()
        assert np.abs(ours.normal(shape) - expected).max() < 1e-5


@pytest.mark.parametrize("steps", [1, 2, 7, 25])
@pytest.mark.parametrize("name", ["ddim", "dpm", "euler"])
@pytest.mark.parametrize(
    ("prediction_type", "options"),
    [
        ("epsilon", {}),
        ("v_prediction", {}),
        ("v_prediction", {"rescale_betas_zero_snr": True}),
        ("sample", {"rescale_betas_zero_snr": True, "beta_schedule": "linear"}),
        ("flow_prediction", {}),
        ("flow_prediction", {"shift": 3.0}),
        ("flow_prediction", {"shift": 3.0, "shift_terminal": 0.25}),
    ],
)
def test_samplers_take_the_steps_of_diffusers(name, prediction_type, options, steps):
    flow = prediction_type == "flow_prediction"
    if flow != (name == "euler"):
        pytest.skip("a sampler for the other kind of model")
    terminal = options.get("shift_terminal")
    if terminal and steps == 1:
        pytest.skip("a single step has no other last level than its first")
    own = training_scheduler(
        prediction_type, **{key: value for key, value in options.items() if key != "shift_terminal"}
    )
    if terminal:
        own = type(own).from_config(own.config, shift_terminal=terminal)
    schedule = None if flow else make_scheduler("ddim", own).alphas_cumprod.numpy()
    config = {"prediction_type": prediction_type, "num_train_timesteps": 1000, "shift": options.get("shift", 1.0)}
    config["shift_terminal"] = terminal
    ours, theirs = make_sampler(name, config, schedule, steps), make_scheduler(name, own)
    theirs.set_timesteps(steps)
    assert np.allclose(ours.timesteps, theirs.timesteps.numpy(), rtol=1e-6)
    generator = torch.Generator().manual_seed(0)
    expected = torch.randn(2, 3, 4, 4, generator=generator)
    x = expected.numpy()
    for number, timestep in enumerate(theirs.timesteps):
        prediction = torch.randn(2, 3, 4, 4, generator=generator)
        expected = theirs.step(prediction, timestep, expected, return_dict=False)[0]
        x = ours.step(prediction.numpy(), number, x)
        assert x.dtype == np.float32
        assert np.abs(x - expected.numpy()).max() <= 1e-5 * expected.abs().max()


def test_noise_levels_are_those_of_the_guidance_interval():
    from pipelines.common import guidance

    schedule = training_scheduler("epsilon").alphas_cumprod
    for timestep in (0, 3.25, 500, 998.5, 999):
        expected = guidance.noise_level(timestep, schedule, 1000)
        assert noise_level(timestep, schedule.numpy(), 1000) == pytest.approx(expected, abs=1e-6)
    assert noise_level(250, None, 1000) == 0.25


# --- images


def test_the_same_seeds_give_the_same_images(model):
    prompts = ["a red poster", "circles"]
    assert_same_images(*model, prompt=prompts, class_labels=["kind 1", "kind 0"], num_images_per_prompt=2)
    assert_same_images(*model, prompt=prompts, negative_prompt="blue", guidance_scale=4.0)
    assert_same_images(*model, prompt="a", guidance_interval=(0.2, 0.7))
    assert_same_images(*model, class_labels=1, guidance_scale=1.0)
    assert_same_images(*model, num_images_per_prompt=3)
    assert_same_images(*model, prompt="a", height=12, width=10)


def test_latents_can_be_given(model):
    pipeline, folder = model
    latents = torch.randn(2, 3, 8, 8)
    options: dict[str, Any] = {"num_images_per_prompt": 2, "num_inference_steps": STEPS, "generator": 1}
    expected = pipeline("a", latents=latents, output_type="latent", **options).images.numpy()
    result = OnnxLatentDiffusionPipeline(folder)("a", latents=latents.numpy(), output_type="latent", **options)
    assert np.abs(result - expected).max() < 1e-3
    other = OnnxLatentDiffusionPipeline(folder)("a", latents=-latents.numpy(), output_type="latent", **options)
    assert np.abs(result - other).max() > 0.02


def test_a_folder_runs_anywhere_without_pytorch(model, tmp_path):
    """The environment has nothing but the four libraries and their requirements."""
    run_elsewhere(environment_of(tmp_path / "environment", *LIBRARIES), *model, tmp_path)


@pytest.mark.slow
def test_a_folder_runs_in_an_environment_from_the_package_index(model, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "environment"], check=True)
    python = tmp_path / "environment" / "bin" / "python"
    install = [python, "-m", "pip", "--disable-pip-version-check", "install", *LIBRARIES]
    done = subprocess.run(install, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    if done.returncode:
        pytest.skip(f"the package index cannot be reached: {done.stderr[-300:]}")
    run_elsewhere(str(python), *model, tmp_path)


CODE = """
import importlib.util, sys
import numpy as np
from onnx_latent_diffusion import OnnxLatentDiffusionPipeline

assert [name for name in ("torch", "diffusers", "transformers", "pipelines") if importlib.util.find_spec(name)] == []
options = {"latents": np.load("latents.npy"), "generator": 2, "num_inference_steps": 4}
pipeline = OnnxLatentDiffusionPipeline()
np.save("images.npy", pipeline(["a red poster", "circles"], output_type="np", **options))
pipeline(["a red poster", "circles"], **options)[1].save("image.png")
"""


def run_elsewhere(python: str, pipeline: LatentDiffusionPipeline, folder: Path, cwd: Path) -> None:
    latents = torch.randn(2, 3, 8, 8)
    np.save(cwd / "latents.npy", latents.numpy())
    variables = {**environment(), "PYTHONPATH": str(folder)}
    done = subprocess.run([python, "-c", CODE], cwd=cwd, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    prompts = ["a red poster", "circles"]
    options: dict[str, Any] = {"latents": latents, "generator": 2, "num_inference_steps": STEPS}
    expected = pipeline(prompts, output_type="np", **options).images
    assert expected.std() > 0.01
    assert np.abs(np.load(cwd / "images.npy") - expected).mean() < 1 / 255
    assert (cwd / "image.png").stat().st_size > 0


@pytest.mark.slow
@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (4, "RGBA")])
def test_grey_and_transparent_images(channels, mode, tmp_path):
    pipeline = pixels(channels, classes=None)
    folder = exported(pipeline, tmp_path)
    options: dict[str, Any] = {"prompt": "a", "generator": 0, "num_inference_steps": STEPS}
    assert_same_images(pipeline, folder, prompt="a")
    (image,) = OnnxLatentDiffusionPipeline(folder)(**options)
    (expected,) = pipeline(**options).images
    assert image.mode == expected.mode == mode
    assert np.abs(np.array(image).astype(int) - np.array(expected).astype(int)).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
def test_images_of_a_u_net_with_a_caption_prior(scheduler, tmp_path):
    pipeline = tiny_pipeline("v_prediction", classes=2, patch_size=4, prior=True)
    folder = exported(pipeline, tmp_path)
    pipeline.set_scheduler(scheduler)
    conditions = {"prompt": ["a", "red"], "class_labels": [1, 0], "guidance_interval": (0.1, 0.6)}
    assert_same_images(pipeline, folder, scheduler=scheduler, **conditions)
    larger = OnnxLatentDiffusionPipeline(folder)("a", height=64, width=48, scheduler=scheduler, output_type="np")
    assert larger.shape == (1, 64, 48, 3)


@pytest.mark.slow
def test_images_with_a_controlnet(tmp_path):
    pipeline = tiny_controlled("film", PICTURE)
    folder = exported(pipeline, tmp_path)
    control = torch.rand(1, 3, 8, 8)
    options: dict[str, Any] = {"controlnet_conditioning_scale": 0.7, "num_inference_steps": STEPS, "generator": 1}
    expected = pipeline("a", control_image=control, output_type="np", **options).images
    runner = OnnxLatentDiffusionPipeline(folder)
    assert np.abs(runner("a", control_image=control.numpy(), output_type="np", **options) - expected).mean() < 0.1 / 255
    assert_same_images(pipeline, folder, prompt="a")


@pytest.mark.slow
def test_a_distilled_model_takes_its_own_steps_without_guidance(tmp_path, capsys):
    """By default, as in PyTorch. Its last step begins at the noise level 1 / 3, as its scheduler says."""
    pipeline = PUBLISHED["distilled"]()
    folder = exported(pipeline, tmp_path, "--benchmark", "true")
    printed = capsys.readouterr().out
    assert "image, 3 steps" in printed
    assert "mean difference of the images: 0.000 of 255" in printed
    assert description(folder)["config"]["distilled"] == {"num_inference_steps": 3, "guidance_scale": 1.5}
    runner = OnnxLatentDiffusionPipeline(folder)
    options: dict[str, Any] = {"prompt": ["a", "red"], "class_labels": [1, 0], "generator": 5, "output_type": "np"}
    expected = pipeline(**options).images
    assert np.abs(runner(**options) - expected).mean() < 0.1 / 255
    assert np.array_equal(runner(**options), runner(**options, num_inference_steps=3, guidance_scale=1))
    assert np.abs(runner(**options, num_inference_steps=25) - expected).mean() > 1e-3
    assert_same_images(pipeline, folder, num_inference_steps=2, prompt="a", guidance_scale=0.5)
    for run in (runner, pipeline):
        with pytest.raises(ValueError, match=r"`guidance_scale` is 2\.5, but this model was distilled.* of 1\.5"):
            run("a", guidance_scale=2.5)
        with pytest.raises(ValueError, match="`num_inference_steps` must be"):
            run("a", num_inference_steps=1)


def test_the_documentation_lists_each_argument_that_is_missing():
    def arguments(*functions: Callable) -> set[str]:
        parameters = [one for function in functions for one in inspect.signature(function).parameters.values()]
        return {one.name for one in parameters if one.kind is not one.VAR_KEYWORD}

    controlled = FusionControlNetPipeline.call_with_control
    of_pytorch = arguments(LatentDiffusionPipeline.__call__, controlled) - {"conditions"}
    missing = of_pytorch - arguments(OnnxLatentDiffusionPipeline.__call__)
    rows = [row for row in (ROOT / "docs/export.md").read_text(encoding="utf-8").splitlines() if "| not avail" in row]
    assert {name for row in rows for name in re.findall("`([a-z_]+)`", row)} == missing - {"return_dict"}


def test_the_defaults_are_those_of_pytorch(model):
    options: dict[str, Any] = {"prompt": "a red poster", "generator": 5, "output_type": "np"}
    expected = model[0](**options).images
    assert np.abs(OnnxLatentDiffusionPipeline(model[1])(**options) - expected).mean() < 0.1 / 255


# --- parts

VAE = {"vae_encoder", "vae_decoder"}
PARTS: dict[str, set[str]] = {
    "captioned": {"text_encoder", "unet", *VAE},
    "labelled": {"unet", *VAE},
    "captioned_and_labelled": {"text_encoder", "caption_prior", "unet", *VAE},
    "distilled": {"text_encoder", "unet", *VAE},
    "unconditional": {"unet", *VAE},
    "pretrained_text_encoder": {"text_encoder", "unet", *VAE},
    "autoencoder": VAE,
    "autoencoder_heads": {*VAE, "vae_segmentation", "vae_classification"},
    "controlnet": {"text_encoder", "unet", "steered_unet", *VAE},
    "two_controlnets": {"text_encoder", "unet", "steered_unet", *VAE},
    "poster_decoder": {"brief_encoder", "unet"},
    "poster_transformer": {"brief_encoder", "transformer"},
    "poster_controlnet": {"brief_encoder", "unet", "steered_unet"},
    "image_caption": {"image_encoder", "image_decoder", "caption_encoder", "caption_decoder", "prior"},
    "layout_encoder": {"encoder"},
    "layout_analysis": {"encoder", "abstractor"},
}


@pytest.mark.parametrize(
    "kind",
    ["autoencoder", *(pytest.param(kind, marks=pytest.mark.slow) for kind in PUBLISHED if kind != "autoencoder")],
)
def test_every_part_of_every_kind_is_exported(kind, tmp_path):
    """The command compares each part with PyTorch at two batch sizes, and for other sizes than in training."""
    parts = description(exported(PUBLISHED[kind](), tmp_path))["parts"]
    assert parts.keys() == PARTS[kind]
    sized = {"unet", "steered_unet", "encoder", "transformer", *VAE, "caption_prior", "caption_encoder"}
    for name, part in parts.items():
        assert 0 <= part["largest_difference"] <= 1e-3
        assert (tmp_path / "exported" / part["file"]).is_file()
        batched = [one["shape"] for one_name, one in part["inputs"].items() if one_name != "conditioning_scales"]
        assert all(isinstance(shape[0], str) for shape in batched), name
        assert part["dynamic_size"] or name not in sized


@pytest.mark.slow
def test_half_precision(tmp_path):
    pipeline = pixels(classes=None)
    folder = exported(pipeline, tmp_path, "--dtype", "fp16")
    assert description(folder)["dtype"] == "float16"
    images = OnnxLatentDiffusionPipeline(folder)("a", num_inference_steps=STEPS, generator=1, output_type="np")
    expected = pipeline("a", num_inference_steps=STEPS, generator=1, output_type="np").images
    assert 0 < np.abs(images - expected).mean() < 4 / 255
    weights = onnx.load(folder / "text_encoder.onnx").graph.initializer
    types = {one.data_type for one in weights if math.prod(one.dims) >= 100}
    assert onnx.TensorProto.FLOAT16 in types
    assert onnx.TensorProto.FLOAT not in types


# --- bad input


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "{folder}"], "does not contain a pipeline"),
        (["--format", "tensorrt"], "invalid choice: 'tensorrt'"),
        (["--opset", "11"], "--opset must be from 18"),
        (["--output", "{folder}"], "already exists and is not an empty folder"),
        (["--tolerance", "0"], "--tolerance must be above 0"),
        (["--tolerence", "1"], "did you mean 'tolerance'"),
    ],
)
def test_bad_input_is_named(flags, message, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    own = [flag.format(folder=tmp_path / "folder") for flag in flags]
    given = {"--model": str(tmp_path / "model"), "--output": str(tmp_path / "new")} | dict(zip(own[::2], own[1::2]))
    with pytest.raises(UserError, match=message):
        main([word for pair in given.items() for word in pair])
    assert not (tmp_path / "new").exists()


def test_errors_end_with_status_2(tmp_path):
    command = [sys.executable, str(ROOT / "pipelines/export.py"), "--model", str(tmp_path), "--output", "new"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"needs onnxscript, .*pip install"):
        main(["--model", str(tmp_path), "--output", str(tmp_path / "new")])


def test_a_larger_difference_is_an_error_and_leaves_nothing(tmp_path):
    pixels(classes=None).save_pretrained(tmp_path / "pipeline")
    with pytest.raises(UserError, match="differs from PyTorch by"):
        main(["--model", str(tmp_path / "pipeline"), "--output", str(tmp_path / "new"), "--tolerance", "1e-12"])
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]


WRONG: list[tuple[Callable[[], dict[str, Any]], str]] = [
    (lambda: {"prompt": 3}, "`prompt` must be a string"),
    (lambda: {"prompt": ["a"] * 2, "class_labels": [0] * 3}, "equally many"),
    (lambda: {"class_labels": "kind 7"}, "not a class; the classes are kind 0, kind 1"),
    (lambda: {"class_labels": 2}, "from 0 to 1"),
    (lambda: {"height": 9}, "`height` must be a multiple of 2"),
    (lambda: {"latents": np.zeros((1, 3, 4, 4))}, "`latents` must have shape"),
    (lambda: {"output_type": "jpg"}, "`output_type` must be one of"),
    (lambda: {"scheduler": "ddim"}, "`scheduler` must be one of euler"),
    (lambda: {"generator": [1, 2]}, "`generator` has 2 entries"),
    (lambda: {"num_inference_steps": 0}, "`num_inference_steps` must be a positive integer"),
    (lambda: {"guidance_interval": (0.9, 0.1)}, "`guidance_interval` must be"),
    (lambda: {"negative_prompt": "a", "guidance_scale": 1.0}, "needs a `guidance_scale` above 1"),
    (lambda: {"control_image": np.zeros((1, 3, 8, 8))}, "has 0 ControlNets"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_arguments_are_quoted(arguments, message, model):
    with pytest.raises(ValueError, match=message):
        OnnxLatentDiffusionPipeline(model[1])(**arguments())


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no onnx_model.json"):
        OnnxLatentDiffusionPipeline(tmp_path)
