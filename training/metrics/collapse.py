"""Collapse detection: have the previews lost what the training pictures have?

Two failures that a person sees at once and a loss curve does not show: every picture is one colour, or all pictures are
the same one. Both are judged against training pictures, so that plain posters or a set of similar portraits raise no
alarm. Pure functions; pictures are compared as 32 x 32 thumbnails, where noise averages out and layout remains.

Legend: N pictures, D = 32 * 32 * 3 values in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

THUMBNAIL = 32
# How far below the training pictures counts as lost.
FAR_BELOW = 0.25
# Same caption everywhere: a model may well answer one prompt with similar pictures, but not with the same one.
FAR_BELOW_SAME_CAPTION = 0.05
# Chance at which training pictures themselves, drawn at random, would look as flat as the previews do.
MAX_CHANCE = 0.01
# Share of the pairs of training pictures that are as close as the typical pair of previews.
MAX_SHARE_OF_PAIRS = 0.1
MIN_REFERENCES = 4
MIN_PREVIEWS_TO_COMPARE = 3
MAX_PICTURES = 64  # of each kind: pairs grow with the square


def collapse_warnings(
    previews: Sequence[Image.Image], references: Sequence[Image.Image], captions: Sequence[str] | None = None
) -> list[str]:
    """What is wrong with `previews` against training pictures (`references`): the fact, the figures, likely causes.

    Args:
        previews: generated pictures, any size.
        references: training pictures, best some dozens drawn at random; fewer than four judge nothing.
        captions: of the previews; pictures with the same caption may be alike.

    Returns:
        No, or one warning.
    """
    if not previews or len(references) < MIN_REFERENCES:
        return []
    shown, real = _thumbnails(previews[:MAX_PICTURES]), _thumbnails(references[:MAX_PICTURES])
    warning = _one_color(shown, real) or _all_alike(shown, real, list(captions or [])[:MAX_PICTURES])
    return [warning] if warning else []


def variation(thumbnails: np.ndarray) -> np.ndarray:
    """Within each picture, the standard deviation of its colour values over its pixels: N D -> N, in [0, 0.5]."""
    pixels = thumbnails.reshape(len(thumbnails), -1, 3)
    return np.sqrt(pixels.var(axis=1).mean(axis=-1))


def pairwise_distances(thumbnails: np.ndarray) -> np.ndarray:
    """Root mean square difference of the colour values of each two pictures: N D -> N N, in [0, 1]."""
    differences = thumbnails[:, None] - thumbnails[None]
    return np.sqrt(np.square(differences).mean(axis=-1))


def _one_color(shown: np.ndarray, real: np.ndarray) -> str | None:
    """Three quarters of the previews vary far less within than training pictures do."""
    shown_variation, real_variation = variation(shown), variation(real)
    typical = float(np.median(real_variation))
    limit = FAR_BELOW * typical
    flat = int((shown_variation < limit).sum())
    # Flat pictures among the training pictures (plus one, for those that were not drawn) make flat previews likely.
    chance = ((int((real_variation < limit).sum()) + 1) / (len(real) + 1)) ** flat
    if flat < 0.75 * len(shown) or chance > MAX_CHANCE:
        return None
    return (
        f"the previews are nearly one colour each: the spread of colours within a picture is "
        f"{np.median(shown_variation):.3f}, in training pictures {typical:.3f} (medians). Likely causes: nothing is "
        f"learned yet (wait for the next previews); a learning rate so high that the weights diverged (lower "
        f"--learning_rate, look at grad_norm); or latents of another scale than the autoencoder's config says."
    )


def _all_alike(shown: np.ndarray, real: np.ndarray, captions: list[str]) -> str | None:
    """Previews lie far closer to one another than training pictures do."""
    if len(shown) < MIN_PREVIEWS_TO_COMPARE:
        return None
    captions = captions + [f"untold {index}" for index in range(len(captions), len(shown))]
    differ = np.array([[a != b for b in captions] for a in captions])
    pairs = np.triu(np.ones_like(differ), k=1)
    same_caption = not (pairs & differ).any()
    shown_distance = float(np.median(pairwise_distances(shown)[pairs if same_caption else pairs & differ]))
    real_distances = pairwise_distances(real)[np.triu_indices(len(real), k=1)]
    typical = float(np.median(real_distances))
    share = ((real_distances <= shown_distance).sum() + 1) / (len(real_distances) + 1)
    too_close = (FAR_BELOW_SAME_CAPTION if same_caption else FAR_BELOW) * typical
    if shown_distance > too_close or share > MAX_SHARE_OF_PAIRS:
        return None
    cause = "" if same_caption else " the captions are ignored (all alike in the data, or dropped too often);"
    return (
        f"the previews are all alike: two of them differ by {shown_distance:.3f}, two training pictures by "
        f"{typical:.3f} (medians, colour values from 0 to 1). Likely causes: nothing is learned yet (wait for the next "
        f"previews);{cause} a guidance scale that is too high; or a learning rate so high that the weights diverged."
    )


def _thumbnails(images: Sequence[Image.Image]) -> np.ndarray:
    """N pictures -> N D, in [0, 1]; transparent ones on white."""
    rows = []
    for image in images:
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
        small = image.convert("RGB").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
        rows.append(np.asarray(small, dtype=np.float32).reshape(-1) / 255)
    return np.stack(rows)
