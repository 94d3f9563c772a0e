"""The studio reads run folders while they change: metrics, samples, the lock and the state."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from PIL import Image

from pipelines.studio.runs import Run, find_runs, open_sample
from pipelines.studio.runs_tab import NONE, RunsTab, curves_of, last_values
from pipelines.tools.cli import UserError
from tests.support.runs import ROOT, environment
from tests.support.toy_runs import run_of


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with the run of a toy stage, and a copy of it in a deeper folder."""
    folder = run_of(tmp_path_factory, ())
    shutil.copytree(folder, folder.parent / "other" / "copy")
    return folder.parent


def test_runs_are_found_by_their_metrics_at_several_depths(runs, tmp_path):
    assert [run.name for run in find_runs(runs)] == ["other/copy", "run"]
    assert [run.name for run in find_runs(runs / "run")] == ["run"]
    assert find_runs(tmp_path) == []
    with pytest.raises(UserError, match="is not a folder"):
        find_runs(tmp_path / "missing")


def test_metrics_of_a_run_are_those_of_its_file(runs):
    run = Run("run", runs / "run")
    table = run.metrics()
    assert table["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert table["loss"].notna().all()
    assert "complete" in run.state()
    assert "step: 6" in run.state()


def test_damaged_rows_are_left_out(runs, tmp_path):
    run = Run("damaged", tmp_path)
    (tmp_path / "metrics.csv").write_bytes(
        b"\xef\xbb\xbfstep,loss,val_loss\n1,0.5,\n2,\xff\xfe,0.25\nx,1,1\n3,0.25,0.125\n4,0.1,0.2,0.3,0.4\n5,"
    )
    table = run.metrics()
    assert table["step"].tolist() == [1, 2, 3, 5]
    assert table["loss"].isna().tolist() == [False, True, False, True]
    assert last_values([table])[1] == ["loss", "0.25", ""]
    for text in ("", "step,loss\n", "nothing\n1\n"):
        (tmp_path / "metrics.csv").write_text(text)
        assert len(run.metrics()) == 0
        assert curves_of([run], [run.metrics()], "loss", True) is not None
    (tmp_path / "metrics.csv").unlink()
    with pytest.raises(UserError, match="the metrics of the run damaged cannot be read"):
        run.metrics()


def test_samples_are_in_the_order_of_training(tmp_path):
    run = Run("run", tmp_path)
    assert run.samples() == {}
    (tmp_path / "samples").mkdir()
    for name in ("epoch_0010", "epoch_0002", "step_00000100", "progress", "epoch_x"):
        Image.new("RGB", (4, 4)).save(tmp_path / "samples" / f"{name}.png")
    assert [str(place) for place in run.samples()] == ["epoch 2", "epoch 10", "step 100"]
    first, *_ = run.samples().values()
    assert open_sample(first).size == (4, 4)
    first.write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(UserError, match="epoch_0002.png cannot be read"):
        open_sample(first)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not list locks")
def test_a_run_that_is_training_is_known_by_its_lock(runs):
    """Another process holds the lock with the class that training uses."""
    run = Run("run", runs / "run")
    assert not run.is_locked()
    code = (
        "import sys; from pathlib import Path; from training.core.locks import FolderLock\n"
        f"with FolderLock(Path({str(run.folder / '.lock')!r}), ''):\n    print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(PYTHONPATH=str(ROOT)),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    assert run.is_locked()
    assert "is training now" in run.state()
    holder.communicate()
    assert not run.is_locked()


def test_the_state_of_an_interrupted_run(runs, tmp_path):
    shutil.copytree(runs / "run", tmp_path / "run")
    run = Run("run", tmp_path / "run")
    record = json.loads((run.folder / "record.json").read_text())
    (run.folder / "record.json").write_text(json.dumps(record | {"best": {"metric": "loss", "value": 0.5, "step": 3}}))
    assert "best loss: 0.5 at step 3" in run.state()
    (run.folder / "record.json").unlink()
    assert "was training" in run.state()
    for name in ("metrics.csv", "run.log"):
        os.utime(run.folder / name, (0, 0))
    assert "interrupted or not exported; last written" in run.state()


def test_two_runs_are_compared_and_a_deleted_one_is_named(runs, tmp_path):
    shutil.copytree(runs, tmp_path / "runs")
    with gr.Blocks():
        tab = RunsTab(tmp_path / "runs")
    state, figure, rows = tab._draw("run", "other/copy", "loss", False)
    assert state.count("complete") == 2
    assert [line.get_label() for line in figure.axes[0].lines] == ["run", "other/copy"]
    assert all(row[1] == row[2] for row in rows)
    _, figure, rows = tab._draw("run", NONE, "loss", True)
    assert figure.axes[0].get_yscale() == "log"
    assert len(figure.axes[0].lines) == 1
    shutil.rmtree(tmp_path / "runs" / "run")
    with pytest.raises(UserError, match="the run run is no longer there"):
        tab._draw("run", NONE, "loss", False)
    assert tab._refreshed("run", "other/copy")[0]["value"] == "other/copy"
    shutil.rmtree(tmp_path / "runs" / "other")
    assert tab._draw(None, NONE, None, False)[0].startswith("The folder contains no run yet")


def write_sample(run: Path, name: str) -> None:
    (run / "samples").mkdir(exist_ok=True)
    Image.new("RGB", (4, 4)).save(run / "samples" / f"{name}.png")


def test_the_slider_steps_through_the_epochs_of_both_runs(runs, tmp_path):
    shutil.copytree(runs, tmp_path / "runs")
    for run, names in {"run": ("epoch_0002", "epoch_0004"), "other/copy": ("epoch_0003", "step_00001000")}.items():
        for name in names:
            write_sample(tmp_path / "runs" / run, name)
    with gr.Blocks():
        tab = RunsTab(tmp_path / "runs")

    def looked(place: Any) -> tuple[str, ...]:
        slider, *samples = tab._look("run", "other/copy", place)
        return slider["info"], *(sample["label"] for sample in samples)

    assert looked(1) == ("Epoch 2 (1 of 4)", "run: epoch 2", "other/copy: epoch 3")
    assert looked(2) == ("Epoch 3 (2 of 4)", "run: epoch 2", "other/copy: epoch 3")
    assert looked(4) == looked(None) == looked(99) == ("Step 1,000 (4 of 4)", "run: epoch 4", "other/copy: step 1,000")
    assert looked(math.nan) == looked("x") == looked(None)
    assert looked(-3) == looked(1)
    slider, *_ = tab._arrange("run", NONE)
    assert (slider["value"], slider["maximum"], slider["visible"]) == (2, 2, True)
    slider, *_ = tab._look("run", NONE, 1)  # it may have been moved in the meantime
    assert "value" not in slider


@pytest.mark.parametrize("system", ["linux", "darwin", "win32"])
def test_a_run_is_followed_with_its_samples_until_its_end_on_every_system(system, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", system)
    shutil.copytree(runs / "run", tmp_path / "runs/run")
    folder = tmp_path / "runs/run"
    record = (folder / "record.json").read_bytes()
    (folder / "record.json").unlink()
    write_sample(folder, "epoch_0001")
    write_sample(folder, "epoch_0002")
    with gr.Blocks():
        tab = RunsTab(tmp_path / "runs")
    chosen = ("run", NONE, "loss", False)
    *_, seen = tab._followed(*chosen, 2, None)
    header = (folder / "metrics.csv").read_text(encoding="utf-8").splitlines()[0].split(",")
    row = {"step": "4321", "loss": "5"}
    with (folder / "metrics.csv").open("a", encoding="utf-8") as table:
        table.write(",".join(row.get(name, "") for name in header) + "\n")
    write_sample(folder, "epoch_0003")
    state, figure, values, slider, sample, other, seen = tab._followed(*chosen, 2, seen)
    assert "was training" in state
    assert "step: 4,321" in state
    assert figure.axes[0].lines[0].get_xdata()[-1] == 4321
    assert ["step", "4321", ""] in values
    # The slider was at its end and moves to the new one; the samples of an earlier epoch would stay.
    assert (slider["value"], sample["label"], other["value"]) == (3, "run: epoch 3", None)
    write_sample(folder, "epoch_0004")
    _, _, _, slider, sample, _, seen = tab._followed(*chosen, 1, seen)
    assert ("value" in slider, slider["maximum"], sample["label"]) == (False, 4, "run: epoch 1")
    state, *others, same = tab._followed(*chosen, 1, seen)
    assert ("was training" in state, same, {str(one) for one in others}) == (True, seen, {str(gr.skip())})
    (folder / "record.json").write_bytes(record)
    state, *_, seen = tab._followed(*chosen, 1, seen)
    assert "run**: complete" in state
    assert [str(one) for one in tab._followed(*chosen, 1, seen)[:-1]] == [str(gr.skip())] * 6
    shutil.rmtree(folder)
    assert tab._followed(*chosen, 1, seen)[-1] == seen


def test_a_run_that_goes_on_after_its_export_is_training(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    shutil.copytree(runs / "run", tmp_path / "run")
    run = Run("run", tmp_path / "run")
    assert (run.is_training(), "complete" in run.state()) == (False, True)
    now = time.time()
    os.utime(run.folder / "record.json", (now - 60, now - 60))
    os.utime(run.folder / "metrics.csv", (now, now))
    assert (run.is_training(), "was training" in run.state()) == (True, True)
    os.utime(run.folder / "metrics.csv", (now - 10, now - 10))
    os.utime(run.folder / "run.log", (now - 10, now - 10))
    monkeypatch.setattr("pipelines.studio.runs.SILENT_SECONDS", 5)
    assert (run.is_training(), "complete" in run.state()) == (False, True)
