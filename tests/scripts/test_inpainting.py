"""`evaluate.py --inpaint_images`: its rectangles, the boundary error in closed form, and the whole measurement."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.tools.cli import UserError
from tests.conftest import forget_accelerate
from tests.scripts.test_evaluate import images, saved  # noqa: F401  (a fixture)
from training import evaluate
from training.evaluation.inpainting import boundary_error, mask_of, random_rectangle

FLAGS = ("--cpu_threads", "1", "--extractor_resolution", "32", "--num_images", "8", "--replay_images", "0")


@pytest.mark.parametrize("size", [(64, 64), (96, 48), (48, 96)])
def test_rectangles_cover_a_quarter_to_a_half_and_depend_on_their_number_alone(size):
    rectangles = [random_rectangle(number, size) for number in range(300)]
    assert rectangles == [random_rectangle(number, size) for number in range(300)]
    assert len(set(rectangles)) > 250
    masks = np.stack([np.asarray(mask_of(one, size)) > 0 for one in rectangles])
    shares = masks.mean(axis=(1, 2))
    assert 0.23 < shares.min() < 0.28 < 0.46 < shares.max() < 0.52
    assert [(right - left) * (bottom - top) for left, top, right, bottom in rectangles] == masks.sum(
        axis=(1, 2)
    ).tolist()
    assert masks.any(axis=0).mean() > 0.95, "nearly every place of the image is filled in some"


def test_the_boundary_error_is_the_step_at_the_edge_alone():
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    pixels[2:6, 3:7] = 51  # a fifth of the range
    pixels[4, 5] = 255  # inside, and not at the edge
    assert boundary_error([Image.fromarray(pixels)], [(3, 2, 7, 6)]) == pytest.approx(0.2)
    assert boundary_error([Image.fromarray(pixels)], [(0, 0, 8, 2)]) == pytest.approx(0.2 * 4 / 8)
    flat = Image.new("RGB", (8, 8), "red")
    assert boundary_error([Image.fromarray(pixels), flat], [(3, 2, 7, 6)] * 2) == pytest.approx(0.1)


def test_a_model_fills_parts_of_real_images(tmp_path, images):  # noqa: F811
    model, output = saved("captioned", tmp_path), tmp_path / "evaluation.json"
    words = (
        "--model",
        str(model),
        "--dataset_name",
        str(images),
        "--num_inference_steps",
        "2",
        "--output",
        str(output),
    )
    forget_accelerate()
    evaluate.main([*FLAGS, *words, "--output", str(output), "--inpaint_images", "6", "--batch_size", "4"])
    results = json.loads(Path(output).read_text(encoding="utf-8"))
    for what in ("boundary_error", "kid"):
        values = [results["metrics"][f"inpaint_{what}{name}"] for name in ("", "_mean_colour", "_pasted")]
        assert np.isfinite([*values, results["real"][f"inpaint_{what}"]]).all()
        assert len({*values, results["real"][f"inpaint_{what}"]}) == 4
    assert results["metrics"]["inpaint_kid_standard_error"] > 0


def test_what_cannot_be_measured_is_refused(tmp_path, images):  # noqa: F811
    model = saved("autoencoder", tmp_path)
    words = ("--model", str(model), "--dataset_name", str(images), "--output", str(tmp_path / "evaluation.json"))
    forget_accelerate()
    with pytest.raises(UserError, match="--inpaint_images: this autoencoder cannot fill a part of an image"):
        evaluate.main([*FLAGS, *words, "--inpaint_images", "6"])
    forget_accelerate()
    with pytest.raises(UserError, match="--inpaint_images must be 0 or at least 4, but is 3"):
        evaluate.main([*FLAGS, *words, "--inpaint_images", "3"])
