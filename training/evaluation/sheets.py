"""Grids of real and generated images, to look at."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from pipelines.tools.grids import comparison_grid
from training.evaluation.data import EvaluationData
from training.metrics.generators import ImageGenerator
from training.metrics.images import to_pil

SAMPLES = 3
VARIANT_SEEDS = 1_000_000


def sample_grid(
    generator: ImageGenerator | None, images: Sequence[Image.Image], data: EvaluationData, most_rows: int
) -> Image.Image:
    """Draw rows of a real image, the generated image for its conditions, and further samples if the model has some.

    Args:
        generator: None for images of unknown origin, which are drawn beside any real ones.
        images: the generated images, in the order of the rows of `data`.
    """
    rows = min(len(images), len(data.conditions))
    shown = range(rows)[:: max(1, rows // most_rows)][:most_rows]
    items = data.items(shown)
    columns = [[to_pil(item["pixel_values"]) for item in items], [images[number] for number in shown]]
    if generator is not None and generator.samples:
        for variant in range(1, SAMPLES):
            columns.append(generator(items, [number + variant * VARIANT_SEEDS for number in shown]))
    titles = ["real image", *["generated"] * (len(columns) - 1)]
    words = [str(item.get("caption", "")) for item in items]
    return comparison_grid([list(row) for row in zip(*columns)], titles, row_titles=words if any(words) else None)
