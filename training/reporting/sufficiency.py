"""What a complete run says about its collection: is it large enough, and would a longer training help? Pure functions.

Both answers come from measurements of generated images during the run, which are columns of metrics.csv: the rate of
copies (`--memorization_epochs`) and KID (`--evaluation_epochs`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

# KID is compared with a measurement at most this share of the run ago, or the last one before that.
COMPARED_SHARE = 0.75
# A fall of KID counts if it is larger than twice its standard error and than this share of the earlier value.
LEAST_FALL = 0.05
# Training further is suggested for this share of the epochs so far.
MORE_EPOCHS = 0.5

Row = Mapping[str, str]


def is_it_enough(rows: Sequence[Row], images: int, generated: int, steps_per_epoch: int) -> list[str]:
    """Return sentences about the collection and the length of a complete run; none where nothing was measured.

    Args:
        rows: the rows of metrics.csv, as texts.
        images: number of training images.
        generated: number of images that were generated for each measurement.
    """
    copies = _copies(rows, images, generated)
    copying = bool(copies) and copies[0].startswith("The collection is too small")
    return copies + _distances(rows, steps_per_epoch, copying=copying)


def _copies(rows: Sequence[Row], images: int, generated: int) -> list[str]:
    measured = [row for row in rows if row.get("eval_copy_rate") and row.get("eval_copy_rate_expected")]
    if not measured:
        return []
    last = measured[-1]
    rate, expected = float(last["eval_copy_rate"]), float(last["eval_copy_rate_expected"])
    numbers = (
        f"{rate:.1%} of {generated} generated images are copies of one of the {images:,} training images, and "
        f"{expected:.1%} are expected by chance"
    )
    if not _exceeds(last, generated):
        return [f"The collection is large enough for this length: {numbers}."]
    earlier = [row for row in measured if not _exceeds(row, generated)]
    found = [f"The collection is too small for this length: {numbers}. Collect more images of the same kind."]
    if earlier:
        step = int(float(earlier[-1]["step"]))
        before = float(earlier[-1]["eval_copy_rate"])
        found.append(
            f"At step {step:,} the rate was {before:.1%}; with these images, train only up to there: "
            f"--max_train_steps {step} --overwrite."
        )
    return found


def _exceeds(row: Row, generated: int) -> bool:
    """Return whether a measurement found more copies than chance does, with 95 % confidence (as `CopyReport`)."""
    from training.metrics.memorization import TOLERANCE, wilson_interval

    rate, expected = float(row["eval_copy_rate"]), float(row["eval_copy_rate_expected"])
    return wilson_interval(round(rate * generated), generated)[0] > expected + TOLERANCE


def _distances(rows: Sequence[Row], steps_per_epoch: int, *, copying: bool) -> list[str]:
    measured = [row for row in rows if row.get("eval_kid")]
    if len(measured) < 2:
        return []
    last = measured[-1]
    end = float(last["images_seen"])
    before = [row for row in measured[:-1] if float(row["images_seen"]) <= COMPARED_SHARE * end]
    earlier = before[-1] if before else measured[0]
    old, new = float(earlier["eval_kid"]), float(last["eval_kid"])
    error = math.hypot(_error(earlier), _error(last))
    numbers = f"{old:.3f} after {float(earlier['images_seen']):,.0f} images seen, {new:.3f} after {end:,.0f}"
    if last.get("eval_kid_floor") and new - 2 * _error(last) <= float(last["eval_kid_floor"]):
        return [f"KID ({new:.3f}) is as low as between real images, so a longer training cannot lower it."]
    if old - new > max(2 * error, LEAST_FALL * abs(old)):
        if copying:
            return [f"KID still falls ({numbers}), but a longer training would also copy more."]
        more = max(2, round(MORE_EPOCHS * float(last["step"]) / steps_per_epoch))
        return [f"KID still falls ({numbers}), so a longer training is likely to help: --extra_epochs {more}."]
    return [
        f"KID no longer falls ({numbers}), so more steps alone will not help: collect more images of the same kind, "
        "or choose a larger network."
    ]


def _error(row: Row) -> float:
    return float(row.get("eval_kid_standard_error") or 0)
