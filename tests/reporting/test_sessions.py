"""The strip of previews, the table of epochs and the next command at the end of a session."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import forget_accelerate
from tests.support.runs import toy
from training.core.previews import save_png
from training.reporting.sessions import (
    GRID_WIDTH,
    MOST_GRIDS,
    epoch_table,
    grid_name,
    next_command,
    progress_strip,
    session_report,
)
from training.run.metrics_log import MetricsLog
from training.run.state import RunState

COLORS = ["#ff0000", "#00ff00", "#0000ff", "#ffff00", "#00ffff", "#ff00ff", "#808080", "#800000", "#008000", "#000080"]


def colors_in(strip: Image.Image) -> list[str]:
    """Return the colours of the grids in a strip, from left to right."""
    colors: list[str] = []
    y = strip.height // 2
    for x in range(strip.width):
        color = "#{:02x}{:02x}{:02x}".format(*strip.getpixel((x, y)))
        if color in COLORS and (not colors or colors[-1] != color):
            colors.append(color)
    return colors


def save_grids(samples: Path, steps: list[int], steps_per_epoch: int) -> None:
    for step, color in zip(steps, COLORS):
        save_png(Image.new("RGB", (1000, 500), color), samples / grid_name(step, steps_per_epoch))


def test_grids_stand_in_the_order_of_their_steps(tmp_path):
    save_grids(tmp_path, [4, 8, 10, 12], 4)
    assert {p.name for p in tmp_path.iterdir()} == {
        "epoch_0001.png", "epoch_0002.png", "step_00000010.png", "epoch_0003.png",
    }  # fmt: skip
    strip = progress_strip(tmp_path, 4, 12)
    assert colors_in(strip) == COLORS[:4]
    assert 4 * GRID_WIDTH < strip.width < 4 * (GRID_WIDTH + 20)
    save_png(strip, tmp_path / "progress.png")
    assert colors_in(progress_strip(tmp_path, 4, 12)) == COLORS[:4], "the strip does not contain itself"
    assert colors_in(progress_strip(tmp_path, 4, 9)) == COLORS[:2], "later grids of an earlier session are left out"


def test_no_grids_no_strip_and_of_many_the_first_and_the_last_stay(tmp_path):
    assert progress_strip(tmp_path, 4, 12) is None
    save_grids(tmp_path, [4 * i for i in range(1, 11)], 4)
    shown = colors_in(progress_strip(tmp_path, 4, 40))
    assert len(shown) == MOST_GRIDS
    assert (shown[0], shown[-1]) == (COLORS[0], COLORS[9])


def metrics(path: Path, epochs: int) -> Path:
    log = MetricsLog(path)
    for step in range(1, 2 * epochs + 1):
        row = {"step": step, "epoch": step / 2, "images_seen": 8 * step, "loss": 1.0 / step}
        if step % 2 == 0:
            row |= {"epoch_loss_mean": 1.5 / step, "val_loss": 2.0 / step}
        log.write(row | {"elapsed_seconds": 40.0 * step, "images_per_second": 5.0})
    return path


def test_the_table_has_losses_and_time_of_each_epoch(tmp_path):
    assert epoch_table(metrics(tmp_path / "metrics.csv", 2)) == [
        "| epoch |  loss | val loss | time |",
        "| ----: | ----: | -------: | ---: |",
        "|     1 |  0.75 |        1 | 1:20 |",
        "|     2 | 0.375 |      0.5 | 1:20 |",
    ]
    assert epoch_table(tmp_path / "none.csv") == []


def test_a_long_table_is_cut_in_the_middle(tmp_path):
    table = epoch_table(metrics(tmp_path / "metrics.csv", 30), most_epochs=5)
    assert [line.split("|")[1].strip() for line in table[2:]] == ["1", "…", "28", "29", "30"]


def test_the_report_has_the_progress_and_the_next_command(tmp_path):
    file = metrics(tmp_path / "metrics.csv", 2)
    state = RunState(step=4, goal_steps=8, sessions=2, elapsed_seconds=3700)
    report = session_report(file, state, 2, "python training/train_decoder.py --config a.yaml", complete=False)
    assert report.startswith("Step 4 of 8 (epoch 2 of 4) after 2 sessions and 1:01:40 of training\n\n| epoch |")
    assert report.endswith("\n\nTo resume: python training/train_decoder.py --config a.yaml")
    # All steps done, but stopped before the export: the same command finishes it.
    state.step = 8
    assert session_report(file, state, 2, "python t.py", complete=False).endswith("To resume: python t.py")
    assert session_report(file, state, 2, "python t.py", complete=True).endswith(
        "To train for more epochs: python t.py --extra_epochs 2"
    )


def test_the_progress_of_a_long_run_is_easy_to_read(tmp_path):
    state = RunState(step=1043, goal_steps=4000, sessions=1, elapsed_seconds=75)
    progress, *_ = session_report(tmp_path / "none.csv", state, 11, "python t.py", complete=False).splitlines()
    assert progress == "Step 1,043 of 4,000 (epoch 94.8 of 363.6) after 1 session and 1:15 of training"


@pytest.mark.parametrize(
    ("command", "extra_epochs", "expected"),
    [
        ("python t.py --config a.yaml", 0, "python t.py --config a.yaml"),
        ("python t.py --config a.yaml", 80, "python t.py --config a.yaml --extra_epochs 80"),
        ("python t.py --extra_epochs 3", 2, "python t.py --extra_epochs 3"),
        ("python t.py --extra_epochs=3", 2, "python t.py --extra_epochs=3"),
        ("python t.py --overwrite --seed 1", 0, "python t.py --seed 1"),
        ("python t.py --overwrite true --seed 1", 0, "python t.py --seed 1"),
        ("python t.py --overwrite=true", 0, "python t.py"),
        ("python t.py --model.widths '[8, 16]'", 0, "python t.py --model.widths '[8, 16]'"),
    ],
)
def test_the_next_command_continues_the_run_and_never_overwrites_it(command, extra_epochs, expected):
    assert next_command(command, extra_epochs) == expected


@pytest.mark.slow
def test_a_run_shows_its_sessions(tmp_path):
    """The toy stage does so like any other: a session of two epochs, and then one more epoch."""
    forget_accelerate()
    first = toy(tmp_path / "run", "--num_train_epochs", "2")
    assert "(epoch 2 of 2)" in first.stdout
    assert "--extra_epochs 2" in first.stdout.splitlines()[-1]
    toy(tmp_path / "run", "--extra_epochs", "1")
    report = (tmp_path / "run/sessions.md").read_text(encoding="utf-8")
    assert "(epoch 3 of 3)" in report
    assert "after 2 sessions" in report
    assert [line.split("|")[1].strip() for line in report.splitlines() if line.startswith("|")][2:] == ["1", "2", "3"]
    assert "To train for more epochs: python tests/support/toy.py" in report
