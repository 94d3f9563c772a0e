"""Training curves from complete, short and damaged metrics.csv files."""

from __future__ import annotations

import csv
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.reporting.curves import draw_training_curves, read_metrics, smooth

ROOT = Path(__file__).resolve().parent.parent.parent
TIMES = ["elapsed_seconds", "images_per_second"]
VALIDATION = ["val_loss", "val_psnr", "val_ssim"]
HEADER = ["step", "epoch", "images_seen", "loss", "learning_rate", "grad_norm", *VALIDATION, "epoch_loss_mean", *TIMES]


def write_metrics(path: Path, rows: int, header=HEADER) -> Path:
    generator = random.Random(0)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, header, extrasaction="ignore", restval="")
        writer.writeheader()
        for step in range(1, rows + 1):
            row = {"step": step, "epoch": step // 100, "images_seen": step * 32, "learning_rate": 1e-3 / step}
            row["loss"] = row["autoencoder_loss"] = row["discriminator_loss"] = (
                math.exp(-step / 50) + generator.random()
            )
            row["grad_norm"] = generator.random()
            if step % 10 == 0:
                row |= {"val_loss": 1 / step, "val_psnr": 20 + step / 100, "val_ssim": 0.5}
            writer.writerow(row)
    return path


@pytest.mark.parametrize("rows", [1, 2, 5, 30, 500])
def test_curves_of_runs_of_any_length(tmp_path, rows):
    path = draw_training_curves(write_metrics(tmp_path / "metrics.csv", rows), tmp_path / "curves.png", "a run")
    image = Image.open(path)
    assert image.width >= 1000
    colors = {tuple(color) for color in np.asarray(image.convert("RGB")).reshape(-1, 3)}
    assert (0x3B, 0x6F, 0xB6) in colors  # the training loss is on it
    assert ((0xD1, 0x49, 0x5B) in colors) == (rows >= 10)  # and validation, where there was one
    assert sorted(os.listdir(tmp_path)) == ["curves.png", "metrics.csv"]


def test_a_stage_with_two_phases_has_two_loss_panels(tmp_path):
    one, two = [[*HEADER[:3], "loss"], [*HEADER[:3], "autoencoder_loss", "discriminator_loss"]]
    first = Image.open(draw_training_curves(write_metrics(tmp_path / "1.csv", 30, one), tmp_path / "1.png"))
    second = Image.open(draw_training_curves(write_metrics(tmp_path / "2.csv", 30, two), tmp_path / "2.png"))
    assert second.width == 2 * first.width


def test_the_losses_by_noise_level_share_a_panel(tmp_path):
    header = [*HEADER[:3], "loss", *(f"val_loss_noise_{band}" for band in ("0_25", "25_50", "50_75", "75_100"))]
    path = write_metrics(tmp_path / "1.csv", 30, header[:4])
    alone = Image.open(draw_training_curves(path, tmp_path / "1.png"))
    rows = [f"{step},1,{step},0.5,{1 / step},{2 / step},{3 / step},{4 / step}" for step in range(1, 30)]
    (tmp_path / "2.csv").write_text("\n".join([",".join(header), *rows]) + "\n", encoding="utf-8")
    both = Image.open(draw_training_curves(tmp_path / "2.csv", tmp_path / "2.png"))
    assert both.width == 2 * alone.width
    assert both.height == alone.height


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"step,loss\n",
        b"no header at all",
        b"step,loss\n1,nan\n2,inf\n3,\n",
        b"loss\n0.5\n",
        b"\x00\xff\xfe\x00garbage\n\n\x00,,,\n",
        b'step,loss\n1,"unclosed quote\n2,3',
    ],
)
def test_a_file_with_nothing_to_draw_gives_no_image_and_no_error(tmp_path, content):
    (tmp_path / "metrics.csv").write_bytes(content)
    assert draw_training_curves(tmp_path / "metrics.csv", tmp_path / "curves.png") is None
    assert not (tmp_path / "curves.png").exists()


def test_no_file_at_all(tmp_path):
    assert draw_training_curves(tmp_path / "metrics.csv", tmp_path / "curves.png") is None


def test_a_damaged_file_is_drawn_as_far_as_it_goes(tmp_path):
    path = write_metrics(tmp_path / "metrics.csv", 50)
    with path.open("ab") as file:
        file.write(b"51,0,,0.2,what\x00,\n52,0")  # cut short by a crash
    assert read_metrics(path)["loss"][0][-1] == 51
    assert draw_training_curves(path, tmp_path / "curves.png") is not None


def test_a_step_that_a_resumed_run_repeats_counts_once_with_its_later_value(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,loss\n1,3\n2,2\n3,1\n2,20\n3,10\n")
    assert read_metrics(tmp_path / "metrics.csv")["loss"] == ([1, 2, 3], [3, 20, 10])


def test_values_of_every_size(tmp_path):
    rows = "".join(f"{step},{10.0 ** (10 - step)},0,1e-30\n" for step in range(1, 40))
    (tmp_path / "metrics.csv").write_text("step,loss,grad_norm,learning_rate\n" + rows)
    assert draw_training_curves(tmp_path / "metrics.csv", tmp_path / "curves.png") is not None


def test_smoothing_is_a_centred_mean_without_lag():
    assert smooth([5.0] * 10, 3) == pytest.approx([5.0] * 10)
    line = [float(step) for step in range(50)]
    assert smooth(line, 5)[5:-5] == pytest.approx(line[5:-5])
    assert smooth([3, 0, 9, 0, 0], 1) == pytest.approx([1.5, 4, 3, 3, 0])
    assert smooth([], 3) == []


def test_the_surrounding_programs_matplotlib_is_left_alone(tmp_path):
    write_metrics(tmp_path / "metrics.csv", 30)
    code = (
        "import sys; from training.reporting.curves import draw_training_curves; "
        "assert 'matplotlib' not in sys.modules; draw_training_curves(sys.argv[1], sys.argv[2], 'title'); "
        "assert 'matplotlib.pyplot' not in sys.modules and 'tkinter' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "metrics.csv", tmp_path / "a.png"], cwd=ROOT, check=True)
