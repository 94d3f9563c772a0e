"""Checks of config values. Each raises a UserError that names the flag, the value and the allowed values."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.tools.cli import UserError, nearest

SMALLEST_MAP = 4


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise UserError unless `value` is one of `choices`."""
    if value not in choices:
        raise UserError(f"--{name} is {value!r}{nearest(str(value), choices)}; choose from {', '.join(choices)}")


def check_bounds(
    name: str,
    value: float,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    usual: str = "",
) -> None:
    """Raise UserError unless `value` is within the given bounds; NaN is always out of bounds."""
    bounded = [
        at_least is None or value >= at_least,
        above is None or value > above,
        at_most is None or value <= at_most,
        below is None or value < below,
    ]
    if all(bounded):
        return
    low, high = at_least if above is None else above, at_most if below is None else below
    if high is None:
        rule = f"be at least {at_least}" if above is None else f"be above {above}"
    elif low is None:
        rule = f"be at most {at_most}" if below is None else f"be below {below}"
    else:
        rule = f"lie in {'[' if above is None else '('}{low}, {high}{']' if below is None else ')'}"
    hint = f" ({usual} is a usual value)" if usual else ""
    raise UserError(f"--{name} is {value}; it must {rule}{hint}")


def check_multiple(name: str, value: int, divisor_name: str, divisor: int) -> None:
    """Raise UserError unless `value` is a multiple of `divisor`."""
    if value % divisor:
        raise UserError(f"--{name} {value} must be a multiple of --{divisor_name} {divisor}")


def check_multiples(name: str, values: Sequence[int], divisor_name: str, divisor: int) -> None:
    """Raise UserError unless `values` is not empty and all of them are positive multiples of `divisor`."""
    if not values or any(value < 1 or value % divisor for value in values):
        raise UserError(f"--{name} {list(values)} must be multiples of --{divisor_name} {divisor}")


def check_deepest_feature_map(size: int, divisor: int, levels: int, flag: str, what: str = "--resolution") -> None:
    """Raise UserError unless `size / divisor` can be halved `levels - 1` times without a remainder, to at least 4.

    Args:
        size: side length of the input, in pixels or latent cells.
        divisor: downsampling factor before the first level (the patch size).
        levels: number of resolutions of the network.
        flag: the flag that sets the number of levels.
        what: the flag, or a description, of `size`.
    """
    factor = divisor * 2 ** (levels - 1)
    deepest = size // factor
    if size % factor:
        raise UserError(
            f"{what} {size} is not a multiple of {factor}, which {levels} levels ({flag}) need; "
            f"use {max(1, round(size / factor)) * factor}"
        )
    if deepest < SMALLEST_MAP:
        fitting = levels
        while fitting > 1 and size // (divisor * 2 ** (fitting - 1)) < SMALLEST_MAP:
            fitting -= 1
        fewer = f"{fitting} level{'s' if fitting > 1 else ''}"
        raise UserError(
            f"the deepest feature map would be {deepest}×{deepest} ({what} {size}, {levels} levels in {flag}); "
            f"it must be at least {SMALLEST_MAP}×{SMALLEST_MAP}: use {fewer}, or a larger {what}"
        )
