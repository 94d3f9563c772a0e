"""The heads of an autoencoder: their settings, targets, metrics and previews.

B images, K pixel classes, N image classes, H W pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipelines.common.class_colors import class_ids_to_pil
from pipelines.tools.cli import UserError
from training.core.options import Options, option
from training.data.checks import chunks
from training.data.companions import SegmentationMask
from training.data.fingerprints import evenly_spaced
from training.data.images import BadSample, LabelMap, load_label_map
from training.data.source import DataConfig, load_all_splits, named_split, require_column, undecoded_images
from training.data.transforms import BrokenImage, load_upright
from training.metrics.images import psnr, to_pil
from training.models.autoencoder import AutoencoderOutput
from training.objectives.segmentation import IGNORE_INDEX, class_areas, mean_iou, pixel_accuracy

logger = logging.getLogger("halftone")

COUNTED_MASKS = 2048  # masks that are read to count their classes
# Where the ids up to the largest are more than this many times those that occur, the values are grey, not class ids.
SPARSE_IDS = 8
MOST_LEGEND_COLORS = 8
# True positives, target pixels and predicted pixels per class, in the order of `class_areas`.
AREAS = ("hit", "total", "taken")


@dataclass
class HeadsConfig(Options):
    """Heads of the autoencoder and the weights of their losses."""

    heads: list[Literal["segmentation", "classification"]] = option([])
    """Heads to train: '[segmentation]' (targets from --mask_column), '[classification]' (targets from
    --label_column), both, or '[]' for none"""
    num_mask_classes: int = option(0, at_least=0)
    """Number of mask classes; 0 counts them in the training data"""
    mask_class_names: list[str] = option([])
    """Names of the mask classes, starting with id 0, which are saved with the model"""
    segmentation_weight: float = option(0.01, on_resume="warn", at_least=0)
    """Weight of the segmentation loss (cross-entropy per pixel), which is about ten times the reconstruction error
    for an untrained head"""
    classification_weight: float = option(0.01, on_resume="warn", at_least=0)
    """Weight of the classification loss (cross-entropy per image)"""
    learned_loss_weights: bool = option(False)
    """Learn the weights of the reconstruction and head losses (Kendall et al. 2018), starting from the given weights"""

    def check_heads(self, class_name: str) -> None:
        """Raise UserError for heads that cannot be combined, or that an autoencoder of this class cannot have."""
        if not self.heads:
            if self.learned_loss_weights:
                raise UserError(
                    "--learned_loss_weights needs more than one loss; set --heads, or remove --learned_loss_weights"
                )
            return
        given = f"--heads '[{','.join(self.heads)}]'"
        if len(set(self.heads)) < len(self.heads):
            raise UserError(f"{given} names a head twice; name each head once")
        if class_name != "MultiHeadAutoencoderKL":
            raise UserError(f"{given} works only with MultiHeadAutoencoderKL; remove --model.class_name {class_name}")
        for head in self.heads if self.learned_loss_weights else ():
            if not getattr(self, f"{head}_weight"):
                raise UserError(
                    f"--{head}_weight is 0; --learned_loss_weights starts from this weight, so it must be above 0"
                )
        names, number = self.mask_class_names, self.num_mask_classes
        if names and number and len(names) != number:
            raise UserError(
                f"--mask_class_names has {len(names)} names, but --num_mask_classes is {number}; "
                "remove --num_mask_classes"
            )
        if number == 1 or len(names) == 1 or max(number, len(names)) > IGNORE_INDEX:
            raise UserError(
                f"the number of mask classes must be 2 to {IGNORE_INDEX}, but is {max(number, len(names))}; "
                "change --num_mask_classes or --mask_class_names"
            )


def count_mask_classes(config: DataConfig) -> int:
    """Return the number of mask classes in the training split: the largest class id in its masks, plus 1.

    At most `COUNTED_MASKS` masks are read.

    Raises:
        UserError: the column is missing, none of its masks can be read, or its values are not class ids.
    """
    column = config.mask_column
    dataset = named_split(config, load_all_splits(config), config.train_split)
    require_column(dataset, column, "mask_column")
    masks = undecoded_images(dataset.select_columns([column]), column, "mask_column", config)
    read_as = SegmentationMask(column, IGNORE_INDEX)
    pixels = np.zeros(IGNORE_INDEX + 1, dtype=np.int64)
    problem = ""
    for _, values in chunks(masks, evenly_spaced(len(masks), COUNTED_MASKS)):
        for source in values[column]:
            try:
                (mask,) = read_as.load({column: source}, load_upright(source).size)
            except (BadSample, BrokenImage) as error:
                problem = str(error)  # the later check of all rows names the row
            else:
                pixels += np.bincount(np.asarray(mask).ravel(), minlength=len(pixels))
    ids = np.flatnonzero(pixels[:IGNORE_INDEX])
    if not ids.size:
        raise UserError(
            f"column '{column}' has no masks ({problem or 'no pixel is labelled'}); choose another with --mask_column"
        )
    classes = int(ids[-1]) + 1
    if classes < 2 or classes > SPARSE_IDS * ids.size:
        raise UserError(
            f"column '{column}' has the class ids {', '.join(map(str, ids[:10]))}; mask classes must be numbered from "
            f"0 and be at least two ({IGNORE_INDEX} means unlabelled); choose another column with --mask_column"
        )
    logger.info("%d classes in the masks of column '%s'", classes, column)
    return classes


@dataclass(frozen=True)
class Heads:
    """The heads of one autoencoder: their class names, and the arguments that they need for the model and the data."""

    mask_classes: list[str]
    """Names of the mask classes by id; empty without a segmentation head."""
    label_map: LabelMap | None
    """Names of the image classes; None without a classification head."""

    @classmethod
    def of(cls, config: Any, recorded: Sequence[str] = ()) -> Heads:
        """Create the heads that `config` (a HeadsConfig and DataConfig) names.

        Args:
            recorded: names of the image classes of the model whose weights are loaded (see `LabelMap.of`).

        Raises:
            UserError: a column is missing in the data, or its values are not classes.
        """
        mask_classes: list[str] = []
        if "segmentation" in config.heads:
            number = config.num_mask_classes or len(config.mask_class_names) or count_mask_classes(config)
            mask_classes = list(config.mask_class_names) or [f"class {id_}" for id_ in range(number)]
        label_map = load_label_map(config, recorded) if "classification" in config.heads else None
        if label_map is not None and len(label_map) < 2:
            raise UserError(
                f"column '{config.label_column}' has {len(label_map)} class, but classification needs at least two; "
                "choose another column with --label_column, or remove classification from --heads"
            )
        return cls(mask_classes, label_map)

    def model_arguments(self) -> dict[str, Any]:
        """Return the arguments of MultiHeadAutoencoderKL for the heads; empty without heads."""
        arguments: dict[str, Any] = {}
        if self.mask_classes:
            names = dict(enumerate(self.mask_classes))
            arguments |= {"num_mask_classes": len(names), "id2mask_class": names}
        if self.label_map is not None:
            names = dict(enumerate(self.label_map.names))
            arguments |= {"num_classes": len(names), "id2label": names}
        return arguments

    def data_arguments(self) -> dict[str, Any]:
        """Return the arguments of ImageDataset for the heads' targets."""
        labels = {"labels": True, "label_map": self.label_map} if self.label_map is not None else {}
        return {"num_mask_classes": len(self.mask_classes), **labels}

    def sums(self, batch: Mapping[str, Any], mask_logits: Tensor | None, class_logits: Tensor | None) -> dict:
        """Compute the sums from which `metrics` computes the metrics, for one batch; batches are added up."""
        sums: dict[str, Tensor] = {}
        if mask_logits is not None:
            areas = class_areas(mask_logits.argmax(1), batch["mask"], len(self.mask_classes))
            for name, by_class in zip(AREAS, areas, strict=True):
                sums |= {f"{name}_{id_}": area for id_, area in enumerate(by_class.cpu())}
        if class_logits is not None:
            sums["recognised"] = (class_logits.argmax(1) == batch["label"]).sum()
        return sums

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Compute val_pixel_accuracy, val_mean_iou (from areas summed over all images) and val_top1_accuracy."""
        metrics: dict[str, float] = {}
        if self.mask_classes:
            ids = range(len(self.mask_classes))
            hit, total, taken = ([sums[f"{name}_{id_}"] for id_ in ids] for name in AREAS)
            metrics |= {"val_pixel_accuracy": pixel_accuracy(hit, total), "val_mean_iou": mean_iou(hit, total, taken)}
        if self.label_map is not None:
            metrics["val_top1_accuracy"] = sums["recognised"] / sums["count"]
        return metrics

    def preview_cells(self, batch: Mapping[str, Any], decoded: AutoencoderOutput) -> list[tuple[Image.Image, str]]:
        """Return each image, its reconstruction and its masks, with captions."""
        images = batch["pixel_values"]
        decibels = psnr(decoded.images, images).tolist()
        words = self.class_words(batch, decoded.class_logits)
        masks = self.mask_cells(batch, decoded.mask_logits)
        cells = []
        for row in range(len(images)):
            target, predicted = words[row]
            cells.append((to_pil(images[row]), f"original{target}"))
            cells.append((to_pil(decoded.images[row]), f"reconstruction, {decibels[row]:.1f} dB{predicted}"))
            cells += masks[row]
        return cells

    def class_words(self, batch: Mapping[str, Any], class_logits: Tensor | None) -> list[tuple[str, str]]:
        """Return the target class and the predicted class of each image, as endings for the captions of its cells."""
        if class_logits is None or self.label_map is None:
            return [("", "")] * len(batch["pixel_values"])
        names = self.label_map.names
        pairs = zip(batch["label"].tolist(), class_logits.argmax(1).tolist(), strict=True)
        return [(f", {names[target]}", f", predicted: {names[predicted]}") for target, predicted in pairs]

    def mask_cells(self, batch: Mapping[str, Any], mask_logits: Tensor | None) -> list[list[tuple[Image.Image, str]]]:
        """Return each image's target and predicted masks, with captions; empty without a segmentation head."""
        if mask_logits is None:
            return [[] for _ in batch["pixel_values"]]
        cells = []
        for target, predicted in zip(batch["mask"].cpu(), mask_logits.argmax(1).cpu(), strict=True):
            iou = mean_iou(*(area.tolist() for area in class_areas(predicted, target, len(self.mask_classes))))
            cells.append([(mask_to_pil(target), "mask"), (mask_to_pil(predicted), f"predicted mask, IoU {iou:.2f}")])
        return cells

    def legend(self, size: int) -> list[tuple[Image.Image, str]]:
        """Return an image with a stripe in each mask class's colour, with the names; empty for too many classes."""
        number = len(self.mask_classes)
        if not 0 < number <= MOST_LEGEND_COLORS:
            return []
        stripes = np.arange(size) * number // size
        image = class_ids_to_pil(np.repeat(stripes[:, None], size, axis=1)).convert("RGB")
        return [(image, f"from top to bottom: {', '.join(self.mask_classes)}")]

    def card_facts(self) -> dict[str, Any]:
        """Return the facts about the heads for the model card."""
        labels: Sequence[str] = self.label_map.names if self.label_map is not None else []
        return {"mask_classes": self.mask_classes, "classes": list(labels)}


def mask_to_pil(ids: Tensor) -> Image.Image:
    """Convert class ids (H W) to an image in the colours of their classes."""
    return class_ids_to_pil(ids.to(torch.uint8).numpy()).convert("RGB")
