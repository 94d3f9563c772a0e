"""Measure how well a model of images and captions captions, draws and retrieves, on training or held-out pairs.

    python training/evaluation/evaluate_captions.py --model runs/image_caption/emoji_64 --split validation
    python training/evaluation/evaluate_captions.py --model runs/image_caption/emoji_64 --split train \\
        --output train.json --pictures docs/images

Data, split and seed are those of the run, unless they are named. Held-out pairs whose picture was trained on as well,
under another caption, are left out and counted. Where a picture has several captions, BLEU and chrF are by all of them,
everything else by the first.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from pipelines.tools.cli import UserError, entry_point
from pipelines.tools.grids import image_grid
from training.core.batches import fetch, to_device
from training.core.draws import SampleKey
from training.core.files import write_json
from training.core.options import Options, option
from training.core.parsing import parse_config
from training.core.previews import save_png
from training.data.captions import CaptionDataConfig, CaptionedImages, captions_of, load_captioned
from training.data.tokenization import CaptionTokens
from training.engine.launch import threads_per_process
from training.metrics.captions import (
    alignment_metrics,
    best_constant_caption,
    caption_scores,
    perplexity,
    retrieval_metrics,
    same_pairs,
)
from training.metrics.images import psnr, ssim, to_pil
from training.objectives.captions import token_losses

BATCH = 64
SHOWN = 8
INVENTED = 64


@dataclass
class CaptionEvaluationConfig(Options):
    """Flags of evaluate_captions.py."""

    model: str = ""
    """A run of train_image_caption.py, a checkpoint or a pipeline"""
    split: str = option("validation", choices=("train", "validation"))
    """validation (held-out pairs) or train"""
    dataset_name: str | None = None
    """Other data than the run's: a folder, file or Hub id"""
    max_samples: int = option(0, at_least=0)
    """Look at so many pairs only, the first ones; 0 looks at all"""
    num_beams: int = option(1, at_least=1)
    """Of the captions; 1 is greedy"""
    num_candidates: int = option(1, at_least=1)
    """Captions that are drawn for each picture, of which the one most like all of them is taken; 1 draws none"""
    num_pairs: int = 8
    """Invented pairs in the picture of them"""
    seed: int = 0
    """Of the shuffled and the invented pairs"""
    device: str | None = None
    """Where models run: cpu, cuda, cuda:1, mps, ...; unset: the GPU if there is one, otherwise the CPU"""
    pictures: str | None = None
    """Folder for PNGs of reconstructions, drawings and invented pairs; unset: none"""
    output: str | None = None
    """Where the figures go (JSON); unset: only printed"""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        if not self.model:
            raise UserError("--model is missing; name a run of train_image_caption.py, a checkpoint or a pipeline")


def evaluate(config: CaptionEvaluationConfig) -> dict[str, Any]:
    """Captions, perplexity, retrieval, alignment and reconstruction of one split.

    Raises:
        UserError: no such model or data.
    """
    from pipelines.caption import load_captioner

    torch.set_num_threads(threads_per_process())
    pipeline = load_captioner(config.model, config.device)
    pipeline.set_progress_bar_config(disable=True)
    train, held_out = data_of(config, pipeline)
    data = train if config.split == "train" else held_out
    if data is None:
        raise UserError(f"the data of {config.model} has no held-out pairs; look at --split train")
    rows = list(range(len(data)))
    if data is held_out:
        known = {name for batch in _batches(train, range(len(train))) for name in image_names(batch)}
        seen = [name in known for batch in _batches(data, rows) for name in image_names(batch)]
        rows = [row for row in rows if not seen[row]]
        if not rows:
            raise UserError(f"all {len(data):,} held-out pictures of {config.model} are among those it trained on")
    rows = rows[: config.max_samples or None]
    found = _over_batches(pipeline, data, rows, config)
    references, told = found.pop("references"), found.pop("told")
    first = [own[0] for own in references]
    similarity, right = found.pop("similarity"), same_pairs(first, found.pop("pictures"))
    candidates = list(captions_of(train.captioned, train.config.caption_column))
    constant, constant_bleu = best_constant_caption(candidates, references)
    figures: dict[str, Any] = {
        "pairs": len(rows),
        **({"left_out": sum(seen)} if data is held_out else {}),
        **caption_scores(told, references),
        "constant_caption": constant,
        "constant_caption_bleu_4": constant_bleu,
        "exact_captions": sum(a in map(_plain, own) for a, own in zip(told, references)) / len(rows),
        **found,
        **retrieval_metrics(similarity, right),
        **alignment_metrics(similarity, right, config.seed),
        **_invented(pipeline, config.seed),
    }
    if config.pictures:
        _save_pictures(pipeline, data, rows, told, config)
    if config.output:
        write_json(config.output, figures)
    return figures


