"""Pipelines with a ControlNet: equality with the base pipeline without control, combinations of prompts and controls,
two ControlNets, and loading without Halftone.

Shapes: B images, C control channels, H W pixels.
"""

from __future__ import annotations

import os
import subprocess
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.fusion_controlnet_pipeline import FusionControlNetPipeline
from pipelines.models.fusion_controlnet import FUSION_MODES, FusionControlNets, as_nets
from pipelines.poster_controlnet_pipeline import PosterControlNetPipeline
from pipelines.tools.loading import load_pipeline
from tests.pipelines.test_poster_decoder import tiny_decoder
from tests.support.environments import environment_without_halftone
from tests.support.tiny_controlnets import (
    MASKS,
    PICTURE,
    controlled,
    tiny_controlled,
    tiny_controlled_decoder,
    tiny_net,
)
from tests.support.tiny_models import tiny_pipeline

PROMPT, OTHER = "a red poster", "blue"
BRIEF, OTHER_BRIEF = {"style": "swiss", "energy": 0.8}, {"style": "pop"}
CONDITIONS = {"latent": (PROMPT, OTHER), "decoder": (BRIEF, OTHER_BRIEF)}
BASES: dict[str, Any] = {"latent": tiny_pipeline, "decoder": tiny_decoder}
SIDES = {"latent": 8, "decoder": 16}
both = pytest.mark.parametrize("kind", ["latent", "decoder"])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def masks(count: int = 1, side: int = 8, seed: int = 0) -> Tensor:
    return torch.rand(count, 2, side, side, generator=seeded(seed)).round()


def draw(pipeline: Any, *condition: Any, seeds: int | list[int] = 0, **options: Any) -> np.ndarray:
    """Generate images, B H W 3 in [0, 1]; `seeds` is one seed for all images or a list with one for each."""
    generator = seeded(seeds) if isinstance(seeds, int) else [seeded(seed) for seed in seeds]
    return pipeline(*condition, num_inference_steps=3, generator=generator, output_type="np", **options).images


