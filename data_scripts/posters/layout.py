"""From a brief to boxes: every style's grammar on one grid of 16 × 16 units.

The page has three bands: the title's (4 u high) where the brief says, and two strips of 6 u for the motif and the
pictures. The title's band carries nothing but the title. At 64 px all of this falls on whole 4 px patches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from data_scripts.posters.brief import PosterBrief, pick
from data_scripts.posters.elements import UNITS, Box, Element, Scene, TextLines, Title, circle, rectangle
from data_scripts.posters.motifs import draw_motif
from data_scripts.posters.pictures import SUBJECTS

TITLE_TOP = {"top": 1.0, "middle": 6.75, "bottom": 12.5}
"""Where a title's capitals begin; the band around them is 0-4, 6-10 or 12-16."""

BODY_WIDTH = 4.0
OVERLAP = 2.0


@dataclass(frozen=True)
class StyleGrammar:
    """How a style sets its title and places its pictures."""

    font: str
    title_width: float
    cap_height: float
    align: str
    inverted: bool = False
    centered_pictures: bool = False


GRAMMARS = {
    "swiss": StyleGrammar("DejaVuSans-Bold", 10.0, 2.5, "left"),
    "minimalist": StyleGrammar("DejaVuSans-Bold", 7.0, 1.75, "left"),
    "constructivist": StyleGrammar("DejaVuSans-BoldOblique", 12.0, 2.5, "left", inverted=True),
    "art_deco": StyleGrammar("DejaVuSerif-Bold", 10.0, 2.5, "center", centered_pictures=True),
    "pop": StyleGrammar("DejaVuSans-BoldOblique", 12.0, 2.75, "center"),
    "psychedelic": StyleGrammar("DejaVuSerif-BoldItalic", 11.0, 2.5, "center", centered_pictures=True),
    "brutalist": StyleGrammar("DejaVuSansMono-Bold", 14.0, 2.5, "left", inverted=True),
    "editorial": StyleGrammar("DejaVuSerif-Bold", 13.0, 2.5, "left"),
}


@dataclass(frozen=True)
class Areas:
    """What the page leaves for the motif, the pictures' row (None without pictures) and the small text."""

    motif: tuple[Box, ...]
    pictures: Box | None
    body: Box | None


def lay_out(brief: PosterBrief, rng: np.random.Generator, complexity: str = "plain") -> list[Element]:
    """The poster's elements in the order in which they are drawn (the background is not one of them).

    `complexity` "standard" lets pictures overlap the motif and prints a large transparent shape over it.
    """
    mirrored = rng.random() < 0.5
    areas = _divide(brief, mirrored, pictures_first=rng.random() < 0.5)
    overprint = _overprint(brief, rng)
    elements: list[Element] = []
    motif_seed = int(rng.integers(2**31))
    for area in areas.motif:  # the same draws in each part: a motif cut in two by the title is one motif
        elements += draw_motif(brief.motif, area, np.random.default_rng(motif_seed))
    if complexity == "standard":
        elements += overprint
        areas = _overlapping(areas)
    if areas.pictures is not None:
        elements += _pictures(brief, areas.pictures, rng)
    if areas.body is not None:
        elements += _body(brief, areas.body, rng)
    return [*elements, _title(brief)]


def _divide(brief: PosterBrief, mirrored: bool, pictures_first: bool) -> Areas:
    """Share out the page. `mirrored` puts small text on the left; `pictures_first` the pictures above the motif."""
    if brief.pictures == 0:
        return _divide_without_pictures(brief)
    rows = {  # (pictures above?) -> (picture row, motif strip); a strip at the page's edge is a unit higher: it bleeds
        ("top", True): ((4.5, 9), (10, 16)),
        ("top", False): ((10, 15), (4, 9)),
        ("middle", True): ((1, 5.5), (10, 16)),
        ("middle", False): ((10.5, 15), (0, 6)),
        ("bottom", True): ((1, 6), (7, 12)),
        ("bottom", False): ((7, 11.5), (0, 6)),
    }
    (top, bottom), (motif_top, motif_bottom) = rows[brief.title_position, pictures_first]
    body: Box | None = None
    pictures: Box = (1, top, 15, bottom)
    motif: Box = (0, motif_top, UNITS, motif_bottom)
    if brief.body_blocks:
        left = 1.0 if mirrored else UNITS - 1 - BODY_WIDTH
        if brief.pictures == 1:
            body = (left, top, left + BODY_WIDTH, bottom)
            pictures = (6, top, 15, bottom) if mirrored else (1, top, 10, bottom)
        else:
            body_top = motif_top if motif_bottom == 12 else motif_top + 1
            body = (left, body_top, left + BODY_WIDTH, body_top + 4)
            motif = (6, motif_top, UNITS, motif_bottom) if mirrored else (0, motif_top, 10, motif_bottom)
    return Areas((motif,), pictures, body)


