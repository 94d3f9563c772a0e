"""Every argument of every pipeline is refused with a ValueError that names it, whatever its type and value."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.tiny_published import PUBLISHED

IMAGE = Image.new("RGB", (32, 32))
WRONG: dict[str, Any] = {
    "none": None, "text": "many", "negative": -1, "zero": 0, "fraction": 1.5, "nan": float("nan"),
    "infinite": float("inf"), "huge": 10**30, "bool": True, "list": [None], "mixed": ["a", 1, None], "empty": [],
    "nested": [["a"]], "dict": {"a": 1}, "bytes": b"a", "array": np.zeros((2, 3)), "names": np.array(["a", "b"]),
    "scalar": torch.tensor(1.5), "tensor": torch.full((1, 2), -1), "object": object(), "set": {1},
    "number": np.float64(-2), "class": int, "function": len, "complex": 1j, "image": IMAGE,
    "generator": torch.Generator(),
}  # fmt: skip
CALLS: dict[str, tuple[str, str, dict[str, Any]]] = {  # pipeline, method, valid arguments
    "captioned": ("captioned", "__call__", {"prompt": "a"}),
    "captioned_and_labelled": ("captioned_and_labelled", "__call__", {"prompt": "a", "class_labels": 1}),
    "labelled": ("labelled", "__call__", {"class_labels": 1}),
    "unconditional": ("unconditional", "__call__", {}),
    "controlnet": ("controlnet", "__call__", {"prompt": "a", "control_image": torch.ones(2, 8, 8)}),
    "two_controlnets": (
        "two_controlnets",
        "__call__",
        {"prompt": "a", "control_image": [torch.ones(2, 8, 8), torch.ones(3, 8, 8)]},
    ),
    "poster_decoder": ("poster_decoder", "__call__", {"briefs": {"style": "pop"}}),
    "poster_controlnet": ("poster_controlnet", "__call__", {"control_image": torch.ones(2, 16, 16)}),
    "autoencoder": ("autoencoder", "__call__", {"images": IMAGE}),
    "decode": ("autoencoder", "decode", {"latents": torch.zeros(1, 4, 4, 4)}),
    "segment": ("autoencoder_heads", "segment", {"images": IMAGE}),
    "classify": ("autoencoder_heads", "classify", {"images": IMAGE}),
    "caption": ("image_caption", "caption", {"images": IMAGE, "max_length": 3}),
    "draw": ("image_caption", "draw", {"prompts": "a red circle"}),
    "sample": ("image_caption", "sample", {"max_length": 3, "num_inference_steps": 1}),
    "similarity": ("image_caption", "similarity", {"images": IMAGE, "texts": "a"}),
    "read": ("layout_analysis", "__call__", {"images": IMAGE}),
    "abstract": ("layout_analysis", "abstract", {"features": [np.zeros((4, 8, 8), np.float32)]}),
}
# A pipeline with a ControlNet passes these on.
PASSED_ON = (
    "controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end", "height", "width",
    "num_inference_steps", "num_images_per_prompt", "guidance_scale", "generator", "output_type", "timesteps", "sigmas",
    "callback_on_step_end", "callback_on_step_end_tensor_inputs", "guidance_interval",
    "image", "mask_image", "strength", "jump_n_sample", "paste_back",
)  # fmt: skip
NOT_CHECKED = ("return_dict", "overlays")  # only their truth counts


def arguments_of(pipeline: Any, method: str) -> list[str]:
    parameters = inspect.signature(getattr(pipeline, method)).parameters
    names = [name for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD]
    names += PASSED_ON if hasattr(pipeline, "controlnet") else ()
    names += (
        ("guidance_model", "autoguidance_scale") if hasattr(pipeline, "controlnet") and hasattr(pipeline, "vae") else ()
    )
    return [name for name in names if name not in NOT_CHECKED]


@pytest.mark.parametrize("call", CALLS)
def test_wrong_arguments_are_refused_with_a_value_error(call: str):
    kind, method, valid = CALLS[call]
    pipeline = PUBLISHED[kind]()
    pipeline.set_progress_bar_config(disable=True)
    names = arguments_of(pipeline, method)
    valid = ({"num_inference_steps": 1} if "num_inference_steps" in names else {}) | valid
    refused, other_errors = dict.fromkeys(names, 0), []
    for name in names:
        for what, value in WRONG.items():
            if name == "callback_on_step_end" and callable(value):
                continue  # an error in the function of a user is not ours
            try:
                getattr(pipeline, method)(**valid | {name: value})
            except ValueError as error:
                refused[name] += bool(str(error))
            except Exception as error:
                other_errors.append(f"{name}={what}: {type(error).__name__}: {str(error)[:100]}")
    assert other_errors == []
    assert min(refused.values()) > 10, refused
