"""Captions of briefs. A caption names the style, colours, number of pictures, title position and motif."""

from __future__ import annotations

import numpy as np

from data_scripts.posters.brief import PosterBrief, pick
from pipelines.common.poster_domain import style_words

PICTURE_WORDS = ("no picture", "one picture", "two pictures", "three pictures")
TITLE_WORDS = {"top": "title at the top", "middle": "title in the middle", "bottom": "title at the bottom"}

TEMPLATES = (
    "{article} {style} poster, {colors}, {pictures}, {title}, {motif}",
    "{article} {style} poster with {pictures} and {motif}, {colors}, {title}",
    "{style} poster, {title}, {pictures}, {motif}, {colors}",
    "{colors}, {article} {style} poster with {motif}, {title}, {pictures}",
)


def write_caption(brief: PosterBrief, rng: np.random.Generator) -> str:
    """Describe the brief with one of the TEMPLATES, chosen by `rng`."""
    style = style_words(brief.style)
    main_colors = brief.primary if brief.accent is None else f"{brief.primary} and {brief.accent}"
    return pick(rng, TEMPLATES).format(
        article="an" if style[0] in "aeiou" else "a",
        style=style,
        colors=f"{main_colors} on {brief.background}",
        pictures=PICTURE_WORDS[brief.pictures],
        title=TITLE_WORDS[brief.title_position],
        motif=brief.motif,
    )