def data_of(config: CaptionEvaluationConfig, pipeline: Any) -> tuple[CaptionedImages, CaptionedImages | None]:
    """The pairs that the run trained on and those that it held out. Raises UserError."""
    run = next((f for f in _folders(Path(config.model).expanduser()) if (f / "config.yaml").is_file()), None)
    settings: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text()) if run else {}
    if not (config.dataset_name or settings):
        raise UserError(f"{config.model} is no run that tells its data; name them with --dataset_name")
    known = CaptionDataConfig.__dataclass_fields__
    chosen = {name: value for name, value in settings.items() if name in known}
    if config.dataset_name:
        chosen |= {"dataset_name": config.dataset_name, "train_data_dir": None}
    chosen |= {"resolution": pipeline.model.config.sample_size, "image_fit": pipeline.config.image_fit}
    chosen |= {"image_interpolation_mode": pipeline.config.image_interpolation_mode}
    # No picture is flipped or cut elsewhere than in its middle: they are looked at as the pipeline would.
    chosen |= {"random_flip": False, "center_crop": True}
    return load_captioned(CaptionDataConfig(**chosen), settings.get("seed", 0), every_caption=True)


def image_names(batch: Mapping[str, Any]) -> list[str]:
    """A name for each picture of a batch: equal ones have the same."""
    return [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in batch["pixel_values"].contiguous()]


def _batches(data: CaptionedImages, rows: Sequence[int]) -> Iterator[Mapping[str, Any]]:
    for start in range(0, len(rows), BATCH):
        yield fetch(data, [SampleKey(row, 0) for row in rows[start : start + BATCH]])


def _folders(path: Path) -> list[Path]:
    """A run's folder, whether it or something in it was named."""
    return [path, *path.parents[:4]]


def _references(batch: Mapping[str, Any]) -> list[list[str]]:
    """All captions of each picture."""
    return [own if isinstance(own, list) else [own] for own in batch["caption"]]


def _plain(text: str) -> str:
    """As captions are told: lower case, single spaces."""
    return " ".join(text.lower().split())


@torch.no_grad()
def _over_batches(
    pipeline: Any, data: CaptionedImages, rows: Sequence[int], config: CaptionEvaluationConfig
) -> dict[str, Any]:
    """Captions, latents' similarities and means over the pairs of `rows`."""
    model, device = pipeline.model, pipeline._execution_device
    tokens = CaptionTokens(pipeline.tokenizer, model.config.max_length, "longest")
    references: list[list[str]] = []
    told: list[str] = []
    pictures: list[str] = []
    latents: dict[str, list[torch.Tensor]] = {"image": [], "caption": []}
    sums = {"told": 0.0, "repeated": 0.0, "tokens": 0.0, "psnr": 0.0, "ssim": 0.0, "drawn_psnr": 0.0}
    for batch in _batches(data, rows):
        pixels = batch["pixel_values"].to(device)
        own_references = _references(batch)
        text = to_device(tokens([own[0] for own in own_references]), device)
        ids, mask = text["input_ids"], text["attention_mask"]
        image, caption = (posterior.mean for posterior in model(pixels, ids, mask))
        references += own_references
        pictures += image_names(batch)
        generators = [torch.Generator().manual_seed(config.seed + len(told) + i) for i in range(len(pixels))]
        told += pipeline.caption(
            (pixels + 1) / 2,
            num_beams=config.num_beams,
            num_candidates=config.num_candidates,
            generator=generators,
        )
        for name, own in (("told", image), ("repeated", caption)):
            losses, lengths = token_losses(model.caption_logits(own, ids), ids, mask)
            sums[name] += float(losses.sum())
        sums["tokens"] += float(lengths.sum())
        decoded, drawn = model.decode_image(image), model.decode_image(caption)
        sums["psnr"] += float(psnr(decoded, pixels).sum())
        sums["ssim"] += float(ssim(decoded, pixels).sum())
        sums["drawn_psnr"] += float(psnr(drawn, pixels).sum())
        for name, own in (("image", image), ("caption", caption)):
            latents[name].append(torch.nn.functional.normalize(own.float(), dim=1).cpu())
    similarity = torch.cat(latents["image"]) @ torch.cat(latents["caption"]).T
    return {
        "references": references,
        "told": told,
        "pictures": pictures,
        "similarity": similarity.numpy().astype(np.float64),
        "caption_loss": sums["told"] / sums["tokens"],
        "perplexity": perplexity(sums["told"], sums["tokens"]),
        "repeated_perplexity": perplexity(sums["repeated"], sums["tokens"]),
        **{name: sums[name] / len(rows) for name in ("psnr", "ssim", "drawn_psnr")},
    }