def _overprint(brief: PosterBrief, rng: np.random.Generator) -> list[Element]:
    """A transparent disc; a square for the style that counts its circles, nothing for the barest one."""
    radius = pick(rng, (3.0, 4.0, 5.0))
    x, y = (pick(rng, (radius, UNITS / 2, UNITS - radius)) for _ in range(2))
    box = (x - radius, y - radius, x + radius, y + radius)
    shape = rectangle(*box, "secondary") if brief.style == "swiss" else circle(x, y, radius, "secondary")
    return [] if brief.style == "minimalist" else [Element("shape", "secondary", 0.35, box, (shape,), opacity=0.55)]


def _overlapping(areas: Areas) -> Areas:
    """The pictures' row grown by OVERLAP onto the motif, where that is next to it and no small text is in the way."""
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
    if brief.title_position == "middle":
        upper, lower = (0, 0, UNITS, 6), (0, 10, UNITS, UNITS)
        return Areas((upper,), None, (1, 11, 15, 15)) if brief.body_blocks else Areas((upper, lower), None, None)
    if brief.title_position == "top":
        if brief.body_blocks:
            return Areas(((0, 4, UNITS, 12),), None, (1, 13, 15, 15))
        return Areas(((0, 4, UNITS, UNITS),), None, None)
    if brief.body_blocks:
        return Areas(((0, 4, UNITS, 12),), None, (1, 1, 15, 3))
    return Areas(((0, 0, UNITS, 12),), None, None)


def _pictures(brief: PosterBrief, row: Box, rng: np.random.Generator) -> list[Element]:
    """One to three pictures side by side in `row`."""
    x0, y0, x1, y1 = row
    width = {2: 6.0, 3: 4.0}.get(brief.pictures) or pick(rng, (6.0, 8.0))
    if brief.pictures == 1:
        grammar = GRAMMARS[brief.style]
        starts = [x0 + (x1 - x0 - width) / 2 if grammar.centered_pictures and x1 - x0 == 14 else x0]
        if x0 > 1 or (x1 == 15 and not grammar.centered_pictures and rng.random() < 0.5):
            starts = [x1 - width]
    else:
        gap = (x1 - x0 - brief.pictures * width) / (brief.pictures - 1)
        starts = [x0 + k * (width + gap) for k in range(brief.pictures)]
    hierarchy = 0.75 if brief.pictures == 1 else 0.65
    scenes = [Scene(pick(rng, SUBJECTS), int(rng.integers(2**31))) for _ in starts]
    return [
        Element("picture", "surface", hierarchy, (x, y0, x + width, y1), scene)
        for x, scene in zip(starts, scenes, strict=True)
    ]


def _body(brief: PosterBrief, area: Box, rng: np.random.Generator) -> list[Element]:
    """Blocks of small text: side by side where the area is wide, below each other where it is a column."""
    x0, y0, x1, y1 = area
    if x1 - x0 > 8:
        half = (x1 - x0 - 2) / 2
        boxes = [(x0, y0, x0 + half, y1), (x0 + half + 2, y0, x1, y1)]
        if brief.body_blocks == 1 and GRAMMARS[brief.style].align == "center":
            boxes = [(x0 + half / 2 + 1, y0, x0 + 1.5 * half + 1, y1)]
    else:
        boxes = [(x0, y0, x1, y0 + 2), (x0, y0 + 3, x1, y0 + 5)] if brief.body_blocks == 2 else [(x0, y0, x1, y0 + 4)]
    align = "center" if GRAMMARS[brief.style].align == "center" else "left"
    elements = []
    for box in boxes[: brief.body_blocks]:
        lines = int(min(box[3] - box[1], 4))
        widths = (1.0,) * (lines - 1) + (pick(rng, (0.5, 0.75)),)
        fitted = (box[0], box[1], box[2], box[1] + lines)
        elements.append(Element("text", "ink", 0.25, fitted, TextLines(widths, align)))
    return elements


def _title(brief: PosterBrief) -> Element:
    grammar = GRAMMARS[brief.style]
    left = {"left": 1.0, "center": (UNITS - grammar.title_width) / 2}[grammar.align]
    middle = TITLE_TOP[brief.title_position] + 1.25
    top = middle - grammar.cap_height / 2
    box = (left, top, left + grammar.title_width, top + grammar.cap_height)
    return Element("title", "ink", 1.0, box, Title(brief.title, grammar.font, grammar.inverted))
