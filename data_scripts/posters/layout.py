"""Lay out a brief: place its elements by the rules of its style on a grid of 8 × 8 modules.

A module is 2 × 2 grid units (u). At 64 px it corresponds to one cell of the latents of the quickstart's autoencoder.
The page has three bands: one of 2 modules for the title, at the brief's title position, and two strips of 3 modules for
the motif and the pictures. The title's band contains only the title.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from data_scripts.posters.brief import PosterBrief, pick
from data_scripts.posters.elements import UNITS, Box, Element, Scene, TextLines, Title, circle, rectangle
from data_scripts.posters.painting.motifs import SIDE_MARGIN, draw_motif
from data_scripts.posters.painting.pictures import SUBJECTS

TITLE_BAND = {"top": (0.0, 4.0), "middle": (6.0, 10.0), "bottom": (12.0, 16.0)}
STRIPS = {"top": ((4, 10), (10, 16)), "middle": ((0, 6), (10, 16)), "bottom": ((0, 6), (6, 12))}
"""The strips that the title's band leaves free (u from the top)."""

BODY_WIDTH = 4.0
OVERLAP = 2.0

TILTS = (-12.0, -9.0, -6.0, 6.0, 9.0, 12.0)
"""Angles by which `rich` posters rotate text, in degrees."""
TURNED_TEXT = {"title": 0.3, "text": 0.2, "both": 0.3, "none": 0.2}
"""Probability that the title, the small text, both or neither is rotated."""
TURNED_HEIGHT = 4.75
"""Maximum height of a rotated title (u); a higher one is scaled down."""
EDGE = 0.25
"""Minimum distance of rotated text from the edges of the page (u)."""


@dataclass(frozen=True)
class StyleGrammar:
    """The layout rules of a style for title and pictures. Each letter of a title has a cell `pitch` wide (u)."""

    font: str
    pitch: float
    cap_height: float
    align: str
    inverted: bool = False
    centered_pictures: bool = False


GRAMMARS = {
    "swiss": StyleGrammar("DejaVuSans-Bold", 3.0, 2.75, "left"),
    "minimalist": StyleGrammar("DejaVuSans-Bold", 2.0, 2.0, "left"),
    "constructivist": StyleGrammar("DejaVuSans-BoldOblique", 4.0, 3.0, "left", inverted=True),
    "art_deco": StyleGrammar("DejaVuSerif-Bold", 3.0, 2.5, "center", centered_pictures=True),
    "pop": StyleGrammar("DejaVuSans-BoldOblique", 4.0, 3.0, "center"),
    "psychedelic": StyleGrammar("DejaVuSerif-BoldItalic", 3.0, 2.75, "center", centered_pictures=True),
    "brutalist": StyleGrammar("DejaVuSansMono-Bold", 4.0, 3.0, "left", inverted=True),
    "editorial": StyleGrammar("DejaVuSerif-Bold", 4.0, 2.75, "left"),
}


@dataclass(frozen=True)
class Areas:
    """The areas of the motif, of the row of pictures and of the small text (None if there are none)."""

    motif: tuple[Box, ...]
    pictures: Box | None
    body: Box | None


def lay_out(brief: PosterBrief, rng: np.random.Generator, complexity: str = "plain") -> list[Element]:
    """Return the elements of the poster in drawing order, without the background.

    For every `complexity` except "plain", pictures may overlap the motif, and a large transparent shape is printed over
    it.
    """
    mirrored = rng.random() < 0.5
    areas = _divide(brief, mirrored, pictures_first=rng.random() < 0.5)
    overprint = _overprint(brief, rng)
    elements: list[Element] = []
    motif_seed = int(rng.integers(2**31))
    for area in areas.motif:  # equal seeds, so that a motif that the title cuts in two is one motif
        elements += draw_motif(brief.motif, area, np.random.default_rng(motif_seed))
    if complexity != "plain":
        elements += overprint
        areas = _overlapping(areas)
    if areas.pictures is not None:
        elements += _pictures(brief, areas.pictures, rng)
    if areas.body is not None:
        elements += _body(brief, areas.body, rng)
    return [*elements, _title(brief)]


