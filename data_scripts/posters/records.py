"""Make a poster as a row of the dataset: a pure function of (seed, index, options)."""

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
from pipelines.common.poster_domain import COLORS, ELEMENT_KINDS, F_TENSOR_CHANNELS, STYLES, TITLE_POSITIONS

Row = dict[str, Any]

GRAMMAR_MEANINGS = {
    "balance": "how equal the visual weights of opposite sides are",
    "equilibrium": "how close the centre of mass is to the centre of the page",
    "symmetry": "how similar the quadrants are when mirrored",
    "regularity": "how few distinct alignment lines and distances the layout has",
    "rhythm": "how evenly the elements are distributed over the quadrants",
    "density": "how close the elements come to filling half of the page",
    "hierarchy_contrast": "how much the elements differ in hierarchy",
    "image_share": "fraction of the page that pictures cover",
}

COLUMNS = {
    "image": "the poster, RGB",
    "text": "the caption",
    "label": "the style as a class label",
    "index": "number of the poster; with the seed and the options it determines the whole row",
    "text_mask": "255 in the boxes of text lines, 0 elsewhere",
    "image_mask": "255 in pictures, 0 elsewhere",
    "color_role": "class ids: 0 background, 1 surface, 2 primary, 3 secondary, 4 accent, 5 ink",
    "hierarchy": "0 to 255, how strongly the element at the pixel attracts the eye",
    "style": "one of " + ", ".join(STYLES),
    "energy": "from calm to energetic, in [0, 1]",
    "formality": "from informal to formal, in [0, 1]",
    "warmth": "from cold to warm colours, in [0, 1]",
    "palette": "colours of the poster as #rrggbb: background, primary, accent (if there is one), ink",
    "palette_names": "names of the colours in palette (" + ", ".join(COLORS) + ")",
    "background": "name of the background colour",
    "text_blocks": "number of text blocks, including the title",
    "pictures": "number of pictures, 0 to 3",
    "title_position": "one of " + ", ".join(TITLE_POSITIONS),
    "title": "the title, one word; it is not in the caption",
    "motif": "the large shape, as named in the caption",
    "elements": "boxes: kind (" + ", ".join(ELEMENT_KINDS) + "), role, hierarchy, x0, y0, x1, y1 in [0, 1]; for "
    "rotated text, the axis-aligned box around it",
    **{name: f"{meaning}, in [0, 1]" for name, meaning in GRAMMAR_MEANINGS.items()},
}

PARTS = {
    "image": "P_Image",
    **dict.fromkeys(F_TENSOR_CHANNELS, "F_Tensor"),
    **dict.fromkeys(("style", "energy", "formality", "warmth", "palette", "text_blocks", "pictures"), "V_Meta"),
    **dict.fromkeys(GRAMMAR_MEANINGS, "V_Grammar"),
}
"""Column -> its name in the documentation of the models: the poster (P_Image), its feature maps (F_Tensor), the values
of its brief (V_Meta), the measures of its layout (V_Grammar). The other columns belong to none of them."""

TURNING, FINISHING = 1, 2
"""Random streams for the rotation of text and for finishing (mounts and inks of pictures, small text, rules). They are
separate from the stream of the design and the textures, so that a `plain` poster does not depend on them."""


@dataclass(frozen=True)
class PosterOptions:
    """The options that, with the index, determine the bytes of a poster."""

    seed: int
    resolution: int
    complexity: str


def make_row(options: PosterOptions, index: int) -> Row:
    """Make poster number `index`: images as PNG bytes, everything else as plain values (see COLUMNS).

    An index has the same design at every resolution and complexity. `standard` and `rich` posters also have rules, and
    `rich` posters also rotate text.
    """
    rng = np.random.default_rng([options.seed, index])
    brief = draw_brief(rng)
    elements = lay_out(brief, rng, options.complexity)
    caption = write_caption(brief, rng)
    texture_seed = int(rng.integers(2**31))  # drawn last, so that the design does not depend on it
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
    """Return an element as plain values.

    Numbers are rounded to float32 first, so that the grammar of a stored row equals the one computed here.
    """
    numbers = [element.hierarchy, *(min(max(value / UNITS, 0.0), 1.0) for value in element.bounds)]
    named = zip(("hierarchy", "x0", "y0", "x1", "y1"), numbers, strict=True)
    return {
        "kind": element.kind,
        "role": brief.seen_role(element.role),
        **{name: float(np.float32(number)) for name, number in named},
    }


def _png(image: Image.Image) -> Row:
    """Return an image in the form in which the `datasets` library stores it."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=3)
    return {"bytes": buffer.getvalue(), "path": None}
