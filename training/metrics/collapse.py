"""Collapse detection: whether previews lack the variation of the training images.

It detects two failures that a person sees at once and a loss curve does not show: every preview is of a single colour,
or all previews are the same image. Both are judged against training images, so that plain posters or a set of similar
portraits give no warning. Pure functions; images are compared as 32 x 32 thumbnails, where noise averages out and
layout remains.

Legend: N images, D = 32 * 32 * 3 values in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from pipelines.common.pixels import to_rgb

THUMBNAIL = 32
# Variation below this fraction of that of the training images counts as collapsed.
FAR_BELOW = 0.25
# If all captions are the same, a model may generate similar images, but not the same image.
FAR_BELOW_SAME_CAPTION = 0.05
# Maximum probability that training images drawn at random would be as flat as the previews.
MAX_CHANCE = 0.01
# Maximum fraction of pairs of training images that are as close as the median pair of previews.
MAX_SHARE_OF_PAIRS = 0.1
MIN_REFERENCES = 4
MIN_PREVIEWS_TO_COMPARE = 3
MAX_IMAGES = 64  # previews and training images each; the number of pairs grows with the square


def collapse_warnings(
    previews: Sequence[Image.Image],
    references: Sequence[Image.Image],
    captions: Sequence[str] | None = None,
    *,
    conditions: Sequence[str] = (),
) -> list[str]:
    """Return a warning if `previews` have collapsed in comparison with training images (`references`).

    Args:
        previews: generated images of any size.
        references: training images, preferably some dozens drawn at random; fewer than four give no warning.
        captions: captions of the previews; previews with the same caption may be similar.
        conditions: what the images were generated from, such as captions and classes; none for an unconditional model.

    Returns:
        A list that is empty or has one warning with the fact, the values and likely causes.
    """
    if not previews or len(references) < MIN_REFERENCES:
        return []
    shown, real = _thumbnails(previews[:MAX_IMAGES]), _thumbnails(references[:MAX_IMAGES])
    warning = _one_color(shown, real) or _all_alike(shown, real, list(captions or [])[:MAX_IMAGES], conditions)
    return [warning] if warning else []


def variation(thumbnails: np.ndarray) -> np.ndarray:
    """Compute the standard deviation of colour values over the pixels of each image: N D -> N, in [0, 0.5]."""
    pixels = thumbnails.reshape(len(thumbnails), -1, 3)
    return np.sqrt(pixels.var(axis=1).mean(axis=-1))


def pairwise_distances(thumbnails: np.ndarray) -> np.ndarray:
    """Compute the root mean square difference of the colour values of each two images: N D -> N N, in [0, 1]."""
    differences = thumbnails[:, None] - thumbnails[None]
    return np.sqrt(np.square(differences).mean(axis=-1))


def _one_color(shown: np.ndarray, real: np.ndarray) -> str | None:
    """Return a warning if three quarters of the previews vary far less within themselves than training images do."""
    shown_variation, real_variation = variation(shown), variation(real)
    typical = float(np.median(real_variation))
    limit = FAR_BELOW * typical
    flat = int((shown_variation < limit).sum())
    # Flat training images (plus one, for those that were not drawn) make flat previews likely.
    chance = ((int((real_variation < limit).sum()) + 1) / (len(real) + 1)) ** flat
    if flat < 0.75 * len(shown) or chance > MAX_CHANCE:
        return None
    return (
        f"the previews are nearly one colour each: the standard deviation of colours within a preview "
        f"is {np.median(shown_variation):.3f}, within a training image {typical:.3f} (medians). Likely causes: the "
        f"model has not learned anything yet (wait for the next previews); the learning rate is so high that the "
        f"weights diverged (lower --learning_rate, check grad_norm); or the scale of the latents differs from the "
        f"autoencoder's config."
    )


def _all_alike(shown: np.ndarray, real: np.ndarray, captions: list[str], conditions: Sequence[str]) -> str | None:
    """Return a warning if previews are far closer to one another than training images are."""
    if len(shown) < MIN_PREVIEWS_TO_COMPARE:
        return None
    captions = captions + [f"no caption {index}" for index in range(len(captions), len(shown))]
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
    ignored = f" the {' and '.join(conditions)} are ignored (all similar in the data, or dropped too often);"
    cause = "" if same_caption or not conditions else ignored
    return (
        f"the previews are all alike: two of them differ by {shown_distance:.3f}, two training images by "
        f"{typical:.3f} (medians, colour values from 0 to 1). Likely causes: the model has not learned anything yet "
        f"(wait for the next previews);{cause} the guidance scale is too high; or the learning rate is so high that "
        f"the weights diverged."
    )


def _thumbnails(images: Sequence[Image.Image]) -> np.ndarray:
    """Convert N images to thumbnails N D in [0, 1]; transparent images are blended with white."""
    rows = []
    for image in images:
        small = to_rgb(image).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
        rows.append(np.asarray(small, dtype=np.float32).reshape(-1) / 255)
    return np.stack(rows)