def _divide(brief: PosterBrief, mirrored: bool, pictures_first: bool) -> Areas:
    """Divide the page. `mirrored` puts small text on the left, `pictures_first` puts the pictures above the motif."""
    if brief.pictures == 0:
        return _divide_without_pictures(brief)
    first, second = STRIPS[brief.title_position]
    (top, bottom), (motif_top, motif_bottom) = (first, second) if pictures_first else (second, first)
    motif: Box = (0, motif_top, UNITS, motif_bottom)
    left, right = SIDE_MARGIN, UNITS - SIDE_MARGIN
    if not brief.body_blocks:
        return Areas((motif,), (left, top, right, bottom), None)
    if mirrored:
        return Areas((motif,), (left + 6, top, right, bottom), (left, top + 1, left + BODY_WIDTH, bottom))
    return Areas((motif,), (left, top, right - 6, bottom), (right - BODY_WIDTH, top + 1, right, bottom))


def _overprint(brief: PosterBrief, rng: np.random.Generator) -> list[Element]:
    """Return a transparent disc; a square for `swiss`, whose captions count circles; nothing for `minimalist`."""
    radius = pick(rng, (3.0, 4.0, 5.0))
    x, y = (pick(rng, (radius, UNITS / 2, UNITS - radius)) for _ in range(2))
    box = (x - radius, y - radius, x + radius, y + radius)
    shape = rectangle(*box, "secondary") if brief.style == "swiss" else circle(x, y, radius, "secondary")
    return [] if brief.style == "minimalist" else [Element("shape", "secondary", 0.35, box, (shape,), opacity=0.55)]


def _overlapping(areas: Areas) -> Areas:
    """Extend the row of pictures by OVERLAP onto an adjacent motif, unless there is small text."""
    if areas.pictures is None or areas.body is not None:
        return areas
    x0, y0, x1, y1 = areas.pictures
    _, motif_top, _, motif_bottom = areas.motif[0]
    if 0 <= motif_top - y1 <= 1:
        return replace(areas, pictures=(x0, y0, x1, y1 + OVERLAP))
    if 0 <= y0 - motif_bottom <= 1:
        return replace(areas, pictures=(x0, y0 - OVERLAP, x1, y1))
    return areas


def _divide_without_pictures(brief: PosterBrief) -> Areas:
    left, right = SIDE_MARGIN, UNITS - SIDE_MARGIN
    if brief.title_position == "middle":
        upper, lower = ((0, y0, UNITS, y1) for y0, y1 in STRIPS["middle"])
        return Areas((upper,), None, (left, 11, right, 15)) if brief.body_blocks else Areas((upper, lower), None, None)
    if brief.title_position == "top":
        if brief.body_blocks:
            return Areas(((0, 4, UNITS, 12),), None, (left, 12, right, 16))
        return Areas(((0, 4, UNITS, UNITS),), None, None)
    if brief.body_blocks:
        return Areas(((0, 4, UNITS, 12),), None, (left, 0, right, 4))
    return Areas(((0, 0, UNITS, 12),), None, None)


def _pictures(brief: PosterBrief, row: Box, rng: np.random.Generator) -> list[Element]:
    """Place one to three pictures side by side in `row`, each slightly smaller than its modules."""
    x0, y0, x1, y1 = row
    width = {2: 6.0, 3: 4.0}.get(brief.pictures) or min(8.0, x1 - x0)
    spare = x1 - x0 - brief.pictures * width
    if spare:
        spare = spare / 2 if GRAMMARS[brief.style].centered_pictures else pick(rng, (0.0, spare))
    inset = 0.25 if brief.pictures == 3 else 0.5
    hierarchy = 0.75 if brief.pictures == 1 else 0.65
    scenes = [Scene(pick(rng, SUBJECTS), int(rng.integers(2**31))) for _ in range(brief.pictures)]
    lefts = [x0 + spare + k * width for k in range(brief.pictures)]
    return [
        Element("picture", "surface", hierarchy, (x + inset, y0 + 0.5, x + width - inset, y1 - 0.5), scene)
        for x, scene in zip(lefts, scenes, strict=True)
    ]