def same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether images are equal up to rounding, which depends on the batch size."""
    return one.shape == other.shape and np.allclose(one, other, atol=2e-5)


def steered(kind: str, mode: str = "film") -> tuple[Any, Any]:
    """Return a base pipeline, and the same pipeline with a ControlNet for two masks."""
    base = BASES[kind]()
    return base, controlled(base, tiny_net(base, mode))


def calls_of(module: torch.nn.Module) -> list[float]:
    """Return a list to which the timesteps of all later calls of `module` are appended."""
    seen: list[float] = []
    module.register_forward_pre_hook(lambda _, args, kwargs: seen.append(float(args[1])), with_kwargs=True)
    return seen


# --- without control


@both
@pytest.mark.parametrize("mode", FUSION_MODES)
def test_without_control_or_at_scale_0_it_is_the_base_exactly(kind: str, mode: str):
    base, pipeline = steered(kind, mode)
    condition, control = CONDITIONS[kind][0], masks(side=SIDES[kind])
    expected = draw(base, condition, num_images_per_prompt=2)
    assert np.array_equal(draw(pipeline, condition, num_images_per_prompt=2), expected)
    assert np.array_equal(
        draw(pipeline, condition, control, num_images_per_prompt=2, controlnet_conditioning_scale=0.0), expected
    )
    assert not np.allclose(draw(pipeline, condition, control, num_images_per_prompt=2), expected, atol=1e-3)
    assert np.array_equal(draw(pipeline, condition, num_images_per_prompt=2), expected), "hooks are left in the U-Net"


@both
def test_an_error_removes_the_hooks(kind: str):
    base, pipeline = steered(kind)

    def fail(*_: Any) -> dict:
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        draw(pipeline, CONDITIONS[kind][0], masks(side=SIDES[kind]), callback_on_step_end=fail)
    assert np.array_equal(draw(pipeline, CONDITIONS[kind][0]), draw(base, CONDITIONS[kind][0]))


# --- how strongly, and when


def trajectory(pipeline: Any, *arguments: Any, **options: Any) -> list[Tensor]:
    """Return the latents or images after each of four steps."""
    name, seen = pipeline._callback_tensor_inputs[0], []
    pipeline(
        *arguments, num_inference_steps=4, generator=seeded(0), **options,
        callback_on_step_end=lambda pipe, step, timestep, tensors: seen.append(tensors[name].clone()) or {},
    )  # fmt: skip
    return seen


@both
def test_guidance_start_and_end_limit_the_controlled_steps(kind: str):
    base, pipeline = steered(kind, "add")
    condition, control = CONDITIONS[kind][0], masks(side=SIDES[kind])
    plain, full = trajectory(base, condition), trajectory(pipeline, condition, control)
    late = trajectory(pipeline, condition, control, control_guidance_start=0.5)
    assert all(torch.equal(a, b) for a, b in zip(late[:2], plain[:2], strict=True))
    assert not torch.allclose(late[2], plain[2], atol=1e-4)
    early = trajectory(pipeline, condition, control, control_guidance_end=0.5)
    assert all(torch.equal(a, b) for a, b in zip(early[:2], full[:2], strict=True))
    assert not torch.allclose(early[2], full[2], atol=1e-4)


@pytest.mark.parametrize("sampler", [None, "heun", "dpm"])
def test_the_controlnet_runs_only_at_the_controlled_steps(sampler: str | None):
    """Second-order samplers call the U-Net twice per step; either both calls are controlled or neither."""
    pipeline = tiny_controlled()
    if sampler:
        pipeline.set_scheduler(sampler)
    net, unet = calls_of(pipeline.controlnet), calls_of(pipeline.unet)
    pipeline(
        PROMPT, masks(), num_inference_steps=4, generator=seeded(0), control_guidance_start=0.25,
        control_guidance_end=0.75,
    )  # fmt: skip
    steps = list(dict.fromkeys(unet))
    assert len(steps) == 4
    assert net == [timestep for timestep in unet if timestep in steps[1:3]]
    assert len(unet) == (7 if sampler == "heun" else 4)


@both
def test_a_stronger_scale_changes_more(kind: str):
    base, pipeline = steered(kind)
    plain, control = draw(base, CONDITIONS[kind][0]), masks(side=SIDES[kind])
    changes = [
        np.abs(draw(pipeline, CONDITIONS[kind][0], control, controlnet_conditioning_scale=scale) - plain).mean()
        for scale in (0.1, 1.0)
    ]
    assert 0 < changes[0] < changes[1]


# --- numbers of prompts, controls and images


@both
def test_one_control_for_several_prompts(kind: str):
    _, pipeline = steered(kind)
    control = masks(side=SIDES[kind])
    images = draw(pipeline, list(CONDITIONS[kind]), control, seeds=[1, 2])
    for i, condition in enumerate(CONDITIONS[kind]):
        assert same(draw(pipeline, condition, control, seeds=[i + 1]), images[i : i + 1])


@both
def test_several_controls_for_one_prompt_or_one_for_each(kind: str):
    _, pipeline = steered(kind)
    controls = masks(2, SIDES[kind])
    images = draw(pipeline, CONDITIONS[kind][0], controls, seeds=[1, 2])
    pairs = draw(pipeline, list(CONDITIONS[kind]), controls, seeds=[1, 2])
    assert same(images[:1], pairs[:1])
    assert same(draw(pipeline, CONDITIONS[kind][0], controls[1], seeds=[2]), images[1:])
    assert same(draw(pipeline, CONDITIONS[kind][1], controls[1], seeds=[2]), pairs[1:])
    assert not np.allclose(images[1], pairs[1], atol=1e-4)


@both
@pytest.mark.parametrize("has_prompts", [True, False])
def test_images_of_one_control_are_consecutive(kind: str, has_prompts: bool):
    """With a prompt (or brief) for each control, and without prompts."""
    _, pipeline = steered(kind)
    controls = masks(2, SIDES[kind])
    condition = list(CONDITIONS[kind]) if has_prompts else None
    images = draw(pipeline, condition, controls, seeds=[1, 2, 3, 4], num_images_per_prompt=2)
    assert len(images) == 4
    for i in range(4):
        alone = draw(pipeline, condition and condition[i // 2], controls[i // 2], seeds=[i + 1])
        assert same(alone, images[i : i + 1])


@both
def test_without_a_prompt_the_number_of_controls_counts(kind: str):
    _, pipeline = steered(kind)
    assert len(draw(pipeline, None, masks(3, SIDES[kind]))) == 3
    assert len(draw(pipeline, control_image=masks(1, SIDES[kind]))) == 1


@both
def test_the_first_images_do_not_depend_on_the_number_of_images(kind: str):
    _, pipeline = steered(kind)
    control = masks(side=SIDES[kind])
    three, two = (draw(pipeline, CONDITIONS[kind][0], control, seeds=4, num_images_per_prompt=n) for n in (3, 2))
    assert same(three[:2], two)
    assert not np.allclose(three[0], three[1], atol=1e-3)


def test_another_size():
    pipeline = tiny_controlled()
    control = torch.rand(2, 16, 12)
    assert draw(pipeline, PROMPT, control, height=16, width=12).shape == (1, 16, 12, 3)


# --- with classes, with a caption prior


def test_class_labels_with_controls():
    base = tiny_pipeline(classes=3)
    pipeline = controlled(base, tiny_net(base, "gated"))
    labels = ["kind 2", "kind 0"]
    assert np.array_equal(draw(pipeline, class_labels=labels), draw(base, class_labels=labels))
    controls = masks(2)
    images = draw(pipeline, None, controls, class_labels="kind 2", seeds=[1, 2])
    pairs = draw(pipeline, None, controls, class_labels=labels, seeds=[1, 2])
    assert same(images[:1], pairs[:1])
    assert not np.allclose(images[1], pairs[1], atol=1e-4)
    three = draw(pipeline, [PROMPT] * 3, masks(3), class_labels=torch.tensor([1, 0, 2]))
    assert len(three) == 3


def test_the_controlnet_takes_the_predictions_of_a_caption_prior():
    base = tiny_pipeline("flow_prediction", prior=True, classes=2)
    net = tiny_net(base, "concat")
    pipeline = controlled(base, net)
    assert net.config.in_channels == 8
    assert np.array_equal(draw(pipeline, PROMPT), draw(base, PROMPT))
    assert not np.allclose(draw(pipeline, PROMPT, masks()), draw(base, PROMPT), atol=1e-3)
    assert not np.allclose(draw(pipeline, PROMPT, masks()), draw(pipeline, PROMPT, 1 - masks()), atol=1e-4)


# --- two nets


@both
def test_two_nets_in_a_list_are_saved_and_loaded(kind: str, tmp_path):
    base, side = BASES[kind](), SIDES[kind]
    nets = tiny_net(base, "film", MASKS, seed=1), tiny_net(base, "add", PICTURE, seed=2)
    pipeline = controlled(base, *nets)
    assert isinstance(pipeline.controlnet, FusionControlNets)
    control = [masks(side=side), torch.rand(1, 3, side, side, generator=seeded(1))]
    images = draw(pipeline, CONDITIONS[kind][0], control)
    pipeline.save_pretrained(tmp_path)
    again = load_pipeline(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again) is type(pipeline)
    assert [net.config.fusion_mode for net in as_nets(again.controlnet)] == ["film", "add"]
    assert np.array_equal(draw(again, CONDITIONS[kind][0], control), images)
    # With one scale at 0, only the other ControlNet has an effect.
    for i, net in enumerate(nets):
        scales = [float(i == 0), float(i == 1)]
        alone = draw(controlled(base, net), CONDITIONS[kind][0], control[i])
        assert np.array_equal(draw(again, CONDITIONS[kind][0], control, controlnet_conditioning_scale=scales), alone)


def test_nets_fuse_in_the_order_of_the_list():
    """The order matters only for modes that depend on the features of the U-Net."""
    base, controls = tiny_pipeline(), [masks(seed=1), masks(seed=2)]
    for mode, matters in (("film", True), ("gated", False)):
        nets = [tiny_net(base, mode, seed=1), tiny_net(base, "add", seed=2)]
        forth = draw(controlled(base, *nets), PROMPT, controls)
        back = draw(controlled(base, *nets[::-1]), PROMPT, controls[::-1])
        assert np.allclose(forth, back, atol=1e-4) != matters, mode


def test_several_controls_of_one_net_and_one_of_the_other():
    base = tiny_pipeline()
    pipeline = controlled(base, tiny_net(base, "add", seed=1), tiny_net(base, "gated", seed=2))
    many, one = masks(3, seed=1), masks(1, seed=2)
    images = draw(pipeline, PROMPT, [many, one], seeds=[1, 2, 3])
    assert same(draw(pipeline, PROMPT, [many[2], one], seeds=[3]), images[2:])


def test_guidance_of_each_net_by_itself():
    base = tiny_pipeline()
    pipeline = controlled(base, tiny_net(base, "add", seed=1), tiny_net(base, "gated", seed=2))
    first, second = (calls_of(net) for net in as_nets(pipeline.controlnet))
    pipeline(
        PROMPT, [masks(), masks()], num_inference_steps=4, generator=seeded(0),
        control_guidance_start=[0.0, 0.5], control_guidance_end=[0.25, 1.0],
    )  # fmt: skip
    assert (len(first), len(second)) == (1, 2)
    assert first[0] > second[0]


# --- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"control_image": masks(side=16)}, r"2 channels of 8×8 .* but has shape \(2, 16, 16\)"),
        ({"control_image": torch.zeros(3, 8, 8)}, r"2 channels of 8×8 .* but has shape \(3, 8, 8\)"),
        (
            {"control_image": masks(3), "prompt": [PROMPT, OTHER]},
            "`control_image` has 3 controls, but `prompt` has 2 entries",
        ),
        ({"controlnet_conditioning_scale": [1.0, 1.0]}, "`controlnet_conditioning_scale` has 2 entries for 1"),
        ({"control_guidance_start": 0.5, "control_guidance_end": 0.5}, "below `control_guidance_end`, .* 0.5 and 0.5"),
        ({"control_guidance_end": 1.5}, "`control_guidance_end`, both in .*, but they are 0.0 and 1.5"),
        ({"control_guidance_start": -0.1}, "are -0.1 and 1.0"),
        ({"height": 9}, "`height` must be a multiple of 2"),
        ({"num_images_per_prompt": 0}, "`num_images_per_prompt` must be a positive integer, but is 0"),
        ({"num_images_per_prompt": 0, "prompt": None}, "`num_images_per_prompt` must be a positive integer, but is 0"),
        ({"output_type": "jpeg"}, "`output_type` must be one of"),
        ({"generator": [seeded(0)] * 2}, "`generator` has 2 entries, but the number of images is 1"),
    ],
)
def test_bad_input_is_quoted(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        tiny_controlled()(**{"prompt": PROMPT, "control_image": masks(), "num_inference_steps": 1} | arguments)


def test_bad_input_with_briefs_and_with_two_nets():
    decoder = tiny_controlled_decoder()
    with pytest.raises(ValueError, match="`control_image` has 3 controls, but `briefs` has 2 entries"):
        decoder([BRIEF, OTHER_BRIEF], masks(3, 16))
    with pytest.raises(ValueError, match="`num_images_per_prompt` must be a positive integer, but is 0"):
        decoder(BRIEF, masks(1, 16), num_images_per_prompt=0)
    base = tiny_pipeline()
    pipeline = controlled(base, tiny_net(base), tiny_net(base))
    with pytest.raises(ValueError, match="`control_image` has 1 entries for 2 ControlNets"):
        pipeline(PROMPT, [masks()])
    with pytest.raises(ValueError, match="needs one control, or as many controls as the others, but they have 2 and 3"):
        pipeline(PROMPT, [masks(2), masks(3)])


def test_a_net_of_another_base_is_refused():
    base = tiny_pipeline()
    with pytest.raises(ValueError, match="trained with another U-Net: its `in_channels` is 8, but this U-Net's is 4"):
        controlled(base, tiny_net(tiny_pipeline(prior=True)))
    # This VAE with patches of 4 has eight pixels per latent cell.
    other = tiny_net(tiny_pipeline(patch_size=4))
    with pytest.raises(ValueError, match="takes 8 pixels per latent cell, but the base has 2: .* another VAE"):
        controlled(base, other)
    pipeline = controlled(base, tiny_net(base))
    with pytest.raises(ValueError, match="another VAE"):
        pipeline.set_controlnet([pipeline.controlnet, other])
    assert draw(pipeline, PROMPT, masks()).shape == (1, 8, 8, 3), "the pipeline must be unchanged"


# --- loading without Halftone


OUTSIDE = """
import importlib.util, sys
from pathlib import Path

