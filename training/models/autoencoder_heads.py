"""The autoencoder's heads: what they learn from, how well they read, and how that is shown.

B pictures, K classes of pixels, N classes of pictures, H W pixels.
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
from training.data.transforms import BrokenImage, open_image
from training.metrics.images import psnr, to_pil
from training.models.autoencoder import Decoded
from training.objectives.segmentation import IGNORE_INDEX, class_areas, mean_iou, pixel_accuracy

logger = logging.getLogger("halftone")

COUNTED_MASKS = 2048
# More than this times as many ids as occur: the column holds grey values rather than class ids.
SPARSE_IDS = 8
MOST_LEGEND_COLORS = 8
AREAS = ("hit", "total", "taken")


@dataclass
class HeadsConfig(Options):
    """Which heads the autoencoder has, and what they weigh."""

    heads: list[Literal["segmentation", "classification"]] = option([])
    """Heads beside the reconstruction: segmentation (of --mask_column), classification (of --label_column)"""
    num_mask_classes: int = option(0, at_least=0)
    """Classes of the masks; 0 counts them in the training data"""
    mask_class_names: list[str] = option([])
    """Names of the classes of the masks, from id 0 on; they are saved with the model"""
    segmentation_weight: float = option(0.01, on_resume="warn", at_least=0)
    """Weight of the cross-entropy per pixel; a fresh head's is some ten times the reconstruction's error"""
    classification_weight: float = option(0.01, on_resume="warn", at_least=0)
    """Weight of the cross-entropy per picture"""
    learned_loss_weights: bool = option(False)
    """Train the weights of reconstruction and heads (Kendall et al. 2018); they start as the weights given"""

    def check_heads(self, class_name: str) -> None:
        """Raise UserError for heads that do not go together, or not with an autoencoder of this class."""
        if not self.heads:
            if self.learned_loss_weights:
                raise UserError("--learned_loss_weights needs more than one loss; give --heads, or leave it out")
            return
        wanted = f"--heads '[{','.join(self.heads)}]'"
        if len(set(self.heads)) < len(self.heads):
            raise UserError(f"{wanted} names a head twice; name each once")
        if class_name != "MultiHeadAutoencoderKL":
            raise UserError(f"{wanted} is for MultiHeadAutoencoderKL; leave --model.class_name {class_name} out")
        for head in self.heads if self.learned_loss_weights else ():
            if not getattr(self, f"{head}_weight"):
                raise UserError(f"--{head}_weight is 0; learned weights start from it, so it must be above 0")
        names, number = self.mask_class_names, self.num_mask_classes
        if names and number and len(names) != number:
            raise UserError(
                f"--mask_class_names has {len(names)} names and --num_mask_classes is {number}; leave the number out"
            )
        if number == 1 or len(names) == 1 or max(number, len(names)) > IGNORE_INDEX:
            raise UserError(f"{max(number, len(names))} classes of masks; a head tells apart 2 to {IGNORE_INDEX}")


def count_mask_classes(config: DataConfig) -> int:
    """One more than the largest class id in (up to `COUNTED_MASKS` of) the training split's masks.

    Raises:
        UserError: no such column, no mask that can be read, or ids that are no class ids.
    """
    column = config.mask_column
    dataset = named_split(config, load_all_splits(config), config.train_split)
    require_column(dataset, column, "mask_column")
    masks = undecoded_images(dataset.select_columns([column]), column, "mask_column")
    read_as = SegmentationMask(column, IGNORE_INDEX)
    pixels = np.zeros(IGNORE_INDEX + 1, dtype=np.int64)
    problem = ""
    for _, values in chunks(masks, evenly_spaced(len(masks), COUNTED_MASKS)):
        for source in values[column]:
            try:
                (mask,) = read_as.load({column: source}, open_image(source).size)
            except (BadSample, BrokenImage) as error:
                problem = str(error)  # the look at all rows, later, names the row
            else:
                pixels += np.bincount(np.asarray(mask).ravel(), minlength=len(pixels))
    found = np.flatnonzero(pixels[:IGNORE_INDEX])
    if not found.size:
        raise UserError(f"column '{column}' has no masks ({problem or 'nothing is labelled'}); see --mask_column")
    classes = int(found[-1]) + 1
    if classes < 2 or classes > SPARSE_IDS * found.size:
        raise UserError(
            f"column '{column}' has class ids {', '.join(map(str, found[:10]))}; masks number their classes from 0, "
            f"two at least ({IGNORE_INDEX} means unlabelled): choose another with --mask_column"
        )
    logger.info("%d classes in the masks of column '%s'", classes, column)
    return classes


@dataclass(frozen=True)
class Heads:
    """The heads of one autoencoder: the names of their classes, and what they need of the data."""

    mask_classes: list[str]
    """By id; empty without a segmentation head."""
    label_map: LabelMap | None
    """None without a classification head."""

    @classmethod
    def of(cls, config: Any) -> Heads:
        """What `config` (a HeadsConfig and DataConfig) asks for.

        Raises:
            UserError: the data has no such column, or nothing in it that could be classes.
        """
        mask_classes: list[str] = []
        if "segmentation" in config.heads:
            number = config.num_mask_classes or len(config.mask_class_names) or count_mask_classes(config)
            mask_classes = list(config.mask_class_names) or [f"class {id_}" for id_ in range(number)]
        label_map = load_label_map(config) if "classification" in config.heads else None
        if label_map is not None and len(label_map) < 2:
            raise UserError(
                f"column '{config.label_column}' has {len(label_map)} class, and there is nothing to tell apart; "
                "choose another with --label_column, or leave classification out of --heads"
            )
        return cls(mask_classes, label_map)

    def model_arguments(self) -> dict[str, Any]:
        """The heads' arguments of MultiHeadAutoencoderKL; empty without heads."""
        arguments: dict[str, Any] = {}
        if self.mask_classes:
            names = dict(enumerate(self.mask_classes))
            arguments |= {"num_mask_classes": len(names), "id2mask_class": names}
        if self.label_map is not None:
            names = dict(enumerate(self.label_map.names))
            arguments |= {"num_classes": len(names), "id2label": names}
        return arguments

    def data_arguments(self) -> dict[str, Any]:
        """The heads' arguments of ImageDataset."""
        labels = {"labels": True, "label_map": self.label_map} if self.label_map is not None else {}
        return {"num_mask_classes": len(self.mask_classes), **labels}

    def sums(self, batch: Mapping[str, Any], mask_logits: Tensor | None, class_logits: Tensor | None) -> dict:
        """What `metrics` is made from, for one batch: numbers that can be added up."""
        sums: dict[str, Tensor] = {}
        if mask_logits is not None:
            areas = class_areas(mask_logits.argmax(1), batch["mask"], len(self.mask_classes))
            for name, by_class in zip(AREAS, areas, strict=True):
                sums |= {f"{name}_{id_}": area for id_, area in enumerate(by_class.cpu())}
        if class_logits is not None:
            sums["recognised"] = (class_logits.argmax(1) == batch["label"]).sum()
        return sums

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """val_pixel_accuracy, val_mean_iou (of areas summed over all pictures) and val_top1_accuracy."""
        found: dict[str, float] = {}
        if self.mask_classes:
            ids = range(len(self.mask_classes))
            hit, total, taken = ([sums[f"{name}_{id_}"] for id_ in ids] for name in AREAS)
            found |= {"val_pixel_accuracy": pixel_accuracy(hit, total), "val_mean_iou": mean_iou(hit, total, taken)}
        if self.label_map is not None:
            found["val_top1_accuracy"] = sums["recognised"] / sums["count"]
        return found

    def preview_cells(self, batch: Mapping[str, Any], decoded: Decoded) -> list[tuple[Image.Image, str]]:
        """Each image, its reconstruction and its masks, with captions; then a legend of the masks' colours."""
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
        return cells + self.legend(images.shape[-1])

    def class_words(self, batch: Mapping[str, Any], class_logits: Tensor | None) -> list[tuple[str, str]]:
        """For each image, what its caption and its reconstruction's say of its class: the target and the prediction."""
        if class_logits is None or self.label_map is None:
            return [("", "")] * len(batch["pixel_values"])
        names = self.label_map.names
        pairs = zip(batch["label"].tolist(), class_logits.argmax(1).tolist(), strict=True)
        return [(f", {names[true]}", f", read as {names[read]}") for true, read in pairs]

    def mask_cells(self, batch: Mapping[str, Any], mask_logits: Tensor | None) -> list[list[tuple[Image.Image, str]]]:
        """For each image its target mask and the predicted one, with captions; empty without a segmentation head."""
        if mask_logits is None:
            return [[] for _ in batch["pixel_values"]]
        cells = []
        for true, read in zip(batch["mask"].cpu(), mask_logits.argmax(1).cpu(), strict=True):
            iou = mean_iou(*(area.tolist() for area in class_areas(read, true, len(self.mask_classes))))
            cells.append([(mask_to_pil(true), "mask"), (mask_to_pil(read), f"mask as read, IoU {iou:.2f}")])
        return cells

    def legend(self, size: int) -> list[tuple[Image.Image, str]]:
        """Stripes in the colours of the mask classes, with their names; nothing where there are too many of them."""
        number = len(self.mask_classes)
        if not 0 < number <= MOST_LEGEND_COLORS:
            return []
        stripes = np.arange(size) * number // size
        picture = class_ids_to_pil(np.repeat(stripes[:, None], size, axis=1)).convert("RGB")
        return [(picture, f"from the top: {', '.join(self.mask_classes)}")]

    def card_facts(self) -> dict[str, Any]:
        """What the model card says of the heads."""
        labels: Sequence[str] = self.label_map.names if self.label_map is not None else []
        return {"mask_classes": self.mask_classes, "classes": list(labels)}


def mask_to_pil(ids: Tensor) -> Image.Image:
    """Class ids H W in the colours of their classes."""
    return class_ids_to_pil(ids.to(torch.uint8).numpy()).convert("RGB")
