"""Is a poster a copy of a training poster? The test of training/metrics/memorization.py, for a few posters at a time.

m posters, n training posters, h real posters that set the threshold.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor

from pipelines.tools.cli import UserError
from training.evaluation.data import EvaluationData
from training.metrics.memorization import EXACT, FEWEST_HELD_OUT, calibrated_threshold, calibration_rows
from training.metrics.neighbours import pixel_search, thumbnails


class CopyTest:
    """Compares posters with all training posters in pixels, with mirrored and moved views.

    Args:
        training: thumbnails of the training posters, n 3072, uint8.
        real: thumbnails of real posters, which set the threshold, h 3072, uint8.
        own_rows: the rows of `real` in `training`; None if they are held-out posters.

    Attributes:
        threshold: a poster is a copy if its distance from the nearest training poster, divided by the mean distance
            from the nearest 50, is below it.
        fingerprint: hash of the posters.
        false_positive_rate: fraction of other posters that are called copies all the same.
    """

    def __init__(self, training: Tensor, real: Tensor, own_rows: Tensor | None = None):
        self._training = training
        parts = (part.contiguous().numpy().tobytes() for part in (training, real))
        self.fingerprint = hashlib.sha256(b"".join(parts)).hexdigest()
        search = pixel_search(real, own_rows)
        search.add(training)
        found = search.result()
        ratios = found.ratios[found.distances[:, 0] >= EXACT]
        self.threshold, self.false_positive_rate = calibrated_threshold(ratios, mutual=own_rows is not None)

    def __call__(self, posters: Sequence[Image.Image]) -> Tensor:
        """Return the ratio of each poster, from 0 (a copy) to 1: m"""
        search = pixel_search(thumbnails(posters))
        search.add(self._training)
        return search.result().ratios


def copy_test(data: EvaluationData, poll: Callable[[], None]) -> CopyTest:
    """Read the training posters of a decoder, and set the threshold by held-out ones if there are enough of them.

    Raises:
        UserError: the data have no training posters, or fewer than two.
    """
    if data.training is None or len(data.training) < 2:
        raise UserError(
            f"{data.source} has no training posters to compare with; name those that the decoder was trained on with "
            "--dataset_name, or add --check_copies false"
        )
    training = torch.cat([thumbnails(batch) for batch in data.training.batches(poll)])
    held_out = [thumbnails(batch) for batch in data.held_out.batches(poll)] if data.held_out else []
    if sum(map(len, held_out)) >= FEWEST_HELD_OUT:
        return CopyTest(training, torch.cat(held_out))
    rows = calibration_rows(len(training))
    return CopyTest(training, training[rows], rows)