for name in ("pipelines", "training", "data_scripts", "accelerate", "datasets"):
    assert importlib.util.find_spec(name) is None, name

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

here = Path(sys.argv[1])
masks = [Image.open(here / name) for name in ("text.png", "image.png")]


def load(name):
    pipeline = DiffusionPipeline.from_pretrained(here / name, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, control, condition="a red poster", **options):
    generator = torch.Generator().manual_seed(0)
    call = {"num_inference_steps": 3, "generator": generator, "output_type": "np", **options}
    return pipeline(condition, control_image=control, **call).images


ours = load("model")
assert type(ours).__module__.startswith("diffusers_modules.")
images = {"ours": draw(ours, masks), "base": draw(ours, None)}
ours.save_pretrained(here / "again")
images["again"] = draw(load("again"), masks)
ours.set_controlnet([ours.controlnet, load("other").controlnet])
images["both"] = draw(ours, [masks, masks], controlnet_conditioning_scale=[0.5, 1.0])
ours.save_pretrained(here / "both")
images["both_again"] = draw(load("both"), [masks, masks], controlnet_conditioning_scale=[0.5, 1.0])
try:
    draw(ours, masks[:1])
except ValueError as error:
    images["refused"] = str(error)
decoder, brief = load("decoder"), {"style": "swiss", "energy": 0.8}
control = torch.from_numpy(np.load(here / "control.npy"))
images["decoder"] = draw(decoder, control, brief)
decoder.save_pretrained(here / "decoder_again")
images["decoder_again"] = draw(load("decoder_again"), control, brief)
np.savez(here / "images.npz", **images)
"""


@pytest.mark.slow
def test_a_saved_folder_loads_without_halftone_and_gives_the_same_images(tmp_path):
    """Uses fusion by cross attention with Halftone's autoencoder, then adds a second ControlNet and saves both.

    The same process also loads the poster decoder with its ControlNet.
    """
    from PIL import Image

    decoder, control = tiny_controlled_decoder(), masks(side=16)
    decoder.save_pretrained(tmp_path / "decoder")
    np.save(tmp_path / "control.npy", control.numpy())
    pipeline = tiny_controlled("cross_attention", patch_size=1)
    pipeline.save_pretrained(tmp_path / "model")
    base = tiny_pipeline(patch_size=1)
    controlled(base, tiny_net(base, "film", seed=3)).save_pretrained(tmp_path / "other")
    images_of_masks = [Image.fromarray((mask * 255).byte().numpy()) for mask in masks()[0]]
    for name, image in zip(("text", "image"), images_of_masks, strict=True):
        image.save(tmp_path / f"{name}.png")
    python = environment_without_halftone(tmp_path / "venv")
    (tmp_path / "outside.py").write_text(OUTSIDE)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    result = subprocess.run(
        [python, tmp_path / "outside.py", tmp_path], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    images = np.load(tmp_path / "images.npz")
    assert np.array_equal(images["ours"], draw(pipeline, PROMPT, images_of_masks))
    assert np.array_equal(images["base"], draw(pipeline, PROMPT))
    assert np.array_equal(images["again"], images["ours"])
    assert np.array_equal(images["both_again"], images["both"])
    assert not np.allclose(images["both"], images["ours"], atol=1e-4)
    assert "`control_image` has 1 entries for 2 ControlNets" in str(images["refused"])
    assert np.array_equal(images["decoder"], draw(decoder, BRIEF, control))
    assert np.array_equal(images["decoder_again"], images["decoder"])
    again = load_pipeline(tmp_path / "both")
    again.set_progress_bar_config(disable=True)
    assert type(again) is FusionControlNetPipeline
    steered_by_both = draw(again, PROMPT, [images_of_masks, images_of_masks], controlnet_conditioning_scale=[0.5, 1.0])
    assert np.array_equal(steered_by_both, images["both"])


@both
def test_every_source_file_is_shipped(kind: str, tmp_path):
    pipeline: Any = tiny_controlled("gated") if kind == "latent" else tiny_controlled_decoder("gated")
    pipeline.save_pretrained(tmp_path)
    stems = {path.stem.rsplit("_", 1)[0] for path in tmp_path.rglob("*.py")}
    shared = {"checks", "control_images", "controlled", "fusion_controlnet", "generation", "sampling", "schedulers"}
    of_latent = {"captions", "distilled", "fusion_controlnet_pipeline", "latent_diffusion", "words"}
    of_decoder = {"poster_controlnet_pipeline", "poster_decoder", "poster_domain", "design_brief"}
    shared |= {"compatibility", "conditions", "guidance", "latents", "lora", "pixels", "standalone"}
    shared |= {"starting_image", "starting_point"}
    assert stems == shared | (of_latent if kind == "latent" else of_decoder | {"design_brief_encoder"})
    loaded = load_pipeline(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is (FusionControlNetPipeline if kind == "latent" else PosterControlNetPipeline)
    control = masks(side=SIDES[kind])
    assert same(draw(loaded, CONDITIONS[kind][0], control), draw(pipeline, CONDITIONS[kind][0], control))
