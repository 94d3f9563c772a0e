"""Previews: the grid of images, and writing its file."""

from __future__ import annotations

import os

import pytest
from PIL import Image

from training.core.previews import Previews, save_png

RED, BLUE = (255, 0, 0), (0, 0, 255)


def square(color, size=64, mode="RGB") -> Image.Image:
    return Image.new(mode, (size, size), color)


def test_the_grid_has_the_given_columns():
    assert Previews([square(RED)] * 4, ["a"] * 4, columns=4).grid().width > Previews([square(RED)] * 4, []).grid().width


def test_a_png_is_written_completely_and_leaves_nothing_else(tmp_path):
    path = save_png(square(RED), tmp_path / "samples" / "epoch_0001.png")
    save_png(square(BLUE), path)
    assert Image.open(path).getpixel((0, 0)) == BLUE
    assert os.listdir(path.parent) == ["epoch_0001.png"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_failed_write_leaves_the_old_image(tmp_path):
    path = save_png(square(RED), tmp_path / "a.png")

    class Unwritable:
        def save(self, file, format):
            file.write(b"half an image")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_png(Unwritable(), path)  # type: ignore[arg-type]
    assert Image.open(path).getpixel((0, 0)) == RED
    assert os.listdir(tmp_path) == ["a.png"]
