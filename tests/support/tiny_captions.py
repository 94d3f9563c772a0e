"""Tiny joint models of images and captions, and data for them: images of coloured shapes with captions."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from pipelines.common.schedulers import sampling_scheduler, training_scheduler
from pipelines.image_caption import ImageCaptionPipeline
from pipelines.models.image_caption_model import ImageCaptionModel
from pipelines.models.latent_prior import LatentPriorModel
from training.data.tokenization import train_tokenizer

COLORS = ("red", "green", "blue", "black", "orange", "purple")
SHAPES = ("circle", "square")
MODEL = {
    "latent_size": 16,
    "max_length": 12,
    "patch_size": 4,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "map_channels": 4,
    "text_hidden_size": 16,
    "num_attention_heads": 2,
    "num_encoder_layers": 1,
    "num_decoder_layers": 2,
    "prefix_length": 2,
}
MODEL_FLAGS = tuple(
    word
    for name, value in MODEL.items()
    for word in (f"--model.{name}", str(list(value)) if isinstance(value, tuple) else str(value))
)
RESOLUTION = 32


def caption(i: int) -> str:
    return f"a {COLORS[i % len(COLORS)]} {SHAPES[i // len(COLORS) % len(SHAPES)]}" + (", big" if i >= 12 else "")


def picture(i: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    reach = 4 if i >= 12 else 9
    box = (reach, reach, size[0] - reach, size[1] - reach)
    (draw.ellipse if caption(i).split()[2].startswith("circle") else draw.rectangle)(box, fill=COLORS[i % len(COLORS)])
    return image


def draw_folder(folder: Path, number: int = 48, size: tuple[int, int] = (32, 32)) -> Path:
    """Make an imagefolder of `number` images with captions."""
    folder.mkdir(parents=True)
    lines = []
    for i in range(number):
        picture(i % 24, size).save(folder / f"{i:03d}.png")
        lines.append(json.dumps({"file_name": f"{i:03d}.png", "text": caption(i % 24)}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def tiny_caption_tokenizer():
    return train_tokenizer([caption(i) for i in range(24)], model_max_length=MODEL["max_length"])


def tiny_caption_model(seed: int = 0, **changes) -> ImageCaptionModel:
    torch.manual_seed(seed)
    sizes = {"vocab_size": len(tiny_caption_tokenizer()), "sample_size": RESOLUTION}
    return ImageCaptionModel(**sizes | MODEL | changes).eval()


def tiny_caption_pipeline(**options) -> ImageCaptionPipeline:
    torch.manual_seed(5)
    pipeline = ImageCaptionPipeline(
        model=tiny_caption_model(),
        tokenizer=tiny_caption_tokenizer(),
        scheduler=sampling_scheduler(training_scheduler("flow_prediction")),
        prior=LatentPriorModel(MODEL["latent_size"], 16, 1).eval(),
        **options,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
