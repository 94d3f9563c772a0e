"""One call for each kind of pipeline that denoises, with tiny models, and the comparison of their images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.support.tiny_published import PUBLISHED

PROMPT, OTHER = "a red poster", "a blue poster of circles"
BRIEF = {"style": "swiss", "energy": 0.8}
GENERATING = {  # a condition for each kind of pipeline that denoises
    "captioned": {"prompt": PROMPT},
    "labelled": {"class_labels": 1},
    "captioned_and_labelled": {"prompt": PROMPT, "class_labels": "kind 1"},
    "unconditional": {},
    "controlnet": {"prompt": PROMPT, "control_image": torch.ones(2, 8, 8)},
    "poster_decoder": {"briefs": BRIEF},
    "poster_transformer": {"briefs": BRIEF},
    "poster_controlnet": {"briefs": BRIEF, "control_image": torch.ones(2, 16, 16)},
}
GUIDED = [name for name in GENERATING if name != "unconditional"]
every = pytest.mark.parametrize("kind", GENERATING)
each_guided = pytest.mark.parametrize("kind", GUIDED)


def made(kind: str) -> Any:
    pipeline = PUBLISHED[kind]()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(pipeline: Any, **options: Any) -> np.ndarray:
    defaults = {"num_inference_steps": 4, "generator": seeded(), "output_type": "np"}
    return pipeline(**defaults | options).images


def same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether images are equal up to rounding, which depends on the batch size."""
    return one.shape == other.shape and np.allclose(one, other, atol=2e-5)