def _body(brief: PosterBrief, area: Box, rng: np.random.Generator) -> list[Element]:
    """Place the blocks of small text: side by side in a wide area, one below the other in a column."""
    x0, y0, x1, y1 = area
    centered = GRAMMARS[brief.style].align == "center"
    if x1 - x0 > BODY_WIDTH:
        middle = (x0 + x1 - BODY_WIDTH) / 2
        lefts = [middle] if brief.body_blocks == 1 and centered else [x0, x0 + BODY_WIDTH + SIDE_MARGIN]
        boxes = [(left, y0, left + BODY_WIDTH, y0 + 4) for left in lefts]
    else:
        boxes = [(x0, y0, x1, y0 + 2), (x0, y0 + 2.5, x1, y1)] if brief.body_blocks == 2 else [(x0, y0, x1, y0 + 4)]
    elements = []
    for box in boxes[: brief.body_blocks]:
        lines = int(min(box[3] - box[1], 4))
        widths = (1.0,) * (lines - 1) + (0.5,)
        fitted = (box[0], box[1], box[2], box[1] + lines)
        elements.append(Element("text", "ink", 0.25, fitted, TextLines(widths, "center" if centered else "left")))
    return elements


def _title(brief: PosterBrief) -> Element:
    grammar = GRAMMARS[brief.style]
    width = grammar.pitch * len(brief.title)
    left = (UNITS - width) / 2 if grammar.align == "center" or width > UNITS - SIDE_MARGIN else SIDE_MARGIN
    top = sum(TITLE_BAND[brief.title_position]) / 2 - grammar.cap_height / 2
    box = (left, top, left + width, top + grammar.cap_height)
    return Element("title", "ink", 1.0, box, Title(brief.title, grammar.font, grammar.inverted))


def turn_text(elements: list[Element], rng: np.random.Generator) -> list[Element]:
    """Rotate the title, the small text, both or neither, for `rich` posters; everything is rotated by one angle.

    If only small text is rotated, square blocks may be rotated by 90 degrees instead.
    """
    which, tilt = pick(rng, list(TURNED_TEXT), list(TURNED_TEXT.values())), pick(rng, TILTS)
    on_its_side = rng.random() < 0.4
    turned_elements = []
    for element in elements:
        if isinstance(element.content, Title) and which in ("title", "both"):
            element = _turned_title(element, tilt)
        elif isinstance(element.content, TextLines) and which in ("text", "both"):
            x0, y0, x1, y1 = element.box
            sideways = which == "text" and on_its_side and x1 - x0 == y1 - y0
            element = _kept_on_page(replace(element, angle=90.0 if sideways else tilt))
        turned_elements.append(element)
    return turned_elements


def _turned_title(element: Element, tilt: float) -> Element:
    """Rotate the title, and scale it down if it would leave the page or exceed TURNED_HEIGHT."""
    x0, y0, x1, y1 = element.box
    width, height, (cx, cy) = x1 - x0, y1 - y0, element.center
    sine, cosine = abs(math.sin(math.radians(tilt))), math.cos(math.radians(tilt))
    across, down = width * cosine + height * sine, width * sine + height * cosine
    scale = min(1.0, (UNITS - 2 * EDGE) / across, TURNED_HEIGHT / down)
    half_width, half_height = scale * width / 2, scale * height / 2
    box = (cx - half_width, cy - half_height, cx + half_width, cy + half_height)
    return _kept_on_page(replace(element, box=box, angle=tilt))


def _kept_on_page(element: Element) -> Element:
    """Move the element so that its corners are at least EDGE away from the edges of the page."""
    left, top, right, bottom = element.bounds
    dx = max(EDGE - left, 0.0) - max(right - (UNITS - EDGE), 0.0)
    dy = max(EDGE - top, 0.0) - max(bottom - (UNITS - EDGE), 0.0)
    x0, y0, x1, y1 = element.box
    return replace(element, box=(x0 + dx, y0 + dy, x1 + dx, y1 + dy))
