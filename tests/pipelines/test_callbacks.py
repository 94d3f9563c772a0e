"""Callbacks of the pipelines, and those of Diffusers: what they see, and what they may change."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.callbacks import (
    IPAdapterScaleCutoffCallback,
    MultiPipelineCallbacks,
    PipelineCallback,
    SDCFGCutoffCallback,
    SDXLCFGCutoffCallback,
)

from tests.support.drawing import GENERATING, GUIDED, OTHER, PROMPT, draw, each_guided, every, made, same, seeded


def trajectory(pipeline: Any, callback: Any = None, **options: Any) -> list[torch.Tensor]:
    """Return the latents (or images) after each step; `callback` is called as well, with all tensors."""
    seen, name = [], pipeline._callback_tensor_inputs[0]

    def record(pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
        seen.append(tensors[name].clone())
        return callback(pipe, step, timestep, tensors) if callback else tensors

    draw(pipeline, callback_on_step_end=record, callback_on_step_end_tensor_inputs=[name, "prompt_embeds"], **options)
    return seen


@every
def test_a_callback_sees_the_state_of_the_call(kind: str):
    pipeline, seen = made(kind), []

    def look(pipe: Any, step: int, timestep: Any, tensors: dict) -> None:
        seen.append((step, pipe.num_timesteps, pipe.guidance_scale, pipe.do_classifier_free_guidance, pipe.interrupt))
        pipe._interrupt = step == 2

    draw(pipeline, **GENERATING[kind], guidance_scale=3, callback_on_step_end=look)
    guided = kind in GUIDED
    assert seen == [(step, 4, 3.0, guided, False) for step in range(3)]
    assert pipeline.interrupt
    draw(pipeline, **GENERATING[kind], guidance_scale=1)
    assert not pipeline.interrupt
    assert not pipeline.do_classifier_free_guidance


@pytest.mark.parametrize("kind", ["captioned", "captioned_and_labelled", "controlnet", "poster_decoder"])
@pytest.mark.parametrize("images", [1, 2])
def test_the_cutoff_callback_ends_guidance(kind: str, images: int):
    """After the cutoff the trajectory is that of a callback of our own which leaves the tensors alone."""
    pipeline = made(kind)
    options = {**GENERATING[kind], "guidance_scale": 4.0, "num_images_per_prompt": images}
    cutoff = draw(pipeline, **options, callback_on_step_end=SDCFGCutoffCallback(None, 1))
    assert pipeline.guidance_scale == 0.0

    def cut(pipe: Any, step: int, timestep: Any, tensors: dict) -> None:
        if step == 1:
            pipe._guidance_scale = 0.0

    assert np.array_equal(cutoff, draw(pipeline, **options, callback_on_step_end=cut))
    guided = draw(pipeline, **options)
    assert not np.allclose(cutoff, guided, atol=1e-4)
    assert not np.allclose(cutoff, draw(pipeline, **options | {"guidance_scale": 1.0}), atol=1e-4)
    several = MultiPipelineCallbacks([SDCFGCutoffCallback(None, 1), SDCFGCutoffCallback(None, 2)])
    assert np.array_equal(draw(pipeline, **options, callback_on_step_end=several), cutoff)
    half = draw(pipeline, **options, callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.25))
    assert np.array_equal(half, cutoff)


def test_the_cutoff_keeps_the_prompt_of_each_image():
    """The callback returns only the last row; the images before it must keep their own prompts."""
    pipeline = made("captioned")
    options = {"guidance_scale": 4.0, "callback_on_step_end": SDCFGCutoffCallback(None, 1)}
    both = draw(pipeline, prompt=[PROMPT, OTHER], generator=[seeded(1), seeded(2)], **options)
    assert same(draw(pipeline, prompt=PROMPT, generator=seeded(1), **options), both[:1])
    assert same(draw(pipeline, prompt=OTHER, generator=seeded(2), **options), both[1:])


@each_guided
def test_a_callback_that_changes_nothing_changes_nothing(kind: str):
    pipeline = made(kind)
    plain = draw(pipeline, **GENERATING[kind])
    last = trajectory(pipeline, **GENERATING[kind])
    assert len(last) == 4
    never = SDCFGCutoffCallback(cutoff_step_index=100, cutoff_step_ratio=None)
    if kind != "labelled":  # without text there is no `prompt_embeds` to cut
        assert np.array_equal(draw(pipeline, **GENERATING[kind], callback_on_step_end=never), plain)


@each_guided
def test_a_callback_may_change_the_scale_at_every_step(kind: str):
    pipeline = made(kind)

    def scaled(scales: list[float]) -> Any:
        def change(pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
            pipe._guidance_scale = scales[step]
            return tensors

        return change

    options = {**GENERATING[kind], "guidance_scale": 3.0}
    constant = draw(pipeline, **options, callback_on_step_end=scaled([3.0] * 4))
    assert np.array_equal(constant, draw(pipeline, **options))
    off_and_on = draw(pipeline, **options, callback_on_step_end=scaled([1.0, 3.0, 3.0, 3.0]))
    assert not np.allclose(off_and_on, constant, atol=1e-5)


def test_a_callback_may_replace_the_prompt():
    pipeline = made("captioned_and_labelled")
    other = pipeline.encode_prompt(["", OTHER])

    def replace(pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
        return {"prompt_embeds": other} if step == 0 else {}

    options = {"class_labels": 1, "guidance_scale": 3.0}
    replaced = draw(pipeline, prompt=PROMPT, **options, callback_on_step_end=replace)
    assert not np.allclose(replaced, draw(pipeline, prompt=PROMPT, **options), atol=1e-5)


class Returning(PipelineCallback):
    """A callback that returns fixed values for `tensor_inputs`."""

    tensor_inputs = ["latents", "prompt_embeds"]

    def __init__(self, values: Any, **attributes: Any):
        super().__init__()
        self.values, self.attributes = values, attributes

    def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
        for name, value in self.attributes.items():
            setattr(pipeline, name, value)
        return self.values


@pytest.mark.parametrize(
    ("callback", "options", "message"),
    [
        (SDXLCFGCutoffCallback(), {}, r"must be among \['latents', 'prompt_embeds'\], but has \['add_text_embeds'"),
        (IPAdapterScaleCutoffCallback(), {}, "is a IPAdapterScaleCutoffCallback, but this model has none"),
        ("print", {}, "`callback_on_step_end` must be a function, but is 'print'"),
        (Returning(3), {}, "`callback_on_step_end` must return a dictionary, but returned 3"),
        (Returning({"latents": 3}), {}, "`latents` must be a floating-point tensor, but is 3"),
        (Returning({"latents": torch.zeros(1, 4, 2, 2)}), {}, r"`latents` must have shape \(1, 4, 4, 4\)"),
        (Returning({"prompt_embeds": torch.zeros(3, 8, 16)}), {}, "returned `prompt_embeds` with 3 rows, but .* 1 im"),
        (Returning({"prompt_embeds": None}), {}, "returned `prompt_embeds` with 0 rows"),
        (Returning({"prompt_embeds": torch.zeros(1, 8, 3)}), {}, r"`prompt_embeds` must have shape \(1, 8, 16\)"),
        (
            Returning({}, _guidance_scale=3.0),
            {"guidance_scale": 1},
            "set the guidance scale to 3.0, but sampling began",
        ),
    ],
)
def test_callbacks_that_cannot_be_used_are_refused(callback, options, message):
    with pytest.raises(ValueError, match=message):
        draw(made("captioned"), prompt=PROMPT, callback_on_step_end=callback, **options)


def test_guidance_that_was_cut_with_its_embeddings_cannot_be_switched_on_again():
    def cut_and_resume(pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
        pipe._guidance_scale = 0.0 if step == 0 else 3.0
        return {"prompt_embeds": tensors["prompt_embeds"][-1:]}

    options = {"callback_on_step_end": cut_and_resume, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with pytest.raises(ValueError, match="guidance needs `prompt_embeds` with 2 rows, .* but there are 1"):
        draw(made("captioned"), prompt=PROMPT, **options)


def test_the_cutoff_callback_needs_a_model_with_text():
    with pytest.raises(ValueError, match="is a SDCFGCutoffCallback, which changes prompts, but this model takes no te"):
        draw(made("labelled"), class_labels=1, callback_on_step_end=SDCFGCutoffCallback(None, 1))
