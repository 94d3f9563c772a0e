"""Run folders that are used again: best and latest, early stopping, older checkpoints, full disks, other settings."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import pytest

from pipelines.tools.cli import UserError
from tests.support.runs import rows, tensors
from tests.support.toy_runs import EVERY_STEP, assert_equal, column, run, snapshot, state_of
from training.run import checkpoint
from training.run.checkpoint import load_tensors
from training.run.folder import RunFolder

NO_IMPROVEMENT = ("--validation_steps", "1", "--early_stopping_patience", "3", "--early_stopping_min_delta", "100")


@pytest.mark.parametrize("use_ema", ["true", "false"])
def test_early_stopping_exports_the_best(tmp_path, use_ema):
    run(tmp_path / "run", *NO_IMPROVEMENT, "--num_train_epochs", "5", "--use_ema", use_ema, *EVERY_STEP)
    assert rows(tmp_path / "run")[-1]["step"] == "4"
    record = json.loads((tmp_path / "run/record.json").read_text())
    assert record["best"]["step"] == 1
    assert record["metrics"]["val_loss"] == record["best"]["value"] == column(tmp_path / "run", "val_loss")[0]
    assert (tmp_path / "run/checkpoints/best").resolve().name == "step-00000001"
    best = load_tensors(tmp_path / "run/checkpoints/best/pipeline/unet/diffusion_pytorch_model.safetensors")
    assert_equal(load_tensors(tmp_path / "run/pipeline/unet/diffusion_pytorch_model.safetensors"), best)
    before = snapshot(tmp_path / "run/checkpoints")
    assert run(tmp_path / "run", *NO_IMPROVEMENT, "--num_train_epochs", "5", "--use_ema", use_ema) == 0
    assert "stopped early" in (tmp_path / "run/run.log").read_text().splitlines()[-1]
    assert snapshot(tmp_path / "run/checkpoints") == before


def test_extra_epochs_after_an_early_stop_have_the_full_patience_again(tmp_path):
    run(tmp_path / "run", *NO_IMPROVEMENT, "--num_train_epochs", "5")
    run(tmp_path / "run", *NO_IMPROVEMENT, "--extra_epochs", "1")
    assert rows(tmp_path / "run")[-1]["step"] == "7"  # three more validations without improvement


def test_best_and_the_given_number_of_newest_checkpoints_are_kept(tmp_path):
    run(tmp_path / "run", *NO_IMPROVEMENT[:2], *NO_IMPROVEMENT[4:], *EVERY_STEP[:2], "--checkpoints_total_limit", "2")
    folder = tmp_path / "run/checkpoints"
    assert sorted(f.name for f in folder.glob("step-*")) == ["step-00000001", "step-00000005", "step-00000006"]
    assert (folder / "best").resolve().name == "step-00000001"
    assert (folder / "latest").resolve().name == "step-00000006"
    for name in ("best", "latest"):
        checkpoint.verify(folder / name)


def test_without_validation_there_is_still_a_best_checkpoint(tmp_path):
    assert run(tmp_path / "run", "--signal_at", "validation") == 75
    assert (tmp_path / "run/checkpoints/best").is_dir()
    assert (tmp_path / "run/checkpoints/latest").is_dir()


def test_resuming_from_an_older_checkpoint(tmp_path):
    """Checkpoints of later steps are outdated: they are not resumed from, nor kept instead of the new ones."""
    folder = tmp_path / "run"
    run(folder, *EVERY_STEP)
    old = str(folder / "checkpoints/step-00000002")
    once = ("--checkpoints_total_limit", "1", "--checkpointing_steps", "1", "--validation_epochs", "0")
    shutil.rmtree(folder / "pipeline")
    assert run(folder, *once, "--resume_from_checkpoint", old, "--max_train_steps", "4", "--learning_rate", "1e-2") == 0
    assert (folder / "checkpoints/latest").resolve().name == "step-00000004"
    changed = tensors(folder)
    assert [row["step"] for row in rows(folder)] == ["1", "2", "3", "4"]
    assert run(folder, *once, "--max_train_steps", "5", "--learning_rate", "1e-2") == 0
    assert rows(folder)[-1]["step"] == "5"
    assert "resumed from step-00000004" in (folder / "run.log").read_text()
    assert changed.keys() == tensors(folder).keys()


def test_a_process_killed_before_it_linked_best(tmp_path):
    folder = tmp_path / "run"
    run(folder, *EVERY_STEP, "--validation_steps", "1")
    best = state_of(folder)["best_step"]
    assert best == 6
    checkpoint.link(folder / "checkpoints", "best", folder / "checkpoints/step-00000003")
    shutil.rmtree(folder / "pipeline")
    run(folder, *EVERY_STEP, "--validation_steps", "1")
    assert (folder / "checkpoints/best").resolve().name == "step-00000006"


def test_extra_epochs_killed_before_the_export_are_not_trained_again(tmp_path):
    run(tmp_path / "run")
    run(tmp_path / "run", "--extra_epochs", "1")
    shutil.rmtree(tmp_path / "run/pipeline")  # as if killed after the last checkpoint and before the export
    run(tmp_path / "run", "--extra_epochs", "1")
    assert rows(tmp_path / "run")[-1]["step"] == "12"
    assert (tmp_path / "run/pipeline/model_index.json").is_file()


def test_a_full_disk_costs_a_checkpoint_but_does_not_end_the_run(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    folder = tmp_path / "run"
    run(folder, "--max_train_steps", "2")
    whole = tensors(folder)
    largest = max(f.stat().st_size for f in (folder / "checkpoints/latest").rglob("*"))
    others = max(f.stat().st_size for f in folder.rglob("*") if f.is_file() and "checkpoints" not in f.parts)
    if others >= largest:
        pytest.skip("no limit on the file size affects checkpoints only")
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, limits[1]))
    try:
        with pytest.raises((OSError, UserError)):  # the checkpoint of the last step must not fail
            run(folder, "--max_train_steps", "4", *EVERY_STEP)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log = (folder / "run.log").read_text()
    assert "checkpoint of step 3 could not be written" in log
    assert "checkpoint of step 4 could not be written" in log
    assert_equal(tensors(folder), whole)
    assert run(folder, "--max_train_steps", "4", *EVERY_STEP) == 0


def test_checkpoints_that_cannot_fit_are_refused_before_training(tmp_path):
    with pytest.raises(UserError, match="GiB free.*checkpoints_total_limit"):
        run(tmp_path / "run", "--checkpoints_total_limit", "100000000")
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


@pytest.mark.parametrize("place", ["file", "file/inside", "/proc/halftone"])
def test_a_folder_that_cannot_be_written_is_refused(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"cannot be written .* --output_dir"):
        run(tmp_path / place)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("flags", [(), ("--overwrite", "true")])
def test_a_folder_in_use_is_left_to_its_process(tmp_path, flags):
    run(tmp_path / "run", "--max_train_steps", "1")
    busy = RunFolder(tmp_path / "run")
    busy.create()
    try:
        with pytest.raises(UserError, match="another process is training"):
            run(tmp_path / "run", *flags)
        assert [p.name for p in tmp_path.iterdir()] == ["run"]
    finally:
        busy.release()
    assert run(tmp_path / "run", "--max_train_steps", "2") == 0


def test_overwrite_sets_the_old_run_aside(tmp_path):
    run(tmp_path / "run", "--max_train_steps", "2")
    run(tmp_path / "run", "--max_train_steps", "1", "--overwrite", "true", "--seed", "1")
    (aside,) = [p for p in tmp_path.iterdir() if p.name.startswith("run.old-")]
    assert rows(aside)[-1]["step"] == "2"
    assert rows(tmp_path / "run")[-1]["step"] == "1"


@pytest.mark.parametrize("flags", [(), ("--overwrite", "true")])
def test_a_folder_with_other_contents_is_refused(tmp_path, flags):
    (tmp_path / "thesis.tex").write_text("x")
    (tmp_path / "config.yaml").write_text("theme: dark\n")
    with pytest.raises(UserError, match="does not contain a run.*choose (a new folder|another --output_dir)"):
        run(tmp_path, *flags)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "thesis.tex"]


@pytest.mark.parametrize("place", [".", "..", "../..", "home", "above home"])
def test_overwrite_never_renames_the_current_or_the_home_folder(tmp_path, monkeypatch, place):
    """Not even if it contains a run, as after `--output_dir .`."""
    home, here = tmp_path / "users/me", tmp_path / "projects/mine/here"
    for folder in (home, here):
        folder.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    output_dir = {"home": "~", "above home": str(home.parent)}.get(place, place)
    target = RunFolder(output_dir)
    target.create()
    target.save_config({"output_dir": output_dir, "seed": 0})
    target.release()
    message = "which is or contains (the current|your home) folder; choose another --output_dir"
    with pytest.raises(UserError, match=message):
        run(Path(output_dir), "--overwrite", "true")
    assert here.is_dir()
    assert home.is_dir()
    assert not list(tmp_path.rglob("*.old-*"))


def test_a_home_folder_in_the_output_dir_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert run(Path("~/runs/a"), "--max_train_steps", "1") == 0
    assert (tmp_path / "runs/a/config.yaml").is_file()
    assert not (tmp_path / "~").exists()


def test_a_run_in_the_current_folder_has_its_name(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert RunFolder(".").name == "mine"
    assert run(Path(), "--max_train_steps", "1") == 0
    assert run(Path(), "--max_train_steps", "2") == 0
    assert (tmp_path / "mine/sessions.md").read_text().startswith("# mine\n")


def test_overwrite_of_a_session_that_was_killed_at_its_start(tmp_path):
    """It has no config yet, but the folders that every run has."""
    folder = RunFolder(tmp_path / "run")
    folder.create()
    folder.release()
    assert run(tmp_path / "run", "--overwrite", "true", "--max_train_steps", "1") == 0
    assert len(list(tmp_path.glob("run.old-*"))) == 1


def test_overwrite_of_a_missing_or_empty_folder(tmp_path):
    assert run(tmp_path / "new", "--overwrite", "true", "--max_train_steps", "1") == 0
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "empty", "--overwrite", "true", "--max_train_steps", "1") == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "new"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--seed", "1"), r"--seed: 0 → 1.*--overwrite"),
        (("--dropout", "0.2"), r"--dropout: 0.1 → 0.2"),
        (("--train_batch_size", "8"), r"global batch size of 8, which is now 16"),
        (("--num_samples", "40"), r"started on 48 images and the data set now has 40"),
        (("--resume_from_checkpoint", "none"), r"add --overwrite"),
        (("--resume_from_checkpoint", "nowhere"), r"nowhere does not exist"),
    ],
)
def test_changes_that_a_run_cannot_resume_with(tmp_path, flags, message):
    run(tmp_path / "run", "--max_train_steps", "1")
    before = snapshot(tmp_path / "run/checkpoints") | snapshot(tmp_path / "run/pipeline")
    with pytest.raises(UserError, match=message):
        run(tmp_path / "run", "--max_train_steps", "2", *flags)
    assert snapshot(tmp_path / "run/checkpoints") | snapshot(tmp_path / "run/pipeline") == before


def test_allowed_changes_are_listed_in_one_warning(tmp_path):
    run(tmp_path / "run", "--max_train_steps", "1")
    changed = ("--learning_rate", "5e-4", "--weight_decay", "0.1")
    run(tmp_path / "run", "--max_train_steps", "2", *changed, "--checkpoints_total_limit", "9")
    (line,) = [s for s in (tmp_path / "run/run.log").read_text().splitlines() if "resuming with changed settings" in s]
    assert line.endswith("--learning_rate: 0.0001 → 0.0005; --weight_decay: 0.01 → 0.1")
    run(tmp_path / "run", "--max_train_steps", "3", *changed)  # no longer a change: they were saved with the run
    assert (tmp_path / "run/run.log").read_text().count("resuming with changed settings") == 1


def test_the_same_global_batch_may_be_split_differently(tmp_path):
    run(tmp_path / "run", "--max_train_steps", "1")
    assert run(tmp_path / "run", "--train_batch_size", "8", "--gradient_accumulation_steps", "1") == 0


def test_a_complete_run_says_how_to_extend_it_and_changes_nothing(tmp_path, capsys):
    run(tmp_path / "run")
    before = {k: v for k, v in snapshot(tmp_path / "run").items() if not k.endswith(("run.log", ".lock"))}
    assert run(tmp_path / "run") == 0
    message = capsys.readouterr().out.splitlines()[-1]
    assert "is complete: 6 steps, 48 images" in message
    assert "--extra_epochs N" in message
    assert {k: v for k, v in snapshot(tmp_path / "run").items() if not k.endswith(("run.log", ".lock"))} == before
