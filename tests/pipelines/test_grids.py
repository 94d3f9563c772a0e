"""Grids: sizes, pixels and captions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from pipelines.tools.grids import (
    CELL,
    GAP,
    INK,
    MARGIN,
    PAPER,
    PLAIN_GAP,
    _drawable,
    _length,
    comparison_grid,
    control_to_pil,
    enlarged,
    image_grid,
    plain_grid,
)

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def square(color, size=64, mode="RGB") -> Image.Image:
    return Image.new(mode, (size, size), color)


def checkerboard(size: int) -> Image.Image:
    board = np.indices((size, size)).sum(0) % 2 * 255
    return Image.fromarray(board.astype(np.uint8)).convert("RGB")


def has_ink(image: Image.Image) -> bool:
    return bool((np.asarray(image.convert("L")) < 120).any())


def test_images_are_at_their_positions():
    grid = image_grid([square(RED), square(GREEN), square(BLUE)], columns=2)
    cell = 64 * round(CELL / 64)
    assert grid.size == (2 * MARGIN + 2 * cell + GAP, 2 * MARGIN + 2 * cell + GAP)
    assert grid.getpixel((MARGIN + 5, MARGIN + 5)) == RED
    assert grid.getpixel((MARGIN + cell + GAP + 5, MARGIN + 5)) == GREEN
    assert grid.getpixel((MARGIN + 5, MARGIN + cell + GAP + 5)) == BLUE
    assert grid.getpixel((MARGIN + cell + GAP + 5, MARGIN + cell + GAP + 5)) == PAPER


def test_small_images_are_enlarged_pixel_by_pixel():
    grid = np.asarray(image_grid([checkerboard(8)]).convert("L"))
    factor = CELL // 8
    inside = grid[MARGIN : MARGIN + 8 * factor, MARGIN : MARGIN + 8 * factor]
    expected = np.kron(np.asarray(checkerboard(8).convert("L")), np.ones((factor, factor)))
    assert np.array_equal(inside, expected)


def test_large_images_are_unchanged():
    assert image_grid([square(RED, 500)]).size == (500 + 2 * MARGIN, 500 + 2 * MARGIN)


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (2, 2), (4, 2), (6, 3), (8, 4), (9, 3), (12, 4), (16, 4)])
def test_grids_are_about_square_and_have_no_empty_cells(count, columns):
    width = image_grid([square(RED)] * count).width
    assert width == image_grid([square(RED)] * count, columns=columns).width


def test_captions_are_wrapped_and_truncated():
    long = "a minimalist poster, blue on cream, one picture, title at the top " * 10
    grid = image_grid([square(RED), square(GREEN)], [long, "Ünïcödé — ελληνικά кириллица"], columns=2)
    cell = 64 * round(CELL / 64)
    below = grid.crop((0, MARGIN + cell + 2, grid.width, grid.height))
    assert has_ink(below.crop((MARGIN, 0, MARGIN + cell, below.height)))
    assert has_ink(below.crop((MARGIN + cell + GAP, 0, grid.width, below.height)))
    assert not has_ink(below.crop((MARGIN + cell + 2, 0, MARGIN + cell + GAP - 2, below.height)))  # none overflows
    assert below.height < 130


def test_a_word_wider_than_its_image_is_split():
    grid = image_grid([square(RED)], ["x" * 300])
    right = grid.crop((grid.width - MARGIN + 1, 0, grid.width, grid.height))
    assert not has_ink(right)


def test_row_and_column_titles():
    grid = comparison_grid(
        [[square(RED), square(GREEN)]] * 3, ["original", "reconstruction"], row_titles=["a", "b", "c"]
    )
    plain = image_grid([square(RED), square(GREEN)] * 3, columns=2)
    assert grid.width > plain.width
    assert grid.height > plain.height
    assert has_ink(grid.crop((0, 0, grid.width, MARGIN + 12)))


def test_a_row_of_another_length_is_an_error():
    with pytest.raises(ValueError, match="row 1 has 1 images for 2 column titles"):
        comparison_grid([[square(RED)] * 2, [square(RED)]], ["a", "b"])


def test_more_captions_than_images_is_an_error():
    with pytest.raises(ValueError, match="3 captions for 1 images"):
        image_grid([square(RED)], ["a", "b", "c"])


def test_any_mode_and_mixed_sizes():
    images = [
        square(128, mode="L"),
        square((255, 0, 0, 0), 32, mode="RGBA"),
        square(1, mode="1"),
        square(RED, 100).convert("P"),
        Image.new("RGB", (120, 40), BLUE),
    ]
    grid = image_grid(images, ["grey", "transparent", "", "palette", "wide"])
    assert grid.mode == "RGB"
    assert not (np.asarray(image_grid([images[1]]).crop((MARGIN, MARGIN, 150, 150))) == RED).all(-1).any()


def test_a_grid_without_images():
    assert image_grid([]).size[0] > 0


def test_the_text_is_ink_on_paper():
    assert sum(INK) < sum(PAPER) / 4


def test_the_grid_is_white_between_images():
    sheet = plain_grid([[Image.new("RGB", (3, 2), "red")] * 2])
    assert sheet.size == (2 * (3 + PLAIN_GAP) + PLAIN_GAP, 2 + 2 * PLAIN_GAP)
    assert sheet.getpixel((0, 0)) == (255, 255, 255)
    assert sheet.getpixel((PLAIN_GAP, PLAIN_GAP)) == (255, 0, 0)


def test_titles_are_above_their_rows_and_truncated_to_the_width():
    rows = [[square(RED, 128), square(GREEN, 128)], [square(BLUE, 128)], [square(RED, 128)]]
    plain = plain_grid(rows)
    titles = ["a word " * 60, "", "\u4e2d\u6587 \u0645\u0631\u062d\u0628\u0627 " + "x" * 300]
    titled = plain_grid(rows, titles)
    assert titled.width == plain.width
    pixels = np.asarray(titled)
    is_image = [(pixels[:, PLAIN_GAP + 64] == color).all(1) for color in (RED, BLUE)]
    assert is_image[0].sum() == 2 * 128
    assert is_image[1].sum() == 128
    bands = titled.height - plain.height
    assert 60 < bands < 120, "two lines for each of the long titles, none for the empty one"
    right = titled.crop((titled.width - PLAIN_GAP, 0, titled.width, titled.height))
    assert not has_ink(right)
    assert plain_grid(rows, ["", "", ""]).tobytes() == plain.tobytes()


def test_a_font_without_a_script_draws_question_marks():
    font = ImageFont.load_default_imagefont()
    assert _drawable("caf\u00e9 \u4e2d\u2026", font) == "caf\u00e9 ??"
    assert _length("caf\u00e9 \u4e2d\u2026", font) > 0


@pytest.mark.parametrize(("size", "shown"), [((64, 64), 128), ((100, 140), 200), ((128, 60), 384), ((130, 200), 130)])
def test_small_images_are_enlarged_by_a_whole_factor(size, shown):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    large = enlarged(image)
    factor = shown // size[0]
    assert large.size == (size[0] * factor, size[1] * factor)
    assert np.array_equal(np.asarray(large)[::factor, ::factor], np.asarray(image))


def test_each_channel_of_a_control_has_its_own_colour():
    control = torch.eye(4).reshape(4, 2, 2)
    colors = np.asarray(control_to_pil(control)).reshape(4, 3)
    assert len({tuple(color) for color in colors}) == 4
    assert tuple(colors[0]) == (255, 255, 255)
    control = torch.rand(3, 2, 2)
    assert np.array_equal(np.asarray(control_to_pil(control)), (control.permute(1, 2, 0) * 255).round().byte().numpy())
