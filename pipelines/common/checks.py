"""Checks of arguments that several pipelines take; each error quotes the argument and its value.

This file is shipped inside published pipelines, so it imports no other file of Halftone.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

OUTPUT_TYPES = ("pil", "np", "pt")
LARGEST_INTEGER = 65_536  # far above any size or number of images that fits into memory
LARGEST_SEED = 2**63


def check_output_type(output_type: str, known: Sequence[str] = OUTPUT_TYPES) -> None:
    """Raise a ValueError for an unknown `output_type`."""
    if not isinstance(output_type, str) or output_type not in known:
        raise ValueError(f"`output_type` must be one of {', '.join(known)}, but is {output_type!r}")


def side_multiple(denoiser: Any) -> int:
    """Return the number of which the sides of the input of a U-Net, or of a transformer on patches, are multiples."""
    config = denoiser.config
    return int(config.get("patch_size") or 2 ** (len(config.block_out_channels) - 1))


def check_positive_integers(**values: Any) -> None:
    """Raise a ValueError for the first of `values` that is not a positive integer; NumPy integers are integers."""
    for name, value in values.items():
        if not is_integer(value) or value < 1:
            raise ValueError(f"`{name}` must be a positive integer, but is {value!r}")
        if value > LARGEST_INTEGER:
            raise ValueError(f"`{name}` must be at most {LARGEST_INTEGER}, but is {value!r}")


def check_numbers(**values: Any) -> None:
    """Raise a ValueError for the first of `values` that is not a finite number; NumPy numbers are numbers."""
    for name, value in values.items():
        if not is_number(value):
            raise ValueError(f"`{name}` must be a finite number, but is {value!r}")


def is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_generator(generator: Any) -> None:
    """Raise a ValueError if `generator` is not None, a seed, a generator or a list of generators."""
    if is_integer(generator):
        if not 0 <= generator < LARGEST_SEED:
            raise ValueError(f"as a seed, `generator` must be from 0 to {LARGEST_SEED - 1}, but is {generator}")
        return
    several = generator if isinstance(generator, (list, tuple)) else [generator]
    if generator is not None and not all(isinstance(one, torch.Generator) for one in several):
        raise ValueError(f"`generator` must be a seed, a torch.Generator or a list of generators, but is {generator!r}")


def check_embeds(width: int, **values: Any) -> None:
    """Raise a ValueError for the first of `values` that is not None and not a floating-point tensor B L `width`."""
    for name, value in values.items():
        if value is None:
            continue
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise ValueError(f"`{name}` must be a floating-point tensor, but is {_described(value)}")
        if value.ndim != 3 or value.shape[-1] != width or 0 in value.shape:
            raise ValueError(f"`{name}` must have shape (B, L, {width}), but has {tuple(value.shape)}")


def check_tensor(name: str, value: Any, shape: Sequence[int]) -> None:
    """Raise a ValueError if `value` is not a floating-point tensor of this shape."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise ValueError(f"`{name}` must be a floating-point tensor, but is {_described(value)}")
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"`{name}` must have shape {tuple(shape)}, but has {tuple(value.shape)}")


def check_steps(scheduler: Any, num_inference_steps: Any, timesteps: Any, sigmas: Any) -> dict[str, Any]:
    """Return the arguments of `scheduler.set_timesteps` for a number of steps, or for the given timesteps or sigmas.

    Raises:
        ValueError: an argument cannot be used, both lists are given, or the scheduler takes no such list.
    """
    check_positive_integers(num_inference_steps=num_inference_steps)
    given = {name: value for name, value in (("timesteps", timesteps), ("sigmas", sigmas)) if value is not None}
    trained = int(scheduler.config.num_train_timesteps)
    if not given:
        if num_inference_steps > trained:
            raise ValueError(f"`num_inference_steps` must be at most {trained}, but is {num_inference_steps}")
        if num_inference_steps == 1 and scheduler.config.get("shift_terminal"):
            # The first level would be stretched to that of the last step, and be no number.
            raise ValueError("`num_inference_steps` must be at least 2 for this model, but is 1")
        return {"num_inference_steps": int(num_inference_steps)}
    if len(given) > 1:
        raise ValueError("`timesteps` and `sigmas` both say which steps to take; pass one of them")
    name, values = next(iter(given.items()))
    values = values.tolist() if isinstance(values, (Tensor, np.ndarray)) else values
    valid = isinstance(values, (list, tuple)) and len(values) > 0 and all(is_number(value) for value in values)
    if not valid or min(values) < 0 or any(a <= b for a, b in zip(values, values[1:])):
        raise ValueError(f"`{name}` must be a list of numbers from high to low, none below 0, but is {values!r}")
    if name == "timesteps" and max(values) > trained:
        raise ValueError(f"`timesteps` must be at most {trained}, but has {max(values)}")
    if name not in inspect.signature(scheduler.set_timesteps).parameters:
        raise ValueError(f"{type(scheduler).__name__} takes no `{name}`; pass `num_inference_steps`")
    return {name: list(values)}


def _described(value: Any) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else repr(value)
