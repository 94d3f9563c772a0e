"""The size of a network's samples: its sides, and how Diffusers writes it into configs."""

from __future__ import annotations


def both_sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of a size, which may be the side of a square."""
    return (size, size) if isinstance(size, int) else size


def sample_size(size: int | tuple[int, int]) -> int | tuple[int, int]:
    """Return the `sample_size` of a network for samples of this size: one number for a square, or (height, width).

    Pipelines of Diffusers, and those here, generate images of this size by default.
    """
    height, width = both_sides(size)
    return height if height == width else (height, width)
