"""Metrics of how well a model follows its control: generated images are read and compared with their controls.

B images, C control channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipelines.tools.cli import UserError
from training.objectives.segmentation import one_hot

MASKS = ("text_mask", "image_mask")
IGNORED_BELOW = 2.0
"""In standard errors; a smaller difference counts as noise"""


class ControlReader:
    """Reads control channels from images, with a layout encoder or the segmentation head of an autoencoder.

    Args:
        path: a run, checkpoint or pipeline of train_encoder.py (or train_abstractor.py), or of train_autoencoder.py
            with a segmentation head.
        kind, names, channels: kind, channel names and number of channels of the control.

    Raises:
        UserError: the model does not exist or does not read these channels.
    """

    def __init__(self, path: str, kind: str, names: Sequence[str], channels: int):
        from pipelines.tools.loading import load_pipeline

        components = load_pipeline(path).components
        self.module = components.get("encoder") or components.get("vae")
        self.kind, self.names = kind, list(names)
        reads_layout = components.get("encoder") is not None
        of_classes = "num_color_roles" if reads_layout else "num_mask_classes"
        known = getattr(getattr(self.module, "config", None), of_classes, 0)
        readable = reads_layout and set(names) <= set(MASKS) if kind == "masks" else kind == "classes"
        if not readable or kind == "classes" and known != channels:
            raise UserError(
                f"--reader {path} does not read this control ({channels} channels of kind {kind}: "
                f"{', '.join(names) or 'images'}); a layout encoder reads {' and '.join(MASKS)} or its colour roles, "
                "an autoencoder with a segmentation head reads its classes"
                + (f" (this model has {known} classes)" if known and kind == "classes" else "")
            )
        self._read = self._layout if reads_layout else self._segments
        self.module.requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Read `images` (B 3 H W in [-1, 1], on any device): B C H W, bool, on the same device."""
        return self._read(images.to(self.module.device)).to(images.device)

    def _layout(self, images: Tensor) -> Tensor:
        output = self.module(images)
        if self.kind == "classes":
            return one_hot(output.color_role.argmax(1), output.color_role.shape[1]).bool()
        return torch.cat([output[name] > 0 for name in self.names], 1)

    def _segments(self, images: Tensor) -> Tensor:
        latents: Any = self.module.encode(images).latent_dist.mode()
        logits = self.module.segment(latents)
        return one_hot(logits.argmax(1), logits.shape[1]).bool()


def control_iou(read: Tensor, control: Tensor) -> Tensor:
    """Compute the intersection over union of read and target channels, mean over channels that are not empty in both.

    Args:
        read: B C H W, bool, the channels that were read from images.
        control: B C H W in [0, 1]; pixels above 0.5 are the target.

    Returns:
        B, in [0, 1]; 1 if all channels are empty in both.
    """
    target = control > 0.5
    both = (read & target).flatten(2).sum(2).float()
    either = (read | target).flatten(2).sum(2).float()
    there = either > 0
    shares = torch.where(there, both / either.clamp(min=1), torch.zeros_like(both))
    return torch.where(there.any(1), shares.sum(1) / there.sum(1).clamp(min=1), torch.ones_like(shares[:, 0]))


def others(batch: Tensor) -> Tensor:
    """Return for each sample the control of the next sample; a single sample gets its own, upside down."""
    return batch.roll(1, 0) if len(batch) > 1 else batch.flip(-2)


def in_standard_errors(total: float, squares: float, count: float) -> float:
    """Compute mean / standard error of paired differences from their sum and sum of squares; 0 for fewer than two."""
    if count < 2:
        return 0.0
    mean = total / count
    variance = max(squares / count - mean**2, 0.0) * count / (count - 1)
    if variance <= 1e-24:
        return 0.0 if abs(mean) < 1e-12 else float("inf") * (1 if mean > 0 else -1)
    return mean / (variance / count) ** 0.5


def control_sums(predictions: Sequence[Tensor], losses: Sequence[Tensor]) -> dict[str, Tensor]:
    """Compute the sums over one batch from which `control_metrics` are calculated.

    Args:
        predictions: predictions with the true control, without control, and with that of another sample; B C h w each.
        losses: losses of these predictions; B each.
    """
    true, none, shuffled = predictions
    sums = {"count": torch.tensor(len(true)), **_gain_sums("gain", losses[2] - losses[0])}
    sums |= {name: loss.sum() for name, loss in zip(("true", "none", "shuffled"), losses, strict=True)}
    sums["power"] = true.float().square().sum()
    sums["change_none"] = (true - none).float().square().sum()
    sums["change_shuffled"] = (true - shuffled).float().square().sum()
    return sums


def iou_sums(read: Tensor | None, control: Tensor) -> dict[str, Tensor]:
    """Compute the sums over generated images from which `control_metrics` are calculated.

    Args:
        read: B C H W, the channels read from the images; None if no images were generated for this batch.
        control: B C H W, their controls.
    """
    if read is None:
        return dict.fromkeys(("read", "iou", "iou_shuffled", "iou_gain", "iou_gain_squares"), torch.tensor(0.0))
    own, other = control_iou(read, control), control_iou(read, others(control))
    sums = {"read": torch.tensor(float(len(read))), "iou": own.sum(), "iou_shuffled": other.sum()}
    return {**sums, **_gain_sums("iou_gain", own - other)}


def _gain_sums(name: str, gain: Tensor) -> dict[str, Tensor]:
    return {name: gain.sum(), f"{name}_squares": gain.double().square().sum()}


def control_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Compute losses with the true control, without control and with that of another sample, and sensitivities.

    A sensitivity is the root mean square change of the prediction relative to the prediction. IoUs of generated images
    are included if there are any.
    """
    count = sums["count"]
    metrics = {
        "val_loss": sums["true"] / count,
        "val_loss_without_control": sums["none"] / count,
        "val_loss_shuffled_control": sums["shuffled"] / count,
        "val_control_sensitivity": (sums["change_none"] / sums["power"]) ** 0.5,
        "val_shuffled_sensitivity": (sums["change_shuffled"] / sums["power"]) ** 0.5,
        "val_control_gain_in_standard_errors": in_standard_errors(sums["gain"], sums["gain_squares"], count),
    }
    if sums.get("read"):
        metrics["val_control_iou"] = sums["iou"] / sums["read"]
        metrics["val_shuffled_iou"] = sums["iou_shuffled"] / sums["read"]
        metrics["val_iou_gain_in_standard_errors"] = in_standard_errors(
            sums["iou_gain"], sums["iou_gain_squares"], sums["read"]
        )
    return metrics
