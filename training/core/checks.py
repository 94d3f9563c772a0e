"""Checks of config values: each raises a UserError that names the flag, the value and what to write instead."""

from __future__ import annotations

from pipelines.tools.cli import UserError, nearest

SMALLEST_MAP = 4


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise UserError unless `value` is one of `choices`."""
    if value not in choices:
        raise UserError(f"--{name} is {value!r}{nearest(str(value), choices)}; choose from {', '.join(choices)}")


def check_at_least(name: str, value: float, least: float) -> None:
    """Raise UserError when `value` is below `least`."""
    if value < least:
        raise UserError(f"--{name} is {value}; it must be at least {least}")


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
