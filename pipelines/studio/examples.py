"""Drawings that the tabs offer as examples: images, posters, masks and control images that suit the tab."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import gradio as gr
from PIL import Image, ImageChops, ImageDraw, ImageFilter

SIDE = 256
"""Width and height of an example in pixels"""
WHITE, BLACK = "#ffffff", "#000000"
Box = tuple[int, int, int, int]
TEXT_MASKS: dict[str, list[Box]] = {
    "title_at_the_top": [(32, 20, 224, 60)],
    "title_at_the_bottom": [(32, 196, 224, 236)],
    "title_and_text": [(32, 20, 224, 60), *((32, top, 150, top + 10) for top in (170, 190, 210))],
}
AREA_MASKS: dict[str, list[Box]] = {
    "middle": [(72, 80, 184, 176)],
    "left_half": [(0, 0, 128, SIDE)],
    "lower_third": [(0, 172, SIDE, SIDE)],
}


class Examples:
    """Files of example drawings in a folder, which is made.

    Attributes:
        images: coloured drawings.
        posters: drawings of posters.
        masks: areas in white on black.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.images = self._saved("images", {"circle": _circle, "house": _house, "poster": _poster})
        posters = {"poster": _poster, "concert_poster": _concert, "exhibition_poster": _exhibition}
        self.posters = self._saved("posters", posters)
        self.masks = self._saved("masks", _masks(AREA_MASKS))

    def of_control(self, kind: str, name: str, colors: Sequence[str]) -> list[str]:
        """Return examples for an image that a ControlNet takes.

        Args:
            kind: its `control_kind`.
            name: what the image shows, out of its `control_names`.
            colors: those of the classes by class id, of a ControlNet for classes.
        """
        if kind == "masks":
            return self._saved("text_masks", _masks(TEXT_MASKS)) if "text" in name else self.masks
        if kind == "classes":
            maps = {"bands": lambda: _bands(colors), "frame": lambda: _frame(colors)}
            return self._saved(f"classes_{len(colors)}", maps)
        edges = self._saved("edges", {"edges_of_a_house": lambda: _edges(_house())})
        return [*self.images, *edges]

    def _saved(self, group: str, drawings: Mapping[str, Callable[[], Image.Image]]) -> list[str]:
        folder, files = self.folder / group, []
        folder.mkdir(parents=True, exist_ok=True)
        for name, draw in drawings.items():
            path = folder / f"{name}.png"
            if not path.is_file():
                draw().save(path)
            files.append(str(path))
        return files


def image_examples(files: Sequence[str], component: gr.Image, label: str) -> None:
    """Add buttons that put an example image into a component."""
    names = [Path(file).stem.replace("_", " ").capitalize() for file in files]
    gr.Examples([[file] for file in files], [component], label=label, example_labels=names)


def _masks(areas: dict[str, list[Box]]) -> dict[str, Callable[[], Image.Image]]:
    def drawing(boxes: list[Box]) -> Callable[[], Image.Image]:
        return lambda: _with_boxes(BLACK, [(box, WHITE) for box in boxes])

    return {name: drawing(boxes) for name, boxes in areas.items()}


def _with_boxes(background: str, boxes: Sequence[tuple[Box, str]]) -> Image.Image:
    """Return a plain square with rectangles (left, top, right, bottom, the last two excluded)."""
    image = Image.new("RGB", (SIDE, SIDE), background)
    for box, color in boxes:
        image.paste(color, box)
    return image


def _bands(colors: Sequence[str]) -> Image.Image:
    """Return a class map with a horizontal band for each class."""
    edges = [round(SIDE * number / len(colors)) for number in range(len(colors) + 1)]
    return _with_boxes(colors[0], [((0, top, SIDE, end), color) for top, end, color in zip(edges, edges[1:], colors)])


def _frame(colors: Sequence[str]) -> Image.Image:
    """Return a class map with classes one inside of the other."""
    step = SIDE // (2 * len(colors) + 1)
    boxes = [
        ((step * number, step * number, SIDE - step * number, SIDE - step * number), color)
        for number, color in enumerate(colors)
    ]
    return _with_boxes(colors[0], boxes)


def _edges(image: Image.Image) -> Image.Image:
    """Return white lines where the colour changes, on black."""
    moved = (ImageChops.offset(image, *by) for by in ((1, 0), (0, 1)))
    changes = [ImageChops.difference(image, one).convert("L").point(lambda value: 255 * (value > 0)) for one in moved]
    lines = ImageChops.lighter(*changes)
    inner = (2, 2, SIDE - 2, SIDE - 2)  # the offset goes round from one side to the other
    result = Image.new("L", image.size)
    result.paste(lines.crop(inner), inner)
    return result.filter(ImageFilter.MaxFilter(3)).convert("RGB")


def _circle() -> Image.Image:
    image = Image.new("RGB", (SIDE, SIDE), "white")
    ImageDraw.Draw(image).ellipse((56, 56, 200, 200), fill="#d0202a")
    return image


def _house() -> Image.Image:
    image = Image.new("RGB", (SIDE, SIDE), "#bfe3ff")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 190, 256, 256), fill="#58a05a")
    draw.rectangle((72, 120, 184, 210), fill="#f4d9a0")
    draw.polygon(((56, 124), (128, 60), (200, 124)), fill="#b0452f")
    draw.rectangle((116, 160, 142, 210), fill="#6b4226")
    return image


def _poster() -> Image.Image:
    image = Image.new("RGB", (SIDE, SIDE), "#f6ecd6")
    draw = ImageDraw.Draw(image)
    draw.rectangle((24, 24, 232, 150), fill="#1e56be")
    draw.ellipse((80, 44, 170, 134), fill="#facc2a")
    for top, right in ((170, 220), (196, 180), (216, 200)):
        draw.rectangle((24, top, right, top + 12), fill="#1c1a1e")
    return image


def _concert() -> Image.Image:
    image = Image.new("RGB", (SIDE, SIDE), "#1c1a1e")
    draw = ImageDraw.Draw(image)
    for radius, color in ((100, "#d0202a"), (72, "#f08a24"), (44, "#facc2a")):
        draw.ellipse((128 - radius, 120 - radius, 128 + radius, 120 + radius), fill=color)
    _letters(draw, (40, 214), "#f6ecd6", 7)
    return image


def _exhibition() -> Image.Image:
    image = Image.new("RGB", (SIDE, SIDE), "#ffffff")
    draw = ImageDraw.Draw(image)
    _letters(draw, (24, 24), "#d0202a", 6)
    draw.rectangle((96, 72, 232, 200), fill="#bfe3ff")
    draw.polygon(((96, 200), (150, 110), (190, 170), (210, 140), (232, 200)), fill="#2f6b4f")
    for top, right in ((72, 84), (86, 76), (100, 80), (114, 60)):
        draw.rectangle((24, top, right, top + 6), fill="#1c1a1e")
    draw.rectangle((24, 218, 232, 222), fill="#1c1a1e")
    return image


def _letters(draw: ImageDraw.ImageDraw, at: tuple[int, int], color: str, count: int) -> None:
    """Draw blocks with the proportions of letters, which no font is needed for."""
    left, top = at
    for number in range(count):
        draw.rectangle((left + 26 * number, top, left + 26 * number + 17, top + 28), fill=color)