def _invented(pipeline: Any, seed: int) -> dict[str, float]:
    """How well the captions of invented pairs fit their pictures: the mean cosine, both encoded anew."""
    if pipeline.prior is None:
        return {}
    generators = [torch.Generator().manual_seed(seed + i) for i in range(INVENTED)]
    pairs = pipeline.sample(INVENTED, generator=generators, output_type="pt")
    fits = [i for i, caption in enumerate(pairs.captions) if caption]
    if len(fits) < 2:
        return {}
    cosines = pipeline.similarity(pairs.images[fits], [pairs.captions[i] for i in fits]).diag()
    return {
        "invented_alignment": float(cosines.mean()),
        "invented_alignment_standard_error": float(cosines.std() / math.sqrt(len(fits))),
    }


def _save_pictures(
    pipeline: Any,
    data: CaptionedImages,
    rows: Sequence[int],
    told: Sequence[str],
    config: CaptionEvaluationConfig,
) -> None:
    """reconstructions, drawings and pairs, as PNGs named after the split."""
    folder = Path(config.pictures or "")
    shown = min(SHOWN, len(told))
    step = len(told) // shown
    places = [i * step for i in range(shown)]  # from all over the data, where neighbours are often alike
    batch = fetch(data, [SampleKey(rows[place], 0) for place in places])
    originals = pipeline.in_proportion([to_pil(image) for image in batch["pixel_values"]])
    latents = pipeline.encode_images((batch["pixel_values"] + 1) / 2)
    restored: list[Image.Image] = pipeline.decode_latents(latents)
    said = [f"as told: {told[place]}" for place in places]
    captions = [own[0] for own in _references(batch)]
    truth = [f"truth: {text}" for text in captions]
    save_png(_one_above_the_other(originals, truth, restored, said), folder / f"{config.split}_reconstructions.png")
    drawn = pipeline.draw(captions).images
    of_it = ["the picture of it"] * shown
    save_png(_one_above_the_other(drawn, captions, originals, of_it), folder / f"{config.split}_drawings.png")
    if pipeline.prior is not None:
        generators = [torch.Generator().manual_seed(config.seed + i) for i in range(config.num_pairs)]
        pairs = pipeline.sample(config.num_pairs, generator=generators)
        save_png(image_grid(pairs.images, pairs.captions), folder / "invented_pairs.png")


def _one_above_the_other(
    above: Sequence[Image.Image], words: Sequence[str], below: Sequence[Image.Image], words_below: Sequence[str]
) -> Image.Image:
    """Pictures above others, each with its words; wide ones in shorter rows."""
    columns = len(above) if above[0].width < 2 * above[0].height else math.ceil(len(above) / 2)
    images: list[Image.Image] = []
    captions: list[str] = []
    for start in range(0, len(above), columns):
        row = slice(start, start + columns)
        images += [*above[row], *below[row]]
        captions += [*words[row], *words_below[row]]
    return image_grid(images, captions, columns=columns)


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(CaptionEvaluationConfig, argv, description=__doc__)
    for name, value in evaluate(config).items():
        print(f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}")


if __name__ == "__main__":
    entry_point(main)
