"""Does a model do what its control says? Pictures read back and compared with their controls; pure arithmetic beside.

B pictures, C control channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipelines.cli import UserError
from training.segmentation import one_hot

MASKS = ("text_mask", "image_mask")
IGNORED_BELOW = 2.0
"""Standard errors: a difference below this is noise"""


class ControlReader:
    """Reads control channels from pictures, with a layout encoder or the segmentation head of an autoencoder.

    Args:
        path: a run, checkpoint or pipeline of train_encoder.py (or train_abstractor.py), or of train_autoencoder.py
            with a segmentation head.
        kind, names: of the control channels.

    Raises:
        UserError: no such model, or one that does not read these channels.
    """

    def __init__(self, path: str, kind: str, names: Sequence[str]):
        from pipelines.loading import load_pipeline

        components = load_pipeline(path).components
        self.module = components.get("encoder") or components.get("vae")
        self.kind, self.names = kind, list(names)
        reads_layout = components.get("encoder") is not None
        readable = reads_layout and (kind == "masks" and set(names) <= set(MASKS) or kind == "classes")
        segments = not reads_layout and kind == "classes" and getattr(self.module, "segment", None) is not None
        if not (readable or segments):
            raise UserError(
                f"--reader {path} does not read this control ({kind}: {', '.join(names) or 'pictures'}); "
                f"a layout encoder reads {' and '.join(MASKS)} or colour roles, an autoencoder with a segmentation "
                "head class ids"
            )
        self._read = self._layout if reads_layout else self._segments
        self.module.requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """`images` (B 3 H W in [-1, 1]) → B C H W, bool."""
        return self._read(images)

    def _layout(self, images: Tensor) -> Tensor:
        found = self.module(images)
        if self.kind == "classes":
            return one_hot(found.color_role.argmax(1), found.color_role.shape[1]).bool()
        return torch.cat([found[name] > 0 for name in self.names], 1)

    def _segments(self, images: Tensor) -> Tensor:
        latents: Any = self.module.encode(images).latent_dist.mode()
        logits = self.module.segment(latents)
        return one_hot(logits.argmax(1), logits.shape[1]).bool()


def control_iou(read: Tensor, control: Tensor) -> Tensor:
    """Intersection over union of what was read and what was asked, mean over the channels that either has. B, [0, 1].

    Args:
        read: B C H W, bool.
        control: B C H W in [0, 1]; above 0.5 is asked for.
    """
    asked = control > 0.5
    both = (read & asked).flatten(2).sum(2).float()
    either = (read | asked).flatten(2).sum(2).float()
    there = either > 0
    shares = torch.where(there, both / either.clamp(min=1), torch.zeros_like(both))
    return torch.where(there.any(1), shares.sum(1) / there.sum(1).clamp(min=1), torch.ones_like(shares[:, 0]))


def others(batch: Tensor) -> Tensor:
    """For every sample the control of another: the next one's; of a lone sample its own, upside down."""
    return batch.roll(1, 0) if len(batch) > 1 else batch.flip(-2)


def in_standard_errors(total: float, squares: float, count: float) -> float:
    """Mean over standard error of paired differences, from their sum and sum of squares; 0 for fewer than two."""
    if count < 2:
        return 0.0
    mean = total / count
    variance = max(squares / count - mean**2, 0.0) * count / (count - 1)
    if variance <= 1e-24:
        return 0.0 if abs(mean) < 1e-12 else float("inf") * (1 if mean > 0 else -1)
    return mean / (variance / count) ** 0.5
