"""metrics.csv: new rows and columns, rows deleted when a run resumes, and the running means."""

from __future__ import annotations

import json
import math

from training.run.metrics_log import EpochLoss, MetricsLog, RunningMeans, read_metrics


def test_new_metrics_add_columns_before_the_timing_columns(tmp_path):
    log = MetricsLog(tmp_path / "m.csv")
    log.write({"step": 1, "epoch": 0.5, "images_seen": 8, "loss": 0.25, "elapsed_seconds": 1.0})
    log.write({"step": 2, "epoch": 1.0, "images_seen": 16, "loss": 0.5, "val_loss": 0.75, "elapsed_seconds": 2.0})
    log.write({"step": 3, "epoch": 1.5, "images_seen": 24, "loss": 1.0, "elapsed_seconds": 3.0})
    header, *lines = (tmp_path / "m.csv").read_text().splitlines()
    assert header == "step,epoch,images_seen,loss,val_loss,elapsed_seconds"
    assert lines == ["1,0.5,8,0.25,,1.0", "2,1.0,16,0.5,0.75,2.0", "3,1.5,24,1.0,,3.0"]


def test_numbers_are_saved_exactly(tmp_path):
    log = MetricsLog(tmp_path / "m.csv")
    values = [0.1 + 0.2, 1e-300, 1 / 3, math.pi * 1e20]
    for step, value in enumerate(values, 1):
        log.write({"step": step, "loss": value})
    assert [float(row["loss"]) for row in read_metrics(tmp_path / "m.csv")] == values


def test_rows_after_the_resume_step_are_deleted_with_their_columns(tmp_path):
    path = tmp_path / "m.csv"
    log = MetricsLog(path)
    for step in range(1, 5):
        log.write({"step": step, "loss": float(step), **({"val_loss": 1.0} if step == 4 else {})})
    resumed = MetricsLog(path, resume_step=2)
    assert [row["step"] for row in read_metrics(path)] == ["1", "2"]
    assert "val_loss" not in read_metrics(path)[0]
    resumed.write({"step": 3, "loss": 9.0})
    assert [row["loss"] for row in read_metrics(path)] == ["1.0", "2.0", "9.0"]


def test_a_row_cut_off_by_a_crash_is_dropped(tmp_path):
    path = tmp_path / "m.csv"
    log = MetricsLog(path)
    log.write({"step": 1, "loss": 1.0})
    log.write({"step": 2, "loss": 2.0})
    path.write_bytes(path.read_bytes() + b"3,")
    MetricsLog(path, resume_step=2).write({"step": 3, "loss": 3.0})
    assert [(row["step"], row["loss"]) for row in read_metrics(path)] == [("1", "1.0"), ("2", "2.0"), ("3", "3.0")]


def test_a_run_from_scratch_deletes_all_old_rows(tmp_path):
    path = tmp_path / "m.csv"
    MetricsLog(path).write({"step": 1, "loss": 1.0})
    MetricsLog(path, resume_step=0)
    assert not path.exists()


def test_running_means_survive_a_checkpoint():
    means = RunningMeans()
    means.add({"loss": 1.0})
    means.add({"loss": 2.0, "late": 8.0})
    copy = RunningMeans(json.loads(json.dumps(means.state())))
    copy.add({"loss": 6.0})
    assert copy.means() == {"loss": 3.0, "late": 8.0}
    copy.reset()
    assert copy.means() == {}


def test_the_loss_of_an_epoch_has_a_mean_minimum_and_maximum():
    loss = EpochLoss(json.loads(json.dumps(EpochLoss().state())))
    assert loss.summary() == {}
    for value in (3.0, 1.0, 2.0):
        loss.add(value)
    summary = EpochLoss(json.loads(json.dumps(loss.state()))).summary()
    assert summary == {"epoch_loss_mean": 2.0, "epoch_loss_min": 1.0, "epoch_loss_max": 3.0}
