"""The finishing of all posters except `plain` ones: mounts and inks of pictures, tone of small text, and thin rules.

Finishing does not move any element of the layout.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from data_scripts.posters.brief import PosterBrief, pick
from data_scripts.posters.elements import UNITS, Box, Element, Scene, TextLines, rectangle
from data_scripts.posters.layout import BODY_WIDTH, GRAMMARS, STRIPS, TITLE_BAND
from data_scripts.posters.painting.motifs import SIDE_MARGIN

MOUNTS = ("keyline", "shadow", "bare")
OWN_COLORS = 0.5
"""Fraction of posters whose pictures are printed in the poster's own colours."""
LEAST_CONTRAST = 60.0
"""Minimum difference of luminance (0..255) between the two colours of a duotone."""
PALEST_INK = 0.6
"""Minimum fraction of ink in the colour of small text; the rest is the colour of the page."""

RULED = 0.5
"""Fraction of posters with rules; almost every page has room for at least one."""
MOST_RULES = 3
RULE_THICKNESSES = (3 / 16, 1 / 4)
"""Thicknesses (u): whole samples at every resolution, and at least three quarters of a pixel at 64 px."""
RULE_STEP = 0.25
"""Rules start at multiples of this (u), and so on whole pixels at every resolution."""
RULE_HIERARCHY = 0.1
CLEARANCE = 0.2
"""Minimum distance between a rule and text or a picture (u)."""
APART = 1.0
"""Minimum vertical distance between rules (u)."""


def finish(brief: PosterBrief, elements: list[Element], rng: np.random.Generator) -> list[Element]:
    """Finish the pictures and the small text, and add rules, if there are any, below the text in drawing order."""
    duotone = _own_duotone(brief, rng) if rng.random() < OWN_COLORS else None
    finished = [_finished(element, duotone, rng) for element in elements]
    rules = _rules(brief, elements, rng) if rng.random() < RULED else []
    first_text = next((k for k, element in enumerate(elements) if element.kind in ("text", "title")), len(elements))
    return [*finished[:first_text], *rules, *finished[first_text:]]


def _finished(element: Element, duotone: tuple[str, str] | None, rng: np.random.Generator) -> Element:
    content = element.content
    if isinstance(content, Scene):
        return replace(element, content=replace(content, mount=pick(rng, MOUNTS), duotone=duotone))
    if isinstance(content, TextLines):
        return replace(element, content=replace(content, ink_share=PALEST_INK + (1 - PALEST_INK) * rng.random()))
    return element


def _own_duotone(brief: PosterBrief, rng: np.random.Generator) -> tuple[str, str]:
    """Draw two roles, the darker first: the background, and ink or a primary colour with enough contrast to it."""
    luminance = {
        role: float(np.dot(brief.color_of(role), (0.299, 0.587, 0.114))) for role in ("background", "primary", "ink")
    }
    others = [
        role for role in ("ink", "primary") if abs(luminance[role] - luminance["background"]) >= LEAST_CONTRAST
    ] or ["ink"]
    other = pick(rng, others)
    return (other, "background") if luminance[other] < luminance["background"] else ("background", other)


def _rules(brief: PosterBrief, elements: list[Element], rng: np.random.Generator) -> list[Element]:
    """Draw one to three rules, or fewer if the room is not enough, at a distance from text, pictures and each other."""
    thickness = pick(rng, RULE_THICKNESSES)
    count = pick(rng, range(1, MOST_RULES + 1))
    taken = [_grown(element.box, CLEARANCE, CLEARANCE) for element in elements if element.kind != "shape"]
    places = [(x0, y, x1, y + thickness) for x0, y, x1 in _rule_places(brief, elements)]
    boxes: list[Box] = []
    for number in rng.permutation(len(places)):
        box = places[number]
        if len(boxes) < count and not any(_overlap(box, other) for other in taken):
            boxes.append(box)
            taken.append(_grown(box, 0, APART))
    return [Element("shape", "ink", RULE_HIERARCHY, box, (rectangle(*box, "ink"),)) for box in boxes]


def _rule_places(brief: PosterBrief, elements: list[Element]) -> list[tuple[float, float, float]]:
    """Return possible places of rules (x0, y, x1): along the title's band, between the strips, above small text."""
    left, right = SIDE_MARGIN, UNITS - SIDE_MARGIN
    top, bottom = TITLE_BAND[brief.title_position]
    # A rule of ink that touches a band of ink would not be visible.
    away = RULE_STEP if GRAMMARS[brief.style].inverted else 0.0
    heights = [bottom + away, top - RULE_STEP - away]
    (_, first_end), (second_start, _) = STRIPS[brief.title_position]
    heights += [first_end] if first_end == second_start else []
    spans = ((left, right), (left, left + BODY_WIDTH), (right - BODY_WIDTH, right))
    places = [(x0, y, x1) for y in heights for x0, x1 in spans]
    places += [(e.box[0], e.box[1] - 2 * RULE_STEP, e.box[2]) for e in elements if e.kind == "text"]
    return [place for place in places if 2 * RULE_STEP <= place[1] <= UNITS - 3 * RULE_STEP]


def _grown(box: Box, across: float, down: float) -> Box:
    x0, y0, x1, y1 = box
    return x0 - across, y0 - down, x1 + across, y1 + down


def _overlap(first: Box, second: Box) -> bool:
    return first[0] < second[2] and second[0] < first[2] and first[1] < second[3] and second[1] < first[3]
