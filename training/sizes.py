"""Sizes that cannot work, found before a model is built."""

from __future__ import annotations

from pipelines.tools.cli import UserError
from training.sampler import BatchLayout

SMALLEST_MAP = 4


def check_deepest_feature_map(size: int, divisor: int, levels: int, flag: str, what: str = "--resolution") -> None:
    """Raise UserError unless `size / divisor` halves evenly `levels - 1` times and stays at 4×4 or more.

    Args:
        size: side of the input in `what`'s units (pixels, or latent cells).
        divisor: reduction before the first level (patches).
        levels: resolutions of the network.
        flag: the one that sets their number.
    """
    factor = divisor * 2 ** (levels - 1)
    deepest = size // factor
    if size % factor:
        raise UserError(
            f"{what} {size} is not a multiple of {factor}, which {levels} levels ({flag}) need; "
            f"take {max(1, round(size / factor)) * factor}"
        )
    if deepest < SMALLEST_MAP:
        fitting = levels
        while fitting > 1 and size // (divisor * 2 ** (fitting - 1)) < SMALLEST_MAP:
            fitting -= 1
        raise UserError(
            f"the deepest feature map would be {deepest}×{deepest} ({what} {size}, {levels} levels in {flag}); "
            f"it must be at least {SMALLEST_MAP}×{SMALLEST_MAP}: use {fitting} levels, or a larger {what}"
        )


def steps_per_epoch(num_samples: int, layout: BatchLayout) -> int:
    """Whole global batches in the data. Raises UserError when there is not one."""
    steps = num_samples // layout.global_batch_size
    if steps == 0:
        raise UserError(
            f"a batch of {layout.global_batch_size} images (--train_batch_size {layout.train_batch_size} × "
            f"{layout.num_processes} processes × --gradient_accumulation_steps {layout.gradient_accumulation_steps}) "
            f"is larger than the data set of {num_samples}; lower --train_batch_size"
        )
    return steps
