"""Whether a collection is large enough, and a run long enough, from rows of metrics.csv."""

from __future__ import annotations

import csv
import io

from training.reporting.sufficiency import is_it_enough

# Rows of a run on 190 photographs (docs/LOG.md, "Few images"). Those on emoji have plausible numbers.
PHOTOS = """step,epoch,images_seen,eval_copy_rate,eval_copy_rate_expected
1000,90.91,16000,,
4004,364.0,64064,0.0234375,0.010416666666666666
8000,727.27,128000,0.23046875,0.010416666666666666
"""
EMOJI = """step,epoch,images_seen,eval_kid,eval_kid_standard_error,eval_kid_floor,eval_copy_rate,eval_copy_rate_expected
1000,7.6,16000,0.412,0.004,-0.0002,0.00390625,0.01
2000,15.2,32000,0.301,0.003,-0.0002,0.01171875,0.01
4000,30.3,64000,0.232,0.002,-0.0002,0.0078125,0.01
"""


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_copies_mean_that_the_collection_is_too_small_and_say_where_they_began():
    first, second = is_it_enough(rows(PHOTOS), 190, 256, 5)
    assert first == (
        "The collection is too small for this length: 23.0% of 256 generated images are copies of one of the 190 "
        "training images, and 1.0% are expected by chance. Collect more images of the same kind."
    )
    assert "At step 4,004 the rate was 2.3%" in second
    assert "--max_train_steps 4004 --overwrite" in second


def test_copies_from_the_first_measurement_on_have_no_earlier_step_to_name():
    (only,) = is_it_enough(rows(PHOTOS)[2:], 190, 256, 5)
    assert "too small" in only


def test_a_few_copies_are_chance():
    """2.3 % of 256 images are six: 1 % plus the tolerance of one percentage point is within their interval."""
    (only,) = is_it_enough(rows(PHOTOS)[:2], 190, 256, 5)
    assert only.startswith("The collection is large enough for this length: 2.3% of 256")


def test_a_kid_that_still_falls_suggests_more_epochs():
    enough, falls = is_it_enough(rows(EMOJI), 2120, 256, 132)
    assert enough.startswith("The collection is large enough")
    assert falls == (
        "KID still falls (0.301 after 32,000 images seen, 0.232 after 64,000), so a longer training is likely to "
        "help: --extra_epochs 15."
    )


def test_a_kid_that_falls_while_images_are_copied_suggests_nothing():
    copied = rows(EMOJI)
    copied[-1]["eval_copy_rate"] = "0.25"
    *_, falls = is_it_enough(copied, 2120, 256, 132)
    assert "would also copy more" in falls
    assert "--extra_epochs" not in falls


def test_a_kid_that_no_longer_falls_or_cannot_says_so():
    flat = rows(EMOJI)
    flat[-1]["eval_kid"] = "0.297"
    assert (
        "KID no longer falls (0.301 after 32,000 images seen, 0.297 after 64,000)"
        in is_it_enough(flat, 2120, 256, 132)[-1]
    )
    flat[-1] |= {"eval_kid": "0.003"}
    assert "as low as between real images" in is_it_enough(flat, 2120, 256, 132)[-1]


def test_nothing_measured_says_nothing():
    assert is_it_enough([], 100, 256, 10) == []
    assert is_it_enough(rows("step,epoch,images_seen,loss\n10,1,160,0.5\n"), 100, 256, 10) == []
    assert is_it_enough(rows(EMOJI)[:1], 100, 256, 10)[0].startswith("The collection is large enough")  # one KID: none
