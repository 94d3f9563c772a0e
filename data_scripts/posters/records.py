"""One poster as one row of the dataset: a pure function of (seed, index, options)."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from data_scripts.posters.brief import PosterBrief, draw_brief
from data_scripts.posters.captions import write_caption
from data_scripts.posters.elements import UNITS, Element
from data_scripts.posters.grammar import design_grammar
from data_scripts.posters.layout import lay_out, turn_text
from data_scripts.posters.painting.drawing import draw_poster
from data_scripts.posters.painting.finishing import finish
from pipelines.common.poster_domain import COLORS, ELEMENT_KINDS, STYLES, TITLE_POSITIONS

Row = dict[str, Any]

GRAMMAR_MEANINGS = {
    "balance": "do the sides weigh the same",
    "equilibrium": "how near the centre of mass is to the page's centre",
    "symmetry": "do the quadrants mirror each other",
    "regularity": "how few lines and distances the layout gets by with",
    "rhythm": "how evenly elements are spread over the quadrants",
    "density": "how near elements come to filling half of the page",
    "hierarchy_contrast": "how far apart elements are in hierarchy",
    "image_share": "share of the page that pictures cover",
}

COLUMNS = {
    "image": "P_Image: the poster, RGB",
    "text": "the caption",
    "label": "the style as a class label",
    "index": "the poster's number: with the seed it determines everything in the row",
    "text_mask": "F_Tensor: 255 on boxes of text lines, else 0",
    "image_mask": "F_Tensor: 255 on pictures, else 0",
    "color_role": "F_Tensor: class ids, 0 background, 1 surface, 2 primary, 3 secondary, 4 accent, 5 ink",
    "hierarchy": "F_Tensor: 0..255, how strongly the element under the pixel leads the eye",
    "style": "V_Meta: one of " + ", ".join(STYLES),
    "energy": "V_Meta, [0, 1]",
    "formality": "V_Meta, [0, 1]",
    "warmth": "V_Meta, [0, 1]",
    "palette": "V_Meta: the poster's colours as #rrggbb: background, primary, accent (where there is one), ink",
    "palette_names": "the same by name (" + ", ".join(COLORS) + ")",
    "background": "name of the background's colour",
    "text_blocks": "V_Meta: number of text blocks, the title among them",
    "pictures": "V_Meta: number of pictures, 0 to 3",
    "title_position": "one of " + ", ".join(TITLE_POSITIONS),
    "title": "the word that is the title; the caption does not say it",
    "motif": "the big shape, as the caption names it",
    "elements": "boxes: kind (" + ", ".join(ELEMENT_KINDS) + "), role, hierarchy, x0, y0, x1, y1 in [0, 1]; of turned "
    "text, the upright box around it",
    **{name: f"V_Grammar, [0, 1]: {meaning}" for name, meaning in GRAMMAR_MEANINGS.items()},
}


TURNING, FINISHING = 1, 2
"""Which of a poster's streams of random numbers its text is turned by, and its pictures, small text and rules are
finished by; its design and textures take one of their own, so that a `plain` poster knows nothing of either."""


@dataclass(frozen=True)
class PosterOptions:
    """What the bytes of a poster depend on, besides its index."""

    seed: int
    resolution: int
    complexity: str


def make_row(options: PosterOptions, index: int) -> Row:
    """Poster number `index`: its pictures as PNG bytes, the rest as plain values (COLUMNS says what is what).

    One index has one design at every resolution and complexity; all but `plain` ones have rules, `rich` ones
    turn some text besides.
    """
    rng = np.random.default_rng([options.seed, index])
    brief = draw_brief(rng)
    elements = lay_out(brief, rng, options.complexity)
    caption = write_caption(brief, rng)
    texture_seed = int(rng.integers(2**31))  # last: nothing of the design hangs on it
    if options.complexity != "plain":
        elements = finish(brief, elements, np.random.default_rng([options.seed, index, FINISHING]))
    if options.complexity == "rich":
        elements = turn_text(elements, np.random.default_rng([options.seed, index, TURNING]))
    drawn = draw_poster(brief, elements, options.resolution, options.complexity, texture_seed)
    boxes = [_element_row(element, brief) for element in elements]
    return {
        "image": _png(drawn.image),
        "text": caption,
        "label": STYLES.index(brief.style),
        "index": index,
        "text_mask": _png(drawn.maps.text_mask),
        "image_mask": _png(drawn.maps.image_mask),
        "color_role": _png(drawn.maps.color_role),
        "hierarchy": _png(drawn.maps.hierarchy),
        "style": brief.style,
        "energy": brief.energy,
        "formality": brief.formality,
        "warmth": brief.warmth,
        "palette": brief.palette,
        "palette_names": brief.palette_names,
        "background": brief.background,
        "text_blocks": brief.text_blocks,
        "pictures": brief.pictures,
        "title_position": brief.title_position,
        "title": brief.title,
        "motif": brief.motif,
        "elements": boxes,
        **design_grammar(boxes),
    }


def _element_row(element: Element, brief: PosterBrief) -> Row:
    """Its numbers are float32 from the start, so that the grammar of a stored row is exactly the one computed here."""
    numbers = [element.hierarchy, *(min(max(value / UNITS, 0.0), 1.0) for value in element.bounds)]
    named = zip(("hierarchy", "x0", "y0", "x1", "y1"), numbers, strict=True)
    return {
        "kind": element.kind,
        "role": brief.seen_role(element.role),
        **{name: float(np.float32(number)) for name, number in named},
    }


def _png(image: Image.Image) -> Row:
    """An image as the `datasets` library stores one."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=3)
    return {"bytes": buffer.getvalue(), "path": None}
