"""Previews of the stages whose pipelines generate images from captions and classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from training.core.exchange import Exchange
from training.core.previews import Previews
from training.core.stage import Batch
from training.metrics.images import to_pil
from training.models.conditioning import pipeline_conditions
from training.stages.image_stage import ImageStage


def prompted_previews(
    stage: ImageStage,
    exchange: Exchange,
    pixels: Callable[[Batch, Sequence[int]], Tensor],
    *,
    captions: bool,
    labels: bool,
    id2label: Mapping[int, str],
) -> Previews:
    """Generate previews from `--preview_prompts`, or else from the captions of the shown rows, and from their classes.

    Args:
        stage: its config has `preview_prompts` and the fields of `PreviewConfig`.
        pixels: returns the images of a batch with these rows, B C H W: the references, whose size the previews have.
        captions, labels: whether the pipeline takes captions, and classes.
        id2label: names of the classes.
    """
    config: Any = stage.config
    count, chosen = config.num_previews, config.preview_prompts

    def read(batch: Batch, rows: Sequence[int]) -> list[tuple[Image.Image, str, int]]:
        texts = batch["caption"] if captions else [""] * len(rows)
        classes = batch["label"].tolist() if labels else [0] * len(rows)
        return list(zip([to_pil(image) for image in pixels(batch, rows)], texts, classes, strict=True))

    shown = stage.shown(exchange, read, count)
    references = [image for image, _, _ in shown]
    texts = (chosen or [text for _, text, _ in shown])[:count] if captions else None
    classes = [class_id for _, _, class_id in shown] if labels else None
    if classes and chosen:
        classes = [i % len(id2label) for i in range(len(texts or classes))]
    _, words = pipeline_conditions(count, texts, classes, id2label)
    pipeline, (width, height) = stage.pipeline(), references[0].size

    def generate(numbers: Sequence[int]) -> list[Image.Image]:
        own_texts = None if texts is None else [texts[number] for number in numbers]
        own_classes = None if classes is None else [classes[number] for number in numbers]
        conditions, _ = pipeline_conditions(len(numbers), own_texts, own_classes, id2label)
        seeds = [config.seed + number for number in numbers]
        return stage.sample(pipeline, seeds=seeds, height=height, width=width, **conditions)

    return Previews(stage.divide(exchange, generate, len(words)), words, references)
